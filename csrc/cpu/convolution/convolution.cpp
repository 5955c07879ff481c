// Convolution: forward, input gradient (also the transposed convolution) and weight gradient.
#include "cpu/convolution/convolution.h"

namespace manual_ops {

namespace {

void copy_axes(const Sizes& from, int64_t (&to)[kAxes], int64_t skip = 0) {
  const int64_t axes = static_cast<int64_t>(from.size()) - skip;
  for (int64_t axis = 0; axis < axes; ++axis) to[kAxes - axes + axis] = from[skip + axis];
}

// A window of one tap at stride 1 has no use for rows: all pixels are one.
void flatten_pixels(ConvGeometry& g) {
  for (int axis = 0; axis < kAxes; ++axis)
    if (g.window[axis] != 1 || g.stride[axis] != 1 || g.padding[axis] != 0 || g.input[axis] != g.output[axis]) return;
  const int64_t pixels = product(g.input);
  for (int axis = 0; axis < kAxes; ++axis) g.input[axis] = g.output[axis] = axis == kAxes - 1 ? pixels : 1;
}

// The geometry of (N, groups*C, *I), (groups*F, C, *T) -> (N, groups*F, *O), with what memory safety needs checked.
ConvGeometry geometry(const char* op, const Sizes& input, const Sizes& weight, const Sizes& output, const Sizes& stride,
                      const Sizes& padding, const Sizes& dilation, int64_t groups) {
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

Sizes with_channels(int64_t first, int64_t second, const Sizes& axes) {
  Sizes sizes{first, second};
  sizes.insert(sizes.end(), axes.begin(), axes.end());
  return sizes;
}

void check_dtypes(const char* op, const Tensor& first, const Tensor& second, const std::optional<Tensor>& bias,
                  int64_t channels) {
  STD_TORCH_CHECK(first.scalar_type() == second.scalar_type(), op, ": the operands must have one dtype");
  STD_TORCH_CHECK(
      !bias || (bias->scalar_type() == first.scalar_type() && bias->dim() == 1 && bias->size(0) == channels), op,
      ": bias must have the shape (", channels, ",) and the operands' dtype");
}

template <class T>
void gather(const GatherPlan& plan, const WeightLayout& layout, bool channels_last, const Tensor& source,
            const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& destination) {
  const T* bias_data = bias ? data<T>(*bias) : nullptr;
  if (depthwise_serves(plan))
    depthwise_gather<T>(plan, layout, channels_last, data<T>(source), data<T>(weight), bias_data,
                        mutable_data<T>(destination));
  else
    dense_gather<T>(plan, layout, data<T>(source), data<T>(weight), bias_data, mutable_data<T>(destination));
}

Tensor conv_forward(const Tensor& input_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any,
                    const Sizes& output_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                    int64_t groups) {
  const Sizes sizes = with_channels(input_any.size(0), weight_any.size(0), output_size);
  const ConvGeometry g =
      geometry("conv_forward", sizes_of(input_any), sizes_of(weight_any), sizes, stride, padding, dilation, groups);
  check_dtypes("conv_forward", input_any, weight_any, bias_any, sizes[1]);
  const bool weight_last = is_channels_last(weight_any), channels_last = is_channels_last(input_any) || weight_last;
  const Tensor output = new_tensor(sizes, input_any.scalar_type(), input_any, channels_last);
  if (output.numel() == 0) return output;
  const Tensor input = as_contiguous(input_any, channels_last), weight = as_contiguous(weight_any, weight_last);
  std::optional<Tensor> bias;
  if (bias_any) bias = as_contiguous(*bias_any);
  const Layout window(g.in_channels, g.window, weight_last);
  const GatherPlan plan =
      forward_plan(g, Layout(input.size(1), g.input, channels_last), Layout(output.size(1), g.output, channels_last));
  const WeightLayout layout{window, g.out_channels * window.image, window.image, window.channel};
  for_floating_dtype(input.scalar_type(), "conv_forward", [&](auto scalar) {
    gather<decltype(scalar)>(plan, layout, channels_last, input, weight, bias, output);
  });
  return output;
}

Tensor conv_input_grad(const Tensor& grad_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any,
                       const Sizes& input_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                       int64_t groups) {
  const Sizes sizes = with_channels(grad_any.size(0), weight_any.size(1) * groups, input_size);
  const ConvGeometry g =
      geometry("conv_input_grad", sizes, sizes_of(weight_any), sizes_of(grad_any), stride, padding, dilation, groups);
  check_dtypes("conv_input_grad", grad_any, weight_any, bias_any, sizes[1]);
  const bool weight_last = is_channels_last(weight_any), channels_last = is_channels_last(grad_any) || weight_last;
  const Tensor grad_input = new_tensor(sizes, grad_any.scalar_type(), grad_any, channels_last);
  if (grad_input.numel() == 0) return grad_input;
  const Tensor grad_output = as_contiguous(grad_any, channels_last), weight = as_contiguous(weight_any, weight_last);
  std::optional<Tensor> bias;
  if (bias_any) bias = as_contiguous(*bias_any);
  const Layout window(g.in_channels, g.window, weight_last);
  const GatherPlan plan = input_grad_plan(g, Layout(grad_output.size(1), g.output, channels_last),
                                          Layout(grad_input.size(1), g.input, channels_last));
  const WeightLayout layout{window, g.out_channels * window.image, window.channel, window.image};
  for_floating_dtype(grad_output.scalar_type(), "conv_input_grad", [&](auto scalar) {
    gather<decltype(scalar)>(plan, layout, channels_last, grad_output, weight, bias, grad_input);
  });
  return grad_input;
}

Tensor conv_weight_grad(const Tensor& grad_any, const Tensor& input_any, const Sizes& kernel_size, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Sizes sizes = with_channels(grad_any.size(1), input_any.size(1) / std::max<int64_t>(1, groups), kernel_size);
  const ConvGeometry g =
      geometry("conv_weight_grad", sizes_of(input_any), sizes, sizes_of(grad_any), stride, padding, dilation, groups);
  check_dtypes("conv_weight_grad", grad_any, input_any, std::nullopt, 0);
  const bool channels_last = is_channels_last(grad_any) || is_channels_last(input_any);
  const Tensor grad_weight = new_tensor(sizes, grad_any.scalar_type(), grad_any, channels_last);
  if (grad_weight.numel() == 0) return grad_weight;
  if (grad_any.numel() == 0 || input_any.numel() == 0) {
    Tensor zeros = grad_weight;
    return torch::stable::zero_(zeros);
  }
  const Tensor grad_output = as_contiguous(grad_any, channels_last), input = as_contiguous(input_any, channels_last);
  const Layout window(g.in_channels, g.window, channels_last);
  const GatherPlan plan = forward_plan(g, Layout(input.size(1), g.input, channels_last),
                                       Layout(grad_output.size(1), g.output, channels_last));
  const WeightLayout layout{window, g.out_channels * window.image, window.image, window.channel};
  for_floating_dtype(grad_output.scalar_type(), "conv_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    if (depthwise_serves(plan))
      depthwise_weight_grad<T>(plan, layout, channels_last, data<T>(input), data<T>(grad_output),
                               mutable_data<T>(grad_weight));
    else
      dense_weight_grad<T>(plan, layout, data<T>(input), data<T>(grad_output), mutable_data<T>(grad_weight));
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_input_grad", TORCH_BOX(&conv_input_grad));
  m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad));
}

}  // namespace manual_ops
