#include <numeric>

#include "cuda/convolution/depthwise_kernels.h"

namespace manual_ops {

namespace {

constexpr int kThreads = 256;

// ---- any window, stride and dilation: a thread gathers one destination

// One axis of a gather: the taps first_tap, first_tap + tap_step, ... of a destination read the sources first_source,
// first_source + source_step, ... Forward, all taps do; in the input gradient those do of which the output is whole:
// position = destination + padding meets tap t where position - t*dilation is a multiple of the stride.
template <class Index>
struct GatherAxis {
  Index source, taps, stride, padding, dilation;
  Index tap_step, source_step;
  // Of the input gradient: positions that are no multiple of `common` = gcd(stride, dilation) meet no tap, the others
  // meet first that with tap*(dilation/common) = position/common modulo tap_step; `inverse` is that of dilation/common.
  Index inverse;
  Divider<Index> by_common, by_tap_step, by_stride;

  GatherAxis() = default;
  GatherAxis(const ConvGeometry& g, int axis, bool forward)
      : source(static_cast<Index>(forward ? g.input[axis] : g.output[axis])),
        taps(static_cast<Index>(g.window[axis])),
        stride(static_cast<Index>(g.stride[axis])),
        padding(static_cast<Index>(g.padding[axis])),
        dilation(static_cast<Index>(g.dilation[axis])),
        tap_step(1),
        source_step(dilation),
        inverse(0),
        by_stride(g.stride[axis]) {
    if (forward) return;
    const int64_t common = std::gcd(g.stride[axis], g.dilation[axis]), step = g.stride[axis] / common;
    by_common = Divider<Index>(common);
    by_tap_step = Divider<Index>(step);
    tap_step = static_cast<Index>(step);
    source_step = static_cast<Index>(-g.dilation[axis] / common);
    inverse = static_cast<Index>(inverse_modulo(g.dilation[axis] / common, step));
  }

  // The largest number that a kernel meets on this axis.
  static int64_t reach(const ConvGeometry& g, int axis) {
    const int64_t step = g.stride[axis] / std::gcd(g.stride[axis], g.dilation[axis]);
    return std::max({g.output[axis] * g.stride[axis] + g.window[axis] * g.dilation[axis],
                     g.input[axis] + g.padding[axis] + g.window[axis] * g.dilation[axis], g.padding[axis], step * step,
                     g.stride[axis] * g.dilation[axis]});
  }

  template <bool forward>
  CU_DEVICE void begin(Index destination, Index& first_tap, Index& first_source) const {
    if constexpr (forward) {
      first_tap = 0;
      first_source = destination * stride - padding;
    } else {
      const Index position = destination + padding, whole = by_common.quotient(position);
      const Index rest = whole - by_tap_step.quotient(whole) * tap_step, product = rest * inverse;
      first_tap = whole * by_common.divisor() == position ? product - by_tap_step.quotient(product) * tap_step : taps;
      const Index distance = position - first_tap * dilation;  // a multiple of the stride where a tap is met
      first_source = distance >= 0 ? by_stride.quotient(distance) : -by_stride.quotient(-distance);
    }
  }
};

template <class Index>
struct Gather {
  GatherAxis<Index> axis[kAxes];
  Index destinations;
  Index source_channels;                              // of one group
  Index source_image, source_channel, source_pixel;   // strides
  Index weight_group, weight_source, weight_channel;  // strides, as in GatherView
  Divider<Index> by_width, by_height, by_depth, by_channels, by_group_channels;

  Gather(const ConvGeometry& g, const GatherView& view, bool channels_last)
      : destinations(static_cast<Index>(g.batch * g.groups * view.channels * pixels(view.destination))),
        source_channels(static_cast<Index>(view.source_channels)),
        source_image(static_cast<Index>(g.groups * view.source_channels * pixels(view.source))),
        source_channel(static_cast<Index>(channels_last ? 1 : pixels(view.source))),
        source_pixel(static_cast<Index>(channels_last ? g.groups * view.source_channels : 1)),
        weight_group(static_cast<Index>(view.weight_group)),
        weight_source(static_cast<Index>(view.weight_source)),
        weight_channel(static_cast<Index>(view.weight_channel)),
        by_width(view.destination[2]),
        by_height(view.destination[1]),
        by_depth(view.destination[0]),
        by_channels(g.groups * view.channels),
        by_group_channels(view.channels) {
    for (int i = 0; i < kAxes; ++i) axis[i] = GatherAxis<Index>(g, i, view.forward);
  }

