#include "cpu/softmax_statistics.h"

// What the target of a row is: an index, an index with label smoothing, or a distribution over the classes. Indices
// were checked before: each is ignore_index or a class.
template <Target kTarget, class T>
using target_t = std::conditional_t<kTarget == Target::distribution, T, int64_t>;

// The losses of a block's slices, their maxima, and the logarithms of their sums of exponentials above the maximum.
// With shifted = input - maximum, a row's loss is sum(w*q) * log_sum - sum(w*q * shifted): one pass over the classes.
template <Target kTarget, class A>
[[gnu::noinline]] static void cross_entropy_of_block(const A* block, const target_t<kTarget, A>* target,
                                                     const A* weight, const Smoothing<A>& smoothing, int64_t classes,
                                                     int count, A* loss, A* maxima, A* log_sums) {
  constexpr int L = kLanes<A>;
  const A hard = smoothing.hard, soft = smoothing.soft;
  A maximum[kBlock], log_sum[kBlock], total[kBlock], costless[kBlock];
  for (int lane = 0; lane < kBlock; lane += kGroup<A>) {
    vector_t<A> largest[kUnrolled], sum[kUnrolled] = {}, wq_sum[kUnrolled] = {}, wq_shifted[kUnrolled] = {};
    group_maximum(block + lane, classes, largest);
    for (int64_t c = 0; c < classes; ++c)
      for (int k = 0; k < kUnrolled; ++k) {
        const int64_t at = c * kBlock + lane + k * L;
        const vector_t<A> shifted = load_vector<A>(block + at) - largest[k];
        sum[k] += vexp(shifted);
        if constexpr (kTarget == Target::smoothed_index) wq_shifted[k] += weight[c] * shifted;
        if constexpr (kTarget == Target::distribution) {
          const vector_t<A> wq = weight[c] * (hard * load_vector<A>(target + at) + soft);
          wq_sum[k] += wq;
          wq_shifted[k] += wq * shifted;
        }
      }
    for (int k = 0; k < kUnrolled; ++k) {
      store_vector<A>(maximum + lane + k * L, largest[k]);
      store_vector<A>(log_sum + lane + k * L, sum[k]);
      store_vector<A>(total + lane + k * L, wq_sum[k]);
      store_vector<A>(costless + lane + k * L, wq_shifted[k]);
    }
  }
  for (int i = 0; i < kBlock; ++i) log_sum[i] = vlog(log_sum[i]);
  for (int i = 0; i < count; ++i) {
    maxima[i] = maximum[i];
    log_sums[i] = log_sum[i];
    if constexpr (kTarget == Target::distribution) {
      loss[i] = classes == 0 ? A(0) : total[i] * log_sum[i] - costless[i];
    } else {
      const int64_t t = target[i];
      if (t == smoothing.ignore_index) {
        loss[i] = 0;
        continue;
      }
      loss[i] = hard * weight[t] * (log_sum[i] - (block[t * kBlock + i] - maximum[i]));
      if (kTarget == Target::smoothed_index) loss[i] += soft * (smoothing.weight_sum * log_sum[i] - costless[i]);
    }
  }
}

// The same for neighbouring slices. `scratch` has room for two blocks.
template <Target kTarget, class T>
void cross_entropy_block(const T* input, const target_t<kTarget, T>* target, const accumulate_t<T>* weight,
                         const Smoothing<accumulate_t<T>>& smoothing, int64_t classes, int64_t pitch, int count,
                         accumulate_t<T>* loss, accumulate_t<T>* maxima, accumulate_t<T>* log_sums,
                         accumulate_t<T>* scratch) {
  read_block(input, pitch, classes, count, scratch);
  if constexpr (kTarget == Target::distribution) {
    accumulate_t<T>* distributions = scratch + classes * kBlock;
    read_block(target, pitch, classes, count, distributions);
    cross_entropy_of_block<kTarget>(scratch, distributions, weight, smoothing, classes, count, loss, maxima, log_sums);
  } else {
    cross_entropy_of_block<kTarget>(scratch, target, weight, smoothing, classes, count, loss, maxima, log_sums);
  }
}

