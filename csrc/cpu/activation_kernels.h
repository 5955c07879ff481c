// y = f(x) and the backward product g * f'(saved), elementwise; the formulas are those of ops/activation.py.
#include "cpu/vectors.h"

// u = 2*sqrt(2/pi) * (x + 0.044715*x^3), the argument of the sigmoid in tanh gelu, and du/dx.
template <class A>
static inline A gelu_argument(A x) {
  return A(1.5957691216057308) * (x + A(0.044715) * x * x * x);
}
template <class A>
static inline A gelu_argument_slope(A x) {
  return A(1.5957691216057308) * (A(1) + A(0.134145) * x * x);
}

template <Activation kind, class A>
[[gnu::always_inline]] static inline A activation_value(A x, A negative_slope) {
  if constexpr (kind == Activation::relu) return x < A(0) ? A(0) : x;
  if constexpr (kind == Activation::relu6) return clamp<A>(x, 0, 6);
  if constexpr (kind == Activation::leaky_relu) return x > A(0) ? x : x * negative_slope;
  if constexpr (kind == Activation::sigmoid) return vsigmoid(x);
  if constexpr (kind == Activation::tanh) return vtanh(x);
  if constexpr (kind == Activation::silu) return x * vsigmoid(x);
  if constexpr (kind == Activation::gelu) return x * vnormal(x).cumulative;
  if constexpr (kind == Activation::gelu_tanh) return x * vsigmoid(gelu_argument(x));
}

template <Activation kind, class A>
[[gnu::always_inline]] static inline A activation_backward(A g, A saved, A negative_slope) {
  if constexpr (kind == Activation::relu) return saved <= A(0) ? A(0) : g;
  if constexpr (kind == Activation::relu6) return (saved <= A(0)) | (saved >= A(6)) ? A(0) : g;
  if constexpr (kind == Activation::leaky_relu) return saved > A(0) ? g : g * negative_slope;
  if constexpr (kind == Activation::sigmoid) return g * (A(1) - saved) * saved;
  if constexpr (kind == Activation::tanh) return g * (A(1) - saved * saved);
  if constexpr (kind == Activation::silu) {
    const A s = vsigmoid(saved);
    return g * (s + saved * s * (A(1) - s));
  }
  if constexpr (kind == Activation::gelu) {
    const Normal<A> normal = vnormal(saved);
    return g * (normal.cumulative + saved * normal.density);
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const A s = vsigmoid(gelu_argument(saved));
    return g * (s + saved * s * (A(1) - s) * gelu_argument_slope(saved));
  }
}

// `output` may be `input`, if it does not go past the caches: hence ivdep, in place of a slow loop for operands that
// overlap.
template <Activation kind, class T>
void activate(const T* input, T* output, int64_t count, double negative_slope, bool past_caches) {
  using A = accumulate_t<T>;
  const A slope = static_cast<A>(negative_slope);
  A wide[kChunk], results[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t elements = count - first < kChunk ? count - first : kChunk;
    const A* x = widened(input + first, elements, wide);
    A* y = computed_at(output + first, results, past_caches);
#pragma GCC ivdep
    for (int64_t i = 0; i < elements; ++i) y[i] = activation_value<kind>(x[i], slope);
    deliver(y, output + first, elements, past_caches);
  }
  if (past_caches) finish_stores_past_caches();
}

template <Activation kind, class T>
void activate_backward(const T* grad_output, const T* saved, T* grad_input, int64_t count, double negative_slope,
                       bool past_caches) {
  using A = accumulate_t<T>;
  const A slope = static_cast<A>(negative_slope);
  A wide_grad[kChunk], wide_saved[kChunk], results[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t elements = count - first < kChunk ? count - first : kChunk;
    const A *g = widened(grad_output + first, elements, wide_grad), *x = widened(saved + first, elements, wide_saved);
    A* y = computed_at(grad_input + first, results, past_caches);
#pragma GCC ivdep
    for (int64_t i = 0; i < elements; ++i) y[i] = activation_backward<kind>(g[i], x[i], slope);
    deliver(y, grad_input + first, elements, past_caches);
  }
  if (past_caches) finish_stores_past_caches();
}
