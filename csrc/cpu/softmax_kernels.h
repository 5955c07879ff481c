#include "cpu/softmax_statistics.h"

// Softmax of every slice of a block, or its logarithm, in its place.
template <bool kLog, class A>
[[gnu::noinline]] static void softmax_in_block(A* block, int64_t classes) {
  constexpr int L = kLanes<A>;
  for (A* group = block; group < block + kBlock; group += kGroup<A>) {
    vector_t<A> maximum[kUnrolled], sum[kUnrolled] = {}, factor[kUnrolled];
    group_maximum(group, classes, maximum);
    for (int64_t c = 0; c < classes; ++c)
      for (int k = 0; k < kUnrolled; ++k) {
        A* at = group + c * kBlock + k * L;
        const vector_t<A> shifted = load_vector<A>(at) - maximum[k], power = vexp(shifted);
        sum[k] += power;
        store_vector<A>(at, kLog ? shifted : power);
      }
    for (int k = 0; k < kUnrolled; ++k) factor[k] = kLog ? logarithm<A>(sum[k]) : A(1) / sum[k];
    for (int64_t c = 0; c < classes; ++c)
      for (int k = 0; k < kUnrolled; ++k) {
        A* at = group + c * kBlock + k * L;
        const vector_t<A> value = load_vector<A>(at);
        store_vector<A>(at, kLog ? value - factor[k] : divided(value, sum[k], factor[k]));
      }
  }
}

// output = softmax of neighbouring slices, or, from the input's `rows`, of rows. `scratch` has room for two blocks.
template <bool kLog, class T>
void softmax_block(const T* input, T* output, int64_t classes, int64_t pitch, int count, accumulate_t<T>* scratch,
                   bool rows, bool past_caches) {
  if (rows)
    rows_to_block(input, classes, count, scratch);
  else
    read_block(input, pitch, classes, count, scratch);
  softmax_in_block<kLog>(scratch, classes);
  write_block(scratch, output, pitch, classes, count, past_caches);
  if (past_caches) finish_stores_past_caches();
}

// The same for rows. `scratch` has room for two rows.
template <bool kLog, class T>
void softmax_rows(const T* input, T* output, int64_t rows, int64_t classes, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=](int64_t first, int count) {
      A block[kShortClasses * kBlock];
      rows_to_block(input + first * classes, classes, count, block);
      softmax_in_block<kLog>(block, classes);
      block_to_rows(block, output + first * classes, classes, count);
    });
    return;
  }
  constexpr A lowest = -std::numeric_limits<A>::infinity();
  for (int64_t row = 0; row < rows; ++row, input += classes, output += classes) {
    const A* x = widened(input, classes, scratch);
    A* y = computed_at(output, scratch, false);
    const A maximum = row_maximum(x, classes);
    vector_t<A> sums[kRowSums] = {};
    for_each_vector<A, kRowSums>(
        classes, [&](int64_t c, auto lanes, int k) __attribute__((always_inline)) {
          prefetch(input + classes + c);  // the next row's
          const vector_t<A> power = vexp(load<A>(x + c, lanes, lowest) - maximum);
          sums[k] += power;
          if (!kLog) store<A>(y + c, power, lanes);
        });
    const A sum = sum_of_row<A>(sums), factor = kLog ? vlog(sum) : A(1) / sum;
    for_each_vector<A>(
        classes, [&](int64_t c, auto lanes, int) __attribute__((always_inline)) {
          if constexpr (kLog)
            store<A>(y + c, (load<A>(x + c, lanes) - maximum) - factor, lanes);
          else
            store<A>(y + c, divided(load<A>(y + c, lanes), sum, factor), lanes);
        });
    deliver(y, output, classes, false);
  }
}

// softmax: s * (g - sum(g * s)); log_softmax: g - exp(l) * sum(g).
template <bool kLog, class V, class S>
[[gnu::always_inline]] static inline V softmax_input_grad_of(V grad, V value, S sum) {
  if constexpr (kLog)
    return grad - vexp(value) * sum;
  else
    return value * (grad - sum);
}

// The gradient takes the place of the outputs in `block`.
template <bool kLog, class A>
[[gnu::noinline]] static void softmax_input_grad_in_block(const A* grad_block, A* block, int64_t classes) {
  constexpr int L = kLanes<A>;
  for (int lane = 0; lane < kBlock; lane += kGroup<A>) {
    const A* grads = grad_block + lane;
    A* group = block + lane;
    vector_t<A> sum[kUnrolled] = {};
    for (int64_t c = 0; c < classes; ++c)
      for (int k = 0; k < kUnrolled; ++k) {
        const vector_t<A> grad = load_vector<A>(grads + c * kBlock + k * L);
        sum[k] += kLog ? grad : grad * load_vector<A>(group + c * kBlock + k * L);
      }
    for (int64_t c = 0; c < classes; ++c)
      for (int k = 0; k < kUnrolled; ++k) {
        A* at = group + c * kBlock + k * L;
        const vector_t<A> grad = load_vector<A>(grads + c * kBlock + k * L);
        store_vector<A>(at, softmax_input_grad_of<kLog>(grad, load_vector<A>(at), sum[k]));
      }
  }
}

template <bool kLog, class T>
void softmax_input_grad_block(const T* grad_output, const T* output, T* grad_input, int64_t classes, int64_t pitch,
                              int count, accumulate_t<T>* scratch, bool past_caches) {
  accumulate_t<T>* grads = scratch + classes * kBlock;
  read_block(grad_output, pitch, classes, count, grads);
  read_block(output, pitch, classes, count, scratch);
  softmax_input_grad_in_block<kLog>(grads, scratch, classes);
  write_block(scratch, grad_input, pitch, classes, count, past_caches);
  if (past_caches) finish_stores_past_caches();
}

template <bool kLog, class T>
void softmax_input_grad_rows(const T* grad_output, const T* output, T* grad_input, int64_t rows, int64_t classes,
                             accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=](int64_t first, int count) {
      A grads[kShortClasses * kBlock], block[kShortClasses * kBlock];
      rows_to_block(grad_output + first * classes, classes, count, grads);
      rows_to_block(output + first * classes, classes, count, block);
      softmax_input_grad_in_block<kLog>(grads, block, classes);
      block_to_rows(block, grad_input + first * classes, classes, count);
    });
    return;
  }
  for (int64_t row = 0; row < rows; ++row, grad_output += classes, output += classes, grad_input += classes) {
    const A *g = widened(grad_output, classes, scratch + classes), *y = widened(output, classes, scratch);
    A* x = computed_at(grad_input, scratch, false);
    vector_t<A> sums[kRowSums] = {};
    for_each_vector<A, kRowSums>(
        classes, [&](int64_t c, auto lanes, int k) __attribute__((always_inline)) {
          const vector_t<A> grad = load<A>(g + c, lanes);
          sums[k] += kLog ? grad : grad * load<A>(y + c, lanes);
        });
    const A sum = sum_of_row<A>(sums);
    for_each_vector<A>(
        classes, [&](int64_t c, auto lanes, int) __attribute__((always_inline)) {
          prefetch(grad_output + classes + c);  // the next row's
          prefetch(output + classes + c);
          store<A>(x + c, softmax_input_grad_of<kLog>(load<A>(g + c, lanes), load<A>(y + c, lanes), sum), lanes);
        });
    deliver(x, grad_input, classes, false);
  }
}
