// Dense tensors: their memory is a stretch without gaps, so that an elementwise loop over it meets every element.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "tensor.h"

namespace manual_ops {

// Whether the elements fill their stretch of memory, each place once, so that a loop over it meets them all.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    if (tensor.size(dim) != 1) dims.emplace_back(tensor.stride(dim), tensor.size(dim));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Uninitialised and dense, in the operand's order of dimensions: the layout of an elementwise result.
inline Tensor new_like(const Tensor& tensor) {
  return tensor.is_contiguous() ? new_tensor(sizes_of(tensor), tensor.scalar_type(), tensor)
                                : in_huge_pages(torch::stable::empty_like(tensor));
}

// The tensor itself where its memory is in the order of `dense`, of the same shape, else a copy that is.
inline Tensor in_layout_of(const Tensor& tensor, const Tensor& dense) {
  bool same = true;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    same = same && (tensor.size(dim) == 1 || tensor.stride(dim) == dense.stride(dim));
  if (same) return tensor;
  Tensor copy = new_like(dense);
  torch::stable::copy_(copy, tensor);
  return copy;
}

// The tensor itself where it is dense, else a copy that is.
inline Tensor as_dense(const Tensor& tensor) {
  if (is_dense(tensor)) return tensor;
  Tensor copy = new_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace manual_ops
