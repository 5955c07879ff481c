// Batch norm, alone and fused with the residual and the ReLU behind it. The formulas are in ops/batch_norm.py.
//
// In training the forward reads its input twice and the backward its two operands twice: a pass for the sums and a pass
// for the result, which starts where the first ended, so that what the L2 cache holds is not read again.
#include <tuple>

#include "cuda/channels.h"

namespace manual_ops {

namespace {

// y = (x - mean) * scale + bias, of which the forward makes its output and the backward its gate.
template <class A>
struct Affine {
  A mean, scale, bias;

  // One expression, in operations that no compiler merges or splits: both round alike.
  CU_DEVICE A operator()(A x) const { return fma(x - mean, scale, bias); }
};

// ReLU's result and its gradient's gate in the dtype of the tensor: a NaN passes.
template <class T>
CU_DEVICE bool passes(T value) {
  return !(static_cast<accumulate_t<T>>(value) <= 0);
}

struct Normalisation {
  ChannelNumbers mean, var, weight, bias;
  double eps;

  // From the variance as it is saved, rounded to A: the backward finds the forward's scale again, to the bit.
  template <class A>
  CU_DEVICE double rstd(int64_t channel) const {
    return var.values == nullptr ? 1 : 1 / sqrt(static_cast<double>(static_cast<A>(var[channel])) + eps);
  }

  template <class A>
  CU_DEVICE Affine<A> affine(int64_t channel) const {
    return {static_cast<A>(mean[channel]), static_cast<A>(weight[channel] * rstd<A>(channel)),
            static_cast<A>(bias[channel])};
  }
};

// Tensors with a number a channel, and the dense copies of those that have gaps.
struct Parameters {
  int64_t channels;
  std::vector<Tensor> dense;

  ChannelNumbers numbers(const MaybeTensor& tensor, double otherwise) {
    return channel_numbers(tensor, channels, otherwise, "batch_norm", dense);
  }
  Normalisation normalisation(const MaybeTensor& mean, const MaybeTensor& var, const MaybeTensor& weight,
                              const MaybeTensor& bias, double eps) {
    return {numbers(mean, 0), numbers(var, 1), numbers(weight, 1), numbers(bias, 0), eps};
  }
};

// ---- sums

// sum d and sum d * d, where d is the distance from a value near the channel's mean.
template <class T_>
struct Moments {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 1, kSums = 2, kSamples = 8;
  const T* inputs[kInputs];
  int64_t pixels;             // from a channel to the next
  int64_t samples[kSamples];  // their places in the first channel

  Moments(const T* input, const Matrix& matrix) : inputs{input}, pixels(matrix.pixels) {
    // Multiples of the golden ratio, modulo 1, spread in both axes: neither a border nor a first row fills them.
    double place = 0.5;
    for (int64_t& sample : samples) {
      const int64_t row = static_cast<int64_t>(place * static_cast<double>(matrix.rows));
      const double rest = place * static_cast<double>(matrix.rows) - static_cast<double>(row);
      sample = row * matrix.columns + static_cast<int64_t>(rest * static_cast<double>(pixels));
      place += 0.6180339887498949;
      if (place >= 1) place -= 1;
    }
  }

  struct Channel {
    A about;
  };
  CU_DEVICE Channel channel(int64_t channel) const {
    A about = 0;
#pragma unroll
    for (int64_t sample : samples) about += static_cast<A>(inputs[0][channel * pixels + sample]) / A(kSamples);
    return {isfinite(about) ? about : A(0)};  // an infinity belongs into the sums, where the mean comes out infinite
  }
  CU_DEVICE void add(const Channel& channel, const A (&x)[1], A (&sums)[2]) const {
    const A d = x[0] - channel.about;
    sums[0] += d;
    sums[1] += d * d;
  }
};

template <class T>
struct FinishMoments {
  Moments<T> moments;
  double count;
  bool empty;
  accumulate_t<T>*mean, *var;

