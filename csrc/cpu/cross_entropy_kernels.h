#include "cpu/softmax_statistics.h"

// What the target of a row is: an index, an index with label smoothing, or a distribution over the classes. Indices
// were checked before: each is ignore_index or a class.
template <Target kTarget, class T>
using target_t = std::conditional_t<kTarget == Target::distribution, T, int64_t>;

// The loss of every slice of a block, its maximum, and the logarithm of its sum of exponentials above the maximum.
template <Target kTarget, class T>
[[gnu::noinline]] void cross_entropy_block(const T* input, const target_t<kTarget, T>* target,
                                           const accumulate_t<T>* weight, const Smoothing<accumulate_t<T>>& smoothing,
                                           int64_t classes, int64_t pitch, int count, accumulate_t<T>* loss,
                                           accumulate_t<T>* maxima, accumulate_t<T>* log_sums) {
  using A = accumulate_t<T>;
  A maximum[kBlock], log_sum[kBlock], expected[kBlock] = {};
  block_statistics(input, classes, pitch, count, maximum, log_sum);
  for (int i = 0; i < count; ++i) log_sum[i] = vlog(log_sum[i]);
  if constexpr (kTarget != Target::index)
    for (int64_t c = 0; c < classes; ++c)
      for (int i = 0; i < count; ++i) {
        A q = 1;
        if constexpr (kTarget == Target::distribution)
          q = smoothing.hard * static_cast<A>(target[c * pitch + i]) + smoothing.soft;
        expected[i] += weight[c] * q * (log_sum[i] - (static_cast<A>(input[c * pitch + i]) - maximum[i]));
      }
  if constexpr (kTarget != Target::distribution)
    for (int i = 0; i < count; ++i) {
      const int64_t t = target[i];
      if (t == smoothing.ignore_index) {
        expected[i] = 0;
        continue;
      }
      const A cost = log_sum[i] - (static_cast<A>(input[t * pitch + i]) - maximum[i]);
      expected[i] = smoothing.hard * weight[t] * cost + smoothing.soft * expected[i];
    }
  for (int i = 0; i < count; ++i) {
    loss[i] = expected[i];
    maxima[i] = maximum[i];
    log_sums[i] = log_sum[i];
  }
}

// The same for rows.
template <Target kTarget, class T>
void cross_entropy_rows(const T* input, const target_t<kTarget, T>* target, const accumulate_t<T>* weight,
                        const Smoothing<accumulate_t<T>>& smoothing, int64_t rows, int64_t classes,
                        accumulate_t<T>* loss, accumulate_t<T>* maxima, accumulate_t<T>* log_sums) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=, &smoothing](int64_t first, int count) {
      T block[kShortClasses * kBlock], distributions[kTarget == Target::distribution ? kShortClasses * kBlock : 1];
      rows_to_block(input + first * classes, block, count, classes);
      const target_t<kTarget, T>* t = target + first;
      if constexpr (kTarget == Target::distribution) {
        rows_to_block(target + first * classes, distributions, count, classes);
        t = distributions;
      }
      cross_entropy_block<kTarget>(block, t, weight, smoothing, classes, kBlock, count, loss + first, maxima + first,
                                   log_sums + first);
    });
    return;
  }
  const A hard = smoothing.hard, soft = smoothing.soft;
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = input + row * classes;
    const A maximum = row_maximum(x, classes);
    const A sum = row_sum<A>(classes, [=](int64_t c) { return vexp(static_cast<A>(x[c]) - maximum); });
    const A log_sum = vlog(sum);
    maxima[row] = maximum;
    log_sums[row] = log_sum;
    const auto cost = [=](int64_t c) { return log_sum - (static_cast<A>(x[c]) - maximum); };
    if constexpr (kTarget == Target::distribution) {
      const T* q = target + row * classes;
      loss[row] =
          row_sum<A>(classes, [=](int64_t c) { return weight[c] * (hard * static_cast<A>(q[c]) + soft) * cost(c); });
    } else {
      const int64_t t = target[row];
      loss[row] = t == smoothing.ignore_index ? A(0) : hard * weight[t] * cost(t);
      if (kTarget == Target::smoothed_index && t != smoothing.ignore_index)
        loss[row] += soft * row_sum<A>(classes, [=](int64_t c) { return weight[c] * cost(c); });
    }
  }
}

