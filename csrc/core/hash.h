// Hashes that are the same on every machine.
#pragma once

#include <cstdint>
#include <string>

namespace mimo_ext::core {

/// FNV-1a by 64-bit words instead of bytes: row counts of thousands of samples are hashed for every microbatch.
class Fnv {
 public:
  void add(std::int64_t value) {
    hash_ = (hash_ ^ static_cast<std::uint64_t>(value)) * 0x100000001b3ULL;
    hash_ ^= hash_ >> 32;  // or what is in the high bits would never reach the low ones
  }
  void add(const std::string& text) {
    add(static_cast<std::int64_t>(text.size()));
    for (const char letter : text) add(static_cast<std::int64_t>(letter));
  }
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325ULL;
};

}  // namespace mimo_ext::core
