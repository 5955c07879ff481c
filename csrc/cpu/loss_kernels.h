// Pointwise losses, their sums and their derivatives by the input; the formulas are those of ops/loss.py.
// `weights` is pos_weight, read by weighted_logistic alone.

template <Loss kind, class A>
[[gnu::always_inline]] static inline A loss_value(A x, A t, A weight) {
  if constexpr (kind == Loss::identity) {
    return x;
  } else if constexpr (kind == Loss::squared) {
    return (x - t) * (x - t);
  } else {
    const A softplus = vlog1p(vexp(-magnitude(x))) + (x < A(0) ? -x : A(0));  // of -x
    const A rest = (A(1) - t) * x;
    if constexpr (kind == Loss::logistic) return rest + softplus;
    return rest + ((weight - A(1)) * t + A(1)) * softplus;
  }
}

template <Loss kind, class A>
[[gnu::always_inline]] static inline A loss_slope(A x, A t, A weight) {
  if constexpr (kind == Loss::squared) return A(2) * (x - t);
  if constexpr (kind == Loss::logistic) return vsigmoid(x) - t;
  if constexpr (kind == Loss::weighted_logistic) return ((weight - A(1)) * t + A(1)) * vsigmoid(x) - weight * t;
}

template <Loss kind, class T>
[[gnu::always_inline]] static inline accumulate_t<T> loss_at(const T* input, const T* target, const T* weights,
                                                             int64_t i) {
  using A = accumulate_t<T>;
  A weight = 1;
  if constexpr (kind == Loss::weighted_logistic) weight = static_cast<A>(weights[i]);
  return loss_value<kind>(static_cast<A>(input[i]), static_cast<A>(target[i]), weight);
}

template <Loss kind, class T>
void losses(const T* input, const T* target, const T* weights, T* output, int64_t count) {
  for (int64_t i = 0; i < count; ++i) output[i] = static_cast<T>(loss_at<kind>(input, target, weights, i));
}

// The sum over a block, in independent lanes so that the loop vectorises.
template <Loss kind, class T>
void sum_losses(const T* input, const T* target, const T* weights, double* sum, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int kLanes = 4 * kVectorBytes / sizeof(A);
  A lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += loss_at<kind>(input, target, weights, i + lane);
  double total = 0;
  for (; i < count; ++i) total += loss_at<kind>(input, target, weights, i);
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  *sum = total;
}

// grad_output has one value an element, or, for a reduced loss, a single one.
template <Loss kind, bool reduced, class T>
void loss_backward(const T* grad_output, double scale, const T* input, const T* target, const T* weights, T* grad_input,
                   int64_t count) {
  using A = accumulate_t<T>;
  const A common = static_cast<A>(scale) * (reduced ? static_cast<A>(*grad_output) : A(1));
  for (int64_t i = 0; i < count; ++i) {
    A weight = 1;
    if constexpr (kind == Loss::weighted_logistic) weight = static_cast<A>(weights[i]);
    const A slope = loss_slope<kind>(static_cast<A>(input[i]), static_cast<A>(target[i]), weight);
    grad_input[i] = static_cast<T>(slope * (reduced ? common : static_cast<A>(grad_output[i])));
  }
}
