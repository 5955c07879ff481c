// The one header that kernels are written against: the same names under nvcc and under the emulator of
// tests/cuda_emulation, which compiles the same .cu files with g++ and runs them on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#ifndef CU_EMULATED
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "tensor.h"

#define CU_DEVICE __device__ __forceinline__

namespace manual_ops {

// 32-bit numbers of elements, and of the threads of a last block that find nothing to do, end here.
constexpr int64_t kIndexLimit = (int64_t{1} << 31) - (1 << 16);

#ifdef CU_EMULATED

// The emulated kernels take the place of the CPU's.
#define CU_KEY CPU

// A __shared__ variable: CU_SHARED(float, sums, [32]).
#define CU_SHARED(type, name, dims)                                                                     \
  using name##_type = type dims;                                                                        \
  static ::emulation::SharedVariable name##_variable{#name, sizeof(name##_type), alignof(name##_type)}; \
  name##_type& name = *static_cast<name##_type*>(::emulation::place(name##_variable))

// The dynamic shared memory that CU_LAUNCH asked for.
template <class T>
T* cu_dynamic_shared(::emulation::Where where = ::emulation::Where::current()) {
  return static_cast<T*>(::emulation::dynamic_shared(where));
}

#define CU_ASSERT(condition)                                                             \
  do {                                                                                   \
    if (!(condition)) ::emulation::fail("device-side assertion failed: %s", #condition); \
  } while (false)

// Makes the tensor's device current, and gives torch's stream there.
class CudaGuard {
 public:
  explicit CudaGuard(const Tensor&) { ::emulation::begin_operation(); }
  cudaStream_t stream() const { return nullptr; }
};

// A kernel's operands: a const tensor may not be written, and nothing outside may be touched.
template <class T>
const T* cu_input(const Tensor& tensor) {
  const T* values = data<T>(tensor);
  ::emulation::add_range(values, tensor.numel() * sizeof(T), false);
  return values;
}
template <class T>
T* cu_output(const Tensor& tensor) {
  T* values = mutable_data<T>(tensor);
  ::emulation::add_range(values, tensor.numel() * sizeof(T), true);
  return values;
}

#define CU_LAUNCH(guard, kernel, grid, block, shared_bytes, ...) \
  ::emulation::launch(#kernel, kernel, grid, block, shared_bytes, __VA_ARGS__)

// Elements from which on kernels count in 64 bits.
inline int64_t index_limit() { return ::emulation::wide_indices() ? 1 : kIndexLimit; }

#else

#define CU_KEY CUDA

#define CU_SHARED(type, name, dims) __shared__ type name dims

template <class T>
CU_DEVICE T* cu_dynamic_shared() {
  extern __shared__ __align__(16) unsigned char cu_dynamic_shared_bytes[];
  return reinterpret_cast<T*>(cu_dynamic_shared_bytes);
}

#define CU_ASSERT(condition)                                                       \
  do {                                                                             \
    if (!(condition)) __assert_fail(#condition, __FILE__, __LINE__, __FUNCTION__); \
  } while (false)

class CudaGuard {
 public:
  explicit CudaGuard(const Tensor& tensor) : device_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard device_;
  cudaStream_t stream_;
};

template <class T>
const T* cu_input(const Tensor& tensor) {
  return data<T>(tensor);
}
template <class T>
T* cu_output(const Tensor& tensor) {
  return mutable_data<T>(tensor);
}

template <class... Parameters, class... Arguments>
void cu_launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
               cudaStream_t stream, Arguments&&... arguments) {
  // More than 48 KiB, the kernel's static shared memory among them, must be asked for.
  if (shared_bytes > 16 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  // clang-format takes the launch for comparisons.
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "manual_ops: ", name, ": ", cudaGetErrorString(error));
}

// CU_LAUNCH(guard, (kernel<T>), grid, block, shared_bytes, arguments...)
#define CU_LAUNCH(guard, kernel, grid, block, shared_bytes, ...) \
  ::manual_ops::cu_launch(#kernel, kernel, grid, block, shared_bytes, (guard).stream(), __VA_ARGS__)

inline int64_t index_limit() { return kIndexLimit; }

#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks of `threads` threads for `items` items, a thread each.
inline unsigned blocks_for(int64_t items, int64_t threads) {
  return static_cast<unsigned>((items + threads - 1) / threads);
}

// The number of this thread in the grid of one axis.
template <class Index>
CU_DEVICE Index thread_index() {
  return static_cast<Index>(blockIdx.x) * static_cast<Index>(blockDim.x) + static_cast<Index>(threadIdx.x);
}

// Calls body(Index{}) with the integer type that counts `elements`: 64-bit arithmetic only where it is needed.
template <class Body>
void for_index_type(int64_t elements, Body&& body) {
  if (elements < index_limit()) return body(int32_t{});
  body(int64_t{});
}

// Division by a number that the whole launch shares: a multiplication and a shift in 32 bits.
template <class Index>
class Divider;

template <>
class Divider<int32_t> {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < static_cast<uint64_t>(divisor)) ++shift_;
    magic_ = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor)) / divisor + 1);
  }
  // `value` from 0 to 2^31 - 1.
  CU_DEVICE int32_t quotient(int32_t value) const {
    const uint32_t unsigned_value = static_cast<uint32_t>(value);
    return static_cast<int32_t>((__umulhi(unsigned_value, magic_) + unsigned_value) >> shift_);
  }
  CU_DEVICE int32_t divisor() const { return static_cast<int32_t>(divisor_); }

 private:
  uint32_t divisor_ = 1, magic_ = 1, shift_ = 0;
};

