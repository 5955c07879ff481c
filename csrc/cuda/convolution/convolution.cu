// Convolution: forward, input gradient (also the transposed convolution) and weight gradient.
#include "cuda/convolution/dense.h"
#include "cuda/convolution/depthwise.h"

#include "convolution_operands.h"

namespace manual_ops {

namespace {

// The direct kernels take no weight without elements, and it contiguous.
bool is_depthwise(const Convolution& c) { return depthwise_serves(c.geometry) && c.weight.numel() > 0; }

Tensor conv_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const Sizes& output_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                    int64_t groups, bool) {
  const CudaGuard guard(input);
  const Convolution c =
      forward_operands("conv_forward", input, weight, bias, output_size, stride, padding, dilation, groups);
  if (c.output.numel() == 0) return c.output;
  if (is_depthwise(c))
    depthwise_forward(guard, c.geometry, c.channels_last, c.input, as_contiguous(c.weight), c.bias, c.output);
  else
    dense_forward(guard, c.geometry, c.channels_last, c.weight_last, c.input, c.weight, c.bias, c.output);
  return c.output;
}

Tensor conv_input_grad(const Tensor& grad_output, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Sizes& input_size, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                       int64_t groups, bool) {
  const CudaGuard guard(grad_output);
  const Convolution c =
      input_grad_operands("conv_input_grad", grad_output, weight, bias, input_size, stride, padding, dilation, groups);
  if (c.input.numel() == 0) return c.input;
  if (is_depthwise(c))
    depthwise_input_grad(guard, c.geometry, c.channels_last, c.output, as_contiguous(c.weight), c.bias, c.input);
  else
    dense_input_grad(guard, c.geometry, c.channels_last, c.weight_last, c.output, c.weight, c.bias, c.input);
  return c.input;
}

Tensor conv_weight_grad(const Tensor& grad_output, const Tensor& input, const Sizes& kernel_size, const Sizes& stride,
                        const Sizes& padding, const Sizes& dilation, int64_t groups, bool) {
  const CudaGuard guard(grad_output);
  const Convolution c =
      weight_grad_operands("conv_weight_grad", grad_output, input, kernel_size, stride, padding, dilation, groups);
  if (c.weight.numel() == 0) return c.weight;
  if (is_depthwise(c)) {
    const Tensor grad_weight =
        c.weight.is_contiguous() ? c.weight : new_tensor(sizes_of(c.weight), c.weight.scalar_type(), c.weight);
    depthwise_weight_grad(guard, c.geometry, c.channels_last, c.output, c.input, grad_weight);
    return as_contiguous(grad_weight, c.weight_last);
  }
  dense_weight_grad(guard, c.geometry, c.channels_last, c.weight_last, c.output, c.input, c.weight);
  return c.weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("conv_forward", TORCH_BOX(&conv_forward));
  m.impl("conv_input_grad", TORCH_BOX(&conv_input_grad));
  m.impl("conv_weight_grad", TORCH_BOX(&conv_weight_grad));
}

}  // namespace manual_ops
