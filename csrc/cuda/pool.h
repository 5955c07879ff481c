// Pooling windows as arithmetic: which inputs an output reads, and which outputs read an input, an axis each, from a
// few numbers that kernels take as arguments.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>

#include "cuda/cu.h"
#include "geometry.h"
#include "pooling.h"

namespace manual_ops {

// An axis on the host. Adaptive are only windows that no stride describes: the pieces are unequal.
struct PoolAxis {
  int64_t input = 1, output = 1;
  int64_t taps = 1, stride = 1, padding = 0, dilation = 1;
  bool adaptive = false;
  bool padding_counts = false;  // in the divisor of an average

  static PoolAxis sliding(int64_t input, int64_t output, int64_t taps, int64_t stride, int64_t padding,
                          int64_t dilation, bool padding_counts) {
    return {input, output, taps, stride, padding, taps == 1 ? 1 : dilation, false, padding_counts};
  }
  static PoolAxis pieces(int64_t input, int64_t output) {
    const int64_t taps = adaptive_taps(input, output);
    const bool unequal = output > 0 && (input == 0 || input % output != 0);
    return {input, output, taps, taps, 0, 1, unequal, false};
  }

  // Every output reads its own input and no other.
  bool is_pointwise() const { return !adaptive && input == output && taps == 1 && stride == 1 && padding == 0; }
  // One output that reads the whole axis.
  bool is_whole() const { return !adaptive && output == 1 && taps == input && padding == 0 && dilation == 1; }
  // What every window divides by, if that is one number; 0 if not.
  int64_t same_divisor() const {
    const int64_t end = (output - 1) * stride - padding + (taps - 1) * dilation + 1;
    const bool whole_windows = padding_counts ? end <= input + padding : padding == 0 && end <= input;
    return whole_windows && !adaptive ? taps : 0;
  }
  // Beyond all positions that a kernel computes on the way.
  double reach() const {
    const double in = static_cast<double>(input), out = static_cast<double>(std::max<int64_t>(1, output));
    const double step = static_cast<double>(stride), gap = static_cast<double>(dilation);
    if (adaptive) return (in + 1) * (out + 1);
    const double positions = in + out * step + static_cast<double>(taps) * gap + static_cast<double>(padding);
    return std::max(positions + gap * step, gap * gap);
  }
};

// A pooling's axes D, H, W and where elements lie: pixels of an image are `pitch` apart, and an image is one plane of a
// contiguous tensor, or all channels of a channels_last one.
struct PoolPlan {
  int64_t images, pitch;
  PoolAxis d, h, w;

  PoolPlan(const Tensor& like, const Sizes& input_size, const Sizes& output_size, const Sizes& kernel_size,
           const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool channels_last,
           bool padding_counts = false) {
    check_windows(like, input_size, output_size, kernel_size, stride, padding, dilation, channels_last);
    images = channels_last ? like.size(0) : like.size(0) * like.size(1);
    pitch = channels_last ? like.size(1) : 1;
    PoolAxis* const last[] = {&w, &h, &d};
    for (size_t axis = 0; axis < input_size.size(); ++axis) {
      PoolAxis& to = *last[input_size.size() - 1 - axis];
      to = kernel_size.empty() ? PoolAxis::pieces(input_size[axis], output_size[axis])
                               : PoolAxis::sliding(input_size[axis], output_size[axis], kernel_size[axis], stride[axis],
                                                   padding[axis], dilation[axis], padding_counts);
    }
    merge_axes();
  }

  int64_t input_pixels() const { return d.input * h.input * w.input; }
  int64_t output_pixels() const { return d.output * h.output * w.output; }
  int64_t inputs() const { return images * pitch * input_pixels(); }
  int64_t outputs() const { return images * pitch * output_pixels(); }
  double taps() const {
    return static_cast<double>(d.taps) * static_cast<double>(h.taps) * static_cast<double>(w.taps);
  }
  // Two axes at most, and one.
  bool is_flat() const { return d.is_pointwise() && d.input == 1; }
  bool is_line() const { return is_flat() && h.is_pointwise() && h.input == 1; }
  // One output an image, which reads all of it.
  bool is_whole() const { return is_line() && w.is_whole(); }
  // The windows of a contiguous tensor cut its rows into whole packs.
  bool rows_of_packs(int64_t pack) const {
    const bool cut = w.input % pack == 0 && w.stride % pack == 0 && w.taps % pack == 0 && w.padding == 0;
    return pitch == 1 && cut && !w.adaptive && w.dilation == 1;
  }
  double same_divisor() const {
    return static_cast<double>(d.same_divisor()) * static_cast<double>(h.same_divisor()) *
           static_cast<double>(w.same_divisor());
  }
  bool dilated() const { return d.dilation > 1 || h.dilation > 1 || w.dilation > 1; }

