// Batch norm, alone and fused with the residual and the ReLU behind it. The formulas are in ops/batch_norm.py.
#include <cmath>
#include <numeric>

#include "channel_layout.h"
#include "cpu/caches.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"
#define MANUAL_OPS_KERNELS "cpu/batch_norm_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// Rows (channels innermost) are cut into blocks of this many; each is summed on its own, and the blocks' sums are added
// in their order, so that the split over threads does not show in the bits. A multiple of 8: rows that share mask
// bytes.
constexpr int64_t kRowsPerBlock = 128;

// Of the operands of channels that are taken together, which are read twice.
constexpr int64_t kChannelBytes = 512 << 10;

// Planes of fewer pixels are small: an image's planes of a few channels, about kSmallRun pixels, are taken for one row,
// and the images for rows that lie `pitch` apart. Channel by channel, 128x512x7x7 takes 2.3 times as long.
constexpr int64_t kSmallPlane = 256, kSmallPlanes = 64, kSmallRun = 1024, kLineValues = 16;

// A channel's planes are `pitch` apart; rows are summed in `blocks`.
struct Layout : ChannelLayout {
  int64_t pitch, blocks;

  explicit Layout(const Tensor& input) : ChannelLayout(input, "batch_norm") {
    pitch = channels * pixels, blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  }

  // Whether results that lie like this go past the caches, in runs of `run` values. They share them with the other
  // `operands`: a backward pass of 3 x 6 MB takes 0.7 times as long so, and 0.85 with one that reads the result after
  // it.
  template <class T>
  bool past_caches(const T* to, int operands, int64_t run) const {
    return std::is_same_v<T, accumulate_t<T>> &&
           goes_past_caches(to, operands * rows * channels * sizeof(T), run * sizeof(T));
  }
  template <class T>
  bool past_caches(const T* to, int operands) const {
    return past_caches(to, operands, is_rows ? channels : pixels);
  }

  // Of the values of an image's small planes that are taken together, the last ones of an image among them.
  int64_t small_run() const { return std::gcd(channels_together(1) * pixels, pitch); }

  bool has_small_planes() const { return pixels > 0 && pixels < kSmallPlane; }

  // How many channels are taken together: of small planes, whole cache lines of values; else as many as fit into the
  // second-level cache.
  int64_t channels_together(int64_t bytes_per_value) const {
    if (!has_small_planes())
      return std::clamp<int64_t>(kChannelBytes / std::max<int64_t>(1, rows * bytes_per_value), 1,
                                 plain::kChannelsTogether);
    const int64_t aligned = kLineValues / std::gcd(kLineValues, pixels);
    return std::max<int64_t>(1, std::min(kSmallRun / pixels, kSmallPlanes) / aligned) * aligned;
  }

  // body(offset of the first plane, its channel, number of planes, index of the first) over all planes, those of an
  // image together. Bodies may store past the caches.
  template <class Body>
  void for_planes(const Body& body) const {
    parallel_for(batch * channels, pixels, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end;) {
        const int64_t channel = plane % channels, count = std::min(channels - channel, end - plane);
        body(plane * pixels, channel, count, plane);
        plane += count;
      }
      finish_stores_past_caches();
    });
  }

  // body(first channel, number of channels) over all channels, `together` of them at a time.
  template <class Body>
  void for_channels(int64_t together, const Body& body) const {
    parallel_for((channels + together - 1) / together, together * rows, [&](int64_t begin, int64_t end) {
      for (int64_t channel = begin * together; channel < std::min(channels, end * together); channel += together)
        body(channel, std::min(together, channels - channel));
      finish_stores_past_caches();
    });
  }

  // body(offset of the first row, number of rows, index of the block) over all blocks of `height` rows.
  template <class Body>
  void for_blocks(int64_t height, const Body& body) const {
    const int64_t count = (rows + height - 1) / height;
    parallel_for(count, height * channels, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        body(block * height * channels, std::min(height, rows - block * height), block);
      finish_stores_past_caches();
    });
  }

  // The same from the last block to the first: what was written last is nearest, and for_blocks() after it finds what
  // was read last.
  template <class Body>
  void for_blocks_backwards(int64_t height, const Body& body) const {
    const int64_t count = (rows + height - 1) / height;
    parallel_for(count, height * channels, [&](int64_t begin, int64_t end) {
      for (int64_t block = end; block-- > begin;)
        body(block * height * channels, std::min(height, rows - block * height), block);
    });
  }
};

