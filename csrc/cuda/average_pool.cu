// Average pooling and its transpose, the spread of a gradient. Formulas: manual_ops/ops/average_pool.py.
#include "cuda/pool_kernels.h"

namespace manual_ops {

namespace {

Tensor average_pool(const Tensor& input_any, Sizes output_size, Sizes kernel_size, Sizes stride, Sizes padding,
                    bool count_include_pad, int64_t divisor_override, bool channels_last) {
  const CudaGuard guard(input_any);
  const Tensor input = as_contiguous(input_any, channels_last);
  const PoolPlan plan(input, spatial(input), output_size, kernel_size, stride, padding, Sizes(kernel_size.size(), 1),
                      channels_last, count_include_pad);
  const Tensor output = new_tensor(with_spatial(input, output_size), input.scalar_type(), input, channels_last);
  const double divisor = divisor_override != 0 ? static_cast<double>(divisor_override) : plan.same_divisor();
  for_floating_dtype(input.scalar_type(), "average_pool", [&](auto scalar) {
    using T = decltype(scalar);
    pool_forward<false>(guard, plan, input, cu_input<T>(input), cu_output<T>(output), NewWinners{}, divisor);
  });
  return output;
}

Tensor average_spread(const Tensor& grad_any, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes padding,
                      bool count_include_pad, int64_t divisor_override, bool channels_last) {
  const CudaGuard guard(grad_any);
  const Tensor grad_output = as_contiguous(grad_any, channels_last);
  const PoolPlan plan(grad_output, input_size, spatial(grad_output), kernel_size, stride, padding,
                      Sizes(kernel_size.size(), 1), channels_last, count_include_pad);
  const Tensor grad_input =
      new_tensor(with_spatial(grad_output, input_size), grad_output.scalar_type(), grad_output, channels_last);
  const double divisor = divisor_override != 0 ? static_cast<double>(divisor_override) : plan.same_divisor();
  for_floating_dtype(grad_output.scalar_type(), "average_spread", [&](auto scalar) {
    using T = decltype(scalar);
    pool_backward<false>(guard, plan, cu_input<T>(grad_output), Winners{}, cu_output<T>(grad_input), divisor);
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("average_pool", TORCH_BOX(&average_pool));
  m.impl("average_spread", TORCH_BOX(&average_spread));
}

}  // namespace manual_ops
