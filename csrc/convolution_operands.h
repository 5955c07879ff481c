// What the CPU and the CUDA convolutions ask of their operands, and the layout of their results.
#pragma once

#include <algorithm>
#include <optional>

#include "geometry.h"
#include "tensor.h"

namespace manual_ops {

// The three tensors of a convolution, of which one is the result, new and not filled; the others are read in place,
// or are copies. `channels_last`: the layout of input and output, and of the weight where `weight_last` says so.
struct Convolution {
  ConvGeometry geometry;
  bool channels_last, weight_last;
  Tensor input, weight, output;
  std::optional<Tensor> bias;
};

inline void copy_axes(const Sizes& from, int64_t (&to)[kAxes], int64_t skip = 0) {
  const int64_t axes = static_cast<int64_t>(from.size()) - skip;
  for (int64_t axis = 0; axis < axes; ++axis) to[kAxes - axes + axis] = from[skip + axis];
}

// A window of one tap at stride 1 has no use for rows: all pixels are one.
inline void flatten_pixels(ConvGeometry& g) {
  for (int axis = 0; axis < kAxes; ++axis)
    if (g.window[axis] != 1 || g.stride[axis] != 1 || g.padding[axis] != 0 || g.input[axis] != g.output[axis]) return;
  const int64_t pixels = product(g.input);
  for (int axis = 0; axis < kAxes; ++axis) g.input[axis] = g.output[axis] = axis == kAxes - 1 ? pixels : 1;
}

// The geometry of (N, groups*C, *I), (groups*F, C, *T) -> (N, groups*F, *O), with what memory safety needs checked.
inline ConvGeometry checked_geometry(const char* op, const Sizes& input, const Sizes& weight, const Sizes& output,
                                     const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const size_t dims = stride.size() + 2;
  STD_TORCH_CHECK(dims >= 3 && dims <= 2 + kAxes, op, ": between 1 and 3 axes, got ", stride.size());
  STD_TORCH_CHECK(input.size() == dims && weight.size() == dims && output.size() == dims &&
                      padding.size() == dims - 2 && dilation.size() == dims - 2,
                  op, ": every argument must have ", dims - 2, " axes");
  STD_TORCH_CHECK(groups >= 1 && input[0] == output[0] && input[1] == weight[1] * groups && output[1] == weight[0] &&
                      weight[0] % groups == 0,
                  op, ": the batches or the channels do not go together");
  ConvGeometry g;
  g.batch = input[0];
  g.groups = groups;
  g.in_channels = weight[1];
  g.out_channels = weight[0] / groups;
  copy_axes(input, g.input, 2);
  copy_axes(weight, g.window, 2);
  copy_axes(output, g.output, 2);
  copy_axes(stride, g.stride);
  copy_axes(padding, g.padding);
  copy_axes(dilation, g.dilation);
  for (int axis = 0; axis < kAxes; ++axis)
    STD_TORCH_CHECK(is_step(g.stride[axis]) && is_step(g.dilation[axis]) && is_step(g.padding[axis] + 1), op,
                    ": stride and dilation must be at least 1, padding at least 0, all of them below 2^31");
  STD_TORCH_CHECK(groups <= std::max<int64_t>(1, weight[0]), op, ": groups must not exceed the output channels");
  flatten_pixels(g);
  return g;
}

inline Sizes with_channels(int64_t first, int64_t second, const Sizes& axes) {
  Sizes sizes{first, second};
  sizes.insert(sizes.end(), axes.begin(), axes.end());
  return sizes;
}

inline void check_dtypes(const char* op, const Tensor& first, const Tensor& second, const std::optional<Tensor>& bias,
                         int64_t channels) {
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), op, ": the operands must have one dtype");
  STD_TORCH_CHECK(
      !bias || (bias->scalar_type() == first.scalar_type() && bias->dim() == 1 && bias->size(0) == channels), op,
      ": bias must have the shape (", channels, ",) and the operands' dtype");
}

inline std::optional<Tensor> contiguous_bias(const std::optional<Tensor>& bias) {
  if (!bias) return std::nullopt;
  return as_contiguous(*bias);
}

// A result is channels_last as soon as one operand is.

inline Convolution forward_operands(const char* op, const Tensor& input, const Tensor& weight,
                                    const std::optional<Tensor>& bias, const Sizes& output_size, const Sizes& stride,
                                    const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Sizes sizes = with_channels(input.size(0), weight.size(0), output_size);
  const ConvGeometry g =
      checked_geometry(op, sizes_of(input), sizes_of(weight), sizes, stride, padding, dilation, groups);
  check_dtypes(op, input, weight, bias, sizes[1]);
  const bool weight_last = is_channels_last(weight), last = is_channels_last(input) || weight_last;
  return {g,
          last,
          weight_last,
          as_contiguous(input, last),
          as_contiguous(weight, weight_last),
          new_tensor(sizes, input.scalar_type(), input, last),
          contiguous_bias(bias)};
}

inline Convolution input_grad_operands(const char* op, const Tensor& grad_output, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const Sizes& input_size, const Sizes& stride,
                                       const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Sizes sizes = with_channels(grad_output.size(0), weight.size(1) * groups, input_size);
  const ConvGeometry g =
      checked_geometry(op, sizes, sizes_of(weight), sizes_of(grad_output), stride, padding, dilation, groups);
  check_dtypes(op, grad_output, weight, bias, sizes[1]);
  const bool weight_last = is_channels_last(weight), last = is_channels_last(grad_output) || weight_last;
  return {g,
          last,
          weight_last,
          new_tensor(sizes, grad_output.scalar_type(), grad_output, last),
          as_contiguous(weight, weight_last),
          as_contiguous(grad_output, last),
          contiguous_bias(bias)};
}

inline Convolution weight_grad_operands(const char* op, const Tensor& grad_output, const Tensor& input,
                                        const Sizes& kernel_size, const Sizes& stride, const Sizes& padding,
                                        const Sizes& dilation, int64_t groups) {
  const Sizes sizes = with_channels(grad_output.size(1), input.size(1) / std::max<int64_t>(1, groups), kernel_size);
  const ConvGeometry g =
      checked_geometry(op, sizes_of(input), sizes, sizes_of(grad_output), stride, padding, dilation, groups);
  check_dtypes(op, grad_output, input, std::nullopt, 0);
  const bool last = is_channels_last(grad_output) || is_channels_last(input);
  return {g,
          last,
          last,
          as_contiguous(input, last),
          new_tensor(sizes, grad_output.scalar_type(), grad_output, last),
          as_contiguous(grad_output, last),
          std::nullopt};
}

}  // namespace manual_ops
