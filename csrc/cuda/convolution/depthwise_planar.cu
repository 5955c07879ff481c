// Contiguous tensors, one source channel, square windows of 3, 5 or 7 taps: a thread slides down two neighbouring
// columns of a plane. It reads each row of the source that it meets into registers once, and holds the destinations
// that the window is over.
#include "cuda/convolution/depthwise_kernels.h"

namespace manual_ops {

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 2;  // of the destination, a thread

// Blocks that a multiprocessor is to hold at once, which bounds the registers: the taps of a window are held in them.
template <class T, int window>
constexpr int kBlocksAtOnce = window == 7      ? (sizeof(T) == 8 ? 2 : 4)
                              : sizeof(T) == 8 ? 4
                                               : 6;

// Down the rows: a step reads `read` rows of the source and completes the first `done` of the `open` destinations; the
// first step begins `lead` destinations before the thread's first.
template <int window, int stride, int parity>
struct Slide : Meeting<window, stride, parity> {
  static constexpr bool forward = parity == kForward;
  static constexpr int read = forward ? stride : 1, done = forward ? 1 : 2;
  static constexpr int open = forward ? (window - 1) / stride + 1 : window;
  static constexpr int lead = forward ? open - 1 : 2 * Slide::halo + parity;
  static constexpr int columns = Slide::sources(kColumns);
  static constexpr int tap(int destination, int source) {
    return forward ? (open - 1 - destination) * stride + source : destination;
  }
};

// The sources of a thread's columns in a row that lies inside the plane; zeros beside it.
template <bool dilated, int count, class T, class A>
CU_DEVICE void read_row(const TiledAxis& width, const T* row, int first, A (&values)[count]) {
#pragma unroll
  for (int x = 0; x < count; ++x) {
    const int column = first + (dilated ? x * width.step : x);
    values[x] =
        static_cast<unsigned>(column) < static_cast<unsigned>(width.source) ? static_cast<A>(row[column]) : A(0);
  }
}

struct PlanarGather {
  TiledAxis height, width;
  int items;                                           // tiles of all planes
  bool turned;                                         // the window
  bool packed;                                         // whether the columns of a thread can be stored at once
  Divider<int32_t> by_source_channels, by_multiplier;  // all of the source's, destinations of one
};

template <int window, int stride, int parity, bool dilated, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, window>)
    planar_gather_kernel(const PlanarGather plan, const T* __restrict__ source, const T* __restrict__ weight,
                         const T* __restrict__ bias, T* __restrict__ destination) {
  using A = accumulate_t<T>;
  using S = Slide<window, stride, parity>;
  const int item = thread_index<int32_t>();
  if (item >= plan.items) return;
  int plane = item;
  const int column = plan.width.start<dilated>(take_digit(plane, plan.width.by_tiles));
  const int row = plan.height.start<dilated>(take_digit(plane, plan.height.by_tiles));
  const int rows = plan.height.count<dilated>(row);
  const int source_plane = plan.by_multiplier.quotient(plane);
  const int image = plan.by_source_channels.quotient(source_plane);
  const int channel = plane - image * plan.by_source_channels.divisor() * plan.by_multiplier.divisor();
  const int source_row = plan.height.first_source + (S::forward ? row * stride : row / 2);
  const int source_column = plan.width.first_source + (S::forward ? column * stride : column / 2);
  source += static_cast<int64_t>(source_plane) * plan.height.source * plan.width.source;
  destination += static_cast<int64_t>(plane) * plan.height.destination * plan.width.destination + column;

  A taps[window * window];
  weight += static_cast<int64_t>(channel) * (window * window);
#pragma unroll
  for (int tap = 0; tap < window * window; ++tap)
    taps[tap] = static_cast<A>(weight[plan.turned ? window * window - 1 - tap : tap]);

  A sum[S::open][kColumns];
  const A start = bias == nullptr ? A(0) : static_cast<A>(bias[channel]);
#pragma unroll
  for (int i = 0; i < S::open; ++i)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[i][c] = start;

  const int steps = (rows - 1 + S::lead) / S::done + 1;
#pragma unroll(window == 3 ? 2 : 1)
  for (int step = 0; step < steps; ++step) {
    const int first = step * S::done - S::lead;  // of the open destinations
#pragma unroll
    for (int j = 0; j < S::read; ++j) {
      const int y = source_row + (step * S::read + j) * (dilated ? plan.height.step : 1);
      if (static_cast<unsigned>(y) >= static_cast<unsigned>(plan.height.source)) continue;
      A values[S::columns];
      read_row<dilated>(plan.width, source + static_cast<int64_t>(y) * plan.width.source, source_column, values);
#pragma unroll
      for (int i = 0; i < S::open; ++i) {
        const int h = S::tap(i, j);
        if (h >= window || static_cast<unsigned>(first + i) >= static_cast<unsigned>(rows)) continue;
#pragma unroll
        for (int x = 0; x < S::columns; ++x)
#pragma unroll
          for (int w = 0; w < window; ++w) {
            const int c = S::destination(x, w);
            if (c >= 0 && c < kColumns) sum[i][c] += taps[h * window + w] * values[x];
          }
      }
    }
#pragma unroll
    for (int i = 0; i < S::done; ++i) {
      if (static_cast<unsigned>(first + i) >= static_cast<unsigned>(rows)) continue;
      const int y = row + (first + i) * (dilated ? plan.height.step : 1);
      T* to = destination + static_cast<int64_t>(y) * plan.width.destination;
      if (!dilated && plan.packed) {
        Pack<T, kColumns> pack;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) pack.at[c] = static_cast<T>(sum[i][c]);
        store<kColumns>(to, pack);
      } else {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int x = dilated ? c * plan.width.step : c;
          if (column + x < plan.width.destination) to[x] = static_cast<T>(sum[i][c]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < S::open; ++i)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[i][c] = i + S::done < S::open ? sum[(i + S::done) % S::open][c] : start;
  }
}

struct PlanarWeightGrad {
  TiledAxis height, width;  // forward's: the source is the input, the destination grad_output
  int tiles, part;          // of all images, and in a part
  int out_channels;
  Divider<int32_t> by_multiplier;
};

// Block (output channel, part): sums all taps of the channel's window over the tiles of its part.
template <int window, int stride, bool dilated, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce<T, window>)
    planar_weight_grad_kernel(const PlanarWeightGrad plan, const T* __restrict__ grad_output,
                              const T* __restrict__ input, accumulate_t<T>* __restrict__ partials) {
  using A = accumulate_t<T>;
  using S = Slide<window, stride, kForward>;
  constexpr int kTaps = window * window, kWarps = kThreads / kWarp;
  CU_SHARED(A, of_warps, [kTaps][kWarps]);
  const int out_channel = static_cast<int>(blockIdx.x), channel = plan.by_multiplier.quotient(out_channel);
  const int channels = plan.by_multiplier.quotient(plan.out_channels);

  A sum[kTaps] = {};
  const int begin = static_cast<int>(blockIdx.y) * plan.part, end = min(begin + plan.part, plan.tiles);
#pragma unroll 1
  for (int tile = begin + static_cast<int>(threadIdx.x); tile < end; tile += static_cast<int>(blockDim.x)) {
    int image = tile;
    const int column = plan.width.start<dilated>(take_digit(image, plan.width.by_tiles));
    const int row = plan.height.start<dilated>(take_digit(image, plan.height.by_tiles));
    const int rows = plan.height.count<dilated>(row);
    const int source_row = plan.height.first_source + row * stride;
    const int source_column = plan.width.first_source + column * stride;
    const T* from = input + (static_cast<int64_t>(image) * channels + channel) * plan.height.source * plan.width.source;
    const T* grads = grad_output + (static_cast<int64_t>(image) * plan.out_channels + out_channel) *
                                       plan.height.destination * plan.width.destination;
    bool exists[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      exists[c] = column + (dilated ? c * plan.width.step : c) < plan.width.destination;

    A grad[S::open][kColumns] = {};
    const int steps = rows + S::lead;
#pragma unroll(window == 3 ? 2 : 1)
    for (int step = 0; step < steps; ++step) {
      const int first = step - S::lead;
#pragma unroll
      for (int i = 0; i + 1 < S::open; ++i)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) grad[i][c] = grad[i + 1][c];
      const int newest = row + step * (dilated ? plan.height.step : 1);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        grad[S::open - 1][c] = step < rows && exists[c]
                                   ? static_cast<A>(grads[static_cast<int64_t>(newest) * plan.width.destination +
                                                          column + (dilated ? c * plan.width.step : c)])
                                   : A(0);
#pragma unroll
      for (int j = 0; j < S::read; ++j) {
        const int y = source_row + (step * S::read + j) * (dilated ? plan.height.step : 1);
        if (static_cast<unsigned>(y) >= static_cast<unsigned>(plan.height.source)) continue;
        A values[S::columns];
        read_row<dilated>(plan.width, from + static_cast<int64_t>(y) * plan.width.source, source_column, values);
#pragma unroll
        for (int i = 0; i < S::open; ++i) {
          const int h = S::tap(i, j);
          if (h >= window || static_cast<unsigned>(first + i) >= static_cast<unsigned>(rows)) continue;
#pragma unroll
          for (int c = 0; c < kColumns; ++c)
#pragma unroll
            // A column that does not exist is left out, not taken for zero: its window may be over an infinity.
            for (int w = 0; w < window; ++w)
              sum[h * window + w] += grad[i][c] * (exists[c] ? values[c * stride + w] : A(0));
        }
      }
    }
  }

#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    const A total = warp_reduce(sum[tap], [](A a, A b) { return a + b; });
    if (threadIdx.x % kWarp == 0) of_warps[tap][threadIdx.x / kWarp] = total;
  }
  __syncthreads();
  partials += (static_cast<int64_t>(blockIdx.y) * plan.out_channels + out_channel) * kTaps;
  for (int tap = threadIdx.x; tap < kTaps; tap += blockDim.x) {
    A total = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += of_warps[tap][warp];
    partials[tap] = total;
  }
}

