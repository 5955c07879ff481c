// Activations: one loop over the memory of any dense tensor, whatever the order of its dimensions.
#include "activation.h"

#include <utility>

#include "cpu/caches.h"
#include "cpu/common.h"
#include "cpu/intrinsics.h"

#define MANUAL_OPS_KERNELS "cpu/activation_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// What one element costs, in scalar operations.
constexpr int64_t work(Activation kind) {
  return kind == Activation::relu || kind == Activation::relu6 || kind == Activation::leaky_relu ? 1 : 8;
}

struct Cpu {
  template <Activation kind>
  static void value(const Tensor& input, const Tensor& output, double negative_slope) {
    for_floating_dtype(input.scalar_type(), "activation", [&](auto scalar) {
      using T = decltype(scalar);
      const T* x = data<T>(input);
      T* y = mutable_data<T>(output);
      const bool past_caches = x != y && elementwise_goes_past_caches<T>(input.numel());
      parallel_for(input.numel(), work(kind), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(activate<kind, T>(x + begin, y + begin, end - begin, negative_slope, past_caches));
      });
    });
  }

  template <Activation kind>
  static void product(const Tensor& grad_output, const Tensor& saved, const Tensor& grad_input, double negative_slope) {
    for_floating_dtype(saved.scalar_type(), "activation backward", [&](auto scalar) {
      using T = decltype(scalar);
      const bool past_caches = elementwise_goes_past_caches<T>(saved.numel());
      parallel_for(saved.numel(), work(kind), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(activate_backward<kind, T>(data<T>(grad_output) + begin, data<T>(saved) + begin,
                                                      mutable_data<T>(grad_input) + begin, end - begin, negative_slope,
                                                      past_caches));
      });
    });
  }
};

using Operators = ActivationOperators<Cpu>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("relu", TORCH_BOX(&Operators::forward<Activation::relu>));
  m.impl("relu_", TORCH_BOX(&Operators::in_place<Activation::relu>));
  m.impl("relu_backward", TORCH_BOX(&Operators::backward<Activation::relu>));
  m.impl("relu6", TORCH_BOX(&Operators::forward<Activation::relu6>));
  m.impl("relu6_", TORCH_BOX(&Operators::in_place<Activation::relu6>));
  m.impl("relu6_backward", TORCH_BOX(&Operators::backward<Activation::relu6>));
  m.impl("leaky_relu", TORCH_BOX(&Operators::forward_with_slope<Activation::leaky_relu>));
  m.impl("leaky_relu_", TORCH_BOX(&Operators::in_place_with_slope<Activation::leaky_relu>));
  m.impl("leaky_relu_backward", TORCH_BOX(&Operators::backward_with_slope<Activation::leaky_relu>));
  m.impl("sigmoid", TORCH_BOX(&Operators::forward<Activation::sigmoid>));
  m.impl("sigmoid_backward", TORCH_BOX(&Operators::backward<Activation::sigmoid>));
  m.impl("tanh", TORCH_BOX(&Operators::forward<Activation::tanh>));
  m.impl("tanh_backward", TORCH_BOX(&Operators::backward<Activation::tanh>));
  m.impl("silu", TORCH_BOX(&Operators::forward<Activation::silu>));
  m.impl("silu_", TORCH_BOX(&Operators::in_place<Activation::silu>));
  m.impl("silu_backward", TORCH_BOX(&Operators::backward<Activation::silu>));
  m.impl("gelu", TORCH_BOX(&Operators::forward<Activation::gelu>));
  m.impl("gelu_backward", TORCH_BOX(&Operators::backward<Activation::gelu>));
  m.impl("gelu_tanh", TORCH_BOX(&Operators::forward<Activation::gelu_tanh>));
  m.impl("gelu_tanh_backward", TORCH_BOX(&Operators::backward<Activation::gelu_tanh>));
}

}  // namespace manual_ops