// A tensor of one number a channel as numbers, `otherwise` where there is none.
std::vector<double> numbers(const MaybeTensor& tensor, int64_t channels, double otherwise) {
  std::vector<double> values(channels, otherwise);
  if (!tensor) return values;
  check_channel_values(*tensor, channels, "batch_norm");
  const Tensor dense = as_contiguous(*tensor);
  for_floating_dtype(dense.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    for (int64_t c = 0; c < channels; ++c)
      values[c] = static_cast<double>(static_cast<accumulate_t<T>>(data<T>(dense)[c]));
  });
  return values;
}

// What the channels are multiplied with and shifted by: y = (x - mean) * scale + bias.
template <class A>
struct Affine {
  std::vector<double> weight, rstd;
  std::vector<A> mean, scale, bias;
  double eps;

  Affine(int64_t channels, const MaybeTensor& weight_tensor, const MaybeTensor& bias_tensor, double eps_)
      : weight(numbers(weight_tensor, channels, 1)),
        rstd(channels, 1),
        mean(channels),
        scale(channels),
        bias(channels),
        eps(eps_) {
    const std::vector<double> shift = numbers(bias_tensor, channels, 0);
    for (int64_t c = 0; c < channels; ++c) {
      bias[c] = static_cast<A>(shift[c]);
      scale[c] = static_cast<A>(weight[c]);
    }
  }

  // The statistics arrive rounded to A, as they are saved: the backward finds the forward's scale again, to the bit.
  void set_statistics(int64_t channel, A channel_mean, A channel_var) {
    rstd[channel] = 1 / std::sqrt(static_cast<double>(channel_var) + eps);
    mean[channel] = channel_mean;
    scale[channel] = static_cast<A>(weight[channel] * rstd[channel]);
  }

  void set_statistics(const MaybeTensor& mean_tensor, const MaybeTensor& var_tensor) {
    if (!mean_tensor) return;
    const int64_t channels = static_cast<int64_t>(mean.size());
    const std::vector<double> means = numbers(mean_tensor, channels, 0), vars = numbers(var_tensor, channels, 0);
    for (int64_t c = 0; c < channels; ++c) set_statistics(c, static_cast<A>(means[c]), static_cast<A>(vars[c]));
  }
};

// The sums over all rows of two numbers a channel: body(block's first value, rows, its two rows of partial sums).
template <class A, class Body>
std::vector<double> sums_of_blocks(const Layout& layout, const Body& body) {
  const int64_t width = 2 * layout.channels;
  std::vector<A> partial(layout.blocks * width);
  layout.for_blocks_backwards(kRowsPerBlock, [&](int64_t offset, int64_t rows, int64_t block) {
    body(offset, rows, partial.data() + block * width, partial.data() + block * width + layout.channels);
  });
  std::vector<double> totals(width);
  for (int64_t block = 0; block < layout.blocks; ++block)
    for (int64_t i = 0; i < width; ++i) totals[i] += partial[block * width + i];
  return totals;
}

// The same for `channels` neighbouring channels of small planes: body(offset of the first image, images, its two rows
// of partial sums, of which each pixel has its own).
template <class A, class Body>
std::vector<double> sums_of_images(const Layout& layout, int64_t channels, const Body& body) {
  const Scratch<A> partial(2 * channels * layout.pixels);
  std::vector<double> totals(2 * channels);
  for (int64_t n = 0; n < layout.batch; n += kRowsPerBlock) {
    body(n * layout.pitch, std::min(kRowsPerBlock, layout.batch - n), partial.data(),
         partial.data() + channels * layout.pixels);
    MANUAL_OPS_FOR_ISA(add_pixels(partial.data(), 2 * channels, layout.pixels, totals.data()));
  }
  return totals;
}