// Rows of a tile: a tall one reads few rows twice, but there are to be enough tiles to fill the device, given how many
// there are of a column each. Always even, as the input gradient at stride 2 asks.
int64_t tile_rows(int64_t rows, int64_t columns, int64_t window) {
  constexpr int64_t kEnough = 132 * 1024;
  int64_t size = rows;
  while (size > 2 * window && columns * ceil_div(rows, size) < kEnough) size = ceil_div(size, 2);
  return size + size % 2;
}

template <int window, int stride, int parity, bool dilated, class T>
void launch_gather(const CudaGuard& guard, const ConvGeometry& g, bool forward, const T* source, const T* weight,
                   const T* bias, T* destination) {
  using S = Slide<window, stride, parity>;
  const GatherView view(g, forward);
  const int64_t planes = g.batch * g.groups * view.channels;
  PlanarGather plan;
  plan.turned = S::forward && !forward;
  const auto axis = [&](int i, int64_t size) {
    return TiledAxis(view.source[i], view.destination[i], size, S::first_source(g, i, plan.turned), g.dilation[i]);
  };
  plan.width = axis(2, kColumns);
  plan.height = axis(
      1, tile_rows(ceil_div(view.destination[1], g.dilation[1]), planes * plan.width.tiles * g.dilation[1], window));
  plan.items = static_cast<int>(planes * plan.height.tiles * plan.width.tiles);
  plan.packed = view.destination[2] % kColumns == 0 && all_aligned(kColumns * sizeof(T), destination);
  plan.by_source_channels = Divider<int32_t>(g.groups);
  plan.by_multiplier = Divider<int32_t>(view.channels);
  CU_LAUNCH(guard, (planar_gather_kernel<window, stride, parity, dilated, T>), blocks_for(plan.items, kThreads),
            kThreads, 0, plan, source, weight, bias, destination);
}

