// Numbers out of the bytes that the fuzzer makes up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

namespace mimo_ext::fuzz {

class Numbers {
 public:
  Numbers(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  bool empty() const { return size_ == 0; }
  /// Zeros where the bytes have run out.
  template <typename T>
  T raw() {
    T value{};
    const std::size_t count = size_ < sizeof(T) ? size_ : sizeof(T);
    std::memcpy(&value, data_, count);
    data_ += count;
    size_ -= count;
    return value;
  }
  std::int64_t byte() { return raw<std::uint8_t>(); }
  bool flag() { return byte() % 2 == 1; }
  /// 0..last, of one byte.
  std::int64_t below(std::int64_t end) { return byte() % end; }
  /// Mostly small, as most interesting sizes are; sometimes anything, or next to a power of two.
  std::int64_t any() {
    const std::int64_t kind = byte();
    if (kind < 224) return byte() % 33;
    if (kind < 232) return -byte();
    if (kind < 244) return (std::int64_t{1} << below(63)) + byte() % 5 - 2;
    return raw<std::int64_t>();
  }
  int any_int() { return static_cast<int>(any()); }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

/// Runs `code`; what it refuses must be refused by name. Whether it went through.
template <typename Code>
bool accepted(const Code& code) {
  try {
    code();
    return true;
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).size() < 10) std::terminate();
  } catch (const std::out_of_range& error) {
    if (std::string(error.what()).find("expected") == std::string::npos &&
        std::string(error.what()).find("pipeline stage") == std::string::npos) {
      std::terminate();  // of a container: nobody has checked
    }
  }
  return false;
}

/// As assert, in every build.
inline void require(bool holds) {
  if (!holds) __builtin_trap();
}

}  // namespace mimo_ext::fuzz
