// Elementwise kernels: a thread computes as many neighbours as one access of 16 bytes holds.
#pragma once

#include "cuda/cu.h"
#include "dense.h"

namespace manual_ops {

template <int N, class T, class Function, class... Inputs>
CU_DEVICE Pack<T, N> apply_to_packs(const Function& function, const Inputs&... inputs) {
  using A = accumulate_t<T>;
  Pack<T, N> result;
#pragma unroll
  for (int k = 0; k < N; ++k) result.at[k] = static_cast<T>(function(static_cast<A>(inputs.at[k])...));
  return result;
}

// output = function(inputs...), where `output` may be an input.
template <int N, class Index, class T, class Function, class... Inputs>
__global__ void __launch_bounds__(256)
    elementwise_kernel(Function function, Index count, T* output, const Inputs*... inputs) {
  const Index first = thread_index<Index>() * N;
  if (first + N <= count) {
    store<N>(output + first, apply_to_packs<N, T>(function, load<N>(inputs + first)...));
  } else {
    for (Index i = first; i < count; ++i) store<1>(output + i, apply_to_packs<1, T>(function, load<1>(inputs + i)...));
  }
}

template <class T, class Function, class... Inputs>
void elementwise(const CudaGuard& guard, const Function& function, int64_t count, T* output, const Inputs*... inputs) {
  if (count == 0) return;
  constexpr int kThreads = 256, kMany = kWidest<T>;
  for_index_type(count, [&](auto index) {
    using Index = decltype(index);
    if (all_aligned(sizeof(T) * kMany, output, inputs...)) {
      CU_LAUNCH(guard, (elementwise_kernel<kMany, Index, T, Function, Inputs...>), blocks_for(count, kThreads * kMany),
                kThreads, 0, function, static_cast<Index>(count), output, inputs...);
    } else {
      CU_LAUNCH(guard, (elementwise_kernel<1, Index, T, Function, Inputs...>), blocks_for(count, kThreads), kThreads, 0,
                function, static_cast<Index>(count), output, inputs...);
    }
  });
}

}  // namespace manual_ops