 private:
  static int64_t pixels(const int64_t* size) { return size[0] * size[1] * size[2]; }
};

template <bool forward, bool channels_last, class Index, class T>
__global__ void __launch_bounds__(kThreads, 4)
    gather_kernel(const Gather<Index> plan, const T* source, const T* weight, const T* bias, T* destination) {
  using A = accumulate_t<T>;
  const Index item = thread_index<Index>();
  if (item >= plan.destinations) return;
  Index number = item, channel = 0, position[kAxes];
  if constexpr (channels_last) channel = take_digit(number, plan.by_channels);
  position[2] = take_digit(number, plan.by_width);
  position[1] = take_digit(number, plan.by_height);
  position[0] = take_digit(number, plan.by_depth);
  if constexpr (!channels_last) channel = take_digit(number, plan.by_channels);
  const Index group = plan.by_group_channels.quotient(channel);
  Index first_tap[kAxes], first_source[kAxes];
#pragma unroll
  for (int i = 0; i < kAxes; ++i) plan.axis[i].template begin<forward>(position[i], first_tap[i], first_source[i]);

  source += number * plan.source_image + group * plan.source_channels * plan.source_channel;
  weight += group * plan.weight_group + (channel - group * plan.by_group_channels.divisor()) * plan.weight_channel;
  A sum = bias == nullptr ? A(0) : static_cast<A>(bias[channel]);
  const GatherAxis<Index>&depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  for (Index s = 0; s < plan.source_channels; ++s) {
    Index z = first_source[0];
    for (Index d = first_tap[0]; d < depth.taps; d += depth.tap_step, z += depth.source_step) {
      if (z < 0 || z >= depth.source) continue;
      Index y = first_source[1];
      for (Index h = first_tap[1]; h < height.taps; h += height.tap_step, y += height.source_step) {
        if (y < 0 || y >= height.source) continue;
        const T* row = source + (z * height.source + y) * width.source * plan.source_pixel;
        const T* taps = weight + (d * height.taps + h) * width.taps;
        Index x = first_source[2];
        A of_row = 0;  // large windows are summed in two levels
#pragma unroll 4
        for (Index w = first_tap[2]; w < width.taps; w += width.tap_step, x += width.source_step)
          if (x >= 0 && x < width.source)
            of_row += static_cast<A>(row[x * plan.source_pixel]) * static_cast<A>(taps[w]);
        sum += of_row;
      }
    }
    source += plan.source_channel;
    weight += plan.weight_source;
  }
  destination[item] = static_cast<T>(sum);
}

// The largest number that the kernels for any window meet.
int64_t largest_number(const ConvGeometry& g) {
  int64_t largest = std::max({g.batch * g.groups * g.in_channels * product(g.input),
                              g.batch * g.groups * g.out_channels * product(g.output),
                              g.groups * g.out_channels * g.in_channels * g.taps()});
  for (int axis = 0; axis < kAxes; ++axis) largest = std::max(largest, GatherAxis<int64_t>::reach(g, axis));
  return largest;
}

template <bool forward, class T>
void gather_any(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const T* source, const T* weight,
                const T* bias, T* destination) {
  for_index_type(largest_number(g), [&](auto index) {
    using Index = decltype(index);
    const Gather<Index> plan(g, GatherView(g, forward), channels_last);
    const unsigned blocks = blocks_for(plan.destinations, kThreads);
    if (channels_last)
      CU_LAUNCH(guard, (gather_kernel<forward, true, Index, T>), blocks, kThreads, 0, plan, source, weight, bias,
                destination);
    else
      CU_LAUNCH(guard, (gather_kernel<forward, false, Index, T>), blocks, kThreads, 0, plan, source, weight, bias,
                destination);
  });
}

// ---- several destination channels a group: a thread gathers `kOut` of them from each source that it reads, with the
// group's weights in shared memory

// N neighbours, in accesses of 16 bytes where they are longer.
template <int N, class T>
CU_DEVICE Pack<T, N> load_long(const T* from) {
  constexpr int kStep = N < kWidest<T> ? N : kWidest<T>;
  Pack<T, N> values;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const Pack<T, kStep> part = load<kStep>(from + i);
#pragma unroll
    for (int k = 0; k < kStep; ++k) values.at[i + k] = part.at[k];
  }
  return values;
}

struct Grouped {
  Gather<int32_t> gather;
  int groups, channels;  // channels: of the destination, in a group
  int lanes;             // neighbouring groups of a block, so that channels_last reads are long enough
  int positions, part;   // (image, position) in all, and of a block
  int group_weights;     // in shared memory, with a gap that spreads the lanes over the banks
  bool packed;           // whether the source's channels can be read four at a time
  Divider<int32_t> by_out_tiles, by_group_tiles, by_lanes, by_taps;
};

template <bool forward, bool channels_last, int kOut, class T>
__global__ void __launch_bounds__(kThreads, 3)
    grouped_gather_kernel(const Grouped plan, const T* __restrict__ source, const T* __restrict__ weight,
                          const T* __restrict__ bias, T* __restrict__ destination) {
  using A = accumulate_t<T>;
  constexpr int N = kChannelPack<T>;
  const Gather<int32_t>& g = plan.gather;
  A* weights = cu_dynamic_shared<A>();  // [lane][tap][source channel][kOut]
  int block = static_cast<int>(blockIdx.x);
  const int first_channel = take_digit(block, plan.by_out_tiles) * kOut;
  const int first_group = take_digit(block, plan.by_group_tiles) * plan.lanes;
  const int lanes = min(plan.lanes, plan.groups - first_group), outs = min(kOut, plan.channels - first_channel);
  const int sources = g.source_channels;
  for (int i = static_cast<int>(threadIdx.x); i < lanes * sources * plan.by_taps.divisor() * kOut; i += kThreads) {
    int rest = i / kOut;
    const int o = i % kOut, tap = take_digit(rest, plan.by_taps), of_lane = rest / sources;
    const int s = rest - of_lane * sources;
    weights[of_lane * plan.group_weights + (tap * sources + s) * kOut + o] =
        o < outs ? static_cast<A>(weight[(first_group + of_lane) * g.weight_group +
                                         (first_channel + o) * g.weight_channel + s * g.weight_source + tap])
                 : A(0);
  }
  __syncthreads();

  const int worker = plan.by_lanes.quotient(static_cast<int>(threadIdx.x));
  const int lane = static_cast<int>(threadIdx.x) - worker * plan.lanes, group = first_group + lane;
  if (lane >= lanes) return;
  weights += lane * plan.group_weights;
  const int out_channel = group * plan.channels + first_channel;
  const int begin = block * plan.part, end = min(begin + plan.part, plan.positions);
#pragma unroll 1
  for (int item = begin + worker; item < end; item += kThreads / plan.lanes) {
    int image = item, position[kAxes], first_tap[kAxes], first_source[kAxes];
#pragma unroll
    for (int i = kAxes - 1; i >= 0; --i)
      position[i] = take_digit(image, i == 2 ? g.by_width : i == 1 ? g.by_height : g.by_depth);
#pragma unroll
    for (int i = 0; i < kAxes; ++i) g.axis[i].template begin<forward>(position[i], first_tap[i], first_source[i]);
    const T* from = source + image * g.source_image + group * sources * g.source_channel;
    A sum[kOut];
#pragma unroll
    for (int o = 0; o < kOut; ++o) sum[o] = bias != nullptr && o < outs ? static_cast<A>(bias[out_channel + o]) : A(0);

    const GatherAxis<int32_t>&depth = g.axis[0], &height = g.axis[1], &width = g.axis[2];
    int z = first_source[0];
    for (int d = first_tap[0]; d < depth.taps; d += depth.tap_step, z += depth.source_step) {
      if (z < 0 || z >= depth.source) continue;
      int y = first_source[1];
      for (int h = first_tap[1]; h < height.taps; h += height.tap_step, y += height.source_step) {
        if (y < 0 || y >= height.source) continue;
        int x = first_source[2];
        for (int w = first_tap[2]; w < width.taps; w += width.tap_step, x += width.source_step) {
          if (x < 0 || x >= width.source) continue;
          const T* at = from + ((z * height.source + y) * width.source + x) * g.source_pixel;
          const A* factors = weights + ((d * height.taps + h) * width.taps + w) * sources * kOut;
          const auto add = [&](A value, int s) {
            const Pack<A, kOut> factor = load_long<kOut>(factors + s * kOut);
#pragma unroll
            for (int o = 0; o < kOut; ++o) sum[o] += factor.at[o] * value;
          };
          if (channels_last && plan.packed) {
#pragma unroll 2
            for (int s = 0; s < sources; s += N) {
              const Pack<T, N> values = load<N>(at + s);
#pragma unroll
              for (int k = 0; k < N; ++k) add(static_cast<A>(values.at[k]), s + k);
            }
          } else {
#pragma unroll 4
            for (int s = 0; s < sources; ++s) add(static_cast<A>(at[s * g.source_channel]), s);
          }
        }
      }
    }

    const int out_width = g.by_width.divisor(), out_height = g.by_height.divisor();
    const int pixels = g.by_depth.divisor() * out_height * out_width, total = plan.groups * plan.channels;
    T* to = destination + (channels_last ? item * total + out_channel
                                         : (image * total + out_channel) * pixels + item - image * pixels);
#pragma unroll
    for (int o = 0; o < kOut; ++o)
      if (o < outs) to[channels_last ? o : o * pixels] = static_cast<T>(sum[o]);
  }
}

// False where there is no such kernel: one channel, numbers beyond 32 bits, or weights beyond the shared memory.
template <bool forward, class T>
bool grouped_gather(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const T* source, const T* weight,
                    const T* bias, T* destination) {
  using A = accumulate_t<T>;
  constexpr int64_t kLongRead = 64, kMostLanes = 8, kMostShared = 48 * 1024, kBanks = 128;
  const GatherView view(g, forward);
  if (view.channels == 1 || largest_number(g) >= index_limit()) return false;
  const int out = view.channels > 4 ? 8 : 4;
  int64_t lanes = 1;
  while (channels_last && lanes < kMostLanes && lanes * 2 <= g.groups &&
         lanes * view.source_channels * static_cast<int64_t>(sizeof(T)) < kLongRead)
    lanes *= 2;
  // Each lane begins 16 bytes beyond a multiple of the banks.
  const int64_t bytes = view.source_channels * g.taps() * out * static_cast<int64_t>(sizeof(A));
  const int64_t lane_bytes = ceil_div(bytes, kBanks) * kBanks + 16;
  while (lanes > 1 && lanes * lane_bytes > kMostShared) lanes /= 2;
  if (lane_bytes > kMostShared) return false;

  const int64_t positions = g.batch * view.destination[0] * view.destination[1] * view.destination[2];
  const int64_t group_tiles = ceil_div(g.groups, lanes), out_tiles = ceil_div(view.channels, out);
  const int64_t workers = kThreads / lanes;
  // Up to 8 positions a thread share the reading of the weights, where there are blocks enough.
  constexpr int64_t kBlocks = 16 * 132;
  const int64_t part = workers * std::clamp<int64_t>(positions * group_tiles * out_tiles / (workers * kBlocks), 1, 8);
  const Grouped plan{
      .gather = Gather<int32_t>(g, view, channels_last),
      .groups = static_cast<int>(g.groups),
      .channels = static_cast<int>(view.channels),
      .lanes = static_cast<int>(lanes),
      .positions = static_cast<int>(positions),
      .part = static_cast<int>(part),
      .group_weights = static_cast<int>(lane_bytes / static_cast<int64_t>(sizeof(A))),
      .packed = view.source_channels % kChannelPack<T> == 0 && all_aligned(kChannelPack<T> * sizeof(T), source),
      .by_out_tiles = Divider<int32_t>(out_tiles),
      .by_group_tiles = Divider<int32_t>(group_tiles),
      .by_lanes = Divider<int32_t>(lanes),
      .by_taps = Divider<int32_t>(g.taps())};
  const unsigned blocks = static_cast<unsigned>(ceil_div(positions, part) * group_tiles * out_tiles);
  const auto launch = [&](auto kernel) {
    CU_LAUNCH(guard, kernel, blocks, kThreads, static_cast<size_t>(lanes * lane_bytes), plan, source, weight, bias,
              destination);
  };
  if (channels_last)
    out == 8 ? launch(grouped_gather_kernel<forward, true, 8, T>) : launch(grouped_gather_kernel<forward, true, 4, T>);
  else
    out == 8 ? launch(grouped_gather_kernel<forward, false, 8, T>)
             : launch(grouped_gather_kernel<forward, false, 4, T>);
  return true;
}

template <bool forward, class T>
void gather(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& source_tensor,
            const Tensor& weight_tensor, const std::optional<Tensor>& bias_tensor, const Tensor& destination_tensor) {
  const T *source = cu_input<T>(source_tensor), *weight = cu_input<T>(weight_tensor);
  const T* bias = bias_tensor ? cu_input<T>(*bias_tensor) : nullptr;
  T* destination = cu_output<T>(destination_tensor);
  constexpr int kPack = kChannelPack<T>;
  if (!channels_last && planar_serves(g, forward))
    planar_gather(guard, g, forward, source, weight, bias, destination);
  else if (channels_last && channel_packs_serve(g, forward, kPack) &&
           all_aligned(kPack * sizeof(T), source, destination))
    channel_packs_gather(guard, g, forward, source, weight, bias, destination);
  else if (!grouped_gather<forward>(guard, g, channels_last, source, weight, bias, destination))
    gather_any<forward>(guard, g, channels_last, source, weight, bias, destination);
}

// ---- the weight gradient of any window

// A thread sums the taps of tile x tile pairs of an output and an input channel: a few neighbours of a window's row at
// a time.
template <int tile>
constexpr int kTapsAtOnce = tile == 1 ? 8 : 3;

template <class Index>
struct WeightGrad {
  Index tiles;                             // of the pairs
  Index positions, part;                   // (image, output) in all, and in a part
  Index in_tiles;                          // of the channels of a group
  Index in_channels, in_total, out_total;  // of a group, of all
  Index in_pixels, out_pixels;             // of a plane
  Index source[kAxes], stride[kAxes], padding[kAxes], dilation[kAxes], window[kAxes];
  Divider<Index> by_width, by_height, by_depth, by_in_tiles, by_out_tiles, by_blocks, by_chunks, by_window_height;