  CU_DEVICE void operator()(int64_t channel, const double (&sums)[2]) const {
    using A = accumulate_t<T>;
    const double shift = sums[0] / count, variance = sums[1] / count - shift * shift;
    mean[channel] = static_cast<A>((empty ? 0 : static_cast<double>(moments.channel(channel).about)) + shift);
    var[channel] = static_cast<A>(variance < 0 ? 0 : variance);
  }
};

// sum g and sum g * (x - mean); with kRelu, g is gated by relu(y) first.
template <class T_, bool kRelu>
struct GradSums {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 2, kSums = 2;
  const T* inputs[kInputs];  // grad_output, input
  Normalisation normalisation;

  struct Mean {
    A mean;
  };
  using Channel = std::conditional_t<kRelu, Affine<A>, Mean>;
  CU_DEVICE Channel channel(int64_t channel) const {
    if constexpr (kRelu) {
      return normalisation.affine<A>(channel);
    } else {
      return {static_cast<A>(normalisation.mean[channel])};
    }
  }
  CU_DEVICE void add(const Channel& channel, const A (&x)[2], A (&sums)[2]) const {
    A g = x[0];
    if constexpr (kRelu) g = passes(static_cast<T>(channel(x[1]))) ? g : A(0);
    sums[0] += g;
    sums[1] += g * (x[1] - channel.mean);
  }
};

template <class A>
struct FinishGradSums {
  Normalisation normalisation;
  int64_t channels;
  A* sums;  // (2, C): sum g and sum g * xhat

  CU_DEVICE void operator()(int64_t channel, const double (&totals)[2]) const {
    sums[channel] = static_cast<A>(totals[0]);
    sums[channels + channel] = static_cast<A>(totals[1] * normalisation.rstd<A>(channel));
  }
};

// ---- elements

// y, with or without a ReLU, or the residual.
template <class T_, bool kResidual>
struct Forward {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = kResidual ? 2 : 1;
  const T* inputs[kInputs];  // input, residual
  T* output;
  Normalisation normalisation;
  bool relu;

  using Channel = Affine<A>;
  CU_DEVICE Channel channel(int64_t channel) const { return normalisation.affine<A>(channel); }
  CU_DEVICE T operator()(const Channel& channel, const A (&x)[kInputs]) const {
    A y = channel(x[0]);
    if constexpr (kResidual) y += x[1];
    const T result = static_cast<T>(y);
    return relu && !passes(result) ? T(0) : result;
  }
};

// weight * rstd * (g - <g> - xhat * <g xhat>), with xhat = (x - mean) * rstd.
template <class T_, bool kRelu>
struct InputGrad {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 2;
  const T* inputs[kInputs];  // grad_output, input
  T* output;
  Normalisation normalisation;
  double count;
  int64_t channels;
  const A* sums;

  struct Channel {
    Affine<A> affine;  // its scale is also g's factor
    A mean_grad, by_input;
  };
  CU_DEVICE Channel channel(int64_t channel) const {
    const double rstd = normalisation.rstd<A>(channel);
    return {normalisation.affine<A>(channel), static_cast<A>(static_cast<double>(sums[channel]) / count),
            static_cast<A>(-rstd * static_cast<double>(sums[channels + channel]) / count)};
  }
  CU_DEVICE T operator()(const Channel& channel, const A (&x)[2]) const {
    A g = x[0];
    if constexpr (kRelu) g = passes(static_cast<T>(channel.affine(x[1]))) ? g : A(0);
    const A centred = x[1] - channel.affine.mean;
    // Of gradients that are all alike the difference is exactly zero.
    return static_cast<T>(channel.affine.scale * fma(centred, channel.by_input, g - channel.mean_grad));
  }
};

template <class T_>
struct Scale {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 1;
  const T* inputs[kInputs];
  T* output;
  ChannelNumbers scale;