// A number a channel as a number a pixel.
template <class A>
class ByPixel {
 public:
  ByPixel(const A* by_channel, int64_t channels, int64_t pixels) : values_(channels * pixels) {
    for (int64_t c = 0; c < channels; ++c) std::fill_n(values_.data() + c * pixels, pixels, by_channel[c]);
  }
  const A* data() const { return values_.data(); }

 private:
  Scratch<A> values_;
};

// Means and variances from the sums of the distances from `about` and of their squares.
template <class A>
void set_from_sums(const Layout& layout, int64_t channels, const A* about, const double* sums, A* mean, A* var) {
  for (int64_t c = 0; c < channels; ++c) {
    const double shift = sums[c] / layout.count();
    const double variance = sums[channels + c] / layout.count() - shift * shift;
    mean[c] = static_cast<A>(about[c] + shift);
    var[c] = static_cast<A>(variance < 0 ? 0 : variance);
  }
}

template <class T>
void statistics_of_rows(const Layout& layout, const T* input, accumulate_t<T>* mean, accumulate_t<T>* var) {
  using A = accumulate_t<T>;
  const int64_t channels = layout.channels, few = std::min<int64_t>(16, layout.rows);
  // The mean of a few rows from all over is near enough to the channels'; an infinity belongs into the sums.
  std::vector<A> about(channels);
  for (int64_t k = 0; k < few; ++k) {
    const T* row = input + (k * (layout.rows / few) + k * (layout.rows % few) / few) * channels;
    for (int64_t c = 0; c < channels; ++c) about[c] += static_cast<A>(row[c]) / static_cast<A>(few);
  }
  for (A& value : about)
    if (!std::isfinite(value)) value = 0;
  const std::vector<double> sums = sums_of_blocks<A>(layout, [&](int64_t offset, int64_t rows, A* sum, A* square) {
    MANUAL_OPS_FOR_ISA(statistics_rows(input + offset, rows, channels, channels, about.data(), sum, square));
  });
  set_from_sums(layout, channels, about.data(), sums.data(), mean, var);
}

