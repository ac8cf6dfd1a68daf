#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "comm/header.h"
#include "core/limits.h"

namespace mimo_ext::comm {
namespace {

Header sample() {
  Header header;
  header.sequence = 7;
  header.forward_sequence = 9;
  header.config_hash = 0xfedcba9876543210ULL;
  header.no_gradient = true;
  header.expects_backward = false;
  header.dtype = 15;
  header.shape = {0, 96, 1};
  header.samples = 12;
  header.rows = {3, 0, 5};
  header.num_rows = 3;
  return header;
}

TEST(Header, RoundTrip) {
  const Header header = Header::decode(sample().encode());
  EXPECT_EQ(header.sequence, 7);
  EXPECT_EQ(header.forward_sequence, 9);
  EXPECT_EQ(header.config_hash, 0xfedcba9876543210ULL);
  EXPECT_TRUE(header.no_gradient);
  EXPECT_FALSE(header.expects_backward);
  EXPECT_EQ(header.dtype, 15);
  EXPECT_EQ(header.shape, (std::array<std::int64_t, 3>{0, 96, 1}));
  EXPECT_EQ(header.samples, 12);
  EXPECT_EQ(header.rows, (std::vector<std::int64_t>{3, 0, 5}));
  EXPECT_FALSE(header.has_extension());
}

TEST(Header, WhatFollowsIsAnnounced) {
  Header header = sample();
  header.payload_bytes = 4095;
  EXPECT_EQ(Header::decode(header.encode()).payload_bytes, 4095);
  header.payload_bytes = 0;
  header.eager_bytes = Header::kMaxEagerBytes;
  EXPECT_EQ(Header::decode(header.encode()).eager_bytes, Header::kMaxEagerBytes);
  header.eager_bytes += 1;
  EXPECT_THROW(Header::decode(header.encode()), std::invalid_argument);
}

TEST(Header, ManyRowCountsTravelInASecondMessage) {
  Header header = sample();
  header.samples = 200;
  header.rows.assign(100, 2);
  header.num_rows = 100;
  Header received = Header::decode(header.encode());
  EXPECT_TRUE(received.has_extension());
  EXPECT_TRUE(received.rows.empty());
  received.set_extension(header.rows);
  EXPECT_EQ(received.rows, header.rows);
  EXPECT_THROW(received.set_extension({1, 2}), std::invalid_argument);
  EXPECT_THROW(received.set_extension(std::vector<std::int64_t>(100, -1)), std::invalid_argument);
}

/// What a peer sends is not to be trusted: every word with every awkward value is either refused or in range.
TEST(Header, MalformedWordsAreRefused) {
  constexpr std::int64_t kAwkward[] = {-1,
                                       3,
                                       128,
                                       std::int64_t{1} << 40,
                                       std::numeric_limits<std::int64_t>::max(),
                                       std::numeric_limits<std::int64_t>::min()};
  int refused = 0;
  for (std::size_t word = 0; word < Header::kWords; ++word) {
    for (std::int64_t value : kAwkward) {
      Header::Words words = sample().encode();
      words[word] = value;
      try {
        const Header header = Header::decode(words);
        EXPECT_GE(header.samples, 0);
        EXPECT_LE(header.num_rows, header.samples);
        for (std::int64_t rows : header.rows) EXPECT_GE(rows, 0);
        for (std::int64_t extent : header.shape) EXPECT_GE(extent, 0);
        EXPECT_GE(header.payload_bytes, 0);
        EXPECT_LE(header.payload_bytes, Header::kMaxPayloadBytes);
        EXPECT_GE(header.eager_bytes, 0);
        EXPECT_LE(header.eager_bytes, Header::kMaxEagerBytes);
      } catch (const std::invalid_argument& error) {
        EXPECT_EQ(std::string(error.what()).find("malformed header: "), 0U);
        ++refused;
      }
    }
  }
  EXPECT_GT(refused, 40);
}

TEST(Header, RowsThatOverflowAreRefused) {
  Header header = sample();
  header.rows.clear();
  header.num_rows = 0;
  header.samples = core::kMaxSamples;
  header.rows_per_sample = std::int64_t{1} << 40;  // each is in range, their product is not
  EXPECT_THROW(Header::decode(header.encode()), std::invalid_argument);
  header.rows_per_sample = 1;
  EXPECT_EQ(Header::decode(header.encode()).samples, core::kMaxSamples);
}

/// A rank that gives up says why in the place of the row counts.
TEST(Header, TheReasonOfARankThatGaveUpTravels) {
  Header header = sample();
  EXPECT_TRUE(Header::decode(header.encode()).gave_up.empty());
  header.gave_up = "ValueError: expected dtype Float, got Double";
  EXPECT_EQ(Header::decode(header.encode()).gave_up, header.gave_up);
  // Cut to what fits, and shown in characters that any log can show.
  header.gave_up = std::string(Header::kTextBytes, 'a') + "lost";
  EXPECT_EQ(Header::decode(header.encode()).gave_up, std::string(Header::kTextBytes, 'a'));
  header.gave_up = "caf\xc3\xa9\n\x1b[31m";
  EXPECT_EQ(Header::decode(header.encode()).gave_up, "caf????[31m");
  Header::Words words = header.encode();
  std::fill(words.begin() + Header::kFixedWords, words.end(), 0);
  EXPECT_EQ(Header::decode(words).gave_up, "no reason was given");
  // Nothing else of such a header counts, so that nothing else of it can be wrong.
  words[5] = words[12] = -1;
  EXPECT_EQ(Header::decode(words).num_rows, 0);
}

TEST(Header, OtherVersionsAreNamed) {
  Header::Words words = sample().encode();
  words[1] += 1;
  try {
    Header::decode(words);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("format version 5, expected 4"), std::string::npos);
  }
}

}  // namespace
}  // namespace mimo_ext::comm
