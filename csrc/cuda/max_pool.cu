// Max pooling, its gradient (scatter) and the choice of the same winners again (pick). Formulas:
// manual_ops/ops/max_pool.py.
#include "cuda/pool_kernels.h"

namespace manual_ops {

namespace {

// Max pooling at fixed winners: each output reads its own.
template <int N, class Index, class T>
__global__ void __launch_bounds__(kPoolThreads)
    pool_pick_kernel(PoolArguments<Index> p, PoolItems<Index> items, const T* input, Winners winners, T* output) {
  const Index index = thread_index<Index>();
  if (index >= items.count) return;
  const auto at = items.at(index);
  const Window<Index> d = p.d.window(at.depth), h = p.h.window(at.row), w = p.w.window(at.column);
  const Index offset = p.output_row(at.image, at.depth, at.row) + at.column * p.pitch + at.lane * N;
  const Pack<int32_t, N> codes = load_codes<N>(winners, offset);
  Pack<T, N> values;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Index code = codes.at[n], rows = p.w.by_taps.quotient(code), planes = p.h.by_taps.quotient(rows);
    const Index k = code - rows * p.w.taps - w.tap, j = rows - planes * p.h.taps - h.tap, i = planes - d.tap;
    const bool inside = i >= 0 && i < d.count && j >= 0 && j < h.count && k >= 0 && k < w.count;
    values.at[n] = T(0);
    if (inside)
      values.at[n] = input[p.input_row(at.image, d.first + i * p.d.dilation, h.first + j * p.h.dilation) +
                           (w.first + k * p.w.dilation) * p.pitch + at.lane * N + n];
  }
  store<N>(output + offset, values);
}

template <class T>
void pool_pick(const CudaGuard& guard, const PoolPlan& plan, const T* input, const Winners& winners, T* output) {
  if (plan.outputs() == 0) return;
  for_index_type(plan.reach(), [&](auto index) {
    using Index = decltype(index);
    for_pack<sizeof(Index) == 4 ? kWidest<T> : 1>(plan, aligned(output, output, winners), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const PoolItems<Index> items(plan.images, plan.d.output, plan.h.output, plan.w.output, plan.pitch / N);
      CU_LAUNCH(guard, (pool_pick_kernel<N, Index, T>), blocks_for(items.count, kPoolThreads), kPoolThreads, 0,
                PoolArguments<Index>(plan), items, input, winners, output);
    });
  });
}

Winners winners_of(const Tensor& winner) {
  Winners winners;
  for_winner_dtype(winner.scalar_type(), [&](auto code) {
    if constexpr (std::is_same_v<decltype(code), uint8_t>)
      winners.bytes = cu_input<uint8_t>(winner);
    else
      winners.numbers = cu_input<int32_t>(winner);
  });
  return winners;
}

std::tuple<Tensor, Tensor> max_pool_forward(const Tensor& input_any, Sizes output_size, Sizes kernel_size, Sizes stride,
                                            Sizes padding, Sizes dilation, bool channels_last) {
  const CudaGuard guard(input_any);
  const Tensor input = as_contiguous(input_any, channels_last);
  const PoolPlan plan(input, spatial(input), output_size, kernel_size, stride, padding, dilation, channels_last);
  const Sizes sizes = with_spatial(input, output_size);
  const bool byte = plan.taps() <= 256;
  const Tensor output = new_tensor(sizes, input.scalar_type(), input, channels_last);
  const Tensor winner = new_tensor(sizes, byte ? ScalarType::Byte : ScalarType::Int, input, channels_last);
  check_winner(winner, input, plan.outputs(), plan.taps());
  NewWinners winners;
  if (byte)
    winners.bytes = cu_output<uint8_t>(winner);
  else
    winners.numbers = cu_output<int32_t>(winner);
  for_floating_dtype(input.scalar_type(), "max_pool_forward", [&](auto scalar) {
    using T = decltype(scalar);
    pool_forward<true>(guard, plan, input, cu_input<T>(input), cu_output<T>(output), winners, 0);
  });
  return {output, winner};
}

Tensor max_pool_scatter(const Tensor& grad_any, const Tensor& winner_any, Sizes input_size, Sizes kernel_size,
                        Sizes stride, Sizes padding, Sizes dilation, bool channels_last) {
  const CudaGuard guard(grad_any);
  const Tensor grad_output = as_contiguous(grad_any, channels_last);
  const Tensor winner = as_contiguous(winner_any, channels_last);
  const PoolPlan plan(grad_output, input_size, spatial(grad_output), kernel_size, stride, padding, dilation,
                      channels_last);
  check_winner(winner, grad_output, plan.outputs(), plan.taps());
  const Tensor grad_input =
      new_tensor(with_spatial(grad_output, input_size), grad_output.scalar_type(), grad_output, channels_last);
  const Winners winners = winners_of(winner);
  for_floating_dtype(grad_output.scalar_type(), "max_pool_scatter", [&](auto scalar) {
    using T = decltype(scalar);
    pool_backward<true>(guard, plan, cu_input<T>(grad_output), winners, cu_output<T>(grad_input), 0);
  });
  return grad_input;
}

Tensor max_pool_pick(const Tensor& input_any, const Tensor& winner_any, Sizes kernel_size, Sizes stride, Sizes padding,
                     Sizes dilation, bool channels_last) {
  const CudaGuard guard(input_any);
  const Tensor input = as_contiguous(input_any, channels_last);
  const Tensor winner = as_contiguous(winner_any, channels_last);
  const PoolPlan plan(input, spatial(input), spatial(winner), kernel_size, stride, padding, dilation, channels_last);
  check_winner(winner, input, plan.outputs(), plan.taps());
  const Tensor output = new_tensor(sizes_of(winner), input.scalar_type(), input, channels_last);
  const Winners winners = winners_of(winner);
  for_floating_dtype(input.scalar_type(), "max_pool_pick", [&](auto scalar) {
    using T = decltype(scalar);
    pool_pick(guard, plan, cu_input<T>(input), winners, cu_output<T>(output));
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("max_pool_forward", TORCH_BOX(&max_pool_forward));
  m.impl("max_pool_scatter", TORCH_BOX(&max_pool_scatter));
  m.impl("max_pool_pick", TORCH_BOX(&max_pool_pick));
}

}  // namespace manual_ops