// Of `channels` channels, whose planes begin at `input`.
template <class T>
void statistics_of_planes(const Layout& layout, const T* input, int64_t channels, accumulate_t<T>* mean,
                          accumulate_t<T>* var) {
  using A = accumulate_t<T>;
  const int64_t batch = layout.batch, pitch = layout.pitch, pixels = layout.pixels;
  std::vector<A> about(channels);
  std::vector<double> sums(2 * channels);
  MANUAL_OPS_FOR_ISA(about_planes(input, batch, channels, pitch, pixels, about.data()));
  if (layout.has_small_planes()) {
    const ByPixel<A> about_pixels(about.data(), channels, pixels);
    sums = sums_of_images<A>(layout, channels, [&](int64_t offset, int64_t images, A* sum, A* square) {
      MANUAL_OPS_FOR_ISA(
          statistics_rows(input + offset, images, channels * pixels, pitch, about_pixels.data(), sum, square));
    });
  } else {
    MANUAL_OPS_FOR_ISA(
        statistics_planes(input, batch, channels, pitch, pixels, about.data(), sums.data(), sums.data() + channels));
  }
  set_from_sums(layout, channels, about.data(), sums.data(), mean, var);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_forward(const Tensor& input_any, const MaybeTensor& residual_any,
                                                              const MaybeTensor& mean, const MaybeTensor& var,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              double eps, bool relu) {
  const Layout layout(input_any);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "batch_norm: mean and var go together");
  const bool has_residual = residual_any.has_value();
  if (has_residual) check_same_shape(*residual_any, input_any, "batch_norm", "the residual");
  const Tensor input = layout.arranged(input_any);
  const Tensor residual = has_residual ? layout.arranged(*residual_any) : input;
  const ScalarType accumulated = accumulation_type(input.scalar_type());
  const Tensor output = new_tensor(sizes_of(input), input.scalar_type(), input, layout.channels_last);
  const Tensor used_mean = new_tensor({layout.channels}, accumulated, input);
  const Tensor used_var = new_tensor({layout.channels}, accumulated, input);
  const Tensor mask = new_tensor(has_residual && relu ? layout.mask_sizes() : Sizes{0}, ScalarType::Byte, input);
  const int64_t channels = layout.channels, pixels = layout.pixels;

  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    Affine<A> affine(channels, weight, bias, eps);
    affine.set_statistics(mean, var);
    const T *x = data<T>(input), *r = has_residual ? data<T>(residual) : nullptr;
    T* y = mutable_data<T>(output);
    const int operands = has_residual ? 3 : 2;
    const bool past_caches = layout.past_caches(y, operands);
    const bool small_past_caches = layout.past_caches(y, operands, layout.small_run());
    A *means = mutable_data<A>(used_mean), *vars = mutable_data<A>(used_var);
    uint8_t* bits = has_residual && relu ? mutable_data<uint8_t>(mask) : nullptr;
    if (mean) {
      const std::vector<double> given = numbers(var, channels, 0);
      for (int64_t c = 0; c < channels; ++c) means[c] = affine.mean[c], vars[c] = static_cast<A>(given[c]);
    }
    const auto planes = [&](int64_t offset, int64_t c, int64_t count, int64_t index) {
      MANUAL_OPS_FOR_ISA(apply_planes(x + offset, r == nullptr ? nullptr : r + offset, y + offset,
                                      bits == nullptr ? nullptr : bits + index * ((pixels + 7) / 8), count, pixels,
                                      &affine.mean[c], &affine.scale[c], &affine.bias[c], relu, past_caches));
    };
    if (!layout.is_rows && mean) {
      layout.for_planes(planes);
    } else if (!layout.is_rows) {
      const int64_t together = layout.channels_together(sizeof(T));
      layout.for_channels(together, [&](int64_t c, int64_t count) {
        statistics_of_planes(layout, x + c * pixels, count, means + c, vars + c);
        for (int64_t k = c; k < c + count; ++k) affine.set_statistics(k, means[k], vars[k]);
        if (layout.has_small_planes() && bits == nullptr) {
          const ByPixel<A> by_pixel[] = {
              {&affine.mean[c], count, pixels}, {&affine.scale[c], count, pixels}, {&affine.bias[c], count, pixels}};
          const int64_t offset = c * pixels;
          MANUAL_OPS_FOR_ISA(apply_rows(x + offset, r == nullptr ? nullptr : r + offset, y + offset, nullptr,
                                        layout.batch, count * pixels, layout.pitch, by_pixel[0].data(),
                                        by_pixel[1].data(), by_pixel[2].data(), relu, small_past_caches));
          return;
        }
        for (int64_t n = 0; n < layout.batch; ++n) planes(n * layout.pitch + c * pixels, c, count, n * channels + c);
      });
    } else {
      if (!mean) {
        statistics_of_rows(layout, x, means, vars);
        for (int64_t c = 0; c < channels; ++c) affine.set_statistics(c, means[c], vars[c]);
      }
      layout.for_blocks(bits == nullptr ? kRowsPerBlock : 8, [&](int64_t offset, int64_t rows, int64_t block) {
        MANUAL_OPS_FOR_ISA(apply_rows(x + offset, r == nullptr ? nullptr : r + offset, y + offset,
                                      bits == nullptr ? nullptr : bits + block * channels, rows, channels, channels,
                                      affine.mean.data(), affine.scale.data(), affine.bias.data(), relu, past_caches));
      });
    }
  });
  return {output, used_mean, used_var, mask};
}