template <int window, int stride, bool dilated, class T>
void launch_weight_grad(const CudaGuard& guard, const ConvGeometry& g, const Tensor& grad_output, const Tensor& input,
                        const Tensor& grad_weight) {
  const int64_t channels = g.groups * g.out_channels;
  PlanarWeightGrad plan;
  plan.width = TiledAxis(g.input[2], g.output[2], kColumns, -g.padding[2], g.dilation[2]);
  const int64_t rows =
      tile_rows(ceil_div(g.output[1], g.dilation[1]), g.batch * channels * plan.width.tiles * g.dilation[1], window);
  plan.height = TiledAxis(g.input[1], g.output[1], rows, -g.padding[1], g.dilation[1]);
  plan.tiles = static_cast<int>(g.batch * plan.height.tiles * plan.width.tiles);
  plan.out_channels = static_cast<int>(channels);
  plan.by_multiplier = Divider<int32_t>(g.out_channels);
  const Parts parts(channels, plan.tiles, kThreads);
  plan.part = static_cast<int>(parts.size);
  const Tensor partials = new_partials<T>(parts, grad_weight);
  const unsigned threads = kWarp * blocks_for(std::min<int64_t>(plan.part, kThreads), kWarp);
  const dim3 grid(static_cast<unsigned>(channels), static_cast<unsigned>(parts.count));
  CU_LAUNCH(guard, (planar_weight_grad_kernel<window, stride, dilated, T>), grid, threads, 0, plan,
            cu_input<T>(grad_output), cu_input<T>(input), cu_output<accumulate_t<T>>(partials));
  add_parts<T>(guard, parts, partials, grad_weight);
}

}  // namespace

bool planar_serves(const ConvGeometry& g, bool forward) {
  return g.in_channels == 1 && (forward || g.out_channels == 1) && square_window_serves(g, forward);
}

template <class T>
void planar_gather(const CudaGuard& guard, const ConvGeometry& g, bool forward, const T* source, const T* weight,
                   const T* bias, T* destination) {
  for_square_window(g, [&](auto window, auto stride, auto dilated) {
    constexpr int k = window.value, s = stride.value;
    if (s == 1 || forward)
      launch_gather<k, s, kForward, dilated.value>(guard, g, forward, source, weight, bias, destination);
    else if constexpr (s == 2) {
      if (g.padding[1] % 2 == 0)
        launch_gather<k, s, 0, false>(guard, g, forward, source, weight, bias, destination);
      else
        launch_gather<k, s, 1, false>(guard, g, forward, source, weight, bias, destination);
    }
  });
}

template <class T>
void planar_weight_grad(const CudaGuard& guard, const ConvGeometry& g, const Tensor& grad_output, const Tensor& input,
                        const Tensor& grad_weight) {
  for_square_window(g, [&](auto window, auto stride, auto dilated) {
    launch_weight_grad<window.value, stride.value, dilated.value, T>(guard, g, grad_output, input, grad_weight);
  });
}

#define INSTANTIATE(T)                                                                                        \
  template void planar_gather(const CudaGuard&, const ConvGeometry&, bool, const T*, const T*, const T*, T*); \
  template void planar_weight_grad<T>(const CudaGuard&, const ConvGeometry&, const Tensor&, const Tensor&,    \
                                      const Tensor&);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
