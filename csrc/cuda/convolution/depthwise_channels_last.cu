// channels_last tensors with one channel a group, square windows of 3, 5 or 7 taps: a thread computes a few neighbours
// of a row, for a pack of channels.
#include "cuda/convolution/depthwise_kernels.h"

namespace manual_ops {

namespace {

constexpr int kThreads = 256;

// Blocks that a multiprocessor is to hold at once, which bounds the registers.
template <class T, int window>
constexpr int kBlocksAtOnce = window == 3 && sizeof(T) < 8 ? 3 : 2;

// Destinations of a thread; even at stride 2. Seven divides the usual sizes.
template <int window, int stride>
constexpr int kColumns = window == 7 && stride == 1 ? 7 : 4;

// What blocks walk over: the items (image, strip of rows, tile of columns, row of the strip), the last fastest, so that
// rows which share sources are read at about the same time.
struct Walk {
  TiledAxis width;
  int rows, strip, items;
  Divider<int32_t> by_strip, by_strips;

  Walk() = default;
  Walk(const TiledAxis& axis, int64_t batch, int64_t row_count) : width(axis), rows(static_cast<int>(row_count)) {
    constexpr int64_t kStrip = 8;
    const int64_t strips = ceil_div(row_count, kStrip), even = ceil_div(row_count, strips);
    strip = static_cast<int>(even);
    items = static_cast<int>(batch * strips * width.tiles * strip);
    by_strip = Divider<int32_t>(even);
    by_strips = Divider<int32_t>(strips);
  }

  // Whether there is such a row.
  CU_DEVICE bool at(int item, int& image, int& row, int& column) const {
    image = item;
    row = take_digit(image, by_strip);
    column = width.start<true>(take_digit(image, width.by_tiles));
    row += take_digit(image, by_strips) * strip;
    return row < rows;
  }
};

// The channels, in tiles of `lanes` packs.
struct Channels {
  int count, packs, lanes, tiles;
  Divider<int32_t> by_lanes, by_tiles;

