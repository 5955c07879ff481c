#include "cpu/softmax_statistics.h"

// output = softmax of every slice of a block, or its logarithm.
template <bool kLog, class T>
void softmax_block(const T* input, T* output, int64_t classes, int64_t pitch, int count) {
  using A = accumulate_t<T>;
  A maximum[kBlock], sum[kBlock];
  block_statistics(input, classes, pitch, count, maximum, sum);
  if (kLog)
    for (int i = 0; i < count; ++i) sum[i] = vlog(sum[i]);
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < count; ++i) {
      const A shifted = static_cast<A>(input[c * pitch + i]) - maximum[i];
      output[c * pitch + i] = static_cast<T>(kLog ? shifted - sum[i] : vexp(shifted) / sum[i]);
    }
}

// The same for rows. `scratch` holds the exponentials of one row.
template <bool kLog, class T>
void softmax_rows(const T* input, T* output, int64_t rows, int64_t classes, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=](int64_t first, int count) {
      T from[kShortClasses * kBlock], to[kShortClasses * kBlock];
      rows_to_block(input + first * classes, from, count, classes);
      softmax_block<kLog>(from, to, classes, kBlock, count);
      block_to_rows(to, output + first * classes, count, classes);
    });
    return;
  }
  for (int64_t row = 0; row < rows; ++row, input += classes, output += classes) {
    const A maximum = row_maximum(input, classes);
    const T* x = input;
    T* y = output;
    if constexpr (kLog) {
      const A sum = row_sum<A>(classes, [=](int64_t c) { return vexp(static_cast<A>(x[c]) - maximum); });
      const A log_sum = vlog(sum);
      for (int64_t c = 0; c < classes; ++c) y[c] = static_cast<T>((static_cast<A>(x[c]) - maximum) - log_sum);
    } else {
      const A sum = row_sum<A>(classes, [=](int64_t c) {
        const A power = vexp(static_cast<A>(x[c]) - maximum);
        scratch[c] = power;
        return power;
      });
      for (int64_t c = 0; c < classes; ++c) y[c] = static_cast<T>(scratch[c] / sum);
    }
  }
}

// softmax: s * (g - sum(g * s)); log_softmax: g - exp(l) * sum(g).
template <bool kLog, class T>
void softmax_input_grad_block(const T* grad_output, const T* output, T* grad_input, int64_t classes, int64_t pitch,
                              int count) {
  using A = accumulate_t<T>;
  A sum[kBlock] = {};
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < count; ++i) {
      const A grad = static_cast<A>(grad_output[c * pitch + i]);
      sum[i] += kLog ? grad : grad * static_cast<A>(output[c * pitch + i]);
    }
  for (int64_t c = 0; c < classes; ++c)
    for (int i = 0; i < count; ++i) {
      const int64_t at = c * pitch + i;
      const A grad = static_cast<A>(grad_output[at]), value = static_cast<A>(output[at]);
      grad_input[at] = static_cast<T>(kLog ? grad - vexp(value) * sum[i] : value * (grad - sum[i]));
    }
}

template <bool kLog, class T>
void softmax_input_grad_rows(const T* grad_output, const T* output, T* grad_input, int64_t rows, int64_t classes) {
  using A = accumulate_t<T>;
  if (classes <= kShortClasses) {
    for_each_block_of_rows(rows, [=](int64_t first, int count) {
      T grad[kShortClasses * kBlock], from[kShortClasses * kBlock], to[kShortClasses * kBlock];
      rows_to_block(grad_output + first * classes, grad, count, classes);
      rows_to_block(output + first * classes, from, count, classes);
      softmax_input_grad_block<kLog>(grad, from, to, classes, kBlock, count);
      block_to_rows(to, grad_input + first * classes, count, classes);
    });
    return;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const T* g = grad_output + row * classes;
    const T* y = output + row * classes;
    T* x = grad_input + row * classes;
    const A sum = row_sum<A>(
        classes, [=](int64_t c) { return kLog ? static_cast<A>(g[c]) : static_cast<A>(g[c]) * static_cast<A>(y[c]); });
    for (int64_t c = 0; c < classes; ++c) {
      const A grad = static_cast<A>(g[c]), value = static_cast<A>(y[c]);
      x[c] = static_cast<T>(kLog ? grad - vexp(value) * sum : value * (grad - sum));
    }
  }
}