Tensor batch_norm_relu_mask(const Tensor& input_any, const Tensor& mean, const Tensor& var, const MaybeTensor& weight,
                            const MaybeTensor& bias, double eps) {
  const Layout layout(input_any);
  const Tensor input = layout.arranged(input_any);
  const Tensor mask = new_tensor(layout.mask_sizes(), ScalarType::Byte, input);
  const int64_t channels = layout.channels, pixels = layout.pixels;
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    Affine<accumulate_t<T>> affine(channels, weight, bias, eps);
    affine.set_statistics(mean, var);
    const T* x = data<T>(input);
    uint8_t* bits = mutable_data<uint8_t>(mask);
    if (layout.is_rows) {
      layout.for_blocks(8, [&](int64_t offset, int64_t rows, int64_t block) {
        MANUAL_OPS_FOR_ISA(mask_rows(x + offset, bits + block * channels, rows, channels, affine.mean.data(),
                                     affine.scale.data(), affine.bias.data()));
      });
    } else {
      layout.for_planes([&](int64_t offset, int64_t c, int64_t count, int64_t index) {
        MANUAL_OPS_FOR_ISA(mask_planes(x + offset, bits + index * ((pixels + 7) / 8), count, pixels, &affine.mean[c],
                                       &affine.scale[c], &affine.bias[c]));
      });
    }
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
  Layout layout(grad_output);
  layout.is_rows = mask.dim() == 2;
  const Sizes expected = layout.mask_sizes();
  STD_TORCH_CHECK(sizes_of(mask) == expected, "batch_norm: the mask is of another shape than the gradient");
  for_floating_dtype(grad_output.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    const T* g = data<T>(grad_output);
    const uint8_t* bits = data<uint8_t>(mask);
    T* out = mutable_data<T>(output);
    const bool past_caches = layout.past_caches(out, 1);
    if (layout.is_rows) {
      layout.for_blocks(8, [&](int64_t offset, int64_t rows, int64_t block) {
        MANUAL_OPS_FOR_ISA(
            masked_rows(g + offset, bits + block * layout.channels, out + offset, rows, layout.channels, past_caches));
      });
    } else {
      layout.for_planes([&](int64_t offset, int64_t, int64_t count, int64_t index) {
        MANUAL_OPS_FOR_ISA(masked_planes(g + offset, bits + index * ((layout.pixels + 7) / 8), out + offset, count,
                                         layout.pixels, past_caches));
      });
    }
  });
  return output;
}

// sum g and sum g * xhat of every channel, (2, C), g gated first with kRelu.
template <bool kRelu, class T>
std::vector<double> sums_of_rows(const Layout& layout, const T* g, const T* x, const Affine<accumulate_t<T>>& affine) {
  using A = accumulate_t<T>;
  std::vector<double> sums = sums_of_blocks<A>(layout, [&](int64_t offset, int64_t rows, A* sum, A* dot) {
    MANUAL_OPS_FOR_ISA(sums_rows<kRelu>(g + offset, x + offset, rows, layout.channels, layout.channels,
                                        affine.mean.data(), affine.scale.data(), affine.bias.data(), sum, dot));
  });
  for (int64_t c = 0; c < layout.channels; ++c) sums[layout.channels + c] *= affine.rstd[c];
  return sums;
}

// The same of `count` channels, from c on, (2, count).
template <bool kRelu, class T>
std::vector<double> sums_of_planes(const Layout& layout, const T* g, const T* x, const Affine<accumulate_t<T>>& affine,
                                   int64_t c, int64_t count) {
  using A = accumulate_t<T>;
  const int64_t pixels = layout.pixels, begin = c * pixels;
  std::vector<double> sums(2 * count);
  if (layout.has_small_planes()) {
    const ByPixel<A> mean(&affine.mean[c], count, pixels), scale(&affine.scale[c], count, pixels),
        bias(&affine.bias[c], count, pixels);
    sums = sums_of_images<A>(layout, count, [&](int64_t offset, int64_t images, A* sum, A* dot) {
      offset += begin;
      MANUAL_OPS_FOR_ISA(sums_rows<kRelu>(g + offset, x + offset, images, count * pixels, layout.pitch, mean.data(),
                                          scale.data(), bias.data(), sum, dot));
    });
  } else {
    MANUAL_OPS_FOR_ISA(sums_planes<kRelu>(g + begin, x + begin, layout.batch, count, layout.pitch, pixels,
                                          &affine.mean[c], &affine.scale[c], &affine.bias[c], sums.data(),
                                          sums.data() + count));
  }
  for (int64_t k = 0; k < count; ++k) sums[count + k] *= affine.rstd[c + k];
  return sums;
}

