// Batch norm over planes (contiguous tensors: a channel is `batch` planes of `pixels` values, `pitch` apart) and over
// rows (channels innermost: a matrix of rows of `channels` values).
//
// Sums are taken in lanes of the accumulation type and flushed to double every few thousand values; variances are
// summed about a value near the mean, so that one pass is enough.

// How far lanes run before they are flushed: few enough additions each for float, many enough to hide the flush.
constexpr int64_t kFlush = 4096;

// y, from which the forward makes its output and the backward its mask: one expression, so that both round alike.
template <class A>
inline A normalised(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

// ReLU's result and its gradient's gate in the dtype of the tensor: a NaN passes.
template <class T>
inline bool passes(T value) {
  return !(static_cast<accumulate_t<T>>(value) <= 0);
}

// Bits are packed and unpacked in groups of so many values: few enough for planes of 7x7 to have full ones.
constexpr int kGroup = 16;

// Bit i of `mask`, lowest first, is flag(i).
template <class Flag>
inline void pack_bits(uint8_t* mask, int64_t count, const Flag& flag) {
  for (int64_t begin = 0; begin < count; begin += kGroup) {
    uint8_t flags[kGroup] = {};
    if (begin + kGroup <= count) {
      for (int i = 0; i < kGroup; ++i) flags[i] = flag(begin + i);
    } else {
      for (int64_t i = begin; i < count; ++i) flags[i - begin] = flag(i);
    }
    const int64_t left = count - begin < kGroup ? count - begin : kGroup;
    for (int64_t byte = 0; byte < (left + 7) / 8; ++byte) {
      uint64_t word;
      memcpy(&word, flags + 8 * byte, 8);
      // Moves flag i from bit 8*i to bit 56+i.
      mask[begin / 8 + byte] = static_cast<uint8_t>(word * UINT64_C(0x0102040810204080) >> 56);
    }
  }
}

template <bool kRelu, class T, class A>
inline A gated(T grad, A x, A mean, A scale, A bias) {
  const A g = static_cast<A>(grad);
  if constexpr (!kRelu) return g;
  return passes(static_cast<T>(normalised(x, mean, scale, bias))) ? g : A(0);
}

// The two sums that term(offset, first, second) adds to, over all values of one channel.
template <class A, class Term>
inline void plane_sums(int64_t batch, int64_t pitch, int64_t pixels, double* first, double* second, const Term& term) {
  constexpr int kWidth = kVectorBytes / sizeof(A), kLanes = 2 * kWidth;
  A a[kLanes] = {}, b[kLanes] = {}, rest_a = 0, rest_b = 0;
  double total_a = 0, total_b = 0;
  int64_t since_flush = 0;
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t begin = 0; begin < pixels; begin += kFlush) {
      const int64_t span = begin + kFlush < pixels ? kFlush : pixels - begin, start = n * pitch + begin;
      int64_t i = 0;
      for (; i + kLanes <= span; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) term(start + i + lane, a[lane], b[lane]);
      for (; i + kWidth <= span; i += kWidth)
        for (int lane = 0; lane < kWidth; ++lane) term(start + i + lane, a[lane], b[lane]);
      for (; i < span; ++i) term(start + i, rest_a, rest_b);
      since_flush += span;
      if (since_flush < kFlush && n + 1 < batch) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        total_a += a[lane], total_b += b[lane];
        a[lane] = b[lane] = 0;
      }
      total_a += rest_a, total_b += rest_b;
      rest_a = rest_b = 0, since_flush = 0;
    }
  }
  *first = total_a;
  *second = total_b;
}

// Mean and (biased) variance of one channel.
template <class T>
void statistics_planes(const T* input, int64_t batch, int64_t pitch, int64_t pixels, accumulate_t<T>* mean,
                       accumulate_t<T>* var) {
  using A = accumulate_t<T>;
  // The mean of a few values from all over is near enough to the channel's: a black border does not deceive it.
  const int64_t all = batch * pixels, few = all < 64 ? all : 64;
  A about = 0;
  for (int64_t k = 0; k < few; ++k) {
    const int64_t at = k * (all / few) + k * (all % few) / few;
    about += static_cast<A>(input[at / pixels * pitch + at % pixels]) / static_cast<A>(few);
  }
  if (!(about - about == 0)) about = 0;  // an infinity belongs into the sums, where the mean comes out infinite
  double sum, square;
  plane_sums<A>(batch, pitch, pixels, &sum, &square, [=](int64_t i, A& s, A& q) {
    const A d = static_cast<A>(input[i]) - about;
    s += d;
    q += d * d;
  });
  const double values = static_cast<double>(batch) * static_cast<double>(pixels);
  const double count = values < 1 ? 1 : values;  // an empty channel has the statistics of a zero
  const double shift = sum / count;
  const double variance = square / count - shift * shift;
  *mean = static_cast<A>(about + shift);
  *var = static_cast<A>(variance < 0 ? 0 : variance);
}