  Channels() = default;
  Channels(int64_t channels, int pack, int64_t most_lanes)
      : count(static_cast<int>(channels)), packs(static_cast<int>(channels / pack)) {
    lanes = static_cast<int>(ceil_div(packs, ceil_div(packs, most_lanes)));
    by_lanes = Divider<int32_t>(lanes);
    tiles = static_cast<int>(ceil_div(packs, lanes));
    by_tiles = Divider<int32_t>(tiles);
  }
};

// A pack in the accumulation type; zeros where it is not inside.
template <int N, class T>
CU_DEVICE Pack<accumulate_t<T>, N> read_pack(const T* from, bool inside) {
  Pack<accumulate_t<T>, N> values = {};
  if (inside) {
    const Pack<T, N> pack = load<N>(from);
#pragma unroll
    for (int p = 0; p < N; ++p) values.at[p] = static_cast<accumulate_t<T>>(pack.at[p]);
  }
  return values;
}

struct PackGather {
  Walk walk;
  Channels channels;
  int source_rows, first_source_row, row_step;  // row_step: between the taps
  int padding;                                  // of the rows
  int part;                                     // items of a block
  bool turned;
};

template <int window, class A, int N>
struct alignas(16) SharedTaps {
  A at[window * window][kWarp * N];
};

template <int window, int stride, int parity, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, window>)
    pack_gather_kernel(const PackGather plan, const T* __restrict__ source, const T* __restrict__ weight,
                       const T* __restrict__ bias, T* __restrict__ destination) {
  using A = accumulate_t<T>;
  using M = Meeting<window, stride, parity>;
  constexpr int N = kChannelPack<T>, kTaps = window * window, kOut = kColumns<window, stride>;
  using Taps = SharedTaps<window, A, N>;
  CU_SHARED(Taps, taps, [1]);
  int block = static_cast<int>(blockIdx.x);
  const int first_pack = take_digit(block, plan.channels.by_tiles) * plan.channels.lanes;
  const int tile_packs = min(plan.channels.lanes, plan.channels.packs - first_pack);
  for (int i = static_cast<int>(threadIdx.x); i < tile_packs * N * kTaps; i += kThreads) {
    const int tap = i % kTaps;
    taps[0].at[plan.turned ? kTaps - 1 - tap : tap][i / kTaps] =
        static_cast<A>(weight[static_cast<int64_t>(first_pack) * N * kTaps + i]);
  }
  __syncthreads();

  const int worker = plan.channels.by_lanes.quotient(static_cast<int>(threadIdx.x));
  const int lane = static_cast<int>(threadIdx.x) - worker * plan.channels.lanes;
  const int workers = plan.channels.by_lanes.quotient(kThreads), channel = (first_pack + lane) * N;
  if (worker >= workers || lane >= tile_packs) return;
  Pack<A, N> start = {};
  if (bias != nullptr)
#pragma unroll
    for (int p = 0; p < N; ++p) start.at[p] = static_cast<A>(bias[channel + p]);
  const int channels = plan.channels.count;
  const int begin = block * plan.part, end = min(begin + plan.part, plan.walk.items);
#pragma unroll 1
  for (int item = begin + worker; item < end; item += workers) {
    int image, row, column;
    if (!plan.walk.at(item, image, row, column)) continue;
    const TiledAxis& width = plan.walk.width;
    const int first_column = width.first_source + M::source_of(column);
    const T* image_source = source + static_cast<int64_t>(image) * plan.source_rows * width.source * channels + channel;
    Pack<A, N> sum[kOut];
#pragma unroll
    for (int r = 0; r < kOut; ++r) sum[r] = start;
    // The taps that this row of the destination meets: all, or in the input gradient at stride 2 every other.
    const int first_tap = parity == kForward ? 0 : (row + plan.padding) & 1;
#pragma unroll 1
    for (int h = first_tap; h < window; h += parity == kForward ? 1 : 2) {
      const int y =
          parity == kForward ? row * stride + plan.first_source_row + h * plan.row_step : (row + plan.padding - h) / 2;
      // What is before the first row is rounded up to 0 by the division.
      if (y < 0 || y >= plan.source_rows || (parity != kForward && row + plan.padding < h)) continue;
      const T* from = image_source + static_cast<int64_t>(y) * width.source * channels;
      Pack<A, N> factor[window];
#pragma unroll
      for (int w = 0; w < window; ++w) factor[w] = load<N>(&taps[0].at[h * window + w][lane * N]);
#pragma unroll
      for (int x = 0; x < M::sources(kOut); ++x) {
        const int place = first_column + x * width.step;
        const bool inside = static_cast<unsigned>(place) < static_cast<unsigned>(width.source);
        const Pack<A, N> value = read_pack<N>(from + place * channels, inside);
#pragma unroll
        for (int w = 0; w < window; ++w) {
          const int r = M::destination(x, w);
          if (r < 0 || r >= kOut) continue;
#pragma unroll
          for (int p = 0; p < N; ++p) sum[r].at[p] += factor[w].at[p] * value.at[p];
        }
      }
    }
    T* to = destination + (static_cast<int64_t>(image) * plan.walk.rows + row) * width.destination * channels + channel;
#pragma unroll
    for (int r = 0; r < kOut; ++r) {
      const int place = column + r * width.step;
      if (place >= width.destination) break;
      Pack<T, N> result;
#pragma unroll
      for (int p = 0; p < N; ++p) result.at[p] = static_cast<T>(sum[r].at[p]);
      store<N>(to + place * channels, result);
    }
  }
}

struct PackWeightGrad {
  Walk walk;  // forward's: the source is the input, the destination grad_output
  Channels channels;
  int source_rows, first_source_row, row_step;
  int part, workers;
};

// Adds the taps of one row of the window. The outputs beyond the end, which only a tile that is not `whole` has, are
// left out rather than taken for zero: their windows may be over an infinity.
template <int window, int stride, bool whole, class T, class A, int N>
CU_DEVICE void add_row(const TiledAxis& width, int channels, const T* grad_row, const T* row, int column, int count,
                       Pack<A, N> (&sum)[window]) {
  using M = Meeting<window, stride, kForward>;
  constexpr int kOut = kColumns<window, stride>;
  Pack<A, N> grad[kOut];
#pragma unroll
  for (int r = 0; r < kOut; ++r)
    grad[r] = read_pack<N>(grad_row + (column + r * width.step) * channels, whole || r < count);
  const int first = width.first_source + column * stride;
#pragma unroll
  for (int x = 0; x < M::sources(kOut); ++x) {
    const int place = first + x * width.step;
    const Pack<A, N> value =
        read_pack<N>(row + place * channels, static_cast<unsigned>(place) < static_cast<unsigned>(width.source));
#pragma unroll
    for (int w = 0; w < window; ++w) {
      const int r = M::destination(x, w);
      if (r < 0 || r >= kOut || !(whole || r < count)) continue;
#pragma unroll
      for (int p = 0; p < N; ++p) sum[w].at[p] += grad[r].at[p] * value.at[p];
    }
  }
}

// A thread sums the taps of one row of the window, for a pack of channels; those of a block's threads that read the
// same outputs are at work on them at about the same time.
template <int window, int stride, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, window>)
    pack_weight_grad_kernel(const PackWeightGrad plan, const T* __restrict__ grad_output, const T* __restrict__ input,
                            accumulate_t<T>* __restrict__ partials) {
  using A = accumulate_t<T>;
  constexpr int N = kChannelPack<T>, kTaps = window * window;
  A* sums = cu_dynamic_shared<A>();  // [worker][tap][channel of the tile]
  int block = static_cast<int>(blockIdx.x);
  const int first_pack = take_digit(block, plan.channels.by_tiles) * plan.channels.lanes;
  const int tile_packs = min(plan.channels.lanes, plan.channels.packs - first_pack);
  const int rest = plan.channels.by_lanes.quotient(static_cast<int>(threadIdx.x));
  const int lane = static_cast<int>(threadIdx.x) - rest * plan.channels.lanes;
  const int worker = rest / window, h = rest - worker * window, channel = (first_pack + lane) * N;
  const int channels = plan.channels.count, tile_channels = tile_packs * N;

  if (worker < plan.workers && lane < tile_packs) {
    Pack<A, N> sum[window] = {};
    const int begin = block * plan.part, end = min(begin + plan.part, plan.walk.items);
#pragma unroll 1
    for (int item = begin + worker; item < end; item += plan.workers) {
      int image, row, column;
      if (!plan.walk.at(item, image, row, column)) continue;
      const int y = row * stride + plan.first_source_row + h * plan.row_step;
      if (y < 0 || y >= plan.source_rows) continue;
      const TiledAxis& width = plan.walk.width;
      const T* grads =
          grad_output + (static_cast<int64_t>(image) * plan.walk.rows + row) * width.destination * channels + channel;
      const T* from = input + (static_cast<int64_t>(image) * plan.source_rows + y) * width.source * channels + channel;
      const int count = width.count<true>(column);
      if (count == kColumns<window, stride>)
        add_row<window, stride, true>(width, channels, grads, from, column, count, sum);
      else
        add_row<window, stride, false>(width, channels, grads, from, column, count, sum);
    }
#pragma unroll
    for (int w = 0; w < window; ++w)
      store<N>(sums + ((worker * window + h) * window + w) * tile_channels + lane * N, sum[w]);
  }
  __syncthreads();
  partials += (static_cast<int64_t>(block) * channels + first_pack * N) * kTaps;
  for (int i = static_cast<int>(threadIdx.x); i < tile_channels * kTaps; i += static_cast<int>(blockDim.x)) {
    const int of_tile = i / kTaps, tap = i % kTaps;
    A total = 0;
    for (int other = 0; other < plan.workers; ++other) total += sums[(other * kTaps + tap) * tile_channels + of_tile];
    partials[i] = total;
  }
}

