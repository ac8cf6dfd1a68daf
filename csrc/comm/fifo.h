// A queue that keeps its memory: std::deque allocates and frees a block every few entries.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace mimo_ext::comm {

/// Not thread-safe. Grows to the largest number of entries that it ever held.
template <typename T>
class Fifo {
 public:
  bool empty() const { return size_ == 0; }
  std::size_t size() const { return size_; }
  T& front() { return ring_[head_]; }
  const T& front() const { return ring_[head_]; }

  void push_back(T value) {
    if (size_ == ring_.size()) grow();
    ring_[(head_ + size_) % ring_.size()] = std::move(value);
    ++size_;
  }
  void push_front(T value) {
    if (size_ == ring_.size()) grow();
    head_ = (head_ + ring_.size() - 1) % ring_.size();
    ring_[head_] = std::move(value);
    ++size_;
  }
  void pop_front() {
    ring_[head_] = T{};
    head_ = (head_ + 1) % ring_.size();
    --size_;
  }

 private:
  void grow() {
    std::vector<T> larger(ring_.empty() ? 8 : 2 * ring_.size());
    for (std::size_t index = 0; index < size_; ++index) {
      larger[index] = std::move(ring_[(head_ + index) % ring_.size()]);
    }
    ring_ = std::move(larger);
    head_ = 0;
  }

  std::vector<T> ring_;
  std::size_t head_ = 0;
  std::size_t size_ = 0;
};

}  // namespace mimo_ext::comm