template <bool kRelu, bool kResidual, class T>
inline void apply_to_plane(const T* input, const T* residual, T* __restrict__ output, int64_t pixels,
                           accumulate_t<T> mean, accumulate_t<T> scale, accumulate_t<T> bias) {
  using A = accumulate_t<T>;
  for (int64_t i = 0; i < pixels; ++i) {
    A y = normalised(static_cast<A>(input[i]), mean, scale, bias);
    if constexpr (kResidual) y += static_cast<A>(residual[i]);
    const T result = static_cast<T>(y);
    output[i] = kRelu && !passes(result) ? T(0) : result;
  }
}

// One plane of the forward; `residual` may be null, and `mask`, of one bit a value, with it.
template <class T>
void apply_plane(const T* input, const T* residual, T* output, uint8_t* mask, int64_t pixels, accumulate_t<T> mean,
                 accumulate_t<T> scale, accumulate_t<T> bias, bool relu) {
  if (residual != nullptr && relu) {
    apply_to_plane<true, true>(input, residual, output, pixels, mean, scale, bias);
  } else if (residual != nullptr) {
    apply_to_plane<false, true>(input, residual, output, pixels, mean, scale, bias);
  } else if (relu) {
    apply_to_plane<true, false>(input, residual, output, pixels, mean, scale, bias);
  } else {
    apply_to_plane<false, false>(input, residual, output, pixels, mean, scale, bias);
  }
  if (mask != nullptr) pack_bits(mask, pixels, [=](int64_t i) { return passes(output[i]); });
}

// The mask of relu(y) from the input of one plane.
template <class T>
void mask_plane(const T* input, uint8_t* mask, int64_t pixels, accumulate_t<T> mean, accumulate_t<T> scale,
                accumulate_t<T> bias) {
  using A = accumulate_t<T>;
  pack_bits(mask, pixels,
            [=](int64_t i) { return passes(static_cast<T>(normalised(static_cast<A>(input[i]), mean, scale, bias))); });
}

template <class T>
void masked_plane(const T* grad_output, const uint8_t* mask, T* __restrict__ output, int64_t pixels) {
  // Groups of 64, not 16, whose flags are read too soon after they are written: 3 ms against 54 on 32x64x56x56.
  for (int64_t begin = 0; begin < pixels; begin += 64) {
    const int64_t count = pixels - begin < 64 ? pixels - begin : 64;
    uint8_t flags[64] = {};
    for (int64_t byte = 0; byte < (count + 7) / 8; ++byte) {
      // The byte eight times, in each copy another bit left standing.
      const uint64_t word = mask[begin / 8 + byte] * UINT64_C(0x0101010101010101) & UINT64_C(0x8040201008040201);
      memcpy(flags + 8 * byte, &word, 8);
    }
    const T* grad = grad_output + begin;
    T* out = output + begin;
    if (count == 64) {
      for (int i = 0; i < 64; ++i) out[i] = flags[i] != 0 ? grad[i] : T(0);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = flags[i] != 0 ? grad[i] : T(0);
    }
  }
}

template <class T>
void scale_plane(const T* input, T* __restrict__ output, int64_t pixels, accumulate_t<T> scale) {
  for (int64_t i = 0; i < pixels; ++i) output[i] = static_cast<T>(static_cast<accumulate_t<T>>(input[i]) * scale);
}

// sum g and sum g * (x - mean) of one channel; with kRelu, g is gated by relu(y) first.
template <bool kRelu, class T>
void sums_planes(const T* grad_output, const T* input, int64_t batch, int64_t pitch, int64_t pixels,
                 accumulate_t<T> mean, accumulate_t<T> scale, accumulate_t<T> bias, double* sum, double* dot) {
  using A = accumulate_t<T>;
  plane_sums<A>(batch, pitch, pixels, sum, dot, [=](int64_t i, A& s, A& d) {
    const A x = static_cast<A>(input[i]);
    const A g = gated<kRelu>(grad_output[i], x, mean, scale, bias);
    s += g;
    d += g * (x - mean);
  });
}

// scale * (g - mean_grad + by_input * (x - mean)): of gradients that are all alike the difference is exactly zero.
template <bool kRelu, class T>
void input_grad_plane(const T* grad_output, const T* input, T* __restrict__ grad_input, int64_t pixels,
                      accumulate_t<T> mean, accumulate_t<T> scale, accumulate_t<T> bias, accumulate_t<T> mean_grad,
                      accumulate_t<T> by_input) {
  using A = accumulate_t<T>;
  for (int64_t i = 0; i < pixels; ++i) {
    const A x = static_cast<A>(input[i]);
    const A g = gated<kRelu>(grad_output[i], x, mean, scale, bias);
    grad_input[i] = static_cast<T>(scale * ((g - mean_grad) + (x - mean) * by_input));
  }
}

// The same over rows; per channel numbers are arrays.

