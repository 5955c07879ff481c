// Activations: one loop over the memory of any dense tensor, whatever the order of its dimensions.
#include "activation.h"

#include "dense.h"

#define MANUAL_OPS_KERNELS "cpu/activation_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// What one element costs, in scalar operations.
constexpr int64_t work(Activation kind) {
  return kind == Activation::relu || kind == Activation::relu6 || kind == Activation::leaky_relu ? 1 : 8;
}

template <Activation kind>
void fill(const Tensor& input, const Tensor& output, double negative_slope) {
  for_floating_dtype(input.scalar_type(), "activation", [&](auto scalar) {
    using T = decltype(scalar);
    parallel_for(input.numel(), work(kind), [&](int64_t begin, int64_t end) {
      MANUAL_OPS_FOR_ISA(
          activate<kind, T>(data<T>(input) + begin, mutable_data<T>(output) + begin, end - begin, negative_slope));
    });
  });
}

template <Activation kind>
Tensor forward_with_slope(const Tensor& input_any, double negative_slope) {
  const Tensor input = as_dense(input_any);
  const Tensor output = new_like(input);
  fill<kind>(input, output, negative_slope);
  return output;
}

template <Activation kind>
void in_place_with_slope(const Tensor& input, double negative_slope) {
  if (is_dense(input)) return fill<kind>(input, input, negative_slope);
  Tensor target = input;
  torch::stable::copy_(target, forward_with_slope<kind>(input, negative_slope));
}

template <Activation kind>
Tensor backward_with_slope(const Tensor& grad_any, const Tensor& saved_any, double negative_slope) {
  STD_TORCH_CHECK(sizes_of(grad_any) == sizes_of(saved_any) && grad_any.scalar_type() == saved_any.scalar_type(),
                  "activation backward: grad_output and saved must have one shape and one dtype");
  const Tensor saved = as_dense(saved_any);
  const Tensor grad_output = in_layout_of(grad_any, saved);
  const Tensor grad_input = new_like(saved);
  for_floating_dtype(saved.scalar_type(), "activation backward", [&](auto scalar) {
    using T = decltype(scalar);
    parallel_for(saved.numel(), work(kind), [&](int64_t begin, int64_t end) {
      MANUAL_OPS_FOR_ISA(activate_backward<kind, T>(data<T>(grad_output) + begin, data<T>(saved) + begin,
                                                    mutable_data<T>(grad_input) + begin, end - begin, negative_slope));
    });
  });
  return grad_input;
}

template <Activation kind>
Tensor forward(const Tensor& input) {
  return forward_with_slope<kind>(input, 0);
}
template <Activation kind>
void in_place(const Tensor& input) {
  in_place_with_slope<kind>(input, 0);
}
template <Activation kind>
Tensor backward(const Tensor& grad_output, const Tensor& saved) {
  return backward_with_slope<kind>(grad_output, saved, 0);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("relu", TORCH_BOX(&forward<Activation::relu>));
  m.impl("relu_", TORCH_BOX(&in_place<Activation::relu>));
  m.impl("relu_backward", TORCH_BOX(&backward<Activation::relu>));
  m.impl("relu6", TORCH_BOX(&forward<Activation::relu6>));
  m.impl("relu6_", TORCH_BOX(&in_place<Activation::relu6>));
  m.impl("relu6_backward", TORCH_BOX(&backward<Activation::relu6>));
  m.impl("leaky_relu", TORCH_BOX(&forward_with_slope<Activation::leaky_relu>));
  m.impl("leaky_relu_", TORCH_BOX(&in_place_with_slope<Activation::leaky_relu>));
  m.impl("leaky_relu_backward", TORCH_BOX(&backward_with_slope<Activation::leaky_relu>));
  m.impl("sigmoid", TORCH_BOX(&forward<Activation::sigmoid>));
  m.impl("sigmoid_backward", TORCH_BOX(&backward<Activation::sigmoid>));
  m.impl("tanh", TORCH_BOX(&forward<Activation::tanh>));
  m.impl("tanh_backward", TORCH_BOX(&backward<Activation::tanh>));
  m.impl("silu", TORCH_BOX(&forward<Activation::silu>));
  m.impl("silu_", TORCH_BOX(&in_place<Activation::silu>));
  m.impl("silu_backward", TORCH_BOX(&backward<Activation::silu>));
  m.impl("gelu", TORCH_BOX(&forward<Activation::gelu>));
  m.impl("gelu_backward", TORCH_BOX(&backward<Activation::gelu>));
  m.impl("gelu_tanh", TORCH_BOX(&forward<Activation::gelu_tanh>));
  m.impl("gelu_tanh_backward", TORCH_BOX(&backward<Activation::gelu_tanh>));
}

}  // namespace manual_ops