  WeightGrad(const ConvGeometry& g, int tile, int64_t blocks, int64_t chunks, int64_t part_positions)
      : tiles(static_cast<Index>(g.groups * g.out_channels / tile * g.in_channels / tile)),
        positions(static_cast<Index>(g.batch * product(g.output))),
        part(static_cast<Index>(part_positions)),
        in_tiles(static_cast<Index>(g.in_channels / tile)),
        in_channels(static_cast<Index>(g.in_channels)),
        in_total(static_cast<Index>(g.groups * g.in_channels)),
        out_total(static_cast<Index>(g.groups * g.out_channels)),
        in_pixels(static_cast<Index>(product(g.input))),
        out_pixels(static_cast<Index>(product(g.output))),
        by_width(g.output[2]),
        by_height(g.output[1]),
        by_depth(g.output[0]),
        by_in_tiles(g.in_channels / tile),
        by_out_tiles(g.out_channels / tile),
        by_blocks(blocks),
        by_chunks(chunks),
        by_window_height(g.window[1]) {
    for (int i = 0; i < kAxes; ++i) {
      source[i] = static_cast<Index>(g.input[i]);
      stride[i] = static_cast<Index>(g.stride[i]);
      padding[i] = static_cast<Index>(g.padding[i]);
      dilation[i] = static_cast<Index>(g.dilation[i]);
      window[i] = static_cast<Index>(g.window[i]);
    }
  }
};

// The values of `count` neighbouring channels.
template <bool channels_last, int count, class Index, class T>
CU_DEVICE Pack<accumulate_t<T>, count> read_channels(const T* from, Index plane) {
  Pack<accumulate_t<T>, count> values;
  if constexpr (channels_last) {
    const Pack<T, count> pack = load_long<count>(from);
#pragma unroll
    for (int c = 0; c < count; ++c) values.at[c] = static_cast<accumulate_t<T>>(pack.at[c]);
  } else {
#pragma unroll
    for (int c = 0; c < count; ++c) values.at[c] = static_cast<accumulate_t<T>>(from[c * plane]);
  }
  return values;
}

// Block (x, part) sums a part of the positions for one chunk of taps: of one tile of pairs where planes are contiguous,
// of kWarp neighbouring ones, a lane each, in channels_last.
template <bool channels_last, int tile, class Index, class T>
__global__ void __launch_bounds__(kThreads, tile == 1 ? 3 : 1)
    weight_grad_kernel(const WeightGrad<Index> plan, const T* __restrict__ grad_output, const T* __restrict__ input,
                       accumulate_t<T>* __restrict__ partials) {
  using A = accumulate_t<T>;
  constexpr int kTaps = kTapsAtOnce<tile>, kSums = tile * tile * kTaps;
  constexpr int kLanes = channels_last ? kWarp : 1, kWorkers = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, worker = threadIdx.x / kLanes;
  Index window_depth = static_cast<Index>(blockIdx.x);
  const Index pair = take_digit(window_depth, plan.by_blocks) * kLanes + lane;
  const Index first_tap = take_digit(window_depth, plan.by_chunks) * kTaps;
  const Index window_height = take_digit(window_depth, plan.by_window_height);
  const Index taps = min(plan.window[2] - first_tap, Index(kTaps));
  const Index out_tile = plan.by_in_tiles.quotient(pair), out_channel = out_tile * tile;
  const Index in_channel = (pair - out_tile * plan.in_tiles) * tile;  // in the group

  A sum[kSums] = {};
  if (pair < plan.tiles) {
    const Index channel = in_channel + plan.by_out_tiles.quotient(out_tile) * plan.in_channels;
    const Index in_pixel = channels_last ? plan.in_total : 1;
    const Index begin = static_cast<Index>(blockIdx.y) * plan.part, end = min(begin + plan.part, plan.positions);
#pragma unroll 1
    for (Index item = begin + worker; item < end; item += kWorkers) {
      Index image = item;
      const Index w = take_digit(image, plan.by_width), h = take_digit(image, plan.by_height);
      const Index d = take_digit(image, plan.by_depth);
      const Index z = d * plan.stride[0] - plan.padding[0] + window_depth * plan.dilation[0];
      const Index y = h * plan.stride[1] - plan.padding[1] + window_height * plan.dilation[1];
      if (z < 0 || z >= plan.source[0] || y < 0 || y >= plan.source[1]) continue;
      const Pack<A, tile> grad = read_channels<channels_last, tile>(
          grad_output + (channels_last ? item * plan.out_total + out_channel
                                       : (image * plan.out_total + out_channel) * plan.out_pixels +
                                             (item - image * plan.out_pixels)),
          plan.out_pixels);
      const T* from = input + (channels_last ? image * plan.in_pixels * plan.in_total + channel
                                             : (image * plan.in_total + channel) * plan.in_pixels);
      from += (z * plan.source[1] + y) * plan.source[2] * in_pixel;
      Index x = w * plan.stride[2] - plan.padding[2] + first_tap * plan.dilation[2];
#pragma unroll
      for (int k = 0; k < kTaps; ++k, x += plan.dilation[2]) {
        if (k >= taps || x < 0 || x >= plan.source[2]) continue;
        const Pack<A, tile> value = read_channels<channels_last, tile>(from + x * in_pixel, plan.in_pixels);
#pragma unroll
        for (int f = 0; f < tile; ++f)
#pragma unroll
          for (int c = 0; c < tile; ++c) sum[(f * tile + c) * kTaps + k] += grad.at[f] * value.at[c];
      }
    }
  }

  const Index pair_taps = plan.window[0] * plan.window[1] * plan.window[2];
  const Index tap = (window_depth * plan.window[1] + window_height) * plan.window[2] + first_tap;
  partials += static_cast<int64_t>(blockIdx.y) * plan.out_total * plan.in_channels * pair_taps;
  const auto write = [&](int i, A total) {
    const int k = i % kTaps, f = i / kTaps / tile, c = i / kTaps % tile;
    if (k < taps) partials[((out_channel + f) * plan.in_channels + in_channel + c) * pair_taps + tap + k] = total;
  };
  if constexpr (channels_last) {
    CU_SHARED(A, sums, [kWorkers][kThreads]);
    // Worker by worker takes over one of the sums, of all lanes.
    for (int first = 0; first < kSums; first += kWorkers) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (i >= first && i < first + kWorkers) sums[i - first][threadIdx.x] = sum[i];
      __syncthreads();
      A total = 0;
      if (first + worker < kSums && pair < plan.tiles) {
        for (int other = 0; other < kWorkers; ++other) total += sums[worker][other * kLanes + lane];
        write(first + worker, total);
      }
    }
  } else {
    CU_SHARED(A, of_warps, [kSums][kThreads / kWarp]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const A total = warp_reduce(sum[i], [](A a, A b) { return a + b; });
      if (threadIdx.x % kWarp == 0) of_warps[i][threadIdx.x / kWarp] = total;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kSums) {
      A total = 0;
      for (int warp = 0; warp < kThreads / kWarp; ++warp) total += of_warps[threadIdx.x][warp];
      write(static_cast<int>(threadIdx.x), total);
    }
  }
}