template <>
class Divider<int64_t> {
 public:
  Divider() = default;
  explicit Divider(int64_t divisor) : divisor_(divisor) {}
  CU_DEVICE int64_t quotient(int64_t value) const { return value / divisor_; }
  CU_DEVICE int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_ = 1;
};

// N neighbouring values, read and written in one access of up to 16 bytes. The pointer must be aligned to all of them.
template <class T, int N>
struct Pack {
  T at[N];
};

template <int bytes>
struct PackWord;
template <>
struct PackWord<1> {
  using type = unsigned char;
};
template <>
struct PackWord<2> {
  using type = unsigned short;
};
template <>
struct PackWord<4> {
  using type = unsigned;
};
template <>
struct PackWord<8> {
  using type = uint2;
};
template <>
struct PackWord<16> {
  using type = uint4;
};

template <int N, class T>
CU_DEVICE Pack<T, N> load(const T* from) {
  using Word = typename PackWord<static_cast<int>(sizeof(T)) * N>::type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Pack<T, N> pack;
  memcpy(&pack, &word, sizeof(word));
  return pack;
}
template <int N, class T>
CU_DEVICE void store(T* to, const Pack<T, N>& pack) {
  using Word = typename PackWord<static_cast<int>(sizeof(T)) * N>::type;
  Word word;
  memcpy(&word, &pack, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

// Values that one access can hold, for pointers that are all aligned to it.
template <class T>
constexpr int kWidest = 16 / static_cast<int>(sizeof(T));

template <class... Pointers>
bool all_aligned(size_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % bytes == 0) && ...);
}

// Reductions. The tree is fixed: the bits do not depend on the run. `combine` must be commutative.
template <class T, class Combine>
CU_DEVICE T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  return value;
}

// Every thread of a block of whole warps gets the result, at most 32 of them. `neutral` changes nothing.
template <class T, class Combine>
CU_DEVICE T block_reduce(T value, T neutral, Combine combine) {
  CU_SHARED(T, of_warps, [kWarp]);
  value = warp_reduce(value, combine);
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  __syncthreads();  // the values of an earlier call have been read
  if (lane == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? of_warps[lane] : neutral, combine);
}

template <class T>
CU_DEVICE T block_sum(T value) {
  return block_reduce(value, T(0), [](T a, T b) { return a + b; });
}

}  // namespace manual_ops
