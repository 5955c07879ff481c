// What the files of the depthwise convolution share.
#pragma once

#include <algorithm>

#include "cuda/convolution/depthwise.h"

namespace manual_ops {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A convolution seen by what gathers: forward, which computes the output, or the input gradient.
struct GatherView {
  bool forward;
  const int64_t *source, *destination;                  // sizes
  int64_t source_channels, channels;                    // of one group
  int64_t weight_group, weight_source, weight_channel;  // strides of the group, and of these two channels

  GatherView(const ConvGeometry& g, bool is_forward)
      : forward(is_forward),
        source(forward ? g.input : g.output),
        destination(forward ? g.output : g.input),
        source_channels(forward ? g.in_channels : g.out_channels),
        channels(forward ? g.out_channels : g.in_channels),
        weight_group(g.out_channels * g.in_channels * g.taps()),
        weight_source(forward ? g.taps() : g.in_channels * g.taps()),
        weight_channel(forward ? g.in_channels * g.taps() : g.taps()) {}
};

// Takes the last digit off `number`, whose base is the divisor.
template <class Index>
CU_DEVICE Index take_digit(Index& number, const Divider<Index>& base) {
  const Index rest = base.quotient(number), digit = number - rest * base.divisor();
  number = rest;
  return digit;
}

// A sum of `items` in parts: enough of them for eight blocks on each of 132 multiprocessors, when as many `blocks`
// share a part, but with at least `least` items in each. By the shape alone: the bits are the same on every device.
struct Parts {
  int64_t size, count;

  Parts(int64_t blocks, int64_t items, int64_t least) {
    constexpr int64_t kBlocks = 8 * 132, kMost = 1024;
    const int64_t wanted = std::clamp(std::min(ceil_div(kBlocks, blocks), items / least), int64_t{1}, kMost);
    size = ceil_div(items, wanted);
    count = ceil_div(items, size);
  }
};

// The weight gradient's workspace, [part][weight].
template <class T>
Tensor new_partials(const Parts& parts, const Tensor& grad_weight) {
  return new_tensor({parts.count, grad_weight.numel()}, scalar_type_of<accumulate_t<T>>(), grad_weight);
}

// grad_weight = sum of the parts, in their order.
template <class T>
void add_parts(const CudaGuard& guard, const Parts& parts, const Tensor& partials, const Tensor& grad_weight);

// ---- square windows of 3, 5 or 7 taps, stride 1, or 2 without dilation

constexpr int kForward = -1;  // in the place of a parity

// Which source meets which destination at which tap, an axis. Forward, source = destination*stride + tap; with
// dilation, a thread's destinations lie as far apart as the taps, so that this holds for them as well. The input
// gradient at stride 1 is forward with the window turned round; at stride 2, 2*source + tap = destination + padding,
// and the parity of the padding decides which taps those are. Both are counted from the thread's first destination,
// which is even there, and its first source.
template <int window, int stride, int parity>
struct Meeting {
  static constexpr int halo = parity == kForward ? 0 : (window - 1 - parity) / 2;
  static constexpr int sources(int destinations) {
    return parity == kForward ? (destinations - 1) * stride + window : halo + 1 + (parity + destinations - 1) / 2;
  }
  // Negative or beyond where they do not meet.
  static constexpr int destination(int source, int tap) {
    if (parity != kForward) return 2 * (source - halo) + tap - parity;
    return source >= tap && (source - tap) % stride == 0 ? (source - tap) / stride : -1;
  }
  // The first source of the thread at destination 0.
  static int64_t first_source(const ConvGeometry& g, int axis, bool turned) {
    if (parity != kForward) return g.padding[axis] / 2 - halo;
    return turned ? g.padding[axis] - g.dilation[axis] * (window - 1) : -g.padding[axis];
  }
  static CU_DEVICE int source_of(int destination) {
    return parity == kForward ? destination * stride : destination / 2;
  }
};

// An axis of the destination cut into tiles, and where its source begins.
struct TiledAxis {
  int source, destination;  // sizes
  int first_source;         // of the tile at destination 0
  int step;                 // between a tile's destinations, and between its sources
  int tile, tiles;
  Divider<int32_t> by_tiles, by_step;

  TiledAxis() = default;
  TiledAxis(int64_t source_size, int64_t destination_size, int64_t tile_size, int64_t first, int64_t dilation)
      : source(static_cast<int>(source_size)),
        destination(static_cast<int>(destination_size)),
        first_source(static_cast<int>(first)),
        step(static_cast<int>(dilation)),
        tile(static_cast<int>(tile_size)),
        tiles(static_cast<int>(ceil_div(destination_size, dilation * tile_size) * dilation)),
        by_tiles(tiles),
        by_step(dilation) {}

  template <bool dilated>
  CU_DEVICE int start(int number) const {
    if constexpr (!dilated) return number * tile;
    const int whole = by_step.quotient(number);
    return whole * tile * step + number - whole * step;
  }
  // The tile's destinations that exist.
  template <bool dilated>
  CU_DEVICE int count(int start) const {
    const int left = destination - start;
    return min(tile, dilated ? by_step.quotient(max(left, 0) + step - 1) : left);
  }
};

// Whether the convolution is one of these, for the output (also for the weight gradient) or for the input gradient, and
// 32 bits hold every position.
bool square_window_serves(const ConvGeometry& g, bool forward);

inline bool is_dilated(const ConvGeometry& g) { return g.dilation[1] != 1 || g.dilation[2] != 1; }

// Calls body(window, stride, dilated), numbers that the compiler knows.
template <class Body>
void for_square_window(const ConvGeometry& g, Body&& body) {
  const auto with_stride = [&](auto window) {
    if (g.stride[1] == 2) return body(window, std::integral_constant<int, 2>{}, std::false_type{});
    if (is_dilated(g)) return body(window, std::integral_constant<int, 1>{}, std::true_type{});
    body(window, std::integral_constant<int, 1>{}, std::false_type{});
  };
  if (g.window[1] == 3) return with_stride(std::integral_constant<int, 3>{});
  if (g.window[1] == 5) return with_stride(std::integral_constant<int, 5>{});
  with_stride(std::integral_constant<int, 7>{});
}

// Contiguous tensors with one source channel a group.
bool planar_serves(const ConvGeometry& g, bool forward);
template <class T>
void planar_gather(const CudaGuard& guard, const ConvGeometry& g, bool forward, const T* source, const T* weight,
                   const T* bias, T* destination);
template <class T>
void planar_weight_grad(const CudaGuard& guard, const ConvGeometry& g, const Tensor& grad_output, const Tensor& input,
                        const Tensor& grad_weight);

// channels_last tensors with one channel a group on both sides, in packs of kChannelPack.
template <class T>
constexpr int kChannelPack = sizeof(T) == 8 ? 2 : 4;
bool channel_packs_serve(const ConvGeometry& g, bool forward, int pack);
template <class T>
void channel_packs_gather(const CudaGuard& guard, const ConvGeometry& g, bool forward, const T* source, const T* weight,
                          const T* bias, T* destination);
template <class T>
void channel_packs_weight_grad(const CudaGuard& guard, const ConvGeometry& g, const Tensor& grad_output,
                               const Tensor& input, const Tensor& grad_weight);

}  // namespace manual_ops
