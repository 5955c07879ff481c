// Activations over the memory of any dense tensor; the formulas are those of ops/activation.py.
#include "activation.h"

#include "cuda/elementwise.h"

namespace manual_ops {

namespace {

template <class A>
CU_DEVICE A logistic(A x) {
  return A(1) / (A(1) + exp(-x));
}

// The normal distribution's cumulative function and density.
template <class A>
CU_DEVICE A normal_cumulative(A x) {
  return A(0.5) * erfc(x * A(-0.7071067811865476));
}
template <class A>
CU_DEVICE A normal_density(A x) {
  return exp(A(-0.5) * x * x) * A(0.3989422804014327);
}

// u = 2*sqrt(2/pi) * (x + 0.044715*x^3), the argument of the sigmoid in tanh gelu, and du/dx.
template <class A>
CU_DEVICE A gelu_argument(A x) {
  return A(1.5957691216057308) * (x + A(0.044715) * x * x * x);
}
template <class A>
CU_DEVICE A gelu_argument_slope(A x) {
  return A(1.5957691216057308) * (A(1) + A(0.134145) * x * x);
}

template <Activation kind, class A>
struct Value {
  A negative_slope;
  CU_DEVICE A operator()(A x) const {
    if constexpr (kind == Activation::relu) return x < A(0) ? A(0) : x;
    if constexpr (kind == Activation::relu6) return x < A(0) ? A(0) : x > A(6) ? A(6) : x;
    if constexpr (kind == Activation::leaky_relu) return x > A(0) ? x : x * negative_slope;
    if constexpr (kind == Activation::sigmoid) return logistic(x);
    if constexpr (kind == Activation::tanh) return tanh(x);
    if constexpr (kind == Activation::silu) return x * logistic(x);
    if constexpr (kind == Activation::gelu) return x * normal_cumulative(x);
    if constexpr (kind == Activation::gelu_tanh) return x * logistic(gelu_argument(x));
  }
};

// grad_output times the derivative at `saved`.
template <Activation kind, class A>
struct Product {
  A negative_slope;
  CU_DEVICE A operator()(A g, A saved) const {
    if constexpr (kind == Activation::relu) return saved <= A(0) ? A(0) : g;
    if constexpr (kind == Activation::relu6) return saved <= A(0) || saved >= A(6) ? A(0) : g;
    if constexpr (kind == Activation::leaky_relu) return saved > A(0) ? g : g * negative_slope;
    if constexpr (kind == Activation::sigmoid) return g * (A(1) - saved) * saved;
    if constexpr (kind == Activation::tanh) return g * (A(1) - saved * saved);
    if constexpr (kind == Activation::silu) {
      const A s = logistic(saved);
      return g * (s + saved * s * (A(1) - s));
    }
    if constexpr (kind == Activation::gelu) return g * (normal_cumulative(saved) + saved * normal_density(saved));
    if constexpr (kind == Activation::gelu_tanh) {
      const A s = logistic(gelu_argument(saved));
      return g * (s + saved * s * (A(1) - s) * gelu_argument_slope(saved));
    }
  }
};

struct Cuda {
  template <Activation kind>
  static void value(const Tensor& input, const Tensor& output, double negative_slope) {
    const CudaGuard guard(input);
    for_floating_dtype(input.scalar_type(), "activation", [&](auto scalar) {
      using T = decltype(scalar);
      using A = accumulate_t<T>;
      elementwise(guard, Value<kind, A>{static_cast<A>(negative_slope)}, input.numel(), cu_output<T>(output),
                  cu_input<T>(input));
    });
  }

  template <Activation kind>
  static void product(const Tensor& grad_output, const Tensor& saved, const Tensor& grad_input, double negative_slope) {
    const CudaGuard guard(saved);
    for_floating_dtype(saved.scalar_type(), "activation backward", [&](auto scalar) {
      using T = decltype(scalar);
      using A = accumulate_t<T>;
      elementwise(guard, Product<kind, A>{static_cast<A>(negative_slope)}, saved.numel(), cu_output<T>(grad_input),
                  cu_input<T>(grad_output), cu_input<T>(saved));
    });
  }
};

using Operators = ActivationOperators<Cuda>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
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
