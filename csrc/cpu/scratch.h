// Scratch memory of a kernel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

namespace manual_ops {

// Uninitialised memory on a cache line of its own.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(::operator new (std::max<int64_t>(1, count) * sizeof(A), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete (data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* data() const { return data_; }

 private:
  A* data_;
};

}  // namespace manual_ops
