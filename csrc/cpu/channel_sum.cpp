// The gradient of a bias: the sum of grad_output over everything but the channel.
#include <cmath>

#define MANUAL_OPS_KERNELS "cpu/channel_sum_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// Rows of channels (channels_last, or a matrix) are cut into blocks of this many; each is summed on its own, and the
// blocks' sums are added in their order, so that the split over threads does not show in the bits.
constexpr int64_t kRowsPerBlock = 512;

Tensor channel_sum(const Tensor& input_any) {
  const bool channels_last = input_any.dim() == 2 || is_channels_last(input_any);
  const Tensor input = input_any.dim() == 2 ? as_contiguous(input_any) : as_contiguous(input_any, channels_last);
  const int64_t channels = input.size(1);
  const Tensor output = new_tensor({channels}, input.scalar_type(), input);
  const int64_t batch = input.size(0);
  const int64_t pixels = input.numel() / std::max<int64_t>(1, batch * channels);
  for_floating_dtype(input.scalar_type(), "channel_sum", [&](auto scalar) {
    using T = decltype(scalar);
    using A = accumulate_t<T>;
    if (!channels_last) {
      parallel_for(channels, batch * pixels, [&](int64_t begin, int64_t end) {
        for (int64_t channel = begin; channel < end; ++channel)
          MANUAL_OPS_FOR_ISA(sum_planes(data<T>(input) + channel * pixels, mutable_data<T>(output) + channel, batch,
                                        channels * pixels, pixels));
      });
      return;
    }
    const int64_t rows = input.numel() / std::max<int64_t>(1, channels);
    const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
    std::vector<A> partial(blocks * channels);
    parallel_for(blocks, kRowsPerBlock * channels, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kRowsPerBlock;
        MANUAL_OPS_FOR_ISA(sum_rows(data<T>(input) + first * channels, partial.data() + block * channels,
                                    std::min(kRowsPerBlock, rows - first), channels));
      }
    });
    for (int64_t channel = 0; channel < channels; ++channel) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += partial[block * channels + channel];
      mutable_data<T>(output)[channel] = static_cast<T>(sum);
    }
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) { m.impl("channel_sum", TORCH_BOX(&channel_sum)); }

}  // namespace manual_ops
