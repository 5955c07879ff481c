#include "cpu/vectors.h"

// Batch norm over planes (contiguous tensors: a channel is `batch` planes of `pixels` values, `pitch` apart) and over
// rows (channels innermost: a matrix of rows of `channels` values).
//
// Sums are taken in lanes of the accumulation type and flushed to double every few thousand values; variances are
// summed about a value near the mean, so that one pass is enough.

// How far lanes run before they are flushed: few enough additions each for float, many enough to hide the flush.
constexpr int64_t kFlush = 4096;

// Neighbouring channels are summed side by side, at most this many, so that the memory reads longer runs.
constexpr int64_t kChannelsTogether = 16;

// kCount values from memory, as a vector or, of one, as a number: what is done with them is written for both.
template <int kCount, class T>
inline auto values(const T* from) {
  if constexpr (kCount == 1)
    return static_cast<accumulate_t<T>>(*from);
  else
    return load_vector<accumulate_t<T>>(from);
}

template <int kCount, class T, class V>
inline void store_values(V result, T* to) {
  if constexpr (kCount == 1)
    *to = static_cast<T>(result);
  else
    store_vector<accumulate_t<T>>(to, result);
}

// The same past the caches, if that is asked for: `to` is aligned then, and T the type of accumulation.
template <int kCount, class T, class V>
inline void store_values(V result, T* to, bool past_caches) {
  if constexpr (kCount > 1 && std::is_same_v<T, accumulate_t<T>>)
    if (past_caches) return store_past_caches(result, to);
  store_values<kCount>(result, to);
}

// What is read next but one page: the processor's own prefetching ends with a page. A pass over 13 or 26 MB of
// gradients and inputs takes 0.45 to 0.8 times as long.
template <class T>
constexpr int64_t kFarAhead = 8192 / sizeof(T);
template <class T>
inline void prefetch_far(const T* p, int64_t ahead = kFarAhead<T>) {
  __builtin_prefetch(p + ahead, 0, 2);
}

// body(count, i) over all i, in vectors, the last of which may overlap the one before it.
template <class A, class Body>
inline void for_values(int64_t count, const Body& body) {
  if (count < kLanes<A>) {
    for (int64_t i = 0; i < count; ++i) body(std::integral_constant<int, 1>(), i);
    return;
  }
  for (int64_t i = 0; i + kLanes<A> <= count; i += kLanes<A>) body(std::integral_constant<int, kLanes<A>>(), i);
  if (count % kLanes<A> != 0) body(std::integral_constant<int, kLanes<A>>(), count - kLanes<A>);
}

// As a tensor of T holds it.
template <class T, class V>
inline V rounded(V value) {
  using A = accumulate_t<T>;
  if constexpr (std::is_same_v<T, A>) return value;
  if constexpr (std::is_same_v<V, A>) {
    return static_cast<A>(static_cast<T>(value));
  } else {
    return rounded_to<T, A>(value);
  }
}

// y, from which the forward makes its output and the backward its mask: one expression, so that both round alike.
template <class V, class U>
inline V normalised(V x, U mean, U scale, U bias) {
  return (x - mean) * scale + bias;
}

// ReLU's result and its gradient's gate, in the dtype of the tensor: what is not <= 0 passes, a NaN among it.

