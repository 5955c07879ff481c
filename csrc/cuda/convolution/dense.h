// Convolution as a product of matrices that are never formed, for any shape.
#pragma once

#include <optional>

#include "cuda/cu.h"
#include "geometry.h"

namespace manual_ops {

// The caller has allocated all tensors, dense in the layouts that are named: `channels_last` that of all but the
// weight, `weight_last` the weight's. The result is not empty.
void dense_forward(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, bool weight_last,
                   const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output);
void dense_input_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, bool weight_last,
                      const Tensor& grad_output, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& grad_input);
void dense_weight_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, bool weight_last,
                       const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight);

}  // namespace manual_ops