  struct Channel {
    A scale;
  };
  CU_DEVICE Channel channel(int64_t channel) const { return {static_cast<A>(scale[channel])}; }
  CU_DEVICE T operator()(const Channel& channel, const A (&x)[1]) const { return static_cast<T>(x[0] * channel.scale); }
};

// ---- elements with a bit of a mask: op(channel, x, bit) gives or takes the bit

enum class Mask { written, read };

// relu(y + residual) and its mask.
template <class T_>
struct AddRelu {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 2;
  static constexpr Mask kMask = Mask::written;
  static constexpr bool kOutput = true;
  const T* inputs[kInputs];  // input, residual
  T* output;
  uint8_t* mask;
  Normalisation normalisation;

  using Channel = Affine<A>;
  CU_DEVICE Channel channel(int64_t channel) const { return normalisation.affine<A>(channel); }
  CU_DEVICE T operator()(const Channel& channel, const A (&x)[2], bool& bit) const {
    const T result = static_cast<T>(channel(x[0]) + x[1]);
    bit = passes(result);
    return bit ? result : T(0);
  }
};

// The mask of relu(y) from the input.
template <class T_>
struct ReluMask {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 1;
  static constexpr Mask kMask = Mask::written;
  static constexpr bool kOutput = false;
  const T* inputs[kInputs];
  T* output;
  uint8_t* mask;
  Normalisation normalisation;

  using Channel = Affine<A>;
  CU_DEVICE Channel channel(int64_t channel) const { return normalisation.affine<A>(channel); }
  CU_DEVICE T operator()(const Channel& channel, const A (&x)[1], bool& bit) const {
    bit = passes(static_cast<T>(channel(x[0])));
    return T(0);
  }
};

template <class T_>
struct MaskedGrad {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 1;
  static constexpr Mask kMask = Mask::read;
  static constexpr bool kOutput = true;
  const T* inputs[kInputs];
  T* output;
  const uint8_t* mask;

  struct Channel {};
  CU_DEVICE T operator()(Channel, const A (&x)[1], const bool& bit) const { return bit ? static_cast<T>(x[0]) : T(0); }
};

// Channels innermost: a thread takes eight rows, whose bits share V bytes. `tiles` counts such groups of rows.
template <int V, class Op>
__global__ void __launch_bounds__(kThreads) masked_rows_kernel(Op op, Tiles tiles, int64_t rows) {
  using T = typename Op::T;
  constexpr int kSteps = kBatch<Op>;
  CU_SHARED(typename Op::Channel, channels, [kBlockChannels]);
  const Spot spot(tiles, V);
  const int64_t stride = tiles.lanes * tiles.columns;
  int64_t byte = spot.row * tiles.columns + spot.column, offset = spot.row * 8 * tiles.columns + spot.column;
  // Rows from the thread's next on; between its groups lie those of the other lanes.
  int left = spot.left <= 0 ? 0 : static_cast<int>(min(spot.left * int64_t{8}, rows - spot.row * 8));

  Inputs<V, Op> inputs[kSteps];
  const auto read = [&](int begin) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      if (left > begin + step) inputs[step] = load_inputs<V>(op, offset + (begin + step) * tiles.columns);
  };
  read(0);
  make_channels(op, spot.first_channel(tiles), spot.channels(tiles, V), channels);
  if (left <= 0) return;
  typename Op::Channel of[V];
  channels_of_columns(channels, spot.column, 1, spot.first_channel(tiles), of);
  while (left > 0) {
    Pack<uint8_t, V> bits = {};
    if constexpr (Op::kMask == Mask::read) bits = load<V>(op.mask + byte);
#pragma unroll
    for (int begin = 0; begin < 8; begin += kSteps) {
#pragma unroll
      for (int step = begin; step < begin + kSteps; ++step) {
        if (left <= step) break;
        Pack<T, V> result;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          accumulate_t<T> x[Op::kInputs];
          element(inputs[step - begin], k, x);
          bool bit = bits.at[k] >> step & 1;
          result.at[k] = op(of[k], x, bit);
          if constexpr (Op::kMask == Mask::written) bits.at[k] |= static_cast<uint8_t>(bit << step);
        }
        if constexpr (Op::kOutput) store<V>(op.output + offset + step * tiles.columns, result);
      }
      if (begin + kSteps < 8) read(begin + kSteps);
    }
    if constexpr (Op::kMask == Mask::written) store<V>(op.mask + byte, bits);
    left -= 8 * tiles.lanes, byte += stride, offset += 8 * stride;
    read(0);
  }
}