Tensor batch_norm_sums(const Tensor& grad_any, const Tensor& input_any, const MaybeTensor& mean, const MaybeTensor& var,
                       double eps) {
  check_same_shape(grad_any, input_any, "batch_norm", "the gradient");
  const Layout layout(input_any);
  const Tensor input = layout.arranged(input_any), grad_output = layout.arranged(grad_any);
  const ScalarType accumulated = accumulation_type(input.scalar_type());
  const int64_t channels = layout.channels;
  const Tensor sums = new_tensor({2, channels}, accumulated, input);
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    Affine<A> affine(channels, std::nullopt, std::nullopt, eps);
    affine.set_statistics(mean, var);
    const T *g = data<T>(grad_output), *x = data<T>(input);
    A* out = mutable_data<A>(sums);
    if (layout.is_rows) {
      const std::vector<double> totals = sums_of_rows<false>(layout, g, x, affine);
      for (int64_t i = 0; i < 2 * channels; ++i) out[i] = static_cast<A>(totals[i]);
    } else {
      layout.for_channels(layout.channels_together(2 * sizeof(T)), [&](int64_t c, int64_t count) {
        const std::vector<double> totals = sums_of_planes<false>(layout, g, x, affine, c, count);
        for (int64_t k = 0; k < count; ++k) {
          out[c + k] = static_cast<A>(totals[k]);
          out[channels + c + k] = static_cast<A>(totals[count + k]);
        }
      });
    }
  });
  return sums;
}

template <bool kRelu, class T>
void backward(const Layout& layout, const T* g, const T* x, T* grad_input, accumulate_t<T>* sums,
              const Affine<accumulate_t<T>>& affine) {
  using A = accumulate_t<T>;
  const int64_t channels = layout.channels, pixels = layout.pixels;
  const bool past_caches = layout.past_caches(grad_input, 3);
  std::vector<A> mean_grad(channels), by_input(channels);
  // weight * rstd * (g - <g> - xhat * <g xhat>), with xhat = (x - mean) * rstd.
  const auto finish = [&](int64_t c, double sum, double dot) {
    sums[c] = static_cast<A>(sum), sums[channels + c] = static_cast<A>(dot);
    mean_grad[c] = static_cast<A>(sum / layout.count());
    by_input[c] = static_cast<A>(-affine.rstd[c] * dot / layout.count());
  };
  if (layout.is_rows) {
    const std::vector<double> totals = sums_of_rows<kRelu>(layout, g, x, affine);
    for (int64_t c = 0; c < channels; ++c) finish(c, totals[c], totals[channels + c]);
    layout.for_blocks(kRowsPerBlock, [&](int64_t offset, int64_t rows, int64_t) {
      MANUAL_OPS_FOR_ISA(input_grad_rows<kRelu>(g + offset, x + offset, grad_input + offset, rows, channels, channels,
                                                affine.mean.data(), affine.scale.data(), affine.bias.data(),
                                                mean_grad.data(), by_input.data(), past_caches));
    });
    return;
  }
  const bool small_past_caches = layout.past_caches(grad_input, 3, layout.small_run());
  layout.for_channels(layout.channels_together(2 * sizeof(T)), [&](int64_t c, int64_t count) {
    const std::vector<double> totals = sums_of_planes<kRelu>(layout, g, x, affine, c, count);
    for (int64_t k = 0; k < count; ++k) finish(c + k, totals[k], totals[count + k]);
    const int64_t begin = c * pixels;
    if (layout.has_small_planes()) {
      const ByPixel<A> by_pixel[] = {{&affine.mean[c], count, pixels},
                                     {&affine.scale[c], count, pixels},
                                     {&affine.bias[c], count, pixels},
                                     {&mean_grad[c], count, pixels},
                                     {&by_input[c], count, pixels}};
      MANUAL_OPS_FOR_ISA(input_grad_rows<kRelu>(
          g + begin, x + begin, grad_input + begin, layout.batch, count * pixels, layout.pitch, by_pixel[0].data(),
          by_pixel[1].data(), by_pixel[2].data(), by_pixel[3].data(), by_pixel[4].data(), small_past_caches));
      return;
    }
    for (int64_t n = 0; n < layout.batch; ++n) {
      const int64_t offset = n * layout.pitch + begin;
      MANUAL_OPS_FOR_ISA(input_grad_planes<kRelu>(g + offset, x + offset, grad_input + offset, count, pixels,
                                                  &affine.mean[c], &affine.scale[c], &affine.bias[c], &mean_grad[c],
                                                  &by_input[c], past_caches));
    }
  });
}

