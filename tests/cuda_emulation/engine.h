// Runs CUDA kernels on the CPU: the threads of a block are fibers on one core, blocks run one after the other. What
// cuda_runtime.h beside it is written on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#pragma GCC visibility push(hidden)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulation {

using Where = std::source_location;

// What a thread hands to its warp in a shuffle or vote.
constexpr size_t kLaneBytes = 64;
struct alignas(16) Lane {
  unsigned char bytes[kLaneBytes];
};

struct SharedVariable {
  const char* name;
  size_t bytes, alignment;
  void* address = nullptr;
  uint64_t block = 0;  // the block that the address belongs to
};

// The variable's place in the block that runs; new in each block, and filled with NaN.
void* place(SharedVariable& variable);
void* dynamic_shared(Where where);

unsigned lane();
// __syncthreads: how many threads came with a predicate.
int barrier(int predicate, Where where);
// Waits for the lanes of `mask`; what each brought. Valid until the thread's next call.
const Lane* meet(unsigned mask, const char* operation, const void* value, size_t bytes, Where where);
// An atomic access, told to the checker.
void note_atomic(const void* address, size_t bytes);

// The global memory that the kernels of one operation may touch.
void begin_operation();
void add_range(const void* begin, size_t bytes, bool writable);

// Whether kernels are to count in 64 bits whatever the size (CUDA_EMULATION_WIDE=1).
bool wide_indices();

// Ends the launch; what called it gets the message as an exception.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void run(void (*thread)(void*), void* arguments, dim3 grid, dim3 block, size_t shared_bytes, const char* name);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Arguments&&... arguments) {
  auto call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  run([](void* bound) { (*static_cast<decltype(call)*>(bound))(); }, &call, grid, block, shared_bytes, name);
}

}  // namespace emulation

#pragma GCC visibility pop