// The same for rows. `scratch` has room for two rows.
template <Target kTarget, class T>
void cross_entropy_rows(const T* input, const target_t<kTarget, T>* target, const accumulate_t<T>* weight,
                        const Smoothing<accumulate_t<T>>& smoothing, int64_t rows, int64_t classes,
                        accumulate_t<T>* loss, accumulate_t<T>* maxima, accumulate_t<T>* log_sums,
                        accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=, &smoothing](int64_t first, int count) {
      A block[kShortClasses * kBlock], distributions[kTarget == Target::distribution ? kShortClasses * kBlock : 1];
      rows_to_block(input + first * classes, classes, count, block);
      const target_t<kTarget, A>* t;
      if constexpr (kTarget == Target::distribution) {
        rows_to_block(target + first * classes, classes, count, distributions);
        t = distributions;
      } else {
        t = target + first;
      }
      cross_entropy_of_block<kTarget>(block, t, weight, smoothing, classes, count, loss + first, maxima + first,
                                      log_sums + first);
    });
    return;
  }
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  const A hard = smoothing.hard, soft = smoothing.soft;
  for (int64_t row = 0; row < rows; ++row, input += classes) {
    const A* x = widened(input, classes, scratch);
    const A* q = nullptr;
    if constexpr (kTarget == Target::distribution) q = widened(target + row * classes, classes, scratch + classes);
    const A maximum = row_maximum(x, classes);
    vector_t<A> sums[kRowSums] = {}, wq_sums[kRowSums] = {}, wq_shifted[kRowSums] = {};
    for_each_vector<A, kRowSums>(
        classes, [&](int64_t c, auto lanes, int k) __attribute__((always_inline)) {
          prefetch(input + classes + c);  // the next row's
          sums[k] += vexp(load<A>(x + c, lanes, lowest) - maximum);
          if constexpr (kTarget != Target::index) {
            vector_t<A> wq = load<A>(weight + c, lanes);
            if constexpr (kTarget == Target::distribution) {
              prefetch(target + (row + 1) * classes + c);
              wq *= hard * load<A>(q + c, lanes) + soft;
              wq_sums[k] += wq;
            }
            wq_shifted[k] += wq * (load<A>(x + c, lanes, maximum) - maximum);
          }
        });
    const A log_sum = vlog(sum_of_row<A>(sums));
    maxima[row] = maximum;
    log_sums[row] = log_sum;
    if constexpr (kTarget == Target::distribution) {
      loss[row] = sum_of_row<A>(wq_sums) * log_sum - sum_of_row<A>(wq_shifted);
    } else {
      const int64_t t = target[row];
      if (t == smoothing.ignore_index) {
        loss[row] = 0;
        continue;
      }
      loss[row] = hard * weight[t] * (log_sum - (x[t] - maximum));
      if (kTarget == Target::smoothed_index)
        loss[row] += soft * (smoothing.weight_sum * log_sum - sum_of_row<A>(wq_shifted));
    }
  }
}

// grad * (W * p_c - w_c * q_c) in place of the inputs of a block; for an index, first without its own class, which has
// a term more. An ignored row is zero, or NaN where its softmax is.
template <Target kTarget, class A>
[[gnu::noinline]] static void cross_entropy_input_grad_of_block(const A* row_grad, A* block,
                                                                const target_t<kTarget, A>* target, const A* weight,
                                                                const Smoothing<A>& smoothing, int64_t classes,
                                                                int count, const A* maxima, const A* log_sums) {
  constexpr int L = kLanes<A>;
  const A hard = smoothing.hard, soft = smoothing.soft;
  A grad[kBlock] = {}, total[kBlock] = {}, maximum[kBlock] = {}, log_sum[kBlock] = {};
  for (int i = 0; i < count; ++i) {
    grad[i] = row_grad[i];
    maximum[i] = maxima[i];
    log_sum[i] = log_sums[i];
    if constexpr (kTarget != Target::distribution) {
      if (target[i] == smoothing.ignore_index)
        grad[i] = 0;
      else
        total[i] = hard * weight[target[i]] + soft * smoothing.weight_sum;
    }
  }
  for (int lane = 0; lane < kBlock; lane += kGroup<A>) {
    vector_t<A> scale[kUnrolled], g[kUnrolled], m[kUnrolled], l[kUnrolled];
    for (int k = 0; k < kUnrolled; ++k) {
      g[k] = load_vector<A>(grad + lane + k * L);
      m[k] = load_vector<A>(maximum + lane + k * L);
      l[k] = load_vector<A>(log_sum + lane + k * L);
      scale[k] = load_vector<A>(total + lane + k * L);
    }
    if constexpr (kTarget == Target::distribution)
      for (int64_t c = 0; c < classes; ++c)
        for (int k = 0; k < kUnrolled; ++k)
          scale[k] += weight[c] * (hard * load_vector<A>(target + c * kBlock + lane + k * L) + soft);
    for (int k = 0; k < kUnrolled; ++k) scale[k] *= g[k];
    for (int64_t c = 0; c < classes; ++c)
      for (int k = 0; k < kUnrolled; ++k) {
        const int64_t at = c * kBlock + lane + k * L;
        vector_t<A> result = scale[k] * vexp((load_vector<A>(block + at) - m[k]) - l[k]);
        if constexpr (kTarget == Target::smoothed_index) result -= g[k] * (soft * weight[c]);
        if constexpr (kTarget == Target::distribution)
          result -= g[k] * (weight[c] * (hard * load_vector<A>(target + at) + soft));
        store_vector<A>(block + at, result);
      }
  }
  if constexpr (kTarget != Target::distribution)
    for (int i = 0; i < count; ++i)
      if (target[i] != smoothing.ignore_index) block[target[i] * kBlock + i] -= grad[i] * (hard * weight[target[i]]);
}