  // The number that decides in how many bits kernels count.
  int64_t reach() const {
    const double axes = std::max({d.reach(), h.reach(), w.reach()});
    return std::max({inputs(), outputs(), static_cast<int64_t>(std::min(axes, 1e18))});
  }

 private:
  // The same windows in fewer axes: H and W where a window spans all of W, D and the images where windows span one D.
  // The numbers of the taps stay.
  void merge_axes() {
    for (int axis = 0; axis < 2; ++axis) {
      if (!w.is_whole() || h.adaptive || h.dilation > 1) break;
      const int64_t width = w.input;
      w = PoolAxis::sliding(h.input * width, h.output, h.taps * width, h.stride * width, h.padding * width, 1,
                            h.padding_counts);
      h = std::exchange(d, PoolAxis{});
    }
    if (d.is_pointwise()) images *= std::exchange(d, PoolAxis{}).input;
  }
};

// An output's window: it reads inputs first + k*dilation for k in 0 .. count-1, of which tap tap + k lies there. All
// are inside the input, whatever the options.
template <class Index>
struct Window {
  Index first, count, tap;
};

// An input's windows: outputs first, first + period .. last read it, the first of them at tap `tap`.
template <class Index>
struct Cover {
  Index first, last, tap;
};

// An axis on the device.
template <class Index>
struct PoolAxisArguments {
  Index input, output, taps, stride, padding, dilation;
  bool adaptive, padding_counts;
  Divider<Index> by_input, by_output, by_taps, by_stride, by_dilation;
  // Taps meet an input again `period` outputs later, `tap_step` taps further down. See cover().
  Index period, tap_step, inverse;
  Divider<Index> by_common, by_period;

  explicit PoolAxisArguments(const PoolAxis& axis)
      : input(static_cast<Index>(axis.input)),
        output(static_cast<Index>(axis.output)),
        taps(static_cast<Index>(axis.taps)),
        stride(static_cast<Index>(axis.stride)),
        padding(static_cast<Index>(axis.padding)),
        dilation(static_cast<Index>(axis.dilation)),
        adaptive(axis.adaptive),
        padding_counts(axis.padding_counts),
        by_input(std::max<int64_t>(1, axis.input)),
        by_output(std::max<int64_t>(1, axis.output)),
        by_taps(axis.taps),
        by_stride(axis.stride),
        by_dilation(axis.dilation) {
    const int64_t common = std::gcd(axis.stride, axis.dilation);
    period = static_cast<Index>(axis.dilation / common);
    tap_step = static_cast<Index>(axis.stride / common);
    inverse = static_cast<Index>(inverse_modulo(axis.stride / common, axis.dilation / common));
    by_common = Divider<Index>(common);
    by_period = Divider<Index>(axis.dilation / common);
  }

  CU_DEVICE Index start(Index o) const { return adaptive ? by_output.quotient(o * input) : o * stride - padding; }

  CU_DEVICE Window<Index> window(Index o) const {
    const Index from = start(o);
    if (adaptive) return {from, by_output.quotient((o + 1) * input + output - 1) - from, 0};
    const Index tap = from < 0 ? by_dilation.quotient(dilation - 1 - from) : 0;
    const Index end = from < input ? min(taps, by_dilation.quotient(input - from + dilation - 1)) : 0;
    return {from + tap * dilation, max(end - tap, Index(0)), tap};
  }

  // What the axis adds to an average's divisor. Padding counts as far as there is any: a last window of ceil_mode may
  // reach beyond it.
  CU_DEVICE Index divisor(Index o) const {
    if (!padding_counts) return window(o).count;
    const Index from = start(o);
    return min(from + taps, input + padding) - from;
  }