// grad_weight[i] = sum over parts of partials[part][i], in their order.
template <class Index, class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(Index count, int parts, const accumulate_t<T>* partials, T* grad_weight) {
  const Index i = thread_index<Index>();
  if (i >= count) return;
  accumulate_t<T> sum = 0;
  for (int part = 0; part < parts; ++part) sum += partials[static_cast<int64_t>(part) * count + i];
  grad_weight[i] = static_cast<T>(sum);
}

template <int tile, class T>
void weight_grad_in_tiles(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                          const Tensor& input, const Tensor& grad_weight) {
  using A = accumulate_t<T>;
  const int64_t tiles = g.groups * g.out_channels / tile * g.in_channels / tile;
  const int64_t pair_blocks = ceil_div(tiles, channels_last ? kWarp : 1);
  const int64_t chunks = ceil_div(g.window[2], kTapsAtOnce<tile>);
  const int64_t blocks = pair_blocks * chunks * g.window[1] * g.window[0], positions = g.batch * product(g.output);
  const Parts parts(blocks, positions, channels_last ? 256 : 2048);
  const Tensor partials = new_partials<T>(parts, grad_weight);
  for_index_type(largest_number(g), [&](auto index) {
    using Index = decltype(index);
    const WeightGrad<Index> plan(g, tile, pair_blocks, chunks, parts.size);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts.count));
    if (channels_last)
      CU_LAUNCH(guard, (weight_grad_kernel<true, tile, Index, T>), grid, kThreads, 0, plan, cu_input<T>(grad_output),
                cu_input<T>(input), cu_output<A>(partials));
    else
      CU_LAUNCH(guard, (weight_grad_kernel<false, tile, Index, T>), grid, kThreads, 0, plan, cu_input<T>(grad_output),
                cu_input<T>(input), cu_output<A>(partials));
  });
  add_parts<T>(guard, parts, partials, grad_weight);
}