template <Target kTarget, class T>
void cross_entropy_input_grad_block(const accumulate_t<T>* row_grad, const T* input, const target_t<kTarget, T>* target,
                                    const accumulate_t<T>* weight, const Smoothing<accumulate_t<T>>& smoothing,
                                    int64_t classes, int64_t pitch, int count, const accumulate_t<T>* maxima,
                                    const accumulate_t<T>* log_sums, T* grad_input, accumulate_t<T>* scratch,
                                    bool past_caches) {
  read_block(input, pitch, classes, count, scratch);
  if constexpr (kTarget == Target::distribution) {
    accumulate_t<T>* distributions = scratch + classes * kBlock;
    read_block(target, pitch, classes, count, distributions);
    cross_entropy_input_grad_of_block<kTarget>(row_grad, scratch, distributions, weight, smoothing, classes, count,
                                               maxima, log_sums);
  } else {
    cross_entropy_input_grad_of_block<kTarget>(row_grad, scratch, target, weight, smoothing, classes, count, maxima,
                                               log_sums);
  }
  write_block(scratch, grad_input, pitch, classes, count, past_caches);
  if (past_caches) finish_stores_past_caches();
}

template <Target kTarget, class T>
void cross_entropy_input_grad_rows(const accumulate_t<T>* row_grad, const T* input, const target_t<kTarget, T>* target,
                                   const accumulate_t<T>* weight, const Smoothing<accumulate_t<T>>& smoothing,
                                   int64_t rows, int64_t classes, const accumulate_t<T>* maxima,
                                   const accumulate_t<T>* log_sums, T* grad_input, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=, &smoothing](int64_t first, int count) {
      A block[kShortClasses * kBlock], distributions[kTarget == Target::distribution ? kShortClasses * kBlock : 1];
      rows_to_block(input + first * classes, classes, count, block);
      const target_t<kTarget, A>* t;
      if constexpr (kTarget == Target::distribution) {
        rows_to_block(target + first * classes, classes, count, distributions);
        t = distributions;
      } else {
        t = target + first;
      }
      cross_entropy_input_grad_of_block<kTarget>(row_grad + first, block, t, weight, smoothing, classes, count,
                                                 maxima + first, log_sums + first);
      block_to_rows(block, grad_input + first * classes, classes, count);
    });
    return;
  }
  const A hard = smoothing.hard, soft = smoothing.soft;
  for (int64_t row = 0; row < rows; ++row, input += classes, grad_input += classes) {
    const A* x = widened(input, classes, scratch);
    A* y = computed_at(grad_input, scratch, false);
    const A maximum = maxima[row], log_sum = log_sums[row];
    A g = row_grad[row], own = 0, total = 0;
    const A* q = nullptr;
    int64_t t = 0;
    if constexpr (kTarget == Target::distribution) {
      q = widened(target + row * classes, classes, scratch + classes);
      vector_t<A> totals[kRowSums] = {};
      for_each_vector<A, kRowSums>(
          classes, [&](int64_t c, auto lanes, int k) __attribute__((always_inline)) {
            totals[k] += load<A>(weight + c, lanes) * (hard * load<A>(q + c, lanes) + soft);
          });
      total = sum_of_row<A>(totals);
    } else {
      const bool kept = target[row] != smoothing.ignore_index;
      t = kept ? target[row] : 0;
      g = kept ? g : A(0);
      own = kept ? hard * weight[t] : A(0);
      total = own + soft * smoothing.weight_sum;
    }
    const A scale = g * total;
    for_each_vector<A>(
        classes, [&](int64_t c, auto lanes, int) __attribute__((always_inline)) {
          vector_t<A> result = scale * vexp((load<A>(x + c, lanes) - maximum) - log_sum);
          if constexpr (kTarget == Target::smoothed_index) result -= g * (soft * load<A>(weight + c, lanes));
          if constexpr (kTarget == Target::distribution)
            result -= g * (load<A>(weight + c, lanes) * (hard * load<A>(q + c, lanes) + soft));
          store<A>(y + c, result, lanes);
        });
    if constexpr (kTarget != Target::distribution) y[t] -= g * own;
    deliver(y, grad_input, classes, false);
  }
}