  // Where taps meet input i: i + padding = o*stride + tap*dilation. With dilation the outputs that solve it are one
  // class modulo `period`, o = (i + padding)/common * inverse, if `common`, the greatest divisor of stride and
  // dilation, divides.
  CU_DEVICE Cover<Index> cover(Index i) const {
    if (adaptive) {
      const Index from = by_input.quotient(i * output);
      return {from, by_input.quotient((i + 1) * output - 1), i - start(from)};
    }
    const Index x = i + padding, before = x - (taps - 1) * dilation;
    Index from = before > 0 ? by_stride.quotient(before + stride - 1) : 0;
    const Index last = min(by_stride.quotient(x), output - 1);
    if (dilation > 1) {
      const Index shared = by_common.quotient(x);
      if (shared * by_common.divisor() != x) return {0, -1, 0};
      const Index ahead = modulo_period(modulo_period(shared) * inverse) - modulo_period(from);
      from += ahead < 0 ? ahead + period : ahead;
    }
    return {from, last, from <= last ? by_dilation.quotient(x - from * stride) : 0};
  }

  // The tap at which output o meets input i, where the output before met it at `tap`.
  CU_DEVICE Index next_tap(Index i, Index o, Index tap) const { return adaptive ? i - start(o) : tap - tap_step; }

 private:
  CU_DEVICE Index modulo_period(Index value) const { return value - by_period.quotient(value) * period; }
};

// What all kernels take.
template <class Index>
struct PoolArguments {
  Index pitch;
  PoolAxisArguments<Index> d, h, w;

  explicit PoolArguments(const PoolPlan& plan)
      : pitch(static_cast<Index>(plan.pitch)), d(plan.d), h(plan.h), w(plan.w) {}

  // Offsets of a row's first element.
  CU_DEVICE Index input_row(Index image, Index depth, Index row) const {
    return ((image * d.input + depth) * h.input + row) * w.input * pitch;
  }
  CU_DEVICE Index output_row(Index image, Index depth, Index row) const {
    return ((image * d.output + depth) * h.output + row) * w.output * pitch;
  }
};

// The items of a launch, a thread each: (image, depth, row or strip of rows, column, lane), the lanes innermost. A lane
// is a pack of channels in channels_last; contiguous tensors have one.
template <class Index>
struct PoolItems {
  struct Item {
    Index image, depth, row, column, lane;
  };

  Index count;
  Divider<Index> lanes, columns, strips, depths;

  PoolItems(int64_t images, int64_t depths, int64_t strips, int64_t columns, int64_t lanes)
      : count(static_cast<Index>(images * depths * strips * columns * lanes)),
        lanes(lanes),
        columns(columns),
        strips(strips),
        depths(depths) {}

  CU_DEVICE Item at(Index index) const {
    const Index pixel = lanes.quotient(index), row = columns.quotient(pixel), plane = strips.quotient(row);
    const Index image = depths.quotient(plane);
    return {image, plane - image * depths.divisor(), row - plane * strips.divisor(), pixel - row * columns.divisor(),
            index - pixel * lanes.divisor()};
  }
};

// The winners' codes, bytes or wider.
struct Winners {
  const uint8_t* bytes = nullptr;
  const int32_t* numbers = nullptr;
};
struct NewWinners {
  uint8_t* bytes = nullptr;
  int32_t* numbers = nullptr;
};

template <int N, class Index>
CU_DEVICE Pack<int32_t, N> load_codes(const Winners& winners, Index offset) {
  Pack<int32_t, N> codes;
  if (winners.bytes != nullptr) {
    const auto bytes = load<N>(winners.bytes + offset);
#pragma unroll
    for (int n = 0; n < N; ++n) codes.at[n] = bytes.at[n];
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) codes.at[n] = winners.numbers[offset + n];
  }
  return codes;
}

template <int N, class Index>
CU_DEVICE void store_codes(const NewWinners& winners, Index offset, const Pack<int32_t, N>& codes) {
  if (winners.bytes != nullptr) {
    Pack<uint8_t, N> bytes;
#pragma unroll
    for (int n = 0; n < N; ++n) bytes.at[n] = static_cast<uint8_t>(codes.at[n]);
    store<N>(winners.bytes + offset, bytes);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) winners.numbers[offset + n] = codes.at[n];
  }
}

}  // namespace manual_ops