std::tuple<Tensor, Tensor> batch_norm_backward(const Tensor& grad_any, const Tensor& input_any, const Tensor& mean,
                                               const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                                               double eps, bool relu) {
  check_same_shape(grad_any, input_any, "batch_norm", "the gradient");
  const Layout layout(input_any);
  const Tensor input = layout.arranged(input_any), grad_output = layout.arranged(grad_any);
  const ScalarType accumulated = accumulation_type(input.scalar_type());
  const Tensor grad_input = new_tensor(sizes_of(input), input.scalar_type(), input, layout.channels_last);
  const Tensor sums = new_tensor({2, layout.channels}, accumulated, input);
  for_floating_dtype(input.scalar_type(), "batch_norm", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    Affine<A> affine(layout.channels, weight, bias, eps);
    affine.set_statistics(mean, var);
    const auto run = relu ? backward<true, T> : backward<false, T>;
    run(layout, data<T>(grad_output), data<T>(input), mutable_data<T>(grad_input), mutable_data<A>(sums), affine);
  });
  return {grad_input, sums};
}

Tensor channel_scale(const Tensor& input_any, const Tensor& scale) {
  const Layout layout(input_any);
  const Tensor input = layout.arranged(input_any);
  const Tensor output = new_tensor(sizes_of(input), input.scalar_type(), input, layout.channels_last);
  for_floating_dtype(input.scalar_type(), "channel_scale", [&](auto scalar) {
    using T = decltype(scalar);
    const Affine<accumulate_t<T>> affine(layout.channels, scale, std::nullopt, 0);
    const T* x = data<T>(input);
    T* y = mutable_data<T>(output);
    const bool past_caches = layout.past_caches(y, 3);  // with the input of the layer, which is read next
    if (layout.is_rows) {
      layout.for_blocks(kRowsPerBlock, [&](int64_t offset, int64_t rows, int64_t) {
        MANUAL_OPS_FOR_ISA(scale_rows(x + offset, y + offset, rows, layout.channels, affine.scale.data(), past_caches));
      });
    } else {
      layout.for_planes([&](int64_t offset, int64_t c, int64_t count, int64_t) {
        MANUAL_OPS_FOR_ISA(scale_planes(x + offset, y + offset, count, layout.pixels, &affine.scale[c], past_caches));
      });
    }
  });
  return output;
}

void batch_norm_update(Tensor running_mean, Tensor running_var, const Tensor& mean, const Tensor& var, int64_t count,
                       double momentum) {
  const auto move = [&](Tensor& running, const Tensor& batch_any, double factor) {
    STD_TORCH_CHECK(running.numel() == batch_any.numel(), "batch_norm: the running statistics have another size");
    const std::vector<double> batch = numbers(batch_any, batch_any.numel(), 0);
    const Tensor dense = as_contiguous(running);
    for_floating_dtype(dense.scalar_type(), "batch_norm", [&](auto scalar) {
      using T = decltype(scalar);
      T* values = mutable_data<T>(dense);
      for (size_t c = 0; c < batch.size(); ++c) {
        const double old = static_cast<double>(static_cast<accumulate_t<T>>(values[c]));
        values[c] = static_cast<T>(static_cast<accumulate_t<T>>((1 - momentum) * old + momentum * factor * batch[c]));
      }
    });
    if (!running.is_contiguous()) torch::stable::copy_(running, dense);
  };
  move(running_mean, mean, 1);
  move(running_var, var, static_cast<double>(count) / static_cast<double>(count - 1));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&batch_norm_forward));
  m.impl("batch_norm_relu_mask", TORCH_BOX(&batch_norm_relu_mask));
  m.impl("batch_norm_masked_grad", TORCH_BOX(&batch_norm_masked_grad));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("channel_scale", TORCH_BOX(&channel_scale));
  m.impl("batch_norm_update", TORCH_BOX(&batch_norm_update));
}

}  // namespace manual_ops