template <class T>
void weight_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                 const Tensor& input, const Tensor& grad_weight) {
  constexpr int kPack = kChannelPack<T>, kTile = 4;
  const void *grad = grad_output.const_data_ptr(), *from = input.const_data_ptr();
  if (!channels_last && planar_serves(g, true))
    planar_weight_grad<T>(guard, g, grad_output, input, grad_weight);
  else if (channels_last && channel_packs_serve(g, true, kPack) && all_aligned(kPack * sizeof(T), grad, from))
    channel_packs_weight_grad<T>(guard, g, grad_output, input, grad_weight);
  else if (g.in_channels % kTile == 0 && g.out_channels % kTile == 0 &&
           (!channels_last || all_aligned(std::min<size_t>(16, kTile * sizeof(T)), grad, from)))
    weight_grad_in_tiles<kTile, T>(guard, g, channels_last, grad_output, input, grad_weight);
  else
    weight_grad_in_tiles<1, T>(guard, g, channels_last, grad_output, input, grad_weight);
}

}  // namespace

bool square_window_serves(const ConvGeometry& g, bool forward) {
  const int64_t window = g.window[1], stride = g.stride[1];
  if (g.window[0] != 1 || g.stride[0] != 1 || g.input[0] != 1 || g.output[0] != 1 || g.padding[0] != 0) return false;
  if (window != g.window[2] || (window != 3 && window != 5 && window != 7)) return false;
  if (stride != g.stride[2] || (stride != 1 && (stride != 2 || is_dilated(g)))) return false;
  if (!forward && stride == 2 && g.padding[1] % 2 != g.padding[2] % 2) return false;
  constexpr int64_t kMost = int64_t{1} << 30;
  const double channels = static_cast<double>(g.groups * std::max(g.in_channels, g.out_channels));
  double places = static_cast<double>(g.batch) * channels;  // at most so many tiles
  for (int axis = 1; axis < kAxes; ++axis) {
    const int64_t smaller = std::min(g.input[axis], g.output[axis]), larger = std::max(g.input[axis], g.output[axis]);
    const int64_t reach = window * g.dilation[axis] + g.padding[axis];
    // A tile of destinations that lie far apart is mostly empty on a small axis.
    if (g.dilation[axis] != 1 && g.dilation[axis] * 4 > smaller) return false;
    if (static_cast<double>(std::max(larger, g.output[axis] * stride) + reach) * channels > kMost) return false;
    places *= static_cast<double>(larger + 2 * g.dilation[axis]);
  }
  return places / 2 < kMost;
}