template <int window, int stride, int parity, class T>
void launch_gather(const CudaGuard& guard, const ConvGeometry& g, bool forward, const T* source, const T* weight,
                   const T* bias, T* destination) {
  using M = Meeting<window, stride, parity>;
  const GatherView view(g, forward);
  PackGather plan;
  plan.turned = parity == kForward && !forward;
  const TiledAxis width(view.source[2], view.destination[2], kColumns<window, stride>,
                        M::first_source(g, 2, plan.turned), g.dilation[2]);
  plan.walk = Walk(width, g.batch, view.destination[1]);
  plan.channels = Channels(g.groups, kChannelPack<T>, kWarp);
  plan.source_rows = static_cast<int>(view.source[1]);
  plan.first_source_row = static_cast<int>(M::first_source(g, 1, plan.turned));
  plan.row_step = static_cast<int>(g.dilation[1]);
  plan.padding = static_cast<int>(g.padding[1]);
  // Up to 8 items a thread share the reading of the weights, where there are blocks enough.
  constexpr int64_t kBlocks = 16 * 132;
  const int64_t workers = kThreads / plan.channels.lanes, tiles = plan.channels.tiles;
  plan.part = static_cast<int>(workers * std::clamp<int64_t>(plan.walk.items * tiles / (workers * kBlocks), 1, 8));
  CU_LAUNCH(guard, (pack_gather_kernel<window, stride, parity, T>),
            static_cast<unsigned>(tiles * ceil_div(plan.walk.items, plan.part)), kThreads, 0, plan, source, weight,
            bias, destination);
}