// first[c] = sum over rows of term(row, c), second[c] of its second part; a few vectors of channels stay in registers.
template <class A, class Term>
inline void column_sums(int64_t rows, int64_t channels, A* __restrict__ first, A* __restrict__ second,
                        const Term& term) {
  constexpr int kTile = 4 * kVectorBytes / sizeof(A);
  int64_t c = 0;
  for (; c + kTile <= channels; c += kTile) {
    A a[kTile] = {}, b[kTile] = {};
    for (int64_t row = 0; row < rows; ++row)
      for (int lane = 0; lane < kTile; ++lane) term(row, c + lane, a[lane], b[lane]);
    for (int lane = 0; lane < kTile; ++lane) first[c + lane] = a[lane], second[c + lane] = b[lane];
  }
  for (int64_t rest = c; rest < channels; ++rest) first[rest] = second[rest] = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t rest = c; rest < channels; ++rest) term(row, rest, first[rest], second[rest]);
}

template <class T>
void statistics_rows(const T* input, int64_t rows, int64_t channels, const accumulate_t<T>* about, accumulate_t<T>* sum,
                     accumulate_t<T>* square) {
  using A = accumulate_t<T>;
  column_sums(rows, channels, sum, square, [=](int64_t row, int64_t c, A& s, A& q) {
    const A d = static_cast<A>(input[row * channels + c]) - about[c];
    s += d;
    q += d * d;
  });
}

template <bool kRelu, bool kResidual, class T>
inline void apply_to_rows(const T* input, const T* residual, T* __restrict__ output, int64_t rows, int64_t channels,
                          const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias) {
  using A = accumulate_t<T>;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = row * channels + c;
      A y = normalised(static_cast<A>(input[i]), mean[c], scale[c], bias[c]);
      if constexpr (kResidual) y += static_cast<A>(residual[i]);
      const T result = static_cast<T>(y);
      output[i] = kRelu && !passes(result) ? T(0) : result;
    }
}

// Eight rows share a row of bytes in `mask`.
template <class Flag>
inline void pack_rows(uint8_t* __restrict__ mask, int64_t rows, int64_t channels, const Flag& flag) {
  for (int64_t c = 0; c < channels; ++c) mask[c] = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) mask[c] |= static_cast<uint8_t>(flag(row, c) << row);
}

template <class T>
void apply_rows(const T* input, const T* residual, T* output, uint8_t* mask, int64_t rows, int64_t channels,
                const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias, bool relu) {
  if (residual != nullptr && relu) {
    apply_to_rows<true, true>(input, residual, output, rows, channels, mean, scale, bias);
  } else if (residual != nullptr) {
    apply_to_rows<false, true>(input, residual, output, rows, channels, mean, scale, bias);
  } else if (relu) {
    apply_to_rows<true, false>(input, residual, output, rows, channels, mean, scale, bias);
  } else {
    apply_to_rows<false, false>(input, residual, output, rows, channels, mean, scale, bias);
  }
  if (mask != nullptr)
    pack_rows(mask, rows, channels, [=](int64_t row, int64_t c) { return passes(output[row * channels + c]); });
}

template <class T>
void mask_rows(const T* input, uint8_t* mask, int64_t rows, int64_t channels, const accumulate_t<T>* mean,
               const accumulate_t<T>* scale, const accumulate_t<T>* bias) {
  using A = accumulate_t<T>;
  pack_rows(mask, rows, channels, [=](int64_t row, int64_t c) {
    return passes(static_cast<T>(normalised(static_cast<A>(input[row * channels + c]), mean[c], scale[c], bias[c])));
  });
}

template <class T>
void masked_rows(const T* grad_output, const uint8_t* mask, T* __restrict__ output, int64_t rows, int64_t channels) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c)
      output[row * channels + c] = mask[c] >> row & 1 ? grad_output[row * channels + c] : T(0);
}

template <class T>
void scale_rows(const T* input, T* __restrict__ output, int64_t rows, int64_t channels, const accumulate_t<T>* scale) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c)
      output[row * channels + c] = static_cast<T>(static_cast<accumulate_t<T>>(input[row * channels + c]) * scale[c]);
}

template <bool kRelu, class T>
void sums_rows(const T* grad_output, const T* input, int64_t rows, int64_t channels, const accumulate_t<T>* mean,
               const accumulate_t<T>* scale, const accumulate_t<T>* bias, accumulate_t<T>* sum, accumulate_t<T>* dot) {
  using A = accumulate_t<T>;
  column_sums(rows, channels, sum, dot, [=](int64_t row, int64_t c, A& s, A& d) {
    const A x = static_cast<A>(input[row * channels + c]);
    const A g = gated<kRelu>(grad_output[row * channels + c], x, mean[c], scale[c], bias[c]);
    s += g;
    d += g * (x - mean[c]);
  });
}

template <bool kRelu, class T>
void input_grad_rows(const T* grad_output, const T* input, T* __restrict__ grad_input, int64_t rows, int64_t channels,
                     const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias,
                     const accumulate_t<T>* mean_grad, const accumulate_t<T>* by_input) {
  using A = accumulate_t<T>;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = row * channels + c;
      const A x = static_cast<A>(input[i]);
      const A g = gated<kRelu>(grad_output[i], x, mean[c], scale[c], bias[c]);
      grad_input[i] = static_cast<T>(scale[c] * ((g - mean_grad[c]) + (x - mean[c]) * by_input[c]));
    }
}
