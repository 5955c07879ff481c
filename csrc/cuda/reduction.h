// Sums over a whole launch: every block leaves the sum of its share in double, and one block adds those up. The trees
// depend on the shape alone.
#pragma once

#include <algorithm>

#include "cuda/cu.h"

namespace manual_ops {

// Blocks among which a sum is cut at most: some waves on the largest devices, quickly added up by one block.
constexpr int64_t kMostShares = 4096;

// The sum of what `count` blocks left, for every thread of this one.
CU_DEVICE double sum_of_shares(const double* shares, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += shares[i];
  return block_sum(sum);
}

}  // namespace manual_ops
