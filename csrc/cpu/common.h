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

}  // namespace manual_ops
