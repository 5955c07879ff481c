// Max pooling, its gradient (scatter) and the choice of the same winners again (pick). Formulas:
// manual_ops/ops/max_pool.py.
#include <new>
#include <utility>
#include <vector>

#include "cpu/intrinsics.h"
#include "windows.h"

#define MANUAL_OPS_KERNELS "cpu/pool_kernels.h"
#include "cpu/each_isa.h"
#include "cpu/pool.h"

namespace manual_ops {

namespace {

void check_winner_of(const PoolGeometry& g, const Tensor& winner, const Tensor& like) {
  const double taps = static_cast<double>(g.d.taps) * static_cast<double>(g.h.taps) * static_cast<double>(g.w.taps);
  check_winner(winner, like, g.batch * g.channels * g.output_pixels(), taps);
}

// Whether few inputs win, and none in more than two windows: the sum of two gradients is rounded once.
bool few_winners(const PoolGeometry& g) {
  return g.output_pixels() * 12 <= g.input_pixels() && g.d.cover_count * g.h.cover_count * g.w.cover_count <= 2;
}

// Where the taps of a window lie, from its first one.
std::vector<int64_t> tap_offsets(const PoolGeometry& g) {
  std::vector<int64_t> offsets;
  for (int64_t d = 0; d < g.d.taps; ++d)
    for (int64_t h = 0; h < g.h.taps; ++h)
      for (int64_t w = 0; w < g.w.taps; ++w)
        offsets.push_back((d * g.d.step * g.h.input + h * g.h.step) * g.w.input + w * g.w.step);
  return offsets;
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& input_any, Sizes output_size, Sizes kernel_size, Sizes stride,
                                            Sizes padding, Sizes dilation, bool channels_last) {
  const Tensor input = as_contiguous(input_any, channels_last);
  const PoolWindows windows(input, spatial(input), output_size, kernel_size, stride, padding, dilation, channels_last);
  const PoolGeometry& g = windows.geometry;
  const Sizes sizes = with_spatial(input, output_size);
  const bool byte = g.d.taps * g.h.taps * g.w.taps <= 256;
  const Tensor output = new_tensor(sizes, input.scalar_type(), input, channels_last);
  const Tensor winner = new_tensor(sizes, byte ? ScalarType::Byte : ScalarType::Int, input, channels_last);
  for_floating_dtype(input.scalar_type(), "max_pool_forward", [&](auto scalar) {
    using T = decltype(scalar);
    for_winner_dtype(winner.scalar_type(), [&](auto code) {
      using U = decltype(code);
      int64_t items = 0;
      if (output.numel() > 0) MANUAL_OPS_FOR_ISA(count_items<accumulate_t<T>>(g, false, &items));
      parallel_for(items, input.numel() / std::max<int64_t>(1, items), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(
            pool_forward<true>(g, data<T>(input), mutable_data<T>(output), mutable_data<U>(winner), begin, end));
      });
    });
  });
  return {output, winner};
}

Tensor max_pool_scatter(const Tensor& grad_any, const Tensor& winner_any, Sizes input_size, Sizes kernel_size,
                        Sizes stride, Sizes padding, Sizes dilation, bool channels_last) {
  const Tensor grad_output = as_contiguous(grad_any, channels_last);
  const Tensor winner = as_contiguous(winner_any, channels_last);
  const PoolWindows windows(grad_output, input_size, spatial(grad_output), kernel_size, stride, padding, dilation,
                            channels_last);
  const PoolGeometry& g = windows.geometry;
  check_winner_of(g, winner, grad_output);
  const Tensor grad_input =
      new_tensor(with_spatial(grad_output, input_size), grad_output.scalar_type(), grad_output, channels_last);
  for_floating_dtype(grad_output.scalar_type(), "max_pool_scatter", [&](auto scalar) {
    using T = decltype(scalar);
    for_winner_dtype(winner.scalar_type(), [&](auto code) {
      using U = decltype(code);
      if (few_winners(g)) {
        const std::vector<int64_t> offsets = tap_offsets(g);
        const int64_t outer = channels_last ? g.batch : g.batch * g.channels;
        parallel_for(outer, grad_input.numel() / std::max<int64_t>(1, outer), [&](int64_t begin, int64_t end) {
          MANUAL_OPS_FOR_ISA(
              place(g, data<T>(grad_output), data<U>(winner), mutable_data<T>(grad_input), offsets.data(), begin, end));
        });
        return;
      }
      int64_t items = 0;
      if (grad_input.numel() > 0) MANUAL_OPS_FOR_ISA(count_items<accumulate_t<T>>(g, true, &items));
      parallel_for(items, grad_input.numel() / std::max<int64_t>(1, items), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(
            pool_backward<true>(g, data<T>(grad_output), data<U>(winner), mutable_data<T>(grad_input), begin, end));
      });
    });
  });
  return grad_input;
}

Tensor max_pool_pick(const Tensor& input_any, const Tensor& winner_any, Sizes kernel_size, Sizes stride, Sizes padding,
                     Sizes dilation, bool channels_last) {
  const Tensor input = as_contiguous(input_any, channels_last);
  const Tensor winner = as_contiguous(winner_any, channels_last);
  const PoolWindows windows(input, spatial(input), spatial(winner), kernel_size, stride, padding, dilation,
                            channels_last);
  const PoolGeometry& g = windows.geometry;
  check_winner_of(g, winner, input);
  const Tensor output = new_tensor(sizes_of(winner), input.scalar_type(), input, channels_last);
  for_floating_dtype(input.scalar_type(), "max_pool_pick", [&](auto scalar) {
    using T = decltype(scalar);
    for_winner_dtype(winner.scalar_type(), [&](auto code) {
      using U = decltype(code);
      const int64_t lanes = channels_last ? g.channels : 1;
      parallel_for(output.numel() / std::max<int64_t>(1, lanes), 8 * lanes, [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(pick(g, data<T>(input), data<U>(winner), mutable_data<T>(output), begin, end));
      });
    });
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_scatter", TORCH_BOX(&max_pool_scatter));
  m.impl("max_pool_pick", TORCH_BOX(&max_pool_pick));
}

}  // namespace manual_ops