template <class T>
void add_parts(const CudaGuard& guard, const Parts& parts, const Tensor& partials, const Tensor& grad_weight) {
  const int64_t count = grad_weight.numel();
  for_index_type(count, [&](auto index) {
    using Index = decltype(index);
    CU_LAUNCH(guard, (add_parts_kernel<Index, T>), blocks_for(count, kThreads), kThreads, 0, static_cast<Index>(count),
              static_cast<int>(parts.count), cu_input<accumulate_t<T>>(partials), cu_output<T>(grad_weight));
  });
}

template void add_parts<double>(const CudaGuard&, const Parts&, const Tensor&, const Tensor&);
template void add_parts<float>(const CudaGuard&, const Parts&, const Tensor&, const Tensor&);
template void add_parts<BFloat16>(const CudaGuard&, const Parts&, const Tensor&, const Tensor&);
template void add_parts<Half>(const CudaGuard&, const Parts&, const Tensor&, const Tensor&);

bool depthwise_serves(const ConvGeometry& g) { return g.groups > 1 && g.in_channels <= 32 && g.out_channels <= 32; }

void depthwise_forward(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& input,
                       const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output) {
  for_floating_dtype(input.scalar_type(), "conv_forward", [&](auto scalar) {
    gather<true, decltype(scalar)>(guard, g, channels_last, input, weight, bias, output);
  });
}

void depthwise_input_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                          const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& grad_input) {
  for_floating_dtype(grad_output.scalar_type(), "conv_input_grad", [&](auto scalar) {
    gather<false, decltype(scalar)>(guard, g, channels_last, grad_output, weight, bias, grad_input);
  });
}

void depthwise_weight_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                           const Tensor& input, const Tensor& grad_weight) {
  if (grad_output.numel() == 0 || input.numel() == 0) {
    Tensor zeros = grad_weight;
    torch::stable::zero_(zeros);
    return;
  }
  for_floating_dtype(input.scalar_type(), "conv_weight_grad", [&](auto scalar) {
    weight_grad<decltype(scalar)>(guard, g, channels_last, grad_output, input, grad_weight);
  });
}

}  // namespace manual_ops
