// FNV-1a: hashes that are the same on every machine.
#pragma once

#include <cstdint>
#include <string>

namespace mimo_ext::core {

class Fnv {
 public:
  void add(std::int64_t value) {
    for (int byte = 0; byte < 8; ++byte) {
      hash_ = (hash_ ^ ((static_cast<std::uint64_t>(value) >> (8 * byte)) & 0xffU)) * 0x100000001b3ULL;
    }
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
