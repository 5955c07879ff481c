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
    inverse = static_cast<Index>(modular_inverse(g.dilation[axis] / common, step));
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

 private:
  // x with number*x = 1 modulo `modulus`, by Euclid's algorithm.
  static int64_t modular_inverse(int64_t number, int64_t modulus) {
    int64_t a = modulus, b = number % modulus, x = 0, y = 1;
    while (b != 0) {
      const int64_t quotient = a / b;
      a = std::exchange(b, a - quotient * b);
      x = std::exchange(y, x - quotient * y);
    }
    return ((x % modulus) + modulus) % modulus;
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
__global__ void __launch_bounds__(kThreads)
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
#pragma unroll 4
        for (Index w = first_tap[2]; w < width.taps; w += width.tap_step, x += width.source_step)
          if (x >= 0 && x < width.source) sum += static_cast<A>(row[x * plan.source_pixel]) * static_cast<A>(taps[w]);
      }
    }
    source += plan.source_channel;
    weight += plan.weight_source;
  }
  destination[item] = static_cast<T>(sum);
}

template <bool forward, class T>
void gather_any(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const T* source, const T* weight,
                const T* bias, T* destination) {
  int64_t largest = std::max({g.batch * g.groups * g.in_channels * product(g.input),
                              g.batch * g.groups * g.out_channels * product(g.output),
                              g.groups * g.out_channels * g.in_channels * g.taps()});
  for (int axis = 0; axis < kAxes; ++axis) largest = std::max(largest, GatherAxis<int64_t>::reach(g, axis));
  for_index_type(largest, [&](auto index) {
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
  else
    gather_any<forward>(guard, g, channels_last, source, weight, bias, destination);
}

// ---- the weight gradient of any window: up to kTapsAtOnce neighbours of a window's row in one sweep

constexpr int kTapsAtOnce = 8;

template <class Index>
struct WeightGrad {
  Index rows;                              // of the weight: an output channel and an input channel of its group
  Index positions, part;                   // (image, output) in all, and in a part
  Index in_channels, in_total, out_total;  // of a group, of all
  Index in_pixels, out_pixels;             // of a plane
  Index source[kAxes], stride[kAxes], padding[kAxes], dilation[kAxes], window[kAxes];
  Divider<Index> by_width, by_height, by_depth, by_in_channels, by_out_channels, by_row_blocks, by_chunks,
      by_window_height;

  WeightGrad(const ConvGeometry& g, int64_t row_blocks, int64_t chunks, int64_t part_positions)
      : rows(static_cast<Index>(g.groups * g.out_channels * g.in_channels)),
        positions(static_cast<Index>(g.batch * product(g.output))),
        part(static_cast<Index>(part_positions)),
        in_channels(static_cast<Index>(g.in_channels)),
        in_total(static_cast<Index>(g.groups * g.in_channels)),
        out_total(static_cast<Index>(g.groups * g.out_channels)),
        in_pixels(static_cast<Index>(product(g.input))),
        out_pixels(static_cast<Index>(product(g.output))),
        by_width(g.output[2]),
        by_height(g.output[1]),
        by_depth(g.output[0]),
        by_in_channels(g.in_channels),
        by_out_channels(g.out_channels),
        by_row_blocks(row_blocks),
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

// Block (x, part) sums a part of the positions for one chunk of taps: of one weight row where planes are contiguous, of
// kWarp neighbouring rows, a lane each, in channels_last.
template <bool channels_last, class Index, class T>
__global__ void __launch_bounds__(kThreads)
    weight_grad_kernel(const WeightGrad<Index> plan, const T* grad_output, const T* input, accumulate_t<T>* partials) {
  using A = accumulate_t<T>;
  constexpr int kRows = channels_last ? kWarp : 1, kWorkers = kThreads / kRows;
  const int lane = threadIdx.x % kRows, worker = threadIdx.x / kRows;
  Index window_depth = static_cast<Index>(blockIdx.x);
  const Index row = take_digit(window_depth, plan.by_row_blocks) * kRows + lane;
  const Index first_tap = take_digit(window_depth, plan.by_chunks) * kTapsAtOnce;
  const Index window_height = take_digit(window_depth, plan.by_window_height);
  const Index taps = min(plan.window[2] - first_tap, Index(kTapsAtOnce));

  A sum[kTapsAtOnce] = {};
  if (row < plan.rows) {
    const Index out_channel = plan.by_in_channels.quotient(row);
    const Index channel =
        row - out_channel * plan.in_channels + plan.by_out_channels.quotient(out_channel) * plan.in_channels;
    const Index out_pixel = channels_last ? plan.out_total : 1, in_pixel = channels_last ? plan.in_total : 1;
    const Index begin = static_cast<Index>(blockIdx.y) * plan.part, end = min(begin + plan.part, plan.positions);
    for (Index item = begin + worker; item < end; item += kWorkers) {
      Index image = item;
      const Index w = take_digit(image, plan.by_width), h = take_digit(image, plan.by_height);
      const Index d = take_digit(image, plan.by_depth);
      const Index z = d * plan.stride[0] - plan.padding[0] + window_depth * plan.dilation[0];
      const Index y = h * plan.stride[1] - plan.padding[1] + window_height * plan.dilation[1];
      if (z < 0 || z >= plan.source[0] || y < 0 || y >= plan.source[1]) continue;
      const A grad =
          static_cast<A>(grad_output[channels_last ? item * out_pixel + out_channel
                                                   : (image * plan.out_total + out_channel) * plan.out_pixels +
                                                         (item - image * plan.out_pixels)]);
      const T* from = input + (channels_last ? image * plan.in_pixels * plan.in_total + channel
                                             : (image * plan.in_total + channel) * plan.in_pixels);
      from += (z * plan.source[1] + y) * plan.source[2] * in_pixel;
      Index x = w * plan.stride[2] - plan.padding[2] + first_tap * plan.dilation[2];
#pragma unroll
      for (int k = 0; k < kTapsAtOnce; ++k, x += plan.dilation[2])
        if (k < taps && x >= 0 && x < plan.source[2]) sum[k] += grad * static_cast<A>(from[x * in_pixel]);
    }
  }

  partials += static_cast<int64_t>(blockIdx.y) * plan.rows * plan.window[0] * plan.window[1] * plan.window[2];
  const Index tap = (window_depth * plan.window[1] + window_height) * plan.window[2] + first_tap;
  const Index row_taps = plan.window[0] * plan.window[1] * plan.window[2];
  if constexpr (channels_last) {
    static_assert(kWorkers == kTapsAtOnce);
    CU_SHARED(A, sums, [kTapsAtOnce][kThreads]);
#pragma unroll
    for (int k = 0; k < kTapsAtOnce; ++k) sums[k][threadIdx.x] = sum[k];
    __syncthreads();
    A total = 0;
    for (int other = 0; other < kWorkers; ++other) total += sums[worker][other * kRows + lane];
    if (worker < taps && row < plan.rows) partials[row * row_taps + tap + worker] = total;
  } else {
#pragma unroll
    for (int k = 0; k < kTapsAtOnce; ++k) {
      const A total = block_sum(sum[k]);
      if (threadIdx.x == 0 && k < taps) partials[row * row_taps + tap + k] = total;
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

template <class T>
void weight_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, const Tensor& grad_output,
                 const Tensor& input, const Tensor& grad_weight) {
  using A = accumulate_t<T>;
  const int64_t rows = g.groups * g.out_channels * g.in_channels, count = rows * g.taps();
  const int64_t row_blocks = ceil_div(rows, channels_last ? kWarp : 1), chunks = ceil_div(g.window[2], kTapsAtOnce);
  const int64_t blocks = row_blocks * chunks * g.window[1] * g.window[0], positions = g.batch * product(g.output);
  const Parts parts(blocks, positions, channels_last ? 256 : 2048);
  const Tensor partials = new_partials<T>(parts, grad_weight);
  int64_t largest = std::max({input.numel(), grad_output.numel(), count});
  for (int axis = 0; axis < kAxes; ++axis) largest = std::max(largest, GatherAxis<int64_t>::reach(g, axis));
  for_index_type(largest, [&](auto index) {
    using Index = decltype(index);
    const WeightGrad<Index> plan(g, row_blocks, chunks, parts.size);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts.count));
    if (channels_last)
      CU_LAUNCH(guard, (weight_grad_kernel<true, Index, T>), grid, kThreads, 0, plan, cu_input<T>(grad_output),
                cu_input<T>(input), cu_output<A>(partials));
    else
      CU_LAUNCH(guard, (weight_grad_kernel<false, Index, T>), grid, kThreads, 0, plan, cu_input<T>(grad_output),
                cu_input<T>(input), cu_output<A>(partials));
  });
  add_parts<T>(guard, parts, partials, grad_weight);
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
  for_floating_dtype(input.scalar_type(), "conv_weight_grad", [&](auto scalar) {
    using T = decltype(scalar);
    constexpr int kPack = kChannelPack<T>;
    if (!channels_last && planar_serves(g, true))
      planar_weight_grad<T>(guard, g, grad_output, input, grad_weight);
    else if (channels_last && channel_packs_serve(g, true, kPack) &&
             all_aligned(kPack * sizeof(T), grad_output.const_data_ptr(), input.const_data_ptr()))
      channel_packs_weight_grad<T>(guard, g, grad_output, input, grad_weight);
    else
      weight_grad<T>(guard, g, channels_last, grad_output, input, grad_weight);
  });
}

}  // namespace manual_ops
