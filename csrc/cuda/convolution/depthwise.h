// Convolution with few channels a group: depthwise (one input channel a group) and grouped. Direct kernels, which read
// the operands in place.
#pragma once

#include <optional>

#include "cuda/cu.h"
#include "geometry.h"

namespace manual_ops {

// Whether these kernels are the ones for this convolution; the dense kernels are for the others.
bool depthwise_serves(const ConvGeometry& g);

// The caller has allocated all tensors: dense, in the layout that is named, but for `weight` and `grad_weight`, which
// are contiguous (groups * out_channels, in_channels, *window). The result is not empty.
void depthwise_forward(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& input,
                       const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output);
void depthwise_input_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                          const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& grad_input);
void depthwise_weight_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                           const Tensor& input, const Tensor& grad_weight);

}  // namespace manual_ops