// Planes: a thread takes the eight elements of a byte, in accesses of V. `tiles` counts bytes, of which a plane's last
// may hold fewer elements.
template <int V, class Op>
__global__ void __launch_bounds__(kThreads) masked_planes_kernel(Op op, Tiles tiles, Matrix matrix) {
  using T = typename Op::T;
  constexpr int kAccesses = 8 / V, kBytes = Op::kInputs * static_cast<int>(sizeof(T));
  constexpr int kSteps = kBytes < 8 ? 8 / kBytes : 1;
  CU_SHARED(typename Op::Channel, channels, [kBlockChannels]);
  const Spot spot(tiles, 1);
  const int64_t channel = spot.column / tiles.pixels, begin = (spot.column - channel * tiles.pixels) * 8;
  const int count = static_cast<int>(min(matrix.pixels - begin, int64_t{8}));
  const int64_t stride = tiles.lanes * matrix.columns;
  int64_t offset = spot.row * matrix.columns + channel * matrix.pixels + begin;
  int64_t byte = spot.row * tiles.columns + spot.column;
  int left = spot.left;

  Inputs<V, Op> inputs[kSteps][kAccesses];
  const auto read = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int access = 0; access < kAccesses; ++access)
        if (left > step * tiles.lanes && access * V < count)
          inputs[step][access] = load_inputs<V>(op, offset + step * stride + access * V);
  };
  read();
  make_channels(op, spot.first_channel(tiles), spot.channels(tiles, 1), channels);
  if (left <= 0) return;
  typename Op::Channel of[1];
  channels_of_columns(channels, spot.column, tiles.pixels, spot.first_channel(tiles), of);
  while (left > 0) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (left <= step * tiles.lanes) break;
      unsigned bits = 0;
      if constexpr (Op::kMask == Mask::read) bits = op.mask[byte];
#pragma unroll
      for (int access = 0; access < kAccesses; ++access) {
        if (access * V >= count) break;
        Pack<T, V> result;
#pragma unroll
        for (int k = 0; k < V; ++k) {
          accumulate_t<T> x[Op::kInputs];
          element(inputs[step][access], k, x);
          bool bit = bits >> (access * V + k) & 1;
          result.at[k] = op(of[0], x, bit);
          if constexpr (Op::kMask == Mask::written) bits |= static_cast<unsigned>(bit) << (access * V + k);
        }
        if constexpr (Op::kOutput) store<V>(op.output + offset + step * stride + access * V, result);
      }
      if constexpr (Op::kMask == Mask::written) op.mask[byte] = static_cast<uint8_t>(bits);
      byte += tiles.lanes * tiles.columns;
    }
    left -= kSteps * tiles.lanes, offset += kSteps * stride;
    read();
  }
}

