// Scratch memory of a kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#include "huge_pages.h"

namespace manual_ops {

// Uninitialised memory on a cache line, or on huge pages, of its own.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(std::max<int64_t>(1, count) * static_cast<int64_t>(sizeof(A))),
        data_(static_cast<A*>(::operator new(bytes_, alignment()))) {
    advise_huge_pages(data_, bytes_);
  }
  ~Scratch() { ::operator delete(data_, alignment()); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data() const { return data_; }

 private:
  std::align_val_t alignment() const { return std::align_val_t(bytes_ < kHugePage ? 64 : kHugePage); }

  int64_t bytes_;
  A* data_;
};

}  // namespace manual_ops