// Bit i, lowest first: whether lane i passes.
template <class A>
inline unsigned passing_bits(vector_t<A> y) {
  const auto stopped = y <= vector_t<A>{};
  unsigned bits = 0;
#if defined(__x86_64__)
  // By the instruction's own type; only the branch that fits is compiled.
  typedef long long Long8 __attribute__((vector_size(64)));
  typedef float Float8 __attribute__((vector_size(32)));
  typedef double Double4 __attribute__((vector_size(32)));
  typedef float Float4 __attribute__((vector_size(16)));
  typedef double Double2 __attribute__((vector_size(16)));
  if constexpr (kVectorBytes == 64 && sizeof(A) == 4)
    bits = __builtin_ia32_cvtd2mask512(stopped);
  else if constexpr (kVectorBytes == 64)
    bits = __builtin_ia32_cvtq2mask512(reinterpret_cast<Long8>(stopped));
  else if constexpr (kVectorBytes == 32 && sizeof(A) == 4)
    bits = __builtin_ia32_movmskps256(reinterpret_cast<Float8>(stopped));
  else if constexpr (kVectorBytes == 32)
    bits = __builtin_ia32_movmskpd256(reinterpret_cast<Double4>(stopped));
  else if constexpr (sizeof(A) == 4)
    bits = __builtin_ia32_movmskps(reinterpret_cast<Float4>(stopped));
  else
    bits = __builtin_ia32_movmskpd(reinterpret_cast<Double2>(stopped));
#else
  for (int lane = 0; lane < kLanes<A>; ++lane) bits |= (stopped[lane] != 0) << lane;
#endif
  return ~bits & ((1u << kLanes<A>)-1);
}