template <class Op>
void apply_with_mask(const CudaGuard& guard, const Op& op, const ChannelLayout& layout) {
  using T = typename Op::T;
  constexpr int kMany = kWidest<T>;
  const Matrix matrix(layout);
  if (matrix.rows == 0 || matrix.columns == 0) return;
  const auto aligned = [&](int values) {
    bool all = all_aligned(values * sizeof(T), op.output) && all_aligned(values, op.mask);
    for (const T* input : op.inputs) all = all && all_aligned(values * sizeof(T), input);
    return all;
  };
  if (layout.is_rows) {
    const bool packs = matrix.columns % kMany == 0 && aligned(kMany);
    const Tiles tiles(divide_up(matrix.rows, 8), matrix.columns, 1, packs ? kMany : 1, true);
    const auto launch = [&](auto kernel) {
      CU_LAUNCH(guard, kernel, tiles.blocks(), kThreads, 0, op, tiles, matrix.rows);
    };
    if (packs) return launch(masked_rows_kernel<kMany, Op>);
    return launch(masked_rows_kernel<1, Op>);
  }
  const int64_t bytes = divide_up(matrix.pixels, 8);
  const Tiles tiles(matrix.rows, matrix.channels * bytes, bytes, 1, matrix.pixels <= kSmallPlane);
  const auto launch = [&](auto kernel) { CU_LAUNCH(guard, kernel, tiles.blocks(), kThreads, 0, op, tiles, matrix); };
  // A byte's elements lie in accesses of a width that divides the planes.
  if (matrix.pixels % kMany == 0 && aligned(kMany)) return launch(masked_planes_kernel<kMany, Op>);
  if constexpr (kMany > 4)
    if (matrix.pixels % 4 == 0 && aligned(4)) return launch(masked_planes_kernel<4, Op>);
  launch(masked_planes_kernel<1, Op>);
}

// ---- the running statistics

// Statistics as they were used, in the dtype of accumulation.
template <class A>
__global__ void __launch_bounds__(kThreads)
    keep_statistics_kernel(ChannelNumbers mean, ChannelNumbers var, int64_t channels, A* used_mean, A* used_var) {
  const int64_t channel = thread_index<int64_t>();
  if (channel >= channels) return;
  used_mean[channel] = static_cast<A>(mean[channel]);
  used_var[channel] = static_cast<A>(var[channel]);
}

// running = (1 - momentum) * running + momentum * factor * batch.
template <class T>
__global__ void __launch_bounds__(kThreads)
    update_kernel(T* running, ChannelNumbers batch, int64_t channels, double momentum, double factor) {
  const int64_t channel = thread_index<int64_t>();
  if (channel >= channels) return;
  const double old = static_cast<double>(static_cast<accumulate_t<T>>(running[channel]));
  running[channel] =
      static_cast<T>(static_cast<accumulate_t<T>>((1 - momentum) * old + momentum * factor * batch[channel]));
}

// ---- operations

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(const Tensor& input_any, const MaybeTensor& residual_any,
                                                              const MaybeTensor& mean, const MaybeTensor& var,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              double eps, bool relu) {
  const ChannelLayout layout(input_any, "batch_norm");
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "batch_norm: mean and var go together");
  const bool has_residual = residual_any.has_value();
  if (has_residual) check_same_shape(*residual_any, input_any, "batch_norm", "the residual");
  const Tensor input = layout.arranged(input_any);
  const Tensor residual = has_residual ? layout.arranged(*residual_any) : input;
  const Tensor output = new_tensor(sizes_of(input), input.scalar_type(), input, layout.channels_last);
  const Tensor used_mean = new_tensor({layout.channels}, accumulation_type(input.scalar_type()), input);
  const Tensor used_var = new_tensor({layout.channels}, accumulation_type(input.scalar_type()), input);
  const Tensor mask = new_tensor(has_residual && relu ? layout.mask_sizes() : Sizes{0}, ScalarType::Byte, input);
  const CudaGuard guard(input);
  const Matrix matrix(layout);
  Parameters parameters{layout.channels};
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    const T *x = cu_input<T>(input), *r = cu_input<T>(residual);
    T* y = cu_output<T>(output);
    A *means = cu_output<A>(used_mean), *vars = cu_output<A>(used_var);
    if (!mean) {
      const Moments<T> moments(x, matrix);
      const FinishMoments<T> finish{moments, layout.count(), layout.rows == 0, means, vars};
      sum_channels(guard, moments, matrix, finish, input);
    } else if (layout.channels > 0) {
      CU_LAUNCH(guard, (keep_statistics_kernel<A>), blocks_for(layout.channels, kThreads), kThreads, 0,
                parameters.numbers(mean, 0), parameters.numbers(var, 1), layout.channels, means, vars);
    }
    const Normalisation normalisation = parameters.normalisation(used_mean, used_var, weight, bias, eps);
    if (has_residual && relu) {
      apply_with_mask(guard, AddRelu<T>{{x, r}, y, cu_output<uint8_t>(mask), normalisation}, layout);
    } else if (has_residual) {
      apply_to_channels(guard, Forward<T, true>{{x, r}, y, normalisation, relu}, matrix);
    } else {
      apply_to_channels(guard, Forward<T, false>{{x}, y, normalisation, relu}, matrix);
    }
  });
  return {output, used_mean, used_var, mask};
}

