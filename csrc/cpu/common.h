// What every CPU operation needs: tensors, and parallel loops. Kernels themselves hold no torch types; see each_isa.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "tensor.h"

namespace manual_ops {

// body(begin, end) over [0, count) on torch's threads. `work` is what one item costs in scalar operations: a parallel
// region costs about a microsecond, so a thread gets at least 32768 of them. Results may not depend on the split.
template <class Body>
void parallel_for(int64_t count, int64_t work, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

// Whether so many results go past the caches, which they would fill without staying. A ReLU, of 1, 8, 13 and 103 MB of
// results: 0.6, 1.2, 1.4, 1.6 times as fast, whether or not what reads them comes next.
template <class T>
bool is_streamed(int64_t count) {
  return count >= (int64_t{8} << 20) / static_cast<int64_t>(sizeof(T));
}

}  // namespace manual_ops
