// Memory for a call: kept by the thread between calls, carved into arrays.
#pragma once
#include <cstdlib>

#include "layout.h"

namespace {

// Memory of a thread, kept between calls and freed with it.
class Scratch {
 public:
  ~Scratch() { free(bytes_); }
  // Room for `count` bytes on a cache line, or null.
  uint8_t* get(int64_t count) {
    if (count > size_) {
      free(bytes_);
      size_ = round_up(count, 4096);
      bytes_ = static_cast<uint8_t*>(aligned_alloc(64, size_));
      if (bytes_ == nullptr) size_ = 0;
    }
    return bytes_;
  }

 private:
  uint8_t* bytes_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch shared_scratch;  // of the calling thread, read by its team
thread_local Scratch own_scratch;

// Carves arrays out of scratch, each on a cache line.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t n) {
    T* out = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return out;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

// `use(carver)` takes its arrays twice: once to count, once from the scratch. False without memory.
template <class Use>
bool carve(Scratch& scratch, Use use) {
  Carver sizes(nullptr);
  use(sizes);
  uint8_t* base = scratch.get(sizes.used());
  if (base == nullptr) return false;
  Carver carver(base);
  use(carver);
  return true;
}

}  // namespace
