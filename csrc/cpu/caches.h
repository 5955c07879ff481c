// When results go past the caches, and the end of that. How they do is in past_caches.h.
//
// A large result would fill the caches without staying in them until it is read; and a line that is written whole need
// not be fetched first.
#pragma once

#include <cstdint>

namespace manual_ops {

// Whether `count` results of an elementwise operation, a softmax or a loss go past the caches. A ReLU, of 1, 8, 13 and
// 103 MB of results: 0.6, 1.2, 1.4, 1.6 times as fast, whether or not what reads them comes next.
template <class T>
bool elementwise_goes_past_caches(int64_t count) {
  return count >= (int64_t{8} << 20) / static_cast<int64_t>(sizeof(T));
}

// Half of a 32 MB cache: so much is not there any more when it is read again.
constexpr int64_t kCachedBytes = 16 << 20;

// Whether the `bytes` of results from `to` on of a convolution, a pooling or a normalisation do, in runs of `run`
// bytes: whole cache lines each. A depthwise convolution became up to 1.6 times as fast from about 16 MB on,
// and slower with less, which was still in the cache when it was read.
inline bool goes_past_caches(const void* to, int64_t bytes, int64_t run) {
  constexpr int64_t kLine = 64;
  return bytes >= kCachedBytes && run % kLine == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
}

// Other threads see what this one stored past the caches.
inline void finish_stores_past_caches() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

}  // namespace manual_ops
