// The activations' names, and their operators, which ask a device for loops over dense memory alone.
#pragma once

#include "dense.h"

namespace manual_ops {

enum class Activation { relu, relu6, leaky_relu, sigmoid, tanh, silu, gelu, gelu_tanh };

// A Device has, for tensors that are dense in one layout, of which `output` may be `input`,
//   template <Activation kind> static void value(input, output, negative_slope);
//   template <Activation kind> static void product(grad_output, saved, grad_input, negative_slope);
template <class Device>
struct ActivationOperators {
  template <Activation kind>
  static Tensor forward_with_slope(const Tensor& input_any, double negative_slope) {
    const Tensor input = as_dense(input_any);
    const Tensor output = new_like(input);
    Device::template value<kind>(input, output, negative_slope);
    return output;
  }

  template <Activation kind>
  static void in_place_with_slope(const Tensor& input, double negative_slope) {
    if (is_dense(input)) return Device::template value<kind>(input, input, negative_slope);
    Tensor target = input;
    torch::stable::copy_(target, forward_with_slope<kind>(input, negative_slope));
  }

  template <Activation kind>
  static Tensor backward_with_slope(const Tensor& grad_any, const Tensor& saved_any, double negative_slope) {
    STD_TORCH_CHECK(sizes_of(grad_any) == sizes_of(saved_any) && grad_any.scalar_type() == saved_any.scalar_type(),
                    "activation backward: grad_output and saved must have one shape and one dtype");
    const Tensor saved = as_dense(saved_any);
    const Tensor grad_output = in_layout_of(grad_any, saved);
    const Tensor grad_input = new_like(saved);
    Device::template product<kind>(grad_output, saved, grad_input, negative_slope);
    return grad_input;
  }

  template <Activation kind>
  static Tensor forward(const Tensor& input) {
    return forward_with_slope<kind>(input, 0);
  }
  template <Activation kind>
  static void in_place(const Tensor& input) {
    in_place_with_slope<kind>(input, 0);
  }
  template <Activation kind>
  static Tensor backward(const Tensor& grad_output, const Tensor& saved) {
    return backward_with_slope<kind>(grad_output, saved, 0);
  }
};

}  // namespace manual_ops
