// Convolution: forward, input gradient (also the transposed convolution) and weight gradient.
#include "convolution_operands.h"

#include "cpu/convolution/convolution.h"

namespace manual_ops {

namespace {

template <class T>
void gather(const GatherPlan& plan, const WeightLayout& layout, bool channels_last, bool fast, const Tensor& source,
            const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& destination) {
  const T* bias_data = bias ? data<T>(*bias) : nullptr;
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    if (pointwise_serves(plan))
      return pointwise_gather<T>(plan, layout, data<T>(source), data<T>(weight), bias_data,
                                 mutable_data<T>(destination));
  }
  if (depthwise_serves<T>(plan, channels_last))
    depthwise_gather<T>(plan, layout, channels_last, data<T>(source), data<T>(weight), bias_data,
                        mutable_data<T>(destination));
  else if (fast && winograd_serves<T>(plan, false))
    winograd_gather<T>(plan, layout, data<T>(source), data<T>(weight), bias_data, mutable_data<T>(destination));
  else if (planar_serves(plan))
    planar_gather<T>(plan, layout, data<T>(source), data<T>(weight), bias_data, mutable_data<T>(destination));
  else
    dense_gather<T>(plan, layout, data<T>(source), data<T>(weight), bias_data, mutable_data<T>(destination));
}

Tensor conv_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Sizes& output_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                    int64_t groups, bool fast) {
  const Convolution c =
      forward_operands("conv_forward", input, weight, bias, output_size, stride, padding, dilation, groups);
  if (c.output.numel() == 0) return c.output;
  const ConvGeometry& g = c.geometry;
  const Layout window(g.in_channels, g.window, c.weight_last);
  const GatherPlan plan = forward_plan(g, Layout(c.input.size(1), g.input, c.channels_last),
                                       Layout(c.output.size(1), g.output, c.channels_last));
  const WeightLayout layout{window, g.out_channels * window.image, window.image, window.channel};
  for_floating_dtype(input.scalar_type(), "conv_forward", [&](auto scalar) {
    gather<decltype(scalar)>(plan, layout, c.channels_last, fast, c.input, c.weight, c.bias, c.output);
  });
  return c.output;
}

Tensor conv_input_grad(const Tensor& grad_output, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Sizes& input_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                       int64_t groups, bool fast) {
  const Convolution c =
      input_grad_operands("conv_input_grad", grad_output, weight, bias, input_size, stride, padding, dilation, groups);
  if (c.input.numel() == 0) return c.input;
  const ConvGeometry& g = c.geometry;
  const Layout window(g.in_channels, g.window, c.weight_last);
  const GatherPlan plan = input_grad_plan(g, Layout(c.output.size(1), g.output, c.channels_last),
                                          Layout(c.input.size(1), g.input, c.channels_last));
  const WeightLayout layout{window, g.out_channels * window.image, window.channel, window.image};
  for_floating_dtype(grad_output.scalar_type(), "conv_input_grad", [&](auto scalar) {
    gather<decltype(scalar)>(plan, layout, c.channels_last, fast, c.output, c.weight, c.bias, c.input);
  });
  return c.input;
}

Tensor conv_weight_grad(const Tensor& grad_output, const Tensor& input, const Sizes& kernel_size, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation, int64_t groups, bool fast) {
  const Convolution c =
      weight_grad_operands("conv_weight_grad", grad_output, input, kernel_size, stride, padding, dilation, groups);
  if (c.weight.numel() == 0) return c.weight;
  if (c.output.numel() == 0 || c.input.numel() == 0) {
    Tensor zeros = c.weight;
    return torch::stable::zero_(zeros);
  }
  const ConvGeometry& g = c.geometry;
  const Layout window(g.in_channels, g.window, c.weight_last);
  const GatherPlan plan = forward_plan(g, Layout(c.input.size(1), g.input, c.channels_last),
                                       Layout(c.output.size(1), g.output, c.channels_last));
  const WeightLayout layout{window, g.out_channels * window.image, window.image, window.channel};
  for_floating_dtype(grad_output.scalar_type(), "conv_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    if (depthwise_serves<T>(plan, c.channels_last))
      depthwise_weight_grad<T>(plan, layout, c.channels_last, data<T>(c.input), data<T>(c.output),
                               mutable_data<T>(c.weight));
    else if (fast && winograd_serves<T>(plan, true))
      winograd_weight_grad<T>(plan, layout, data<T>(c.input), data<T>(c.output), mutable_data<T>(c.weight));
    else if (planar_serves_weight_grad(plan))
      planar_weight_grad<T>(plan, layout, data<T>(c.input), data<T>(c.output), mutable_data<T>(c.weight));
    else
      dense_weight_grad<T>(plan, layout, data<T>(c.input), data<T>(c.output), mutable_data<T>(c.weight));
  });
  return c.weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_input_grad", TORCH_BOX(&conv_input_grad));
  m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad));
}

}  // namespace manual_ops
