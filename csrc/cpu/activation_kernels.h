// y = f(x) and the backward product g * f'(saved), elementwise; the formulas are those of ops/activation.py.

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

// `output` may be `input`.
template <Activation kind, class T>
void activate(const T* input, T* output, int64_t count, double negative_slope) {
  using A = accumulate_t<T>;
  for (int64_t i = 0; i < count; ++i)
    output[i] = static_cast<T>(activation_value<kind>(static_cast<A>(input[i]), static_cast<A>(negative_slope)));
}

template <Activation kind, class T>
void activate_backward(const T* grad_output, const T* saved, T* grad_input, int64_t count, double negative_slope) {
  using A = accumulate_t<T>;
  for (int64_t i = 0; i < count; ++i)
    grad_input[i] = static_cast<T>(activation_backward<kind>(static_cast<A>(grad_output[i]), static_cast<A>(saved[i]),
                                                             static_cast<A>(negative_slope)));
}