Tensor batch_norm_relu_mask(const Tensor& input_any, const Tensor& mean, const Tensor& var, const MaybeTensor& weight,
                            const MaybeTensor& bias, double eps) {
  const ChannelLayout layout(input_any, "batch_norm");
  const Tensor input = layout.arranged(input_any);
  const Tensor mask = new_tensor(layout.mask_sizes(), ScalarType::Byte, input);
  const CudaGuard guard(input);
  Parameters parameters{layout.channels};
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    const Normalisation normalisation = parameters.normalisation(mean, var, weight, bias, eps);
    apply_with_mask(guard, ReluMask<T>{{cu_input<T>(input)}, nullptr, cu_output<uint8_t>(mask), normalisation}, layout);
  });
  return mask;
}

// The mask's own shape says how the input lay that it was made of.
Tensor batch_norm_masked_grad(const Tensor& grad_any, const Tensor& mask_any) {
  const bool channels_last = mask_any.dim() == 2 && grad_any.dim() > 2;
  const Tensor grad_output = channels_last ? torch::stable::contiguous(grad_any, channels_last_format(grad_any.dim()))
                                           : as_contiguous(grad_any);
  const Tensor mask = as_contiguous(mask_any);
  const Tensor output = new_tensor(sizes_of(grad_output), grad_output.scalar_type(), grad_output, channels_last);
  ChannelLayout layout(grad_output, "batch_norm");
  layout.is_rows = mask.dim() == 2;
  STD_TORCH_CHECK(sizes_of(mask) == layout.mask_sizes(), "batch_norm: the mask is of another shape than the gradient");
  const CudaGuard guard(grad_output);
  for_floating_dtype(grad_output.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    const T* g = cu_input<T>(grad_output);
    apply_with_mask(guard, MaskedGrad<T>{{g}, cu_output<T>(output), cu_input<uint8_t>(mask)}, layout);
  });
  return output;
}

// sum g and sum g * xhat of every channel, (2, C), g gated first with kRelu.
template <bool kRelu, class T>
void grad_sums(const CudaGuard& guard, const T* grad_output, const T* input, const Normalisation& normalisation,
               const Matrix& matrix, accumulate_t<T>* sums, const Tensor& like) {
  const GradSums<T, kRelu> term{{grad_output, input}, normalisation};
  sum_channels(guard, term, matrix, FinishGradSums<accumulate_t<T>>{normalisation, matrix.channels, sums}, like);
}

Tensor batch_norm_sums(const Tensor& grad_any, const Tensor& input_any, const MaybeTensor& mean, const MaybeTensor& var,
                       double eps) {
  check_same_shape(grad_any, input_any, "batch_norm", "the gradient");
  const ChannelLayout layout(input_any, "batch_norm");
  const Tensor input = layout.arranged(input_any), grad_output = layout.arranged(grad_any);
  const Tensor sums = new_tensor({2, layout.channels}, accumulation_type(input.scalar_type()), input);
  const CudaGuard guard(input);
  Parameters parameters{layout.channels};
  const Normalisation normalisation = parameters.normalisation(mean, var, std::nullopt, std::nullopt, eps);
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    grad_sums<false>(guard, cu_input<T>(grad_output), cu_input<T>(input), normalisation, Matrix(layout),
                     cu_output<accumulate_t<T>>(sums), input);
  });
  return sums;
}