// The bits of a plane, lowest first, of results that value(count, i) makes.
template <class A, class Value>
inline void pack_plane(uint8_t* mask, int64_t pixels, const Value& value) {
  constexpr int kGroup = 16;  // no vector is longer
  int64_t i = 0;
  for (; i + kGroup <= pixels; i += kGroup) {
    unsigned bits = 0;
    for (int lane = 0; lane < kGroup; lane += kLanes<A>)
      bits |= passing_bits<A>(value(std::integral_constant<int, kLanes<A>>(), i + lane)) << lane;
    mask[i / 8] = static_cast<uint8_t>(bits);
    mask[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }
  for (; i < pixels; i += 8) {
    unsigned bits = 0;
    for (int64_t k = i; k < pixels && k < i + 8; ++k)
      bits |= static_cast<unsigned>(!(value(std::integral_constant<int, 1>(), k) <= 0)) << (k - i);
    mask[i / 8] = static_cast<uint8_t>(bits);
  }
}

// Eight rows share a row of bytes: bit r of byte c is that of value(count, r, c). Row by row, as memory likes it.
template <class A, class Value>
inline void pack_rows(uint8_t* mask, int64_t rows, int64_t channels, const Value& value) {
  memset(mask, 0, channels);
  for (int64_t row = 0; row < rows; ++row)
    for_values<A>(channels, [=](auto count, int64_t c) {
      if constexpr (count() == 1) {
        mask[c] |= static_cast<uint8_t>(!(value(count, row, c) <= 0)) << row;
      } else {
        typedef uint8_t Bytes __attribute__((vector_size(count())));
        const auto bits = ~(value(count, row, c) <= vector_t<A>{}) & (1 << row);
        Bytes bytes;
        memcpy(&bytes, mask + c, sizeof(bytes));
        bytes |= __builtin_convertvector(bits, Bytes);
        memcpy(mask + c, &bytes, sizeof(bytes));
      }
    });
}

// g where relu(y) passes it, 0 elsewhere.
template <bool kRelu, class T, class V, class U>
inline V gated(V g, V x, U mean, U scale, U bias) {
  if constexpr (!kRelu) return g;
#if defined(__x86_64__)
  asm("" : "+x"(g));  // else the load of g becomes a masked one, which waits for the comparison
#endif
  const V y = rounded<T>(normalised(x, mean, scale, bias));
  return y <= V{} ? V{} : g;
}

// Before y is rounded: what the tensor's dtype would round to zero is stored as zero either way.
template <bool kRelu, class V>
inline V relu_of(V y) {
  if constexpr (!kRelu) return y;
  return y <= V{} ? V{} : y;
}

// Sums of one channel on their way: lanes, which are flushed to double now and then.
template <class A>
struct ChannelSums {
  vector_t<A> a[2] = {}, b[2] = {};
  A rest_a = 0, rest_b = 0;
  double total_a = 0, total_b = 0;
  int64_t since_flush = 0;

  void flush() {
    for (int k = 0; k < 2; ++k) {
      for (int lane = 0; lane < kLanes<A>; ++lane) total_a += a[k][lane], total_b += b[k][lane];
      a[k] = b[k] = vector_t<A>{};
    }
    total_a += rest_a, total_b += rest_b;
    rest_a = rest_b = 0, since_flush = 0;
  }

  // Adds `span` values, from `start` on; ahead(i) is called for each line of them, early.
  template <class Term, class Ahead>
  [[gnu::always_inline]] void add(int64_t span, int64_t start, const Term& term, const Ahead& ahead) {
    constexpr int kWidth = kLanes<A>, kLine = 64 / sizeof(A);
    constexpr std::integral_constant<int, kWidth> kVector;
    int64_t i = 0;
    for (; i + 2 * kWidth <= span; i += 2 * kWidth) {
      for (int64_t line = i; line < i + 2 * kWidth; line += kLine) ahead(line);
      term(kVector, start + i, a[0], b[0]);
      term(kVector, start + i + kWidth, a[1], b[1]);
    }
    if (i + kWidth <= span) {
      term(kVector, start + i, a[0], b[0]);
      i += kWidth;
    }
    for (; i < span; ++i) term(std::integral_constant<int, 1>(), start + i, rest_a, rest_b);
    since_flush += span;
    if (since_flush >= kFlush) flush();
  }
};

// first[c] and second[c]: the two sums that term(c) makes a term for, which adds to them as term(count, offset, first,
// second), over all values of `channels` neighbouring channels. fetch(offset) announces what is read soon, across the
// gaps between images.
template <class A, class Term, class Fetch>
inline void plane_sums(int64_t batch, int64_t channels, int64_t pitch, int64_t pixels, double* first, double* second,
                       const Term& term, const Fetch& fetch) {
  const int64_t run = channels * pixels, runs_ahead = kFarAhead<A> / (run + 1), rest_ahead = kFarAhead<A> % (run + 1);
  ChannelSums<A> sums[kChannelsTogether];
  for (int64_t n = 0; n < batch; ++n) {
    for (int64_t c = 0; c < channels; ++c) {
      ChannelSums<A> of_channel = sums[c];  // in registers
      for (int64_t begin = 0; begin < pixels; begin += kFlush) {
        const int64_t at = c * pixels + begin;
        of_channel.add(begin + kFlush < pixels ? kFlush : pixels - begin, n * pitch + at, term(c), [=](int64_t i) {
          const int64_t then = at + i + rest_ahead;
          fetch(then < run ? (n + runs_ahead) * pitch + then : (n + runs_ahead + 1) * pitch + then - run);
        });
      }
      sums[c] = of_channel;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    sums[c].flush();
    first[c] = sums[c].total_a, second[c] = sums[c].total_b;
  }
}

// The mean of a few values of each of neighbouring channels, from all over, is near enough to the channel's: a black
// border does not deceive it. An infinity belongs into the sums, where the mean comes out infinite.
template <class T>
void about_planes(const T* input, int64_t batch, int64_t channels, int64_t pitch, int64_t pixels,
                  accumulate_t<T>* about) {
  using A = accumulate_t<T>;
  const int64_t all = batch * pixels, few = all < 64 ? all : 64;
  for (int64_t c = 0; c < channels; ++c) about[c] = 0;
  for (int64_t k = 0; k < few; ++k) {
    const int64_t at = k * (all / few) + k * (all % few) / few;
    const T* first = input + at / pixels * pitch + at % pixels;
    for (int64_t c = 0; c < channels; ++c) about[c] += static_cast<A>(first[c * pixels]) / static_cast<A>(few);
  }
  for (int64_t c = 0; c < channels; ++c)
    if (!(about[c] - about[c] == 0)) about[c] = 0;
}

// Sums of neighbouring channels' distances from `about`, and of their squares.
template <class T>
void statistics_planes(const T* input, int64_t batch, int64_t channels, int64_t pitch, int64_t pixels,
                       const accumulate_t<T>* about, double* sum, double* square) {
  const auto term = [=](int64_t channel) {
    return [input, about = about[channel]](auto count, int64_t i, auto& s, auto& q) {
      const auto d = values<count()>(input + i) - about;
      s += d;
      q += d * d;
    };
  };
  plane_sums<accumulate_t<T>>(batch, channels, pitch, pixels, sum, square, term,
                              [=](int64_t i) { prefetch_far(input + i, 0); });
}

template <bool kRelu, bool kResidual, class T>
inline void apply_to_planes(const T* input, const T* residual, T* output, int64_t channels, int64_t pixels,
                            const accumulate_t<T>* means, const accumulate_t<T>* scales, const accumulate_t<T>* biases,
                            bool past_caches) {
  for (int64_t c = 0; c < channels; ++c) {
    const auto mean = means[c], scale = scales[c], bias = biases[c];
    for_values<accumulate_t<T>>(pixels, [=](auto count, int64_t i) {
      i += c * pixels;
      prefetch_far(input + i);
      auto y = normalised(values<count()>(input + i), mean, scale, bias);
      if constexpr (kResidual) {
        prefetch_far(residual + i);
        y += values<count()>(residual + i);
      }
      store_values<count()>(relu_of<kRelu>(y), output + i, past_caches);
    });
  }
}

// Neighbouring planes of the forward; `residual` may be null. `mask` has one bit a value, and is there with a residual
// and relu.
template <class T>
void apply_planes(const T* input, const T* residual, T* output, uint8_t* mask, int64_t channels, int64_t pixels,
                  const accumulate_t<T>* means, const accumulate_t<T>* scales, const accumulate_t<T>* biases, bool relu,
                  bool past_caches) {
  if (mask != nullptr) {
    for (int64_t c = 0; c < channels; ++c) {
      const auto mean = means[c], scale = scales[c], bias = biases[c];
      pack_plane<accumulate_t<T>>(mask + c * ((pixels + 7) / 8), pixels, [=](auto count, int64_t i) {
        i += c * pixels;
        prefetch_far(input + i);
        prefetch_far(residual + i);
        const auto y =
            rounded<T>(normalised(values<count()>(input + i), mean, scale, bias) + values<count()>(residual + i));
        store_values<count()>(relu_of<true>(y), output + i, past_caches);
        return y;
      });
    }
  } else if (residual != nullptr) {
    apply_to_planes<false, true>(input, residual, output, channels, pixels, means, scales, biases, past_caches);
  } else if (relu) {
    apply_to_planes<true, false>(input, residual, output, channels, pixels, means, scales, biases, past_caches);
  } else {
    apply_to_planes<false, false>(input, residual, output, channels, pixels, means, scales, biases, past_caches);
  }
}

// The mask of relu(y) from the input of neighbouring planes.
template <class T>
void mask_planes(const T* input, uint8_t* mask, int64_t channels, int64_t pixels, const accumulate_t<T>* means,
                 const accumulate_t<T>* scales, const accumulate_t<T>* biases) {
  for (int64_t c = 0; c < channels; ++c) {
    const auto mean = means[c], scale = scales[c], bias = biases[c];
    pack_plane<accumulate_t<T>>(mask + c * ((pixels + 7) / 8), pixels, [=](auto count, int64_t i) {
      return rounded<T>(normalised(values<count()>(input + c * pixels + i), mean, scale, bias));
    });
  }
}

template <class T>
void masked_planes(const T* grad_output, const uint8_t* mask, T* output, int64_t planes, int64_t pixels,
                   bool past_caches) {
  using A = accumulate_t<T>;
  using Bits = decltype(vector_t<A>{} <= vector_t<A>{});
  Bits bit;
  for (int lane = 0; lane < kLanes<A>; ++lane) bit[lane] = 1 << lane;
  for (int64_t plane = 0; plane < planes; ++plane) {
    int64_t i = 0;
    for (; i + kLanes<A> <= pixels; i += kLanes<A>) {
      prefetch_far(grad_output + i);
      int bits = mask[i / 8] >> i % 8;  // lane 0's is the lowest
      if constexpr (sizeof(vector_t<A>) > 8 * sizeof(A)) bits |= mask[i / 8 + 1] << 8;
      store_values<kLanes<A>>(((bits - Bits{}) & bit) == 0 ? vector_t<A>{} : load_vector<A>(grad_output + i),
                              output + i, past_caches);
    }
    for (; i < pixels; ++i) output[i] = mask[i / 8] >> i % 8 & 1 ? grad_output[i] : T(0);
    grad_output += pixels, output += pixels, mask += (pixels + 7) / 8;
  }
}

template <class T>
void scale_planes(const T* input, T* output, int64_t channels, int64_t pixels, const accumulate_t<T>* scales,
                  bool past_caches) {
  for (int64_t c = 0; c < channels; ++c) {
    const auto scale = scales[c];
    for_values<accumulate_t<T>>(pixels, [=](auto count, int64_t i) {
      i += c * pixels;
      prefetch_far(input + i);
      store_values<count()>(values<count()>(input + i) * scale, output + i, past_caches);
    });
  }
}

// sum g and sum g * (x - mean) of neighbouring channels; with kRelu, g is gated by relu(y) first.
template <bool kRelu, class T>
void sums_planes(const T* grad_output, const T* input, int64_t batch, int64_t channels, int64_t pitch, int64_t pixels,
                 const accumulate_t<T>* means, const accumulate_t<T>* scales, const accumulate_t<T>* biases,
                 double* sum, double* dot) {
  const auto term = [=](int64_t channel) {
    return [=, mean = means[channel], scale = scales[channel], bias = biases[channel]](auto count, int64_t i, auto& s,
                                                                                       auto& d) {
      const auto x = values<count()>(input + i);
      const auto g = gated<kRelu, T>(values<count()>(grad_output + i), x, mean, scale, bias);
      s += g;
      d += g * (x - mean);
    };
  };
  plane_sums<accumulate_t<T>>(batch, channels, pitch, pixels, sum, dot, term, [=](int64_t i) {
    prefetch_far(input + i, 0);
    prefetch_far(grad_output + i, 0);
  });
}

// scale * (g - mean_grad + by_input * (x - mean)): of gradients that are all alike the difference is exactly zero.
template <bool kRelu, class T>
void input_grad_planes(const T* grad_output, const T* input, T* grad_input, int64_t channels, int64_t pixels,
                       const accumulate_t<T>* means, const accumulate_t<T>* scales, const accumulate_t<T>* biases,
                       const accumulate_t<T>* mean_grads, const accumulate_t<T>* by_inputs, bool past_caches) {
  for (int64_t c = 0; c < channels; ++c) {
    const auto mean = means[c], scale = scales[c], bias = biases[c];
    const auto mean_grad = mean_grads[c], by_input = by_inputs[c];
    for_values<accumulate_t<T>>(pixels, [=](auto count, int64_t i) {
      i += c * pixels;
      const auto x = values<count()>(input + i);
      const auto g = gated<kRelu, T>(values<count()>(grad_output + i), x, mean, scale, bias);
      store_values<count()>(scale * ((g - mean_grad) + (x - mean) * by_input), grad_input + i, past_caches);
    });
  }
}

// The same over rows, `pitch` apart; per channel numbers are arrays.

// How far ahead to prefetch in rows: where they follow each other.
template <class T>
inline int64_t ahead_in_rows(int64_t channels, int64_t pitch) {
  return pitch == channels ? kFarAhead<T> : 0;
}

// first[c] = sum over rows of term(count, row, c), second[c] of its second part. A few rows at a time, so that the sums
// wait in memory less often; fetch(offset) announces, in the order of memory where rows follow each other, the next
// few.
template <class A, class Term, class Fetch>
inline void column_sums(int64_t rows, int64_t channels, int64_t pitch, A* first, A* second, const Term& term,
                        const Fetch& fetch) {
  constexpr int64_t kTogether = 4;
  const int64_t vectors = channels / kLanes<A> * kLanes<A>;
  const bool dense = pitch == channels;
  for (int64_t c = 0; c < channels; ++c) first[c] = second[c] = 0;
  const auto add_rows = [&](auto together, int64_t row) {
    const int64_t next = (row + together()) * pitch;
    const auto add = [&](auto count, int64_t c) {
      auto a = values<count()>(first + c), b = values<count()>(second + c);
      for (int k = 0; k < together(); ++k) {
        if constexpr (count() > 1)
          fetch(next + (dense ? together() * c + k * kLanes<A> + kFarAhead<A> / 2 : k * pitch + c));
        term(count, row + k, c, a, b);
      }
      store_values<count()>(a, first + c);
      store_values<count()>(b, second + c);
    };
    int64_t c = 0;
    for (; c < vectors; c += kLanes<A>) add(std::integral_constant<int, kLanes<A>>(), c);
    for (; c < channels; ++c) add(std::integral_constant<int, 1>(), c);
  };
  int64_t row = 0;
  for (; row + kTogether <= rows; row += kTogether) add_rows(std::integral_constant<int, kTogether>(), row);
  for (; row < rows; ++row) add_rows(std::integral_constant<int, 1>(), row);
}

// totals[c] += the sum over the pixels of plane c.
template <class A>
void add_pixels(const A* planes, int64_t channels, int64_t pixels, double* totals) {
  for (int64_t c = 0; c < channels; ++c) {
    ChannelSums<A> sums;
    const auto term = [=](auto count, int64_t i, auto& sum, auto&) { sum += values<count()>(planes + i); };
    sums.add(pixels, c * pixels, term, [](int64_t) {});
    sums.flush();
    totals[c] += sums.total_a;
  }
}

template <class T>
void statistics_rows(const T* input, int64_t rows, int64_t channels, int64_t pitch, const accumulate_t<T>* about,
                     accumulate_t<T>* sum, accumulate_t<T>* square) {
  const auto term = [=](auto count, int64_t row, int64_t c, auto& s, auto& q) {
    const auto d = values<count()>(input + row * pitch + c) - values<count()>(about + c);
    s += d;
    q += d * d;
  };
  column_sums(rows, channels, pitch, sum, square, term, [=](int64_t i) { prefetch_far(input + i, 0); });
}

template <bool kRelu, bool kResidual, class T>
inline void apply_to_rows(const T* input, const T* residual, T* output, int64_t rows, int64_t channels, int64_t pitch,
                          const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias,
                          bool past_caches) {
  const int64_t ahead = ahead_in_rows<T>(channels, pitch);
  for (int64_t row = 0; row < rows; ++row)
    for_values<accumulate_t<T>>(channels, [=](auto count, int64_t c) {
      const int64_t i = row * pitch + c;
      prefetch_far(input + i, ahead);
      auto y = normalised(values<count()>(input + i), values<count()>(mean + c), values<count()>(scale + c),
                          values<count()>(bias + c));
      if constexpr (kResidual) {
        prefetch_far(residual + i, ahead);
        y += values<count()>(residual + i);
      }
      store_values<count()>(relu_of<kRelu>(y), output + i, past_caches);
    });
}

template <class T>
void apply_rows(const T* input, const T* residual, T* output, uint8_t* mask, int64_t rows, int64_t channels,
                int64_t pitch, const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias,
                bool relu, bool past_caches) {
  const int64_t ahead = ahead_in_rows<T>(channels, pitch);
  if (mask != nullptr) {
    pack_rows<accumulate_t<T>>(mask, rows, channels, [=](auto count, int64_t row, int64_t c) {
      const int64_t i = row * pitch + c;
      prefetch_far(input + i, ahead);
      prefetch_far(residual + i, ahead);
      const auto y = rounded<T>(normalised(values<count()>(input + i), values<count()>(mean + c),
                                           values<count()>(scale + c), values<count()>(bias + c)) +
                                values<count()>(residual + i));
      store_values<count()>(relu_of<true>(y), output + i, past_caches);
      return y;
    });
  } else if (residual != nullptr) {
    apply_to_rows<false, true>(input, residual, output, rows, channels, pitch, mean, scale, bias, past_caches);
  } else if (relu) {
    apply_to_rows<true, false>(input, residual, output, rows, channels, pitch, mean, scale, bias, past_caches);
  } else {
    apply_to_rows<false, false>(input, residual, output, rows, channels, pitch, mean, scale, bias, past_caches);
  }
}

template <class T>
void mask_rows(const T* input, uint8_t* mask, int64_t rows, int64_t channels, const accumulate_t<T>* mean,
               const accumulate_t<T>* scale, const accumulate_t<T>* bias) {
  pack_rows<accumulate_t<T>>(mask, rows, channels, [=](auto count, int64_t row, int64_t c) {
    return rounded<T>(normalised(values<count()>(input + row * channels + c), values<count()>(mean + c),
                                 values<count()>(scale + c), values<count()>(bias + c)));
  });
}

template <class T>
void masked_rows(const T* grad_output, const uint8_t* mask, T* output, int64_t rows, int64_t channels,
                 bool past_caches) {
  using A = accumulate_t<T>;
  for (int64_t row = 0; row < rows; ++row)
    for_values<A>(channels, [=](auto count, int64_t c) {
      const int64_t i = row * channels + c;
      prefetch_far(grad_output + i);
      if constexpr (count() == 1) {
        output[i] = mask[c] >> row & 1 ? grad_output[i] : T(0);
      } else {
        typedef uint8_t Bytes __attribute__((vector_size(count())));
        Bytes bytes;
        memcpy(&bytes, mask + c, sizeof(bytes));
        const auto bits = __builtin_convertvector(bytes, decltype(vector_t<A>{} <= vector_t<A>{}));
        const auto g = load_vector<accumulate_t<T>>(grad_output + i);
        store_values<count()>((bits & (1 << row)) == 0 ? vector_t<A>{} : g, output + i, past_caches);
      }
    });
}

template <class T>
void scale_rows(const T* input, T* output, int64_t rows, int64_t channels, const accumulate_t<T>* scale,
                bool past_caches) {
  for (int64_t row = 0; row < rows; ++row)
    for_values<accumulate_t<T>>(channels, [=](auto count, int64_t c) {
      const int64_t i = row * channels + c;
      prefetch_far(input + i);
      store_values<count()>(values<count()>(input + i) * values<count()>(scale + c), output + i, past_caches);
    });
}

template <bool kRelu, class T>
void sums_rows(const T* grad_output, const T* input, int64_t rows, int64_t channels, int64_t pitch,
               const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias,
               accumulate_t<T>* sum, accumulate_t<T>* dot) {
  const auto term = [=](auto count, int64_t row, int64_t c, auto& s, auto& d) {
    const auto x = values<count()>(input + row * pitch + c), m = values<count()>(mean + c);
    const auto g = gated<kRelu, T>(values<count()>(grad_output + row * pitch + c), x, m, values<count()>(scale + c),
                                   values<count()>(bias + c));
    s += g;
    d += g * (x - m);
  };
  column_sums(rows, channels, pitch, sum, dot, term, [=](int64_t i) {
    prefetch_far(input + i, 0);
    prefetch_far(grad_output + i, 0);
  });
}

template <bool kRelu, class T>
void input_grad_rows(const T* grad_output, const T* input, T* grad_input, int64_t rows, int64_t channels, int64_t pitch,
                     const accumulate_t<T>* mean, const accumulate_t<T>* scale, const accumulate_t<T>* bias,
                     const accumulate_t<T>* mean_grad, const accumulate_t<T>* by_input, bool past_caches) {
  const int64_t ahead = ahead_in_rows<T>(channels, pitch);
  for (int64_t row = 0; row < rows; ++row)
    for_values<accumulate_t<T>>(channels, [=](auto count, int64_t c) {
      const int64_t i = row * pitch + c;
      prefetch_far(input + i, ahead);
      prefetch_far(grad_output + i, ahead);
      const auto x = values<count()>(input + i), m = values<count()>(mean + c), s = values<count()>(scale + c);
      const auto g = gated<kRelu, T>(values<count()>(grad_output + i), x, m, s, values<count()>(bias + c));
      store_values<count()>(s * ((g - values<count()>(mean_grad + c)) + (x - m) * values<count()>(by_input + c)),
                            grad_input + i, past_caches);
    });
}
