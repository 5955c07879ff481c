// Pointwise losses, their sums and their derivatives by the input; the formulas are those of ops/loss.py.
// `weights` is pos_weight, read by weighted_logistic alone.
#include "cpu/vectors.h"

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

// A chunk of the operands, widened.
template <Loss kind, class T>
struct LossChunk {
  using A = accumulate_t<T>;
  const A *x, *t, *weights;

  [[gnu::always_inline]] A weight(int64_t i) const { return kind == Loss::weighted_logistic ? weights[i] : A(1); }
  [[gnu::always_inline]] A value(int64_t i) const { return loss_value<kind>(x[i], t[i], weight(i)); }
  [[gnu::always_inline]] A slope(int64_t i) const { return loss_slope<kind>(x[i], t[i], weight(i)); }
};

// body(chunk, first, elements) for `count` elements.
template <Loss kind, class T, class Body>
[[gnu::always_inline]] static inline void for_each_chunk(const T* input, const T* target, const T* weights,
                                                         int64_t count, const Body& body) {
  using A = accumulate_t<T>;
  A x[kChunk], t[kChunk], w[kChunk];
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t elements = count - first < kChunk ? count - first : kChunk;
    LossChunk<kind, T> chunk;
    chunk.x = widened(input + first, elements, x);
    chunk.t = kind == Loss::identity ? chunk.x : widened(target + first, elements, t);
    chunk.weights = kind == Loss::weighted_logistic ? widened(weights + first, elements, w) : chunk.x;
    body(chunk, first, elements);
  }
}

template <Loss kind, class T>
void losses(const T* input, const T* target, const T* weights, T* output, int64_t count, bool past_caches) {
  using A = accumulate_t<T>;
  A results[kChunk];
  for_each_chunk<kind>(input, target, weights, count, [&](const auto& chunk, int64_t first, int64_t elements) {
    A* y = computed_at(output + first, results, past_caches);
#pragma GCC ivdep
    for (int64_t i = 0; i < elements; ++i) y[i] = chunk.value(i);
    deliver(y, output + first, elements, past_caches);
  });
  if (past_caches) finish_stores_past_caches();
}

// The sum over a block, in independent lanes so that the loop vectorises.
template <Loss kind, class T>
void sum_losses(const T* input, const T* target, const T* weights, double* sum, int64_t count) {
  using A = accumulate_t<T>;
  constexpr int kSums = 4 * kLanes<A>;
  A lanes[kSums] = {};
  double total = 0;
  for_each_chunk<kind>(input, target, weights, count, [&](const auto& chunk, int64_t, int64_t elements) {
    int64_t i = 0;
    for (; i + kSums <= elements; i += kSums)
      for (int lane = 0; lane < kSums; ++lane) lanes[lane] += chunk.value(i + lane);
    for (; i < elements; ++i) total += chunk.value(i);
  });
  for (int lane = 0; lane < kSums; ++lane) total += lanes[lane];
  *sum = total;
}

// grad_output has one value an element, or, for a reduced loss, a single one.
template <Loss kind, bool reduced, class T>
void loss_backward(const T* grad_output, double scale, const T* input, const T* target, const T* weights, T* grad_input,
                   int64_t count, bool past_caches) {
  using A = accumulate_t<T>;
  const A common = static_cast<A>(scale) * (reduced ? static_cast<A>(*grad_output) : A(1));
  A wide_grad[kChunk], results[kChunk];
  for_each_chunk<kind>(input, target, weights, count, [&](const auto& chunk, int64_t first, int64_t elements) {
    const A* g = reduced ? &common : widened(grad_output + first, elements, wide_grad);
    A* y = computed_at(grad_input + first, results, past_caches);
#pragma GCC ivdep
    for (int64_t i = 0; i < elements; ++i) y[i] = chunk.slope(i) * (reduced ? common : g[i]);
    deliver(y, grad_input + first, elements, past_caches);
  });
  if (past_caches) finish_stores_past_caches();
}
