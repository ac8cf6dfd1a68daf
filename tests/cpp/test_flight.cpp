#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "comm/flight.h"

namespace mimo_ext::comm {
namespace {

using In = FlightCaller::In;

TEST(FlightRecorder, AnOperationIsFollowedFromPostingToItsEnd) {
  const auto recorder = std::make_unique<FlightRecorder>();
  EXPECT_TRUE(recorder->entries().empty());
  const auto id = recorder->record(false, true, 7, 0, 100);
  EXPECT_EQ(id, 1U);
  recorder->update(id, FlightPhase::kHeader, 0, 110);
  recorder->set_bytes(id, 4096);
  FlightEntry entry = recorder->entries().at(0);
  EXPECT_FALSE(entry.is_send);
  EXPECT_TRUE(entry.is_forward);
  EXPECT_EQ(entry.microbatch, 7);
  EXPECT_EQ(entry.bytes, 4096);
  EXPECT_EQ(entry.posted, 100);
  EXPECT_EQ(entry.since, 110);
  EXPECT_EQ(entry.peer, 0);
  EXPECT_EQ(std::string(text_of(entry.phase)), "header from");
  EXPECT_EQ(entry.outcome, FlightOutcome::kRunning);

  recorder->update(id, FlightPhase::kPayload, 123456, 120);
  EXPECT_EQ(recorder->entries().at(0).peer, 123456);
  recorder->retire(id, false, 130);
  entry = recorder->entries().at(0);
  EXPECT_EQ(entry.outcome, FlightOutcome::kDone);
  EXPECT_EQ(entry.since, 130);
  EXPECT_EQ(entry.peer, -1);
  EXPECT_EQ(text_of(entry.phase), nullptr);
  EXPECT_TRUE(entry.is_forward);
}

TEST(FlightRecorder, WhatAFailedOperationWaitedForIsKept) {
  const auto recorder = std::make_unique<FlightRecorder>();
  const auto id = recorder->record(true, false, 3, 64, 1);
  recorder->update(id, FlightPhase::kMessage, 5, 2);
  recorder->retire(id, true, 9);
  const FlightEntry entry = recorder->entries().at(0);
  EXPECT_TRUE(entry.is_send);
  EXPECT_FALSE(entry.is_forward);
  EXPECT_EQ(entry.outcome, FlightOutcome::kFailed);
  EXPECT_EQ(entry.phase, FlightPhase::kMessage);
  EXPECT_EQ(entry.peer, 5);
  EXPECT_EQ(entry.since, 9);
}

TEST(FlightRecorder, TheLastOperationsAreKept) {
  const auto recorder = std::make_unique<FlightRecorder>();
  constexpr auto kCount = static_cast<std::int64_t>(FlightRecorder::kCapacity) * 2 + 5;
  for (std::int64_t index = 0; index < kCount; ++index) recorder->record(index % 2 == 0, true, index, 0, index);
  const auto entries = recorder->entries();
  ASSERT_EQ(entries.size(), FlightRecorder::kCapacity);
  EXPECT_EQ(entries.front().microbatch, kCount - static_cast<std::int64_t>(FlightRecorder::kCapacity));
  EXPECT_EQ(entries.back().microbatch, kCount - 1);
  for (std::size_t index = 1; index < entries.size(); ++index) EXPECT_EQ(entries[index].id, entries[index - 1].id + 1);
}

TEST(FlightRecorder, AnOvertakenOperationDoesNotWriteIntoItsSuccessor) {
  const auto recorder = std::make_unique<FlightRecorder>();
  const auto old = recorder->record(false, true, 0, 0, 0);
  for (std::size_t index = 0; index < FlightRecorder::kCapacity; ++index) recorder->record(true, false, 1, 8, 1);
  recorder->update(old, FlightPhase::kPayload, 4, 99);
  recorder->set_bytes(old, 77);
  recorder->retire(old, true, 100);
  for (const FlightEntry& entry : recorder->entries()) {
    EXPECT_EQ(entry.outcome, FlightOutcome::kRunning);
    EXPECT_EQ(entry.phase, FlightPhase::kPosted);
    EXPECT_EQ(entry.bytes, 8);
    EXPECT_EQ(entry.since, 1);
  }
}

TEST(FlightRecorder, TheCallerIsBlockedForAsLongAsItSays) {
  const auto recorder = std::make_unique<FlightRecorder>();
  EXPECT_EQ(recorder->caller().in, In::kNothing);
  {
    const FlightRecorder::Blocked blocked(*recorder, In::kReceive, false, (std::int64_t{1} << 40) + 3, 55);
    const FlightCaller caller = recorder->caller();
    EXPECT_EQ(caller.in, In::kReceive);
    EXPECT_FALSE(caller.is_forward);
    EXPECT_EQ(caller.microbatch, (std::int64_t{1} << 40) + 3);
    EXPECT_EQ(caller.since, 55);
  }
  EXPECT_EQ(recorder->caller().in, In::kNothing);
}

TEST(FlightRecorder, IsReadWhileOthersWrite) {
  const auto recorder = std::make_unique<FlightRecorder>();
  constexpr std::int64_t kOperations = 20000;
  std::atomic<std::uint64_t> recorded{0};
  std::atomic<bool> over{false};
  std::atomic<bool> looked{false};  // the writers do not end before somebody has read beside them
  std::thread caller([&] {
    for (std::int64_t index = 1; index <= kOperations || !looked; ++index) {
      // Every field can be computed from the id.
      recorded = recorder->record(index % 2 == 0, index % 3 == 0, 10 * index, 100 * index, 1000 * index);
    }
    over = true;
  });
  std::thread worker([&] {
    while (!over) {
      const std::uint64_t id = recorded;
      if (id == 0) continue;
      const auto index = static_cast<std::int64_t>(id);
      recorder->update(id, FlightPhase::kPayload, static_cast<int>(index), 1000 * index);
      recorder->retire(id, false, 1000 * index);
    }
  });
  std::uint64_t read = 0;
  while (!over) {
    std::uint64_t before = 0;
    for (const FlightEntry& entry : recorder->entries()) {
      const auto index = static_cast<std::int64_t>(entry.id);
      ASSERT_GT(entry.id, before);
      before = entry.id;
      ASSERT_EQ(entry.microbatch, 10 * index);
      ASSERT_EQ(entry.bytes, 100 * index);
      ASSERT_EQ(entry.posted, 1000 * index);
      ++read;
    }
    looked = read > 0;
  }
  caller.join();
  worker.join();
  EXPECT_GT(read, 0U);
  EXPECT_EQ(recorder->entries().back().id, recorded);
}

}  // namespace
}  // namespace mimo_ext::comm