// row_grad * (W * p_c - w_c * q_c). An ignored row is zero, or NaN where its softmax is.
template <Target kTarget, class T>
[[gnu::noinline]] void cross_entropy_input_grad_block(const accumulate_t<T>* row_grad, const T* input,
                                                      const target_t<kTarget, T>* target, const accumulate_t<T>* weight,
                                                      const Smoothing<accumulate_t<T>>& smoothing, int64_t classes,
                                                      int64_t pitch, int count, const accumulate_t<T>* maxima,
                                                      const accumulate_t<T>* log_sums, T* grad_input) {
  using A = accumulate_t<T>;
  using Index = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;  // as wide as A, to share its masks
  const A hard = smoothing.hard, soft = smoothing.soft;
  A grad[kBlock], total[kBlock] = {}, own[kBlock] = {}, maximum[kBlock], log_sum[kBlock];
  Index index[kBlock];
  for (int i = 0; i < count; ++i) {
    grad[i] = row_grad[i];
    maximum[i] = maxima[i];
    log_sum[i] = log_sums[i];
  }
  if constexpr (kTarget == Target::distribution) {
    for (int64_t c = 0; c < classes; ++c)
      for (int i = 0; i < count; ++i) total[i] += weight[c] * (hard * static_cast<A>(target[c * pitch + i]) + soft);
  } else {
    for (int i = 0; i < count; ++i) {
      const bool kept = target[i] != smoothing.ignore_index;
      index[i] = static_cast<Index>(kept ? target[i] : -1);
      grad[i] = kept ? grad[i] : A(0);
      own[i] = kept ? hard * weight[target[i]] : A(0);
      total[i] = own[i] + soft * smoothing.weight_sum;
    }
  }
  for (int64_t c = 0; c < classes; ++c) {
    const Index own_class = static_cast<Index>(c);
    const A spread = soft * weight[c];
    for (int i = 0; i < count; ++i) {
      const int64_t at = c * pitch + i;
      const A p = vexp((static_cast<A>(input[at]) - maximum[i]) - log_sum[i]);
      A wq;
      if constexpr (kTarget == Target::distribution)
        wq = weight[c] * (hard * static_cast<A>(target[at]) + soft);
      else
        wq = spread + (index[i] == own_class ? own[i] : A(0));
      grad_input[at] = static_cast<T>(grad[i] * (total[i] * p - wq));
    }
  }
}

template <Target kTarget, class T>
void cross_entropy_input_grad_rows(const accumulate_t<T>* row_grad, const T* input, const target_t<kTarget, T>* target,
                                   const accumulate_t<T>* weight, const Smoothing<accumulate_t<T>>& smoothing,
                                   int64_t rows, int64_t classes, const accumulate_t<T>* maxima,
                                   const accumulate_t<T>* log_sums, T* grad_input) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=, &smoothing](int64_t first, int count) {
      T block[kShortClasses * kBlock], grad[kShortClasses * kBlock];
      T distributions[kTarget == Target::distribution ? kShortClasses * kBlock : 1];
      rows_to_block(input + first * classes, block, count, classes);
      const target_t<kTarget, T>* t = target + first;
      if constexpr (kTarget == Target::distribution) {
        rows_to_block(target + first * classes, distributions, count, classes);
        t = distributions;
      }
      cross_entropy_input_grad_block<kTarget>(row_grad + first, block, t, weight, smoothing, classes, kBlock, count,
                                              maxima + first, log_sums + first, grad);
      block_to_rows(grad, grad_input + first * classes, count, classes);
    });
    return;
  }
  const A hard = smoothing.hard, soft = smoothing.soft;
  for (int64_t row = 0; row < rows; ++row) {
    const T* x = input + row * classes;
    T* out = grad_input + row * classes;
    const A g = row_grad[row], maximum = maxima[row], log_sum = log_sums[row];
    const auto p = [=](int64_t c) { return vexp((static_cast<A>(x[c]) - maximum) - log_sum); };
    if constexpr (kTarget == Target::distribution) {
      const T* q = target + row * classes;
      const auto wq = [=](int64_t c) { return weight[c] * (hard * static_cast<A>(q[c]) + soft); };
      const A total = row_sum<A>(classes, wq);
      for (int64_t c = 0; c < classes; ++c) out[c] = static_cast<T>(g * (total * p(c) - wq(c)));
    } else {
      const int64_t t = target[row];
      if (t == smoothing.ignore_index) {
        const T nothing = static_cast<T>(A(0) * (maximum + log_sum));
        for (int64_t c = 0; c < classes; ++c) out[c] = nothing;
        continue;
      }
      const A own = hard * weight[t];
      if constexpr (kTarget == Target::index) {
        const A scale = g * own;
        for (int64_t c = 0; c < classes; ++c) out[c] = static_cast<T>(scale * p(c));
        out[t] = static_cast<T>(scale * p(t) - scale);
      } else {
        const A total = own + soft * smoothing.weight_sum;
        for (int64_t c = 0; c < classes; ++c) out[c] = static_cast<T>(g * (total * p(c) - soft * weight[c]));
        out[t] = static_cast<T>(g * (total * p(t) - (own + soft * weight[t])));
      }
    }
  }
}
