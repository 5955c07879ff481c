// What pooling checks of its operands and computes of its options, on the CPU and on CUDA.
#pragma once

#include <algorithm>

#include "tensor.h"

namespace manual_ops {

inline Sizes spatial(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 3 && tensor.dim() <= 5, "pooling: a batched tensor of 1 to 3 axes is needed");
  return Sizes(tensor.sizes().begin() + 2, tensor.sizes().end());
}

inline Sizes with_spatial(const Tensor& like, const Sizes& axes) {
  Sizes sizes{like.size(0), like.size(1)};
  sizes.insert(sizes.end(), axes.begin(), axes.end());
  return sizes;
}

// An empty kernel_size stands for adaptive windows.
inline void check_windows(const Tensor& like, const Sizes& input_size, const Sizes& output_size,
                          const Sizes& kernel_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                          bool channels_last) {
  const size_t axes = like.dim() - 2, given = kernel_size.size();
  STD_TORCH_CHECK(input_size.size() == axes && output_size.size() == axes && (given == 0 || given == axes) &&
                      stride.size() == given && padding.size() == given && dilation.size() == given,
                  "pooling: one size and one option an axis are needed");
  STD_TORCH_CHECK(!channels_last || axes >= 2, "pooling: channels_last needs 2 or 3 axes");
  for (size_t axis = 0; axis < axes; ++axis) {
    STD_TORCH_CHECK(input_size[axis] >= 0 && output_size[axis] >= 0, "pooling: a size is negative");
    STD_TORCH_CHECK(given == 0 || (is_step(kernel_size[axis]) && is_step(stride[axis]) && is_step(padding[axis] + 1) &&
                                   is_step(dilation[axis])),
                    "pooling: a window option is out of range");
  }
}

// Taps of the largest adaptive window along an axis; a bound, exact where the sizes divide.
inline int64_t adaptive_taps(int64_t input, int64_t output) {
  const int64_t pieces = std::max<int64_t>(1, output);
  const int64_t largest = input % pieces == 0 ? input / pieces : (input + 2 * pieces - 2) / pieces;
  return std::max<int64_t>(1, largest);
}

// Winners are bytes where the largest window has at most 256 taps.
template <class Body>
void for_winner_dtype(ScalarType dtype, Body&& body) {
  if (dtype == ScalarType::Byte) return body(uint8_t{});
  STD_TORCH_CHECK(dtype == ScalarType::Int, "max pooling: winner must be uint8 or int32");
  body(int32_t{});
}

// `outputs` of all images; `taps` of the largest window, a double, which no product of three overflows.
inline void check_winner(const Tensor& winner, const Tensor& like, int64_t outputs, double taps) {
  const bool same_batch =
      winner.dim() == like.dim() && winner.size(0) == like.size(0) && winner.size(1) == like.size(1);
  STD_TORCH_CHECK(same_batch && winner.numel() == outputs, "max pooling: winner has the wrong shape");
  STD_TORCH_CHECK(taps <= 2147483647.0, "max pooling: a window may have 2^31 - 1 taps at most");
}

}  // namespace manual_ops
