// Stands in for <cuda_runtime.h> when g++ compiles the CUDA sources for the emulator.
#pragma once

#include <math.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "engine.h"

#define CU_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ use_CU_SHARED_in_place_of___shared__
// The stand-ins' own copies are not accesses of the kernel.
#define NOT_WATCHED __attribute__((no_sanitize("thread")))

using cudaStream_t = void*;

#define VECTORS(type, name)                                               \
  struct alignas(2 * sizeof(type)) name##2 {                              \
    type x, y;                                                            \
  };                                                                      \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { \
    type x, y, z, w;                                                      \
  };                                                                      \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }        \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }

using std::isfinite;
using std::isinf;
using std::isnan;

// ---- arithmetic

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
template <class A, class B>
constexpr auto min(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(b) < Common(a) ? Common(b) : Common(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using Common = std::common_type_t<A, B>;
  return Common(a) < Common(b) ? Common(b) : Common(a);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}

// ---- barriers

#define WHERE emulation::Where where = emulation::Where::current()

inline void __syncthreads(WHERE) { emulation::barrier(0, where); }
inline int __syncthreads_count(int predicate, WHERE) { return emulation::barrier(predicate != 0, where); }
inline int __syncthreads_or(int predicate, WHERE) { return emulation::barrier(predicate != 0, where) != 0; }
inline int __syncthreads_and(int predicate, WHERE) { return emulation::barrier(predicate == 0, where) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, WHERE) { emulation::meet(mask, "__syncwarp", nullptr, 0, where); }

// ---- warps

template <class T, class Source>
NOT_WATCHED T emulated_shuffle(const char* operation, unsigned mask, T value, int width, Source source,
                               emulation::Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= emulation::kLaneBytes);
  const int lane = static_cast<int>(emulation::lane()), segment = lane & ~(width - 1);
  const int asked = source(lane - segment);
  const int from = asked < 0 || asked >= width ? lane : segment + asked;  // outside the segment: its own value
  const emulation::Lane* lanes = emulation::meet(mask, operation, &value, sizeof(T), where);
  if (!(mask >> from & 1))
    emulation::fail("%s:%u: %s reads lane %d, which the mask 0x%08x does not name", where.file_name(), where.line(),
                    operation, from, mask);
  T result;
  std::memcpy(&result, lanes[from].bytes, sizeof(T));
  return result;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, WHERE) {
  return emulated_shuffle(
      "__shfl_sync", mask, value, width, [=](int) { return from & (width - 1); }, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, WHERE) {
  return emulated_shuffle(
      "__shfl_xor_sync", mask, value, width, [=](int lane) { return lane ^ bits; }, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, int width = 32, WHERE) {
  return emulated_shuffle(
      "__shfl_down_sync", mask, value, width, [=](int lane) { return lane + distance; }, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, int width = 32, WHERE) {
  return emulated_shuffle(
      "__shfl_up_sync", mask, value, width, [=](int lane) { return lane - distance; }, where);
}
NOT_WATCHED inline unsigned __ballot_sync(unsigned mask, int predicate, WHERE) {
  const int mine = predicate != 0;
  const emulation::Lane* lanes = emulation::meet(mask, "__ballot_sync", &mine, sizeof(mine), where);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    int theirs = 0;
    if (mask >> lane & 1) std::memcpy(&theirs, lanes[lane].bytes, sizeof(theirs));
    votes |= static_cast<unsigned>(theirs) << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, WHERE) { return __ballot_sync(mask, predicate, where) != 0; }
inline int __all_sync(unsigned mask, int predicate, WHERE) { return __ballot_sync(mask, predicate, where) == mask; }

// ---- atomics: one core runs all threads, so a plain read and write cannot be parted; the checker is told

template <class T, class Change>
NOT_WATCHED __attribute__((noinline)) T emulated_atomic(T* address, Change change) {
  emulation::note_atomic(address, sizeof(T));
  const T old = *address;
  *address = change(old);
  return old;
}
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulated_atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulated_atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulated_atomic(address, [=](T old) { return value < old ? value : old; });
}