std::tuple<Tensor, Tensor> batch_norm_backward(const Tensor& grad_any, const Tensor& input_any, const Tensor& mean,
                                               const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                                               double eps, bool relu) {
  check_same_shape(grad_any, input_any, "batch_norm", "the gradient");
  const ChannelLayout layout(input_any, "batch_norm");
  const Tensor input = layout.arranged(input_any), grad_output = layout.arranged(grad_any);
  const Tensor grad_input = new_tensor(sizes_of(input), input.scalar_type(), input, layout.channels_last);
  const Tensor sums = new_tensor({2, layout.channels}, accumulation_type(input.scalar_type()), input);
  const CudaGuard guard(input);
  const Matrix matrix(layout);
  Parameters parameters{layout.channels};
  const Normalisation normalisation = parameters.normalisation(mean, var, weight, bias, eps);
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    const T *g = cu_input<T>(grad_output), *x = cu_input<T>(input);
    T* result = cu_output<T>(grad_input);
    accumulate_t<T>* totals = cu_output<accumulate_t<T>>(sums);
    const auto run = [&](auto gated) {
      constexpr bool kRelu = decltype(gated)::value;
      grad_sums<kRelu>(guard, g, x, normalisation, matrix, totals, input);
      apply_to_channels(
          guard, InputGrad<T, kRelu>{{g, x}, result, normalisation, layout.count(), layout.channels, totals}, matrix);
    };
    if (relu) return run(std::true_type{});
    run(std::false_type{});
  });
  return {grad_input, sums};
}

Tensor channel_scale(const Tensor& input_any, const Tensor& scale) {
  const ChannelLayout layout(input_any, "channel_scale");
  const Tensor input = layout.arranged(input_any);
  const Tensor output = new_tensor(sizes_of(input), input.scalar_type(), input, layout.channels_last);
  const CudaGuard guard(input);
  Parameters parameters{layout.channels};
  for_floating_dtype(input.scalar_type(), "channel_scale", [&](auto scalar) {
    using T = decltype(scalar);
    const Scale<T> op{{cu_input<T>(input)}, cu_output<T>(output), parameters.numbers(scale, 1)};
    apply_to_channels(guard, op, Matrix(layout));
  });
  return output;
}

void batch_norm_update(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var, int64_t count,
                       double momentum) {
  const CudaGuard guard(running_mean);
  const auto move = [&](Tensor& running, const Tensor& batch, double factor) {
    const int64_t channels = batch.numel();
    STD_TORCH_CHECK(running.numel() == channels, "batch_norm: the running statistics have another size");
    if (channels == 0) return;
    Parameters parameters{channels};
    const Tensor dense = as_contiguous(running);
    for_floating_dtype(dense.scalar_type(), "batch_norm", [&](auto scalar) {
      using T = decltype(scalar);
      CU_LAUNCH(guard, (update_kernel<T>), blocks_for(channels, kThreads), kThreads, 0, cu_output<T>(dense),
                parameters.numbers(batch, 0), channels, momentum, factor);
    });
    if (!running.is_contiguous()) torch::stable::copy_(running, dense);
  };
  move(running_mean, mean, 1);
  move(running_var, var, static_cast<double>(count) / static_cast<double>(count - 1));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("batch_norm_relu_mask", TORCH_BOX(&batch_norm_relu_mask));
  m.impl("batch_norm_masked_grad", TORCH_BOX(&batch_norm_masked_grad));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("channel_scale", TORCH_BOX(&channel_scale));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace manual_ops
