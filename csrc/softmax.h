// What softmax's kernels share on the CPU and on CUDA: the tensor as slices.
#pragma once

#include "tensor.h"

namespace manual_ops {

// A contiguous tensor as (outer, classes, inner): slices are rows where inner is 1, else neighbours in blocks.
struct Slices {
  int64_t outer = 1, classes, inner = 1;

  Slices(const Tensor& tensor, int64_t dim) {
    STD_TORCH_CHECK(0 <= dim && dim < tensor.dim(), "softmax: dim ", dim, " of ", tensor.dim(), " dimensions");
    classes = tensor.size(dim);
    for (int64_t other = 0; other < tensor.dim(); ++other)
      if (other != dim) (other < dim ? outer : inner) *= tensor.size(other);
  }
};

}  // namespace manual_ops
