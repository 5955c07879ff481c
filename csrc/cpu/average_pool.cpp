// Average pooling and its transpose, the spread of a gradient. Formulas: manual_ops/ops/average_pool.py.
#include <new>
#include <utility>

#include "cpu/intrinsics.h"
#include "windows.h"

#define MANUAL_OPS_KERNELS "cpu/pool_kernels.h"
#include "cpu/each_isa.h"
#include "cpu/pool.h"

namespace manual_ops {

namespace {

// One window that is the whole plane, of contiguous tensors: what it divides by, else 0.
double whole_plane_divisor(const PoolGeometry& g) {
  double divisor = 1;
  for (const AxisView* axis : {&g.d, &g.h, &g.w}) {
    if (axis->output != 1 || axis->count[0] != axis->input) return 0;
    divisor *= static_cast<double>(axis->divisor[0]);
  }
  if (g.channels_last) return 0;
  return g.divisor_override != 0 ? g.divisor_override : divisor;
}

// Whether windows of contiguous tensors are so long along W that rows need no transposes.
bool has_long_windows(const PoolGeometry& g) { return !g.channels_last && g.w.taps >= 64; }

Tensor average_pool(const Tensor& input_any, Sizes output_size, Sizes kernel_size, Sizes stride, Sizes padding,
                    bool count_include_pad, int64_t divisor_override, bool channels_last) {
  const Tensor input = as_contiguous(input_any, channels_last);
  const PoolWindows windows(input, spatial(input), output_size, kernel_size, stride, padding,
                            Sizes(kernel_size.size(), 1), channels_last, count_include_pad, divisor_override);
  const PoolGeometry& g = windows.geometry;
  const Tensor output = new_tensor(with_spatial(input, output_size), input.scalar_type(), input, channels_last);
  for_floating_dtype(input.scalar_type(), "average_pool", [&](auto scalar) {
    using T = decltype(scalar);
    if (const double divisor = whole_plane_divisor(g); divisor != 0) {
      parallel_for(g.batch * g.channels, g.input_pixels(), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(
            average_planes(data<T>(input), mutable_data<T>(output), g.input_pixels(), divisor, begin, end));
      });
      return;
    }
    if (has_long_windows(g)) {
      parallel_for(g.batch * g.channels, g.input_pixels(), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(average_runs(g, data<T>(input), mutable_data<T>(output), begin, end));
      });
      return;
    }
    int64_t items = 0;
    if (output.numel() > 0) MANUAL_OPS_FOR_ISA(count_items<accumulate_t<T>>(g, false, &items));
    parallel_for(items, input.numel() / std::max<int64_t>(1, items), [&](int64_t begin, int64_t end) {
      uint8_t* no_winner = nullptr;
      MANUAL_OPS_FOR_ISA(pool_forward<false>(g, data<T>(input), mutable_data<T>(output), no_winner, begin, end));
    });
  });
  return output;
}

Tensor average_spread(const Tensor& grad_any, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes padding,
                      bool count_include_pad, int64_t divisor_override, bool channels_last) {
  const Tensor grad_output = as_contiguous(grad_any, channels_last);
  const PoolWindows windows(grad_output, input_size, spatial(grad_output), kernel_size, stride, padding,
                            Sizes(kernel_size.size(), 1), channels_last, count_include_pad, divisor_override);
  const PoolGeometry& g = windows.geometry;
  const Tensor grad_input =
      new_tensor(with_spatial(grad_output, input_size), grad_output.scalar_type(), grad_output, channels_last);
  for_floating_dtype(grad_output.scalar_type(), "average_spread", [&](auto scalar) {
    using T = decltype(scalar);
    if (const double divisor = whole_plane_divisor(g); divisor != 0) {
      parallel_for(g.batch * g.channels, g.input_pixels(), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(
            spread_planes(data<T>(grad_output), mutable_data<T>(grad_input), g.input_pixels(), divisor, begin, end));
      });
      return;
    }
    if (has_long_windows(g)) {
      parallel_for(g.batch * g.channels, g.input_pixels(), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(spread_runs(g, data<T>(grad_output), mutable_data<T>(grad_input), begin, end));
      });
      return;
    }
    int64_t items = 0;
    if (grad_input.numel() > 0) MANUAL_OPS_FOR_ISA(count_items<accumulate_t<T>>(g, true, &items));
    parallel_for(items, grad_input.numel() / std::max<int64_t>(1, items), [&](int64_t begin, int64_t end) {
      const uint8_t* no_winner = nullptr;
      MANUAL_OPS_FOR_ISA(
          pool_backward<false>(g, data<T>(grad_output), no_winner, mutable_data<T>(grad_input), begin, end));
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("average_pool", TORCH_BOX(&average_pool));
  m.impl("average_spread", TORCH_BOX(&average_spread));
}

}  // namespace manual_ops