template <int window, int stride, class T>
void launch_weight_grad(const CudaGuard& guard, const ConvGeometry& g, const Tensor& grad_output, const Tensor& input,
                        const Tensor& grad_weight) {
  using A = accumulate_t<T>;
  constexpr int64_t kMostLanes = 16;
  PackWeightGrad plan;
  plan.walk = Walk(TiledAxis(g.input[2], g.output[2], kColumns<window, stride>, -g.padding[2], g.dilation[2]), g.batch,
                   g.output[1]);
  plan.channels = Channels(g.groups, kChannelPack<T>, kMostLanes);
  plan.source_rows = static_cast<int>(g.input[1]);
  plan.first_source_row = static_cast<int>(-g.padding[1]);
  plan.row_step = static_cast<int>(g.dilation[1]);
  const int64_t tiles = plan.channels.tiles;
  plan.workers = kThreads / (plan.channels.lanes * window);
  // A part is eight times as large as the sums that it leaves.
  const Parts parts(tiles, plan.walk.items, ceil_div(8 * window * window, kColumns<window, stride>));
  plan.part = static_cast<int>(parts.size);
  const Tensor partials = new_partials<T>(parts, grad_weight);
  const unsigned threads = kWarp * blocks_for(plan.channels.lanes * window * plan.workers, kWarp);
  const size_t shared = sizeof(A) * plan.workers * window * window * plan.channels.lanes * kChannelPack<T>;
  CU_LAUNCH(guard, (pack_weight_grad_kernel<window, stride, T>), static_cast<unsigned>(tiles * parts.count), threads,
            shared, plan, cu_input<T>(grad_output), cu_input<T>(input), cu_output<A>(partials));
  add_parts<T>(guard, parts, partials, grad_weight);
}

}  // namespace

bool channel_packs_serve(const ConvGeometry& g, bool forward, int pack) {
  return g.in_channels == 1 && g.out_channels == 1 && g.groups % pack == 0 && square_window_serves(g, forward);
}

template <class T>
void channel_packs_gather(const CudaGuard& guard, const ConvGeometry& g, bool forward, const T* source, const T* weight,
                          const T* bias, T* destination) {
  for_square_window(g, [&](auto window, auto stride, auto) {
    constexpr int k = window.value, s = stride.value;
    if (s == 1 || forward)
      launch_gather<k, s, kForward>(guard, g, forward, source, weight, bias, destination);
    else if constexpr (s == 2) {
      if (g.padding[1] % 2 == 0)
        launch_gather<k, s, 0>(guard, g, forward, source, weight, bias, destination);
      else
        launch_gather<k, s, 1>(guard, g, forward, source, weight, bias, destination);
    }
  });
}

template <class T>
void channel_packs_weight_grad(const CudaGuard& guard, const ConvGeometry& g, const Tensor& grad_output,
                               const Tensor& input, const Tensor& grad_weight) {
  for_square_window(g, [&](auto window, auto stride, auto) {
    launch_weight_grad<window.value, stride.value, T>(guard, g, grad_output, input, grad_weight);
  });
}

#define INSTANTIATE(T)                                                                                               \
  template void channel_packs_gather(const CudaGuard&, const ConvGeometry&, bool, const T*, const T*, const T*, T*); \
  template void channel_packs_weight_grad<T>(const CudaGuard&, const ConvGeometry&, const Tensor&, const Tensor&,    \
                                             const Tensor&);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
