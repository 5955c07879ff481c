// When to write around the caches.
#pragma once

#include <cstdint>

namespace manual_ops {

// Whether a tensor of `bytes` from `to` on has left the caches before it is read again, and can be written around them
// (past_caches.h) in runs of `run` bytes: whole cache lines each.
inline bool write_past_caches(const void* to, int64_t bytes, int64_t run) {
  constexpr int64_t kCachedBytes = 16 * 1024 * 1024, kLine = 64;
  return bytes >= kCachedBytes && run % kLine == 0 && reinterpret_cast<uintptr_t>(to) % kLine == 0;
}

}  // namespace manual_ops
