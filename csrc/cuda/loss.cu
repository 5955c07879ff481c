// Mean squared error and binary cross-entropy with logits, pointwise or reduced in a fixed order; the formulas are
// those of ops/loss.py. Reduced losses are read once: each block leaves the sum of its share, and a second launch adds
// those.
#include "cuda/elementwise.h"
#include "cuda/reduction.h"
#include "loss.h"

namespace manual_ops {

namespace {

template <Loss kind, class A>
struct LossValue {
  CU_DEVICE A operator()(A x) const { return x; }
  CU_DEVICE A operator()(A x, A t) const {
    if constexpr (kind == Loss::squared) return (x - t) * (x - t);
    if constexpr (kind == Loss::logistic) return (A(1) - t) * x + softplus(x);
  }
  CU_DEVICE A operator()(A x, A t, A weight) const {
    return (A(1) - t) * x + ((weight - A(1)) * t + A(1)) * softplus(x);
  }

 private:
  // log(1 + exp(-x))
  CU_DEVICE static A softplus(A x) { return log1p(exp(-fabs(x))) + (x < A(0) ? -x : A(0)); }
};

template <Loss kind, class A>
CU_DEVICE A loss_slope(A x, A t, A weight) {
  if constexpr (kind == Loss::squared) return A(2) * (x - t);
  if constexpr (kind == Loss::logistic) return A(1) / (A(1) + exp(-x)) - t;
  if constexpr (kind == Loss::weighted_logistic) return ((weight - A(1)) * t + A(1)) / (A(1) + exp(-x)) - weight * t;
}

// Times the gradient of the element's own loss.
template <Loss kind, class A>
struct PointwiseSlope {
  CU_DEVICE A operator()(A g, A x, A t) const { return loss_slope<kind>(x, t, A(1)) * g; }
  CU_DEVICE A operator()(A g, A x, A t, A weight) const { return loss_slope<kind>(x, t, weight) * g; }
};

// Times the gradient of the sum or the mean.
template <Loss kind, class T>
struct ReducedSlope {
  using A = accumulate_t<T>;
  const T* grad_output;
  A scale;
  CU_DEVICE A operator()(A x, A t) const { return loss_slope<kind>(x, t, A(1)) * common(); }
  CU_DEVICE A operator()(A x, A t, A weight) const { return loss_slope<kind>(x, t, weight) * common(); }

 private:
  CU_DEVICE A common() const { return scale * static_cast<A>(*grad_output); }
};

// Packs that a thread adds up before it goes over to double.
constexpr int kSumPacks = 4;

// The sum of function(inputs...) over every gridDim.x-th tile of kSumPacks packs a thread.
template <int N, class T, class Function, class... Inputs>
__global__ void __launch_bounds__(256)
    sum_kernel(Function function, int64_t count, double* shares, const Inputs*... inputs) {
  using A = accumulate_t<T>;
  constexpr int kTile = 256 * N * kSumPacks;
  double sum = 0;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile; tile < count;
       tile += static_cast<int64_t>(gridDim.x) * kTile) {
    A lanes[N] = {};
#pragma unroll
    for (int k = 0; k < kSumPacks; ++k) {
      const int64_t first = tile + (k * 256 + static_cast<int>(threadIdx.x)) * N;
      if (first + N <= count) {
        const Pack<A, N> values = apply_to_packs<N, A>(function, load<N>(inputs + first)...);
#pragma unroll
        for (int j = 0; j < N; ++j) lanes[j] += values.at[j];
      } else {
        for (int64_t i = first; i < count; ++i) lanes[0] += function(static_cast<A>(inputs[i])...);
      }
    }
    A of_tile = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) of_tile += lanes[j];
    sum += of_tile;
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) shares[blockIdx.x] = sum;
}

template <class T>
__global__ void finish_sum_kernel(const double* shares, int64_t count, double scale, T* output) {
  const double sum = sum_of_shares(shares, count);
  if (threadIdx.x == 0) *output = static_cast<T>(static_cast<accumulate_t<T>>(sum * scale));
}

template <class T, class Function, class... Inputs>
void sum_into(const CudaGuard& guard, const Function& function, const Tensor& like, double scale, T* output,
              const Inputs*... inputs) {
  constexpr int kMany = kWidest<T>;
  const int64_t count = like.numel();
  const bool aligned = all_aligned(sizeof(T) * kMany, inputs...);
  const int64_t tile = int64_t{256} * kSumPacks * (aligned ? kMany : 1);
  const int64_t blocks = std::min(kMostShares, (count + tile - 1) / tile);
  const Tensor scratch = new_tensor({blocks}, ScalarType::Double, like);
  double* shares = cu_output<double>(scratch);
  if (blocks > 0 && aligned)
    CU_LAUNCH(guard, (sum_kernel<kMany, T, Function, Inputs...>), static_cast<unsigned>(blocks), 256, 0, function,
              count, shares, inputs...);
  else if (blocks > 0)
    CU_LAUNCH(guard, (sum_kernel<1, T, Function, Inputs...>), static_cast<unsigned>(blocks), 256, 0, function, count,
              shares, inputs...);
  CU_LAUNCH(guard, finish_sum_kernel<T>, 1, 1024, 0, shares, blocks, scale, output);
}

struct Cuda {
  template <Loss kind>
  static void value(const LossOperands& operands, const Tensor& output, bool reduced, double scale) {
    const auto& [input, target, weights] = operands;
    const CudaGuard guard(input);
    for_floating_dtype(input.scalar_type(), "loss",
                       [&, &input = input, &target = target, &weights = weights](auto scalar) {
                         using T = decltype(scalar);
                         const LossValue<kind, accumulate_t<T>> value{};
                         T* to = cu_output<T>(output);
                         const auto run = [&](auto... inputs) {
                           if (reduced) return sum_into(guard, value, input, scale, to, inputs...);
                           if constexpr (kind != Loss::identity)
                             elementwise(guard, value, input.numel(), to, inputs...);
                         };
                         const T* x = cu_input<T>(input);
                         if constexpr (kind == Loss::identity)
                           run(x);
                         else if constexpr (kind == Loss::weighted_logistic)
                           run(x, cu_input<T>(target), cu_input<T>(weights));
                         else
                           run(x, cu_input<T>(target));
                       });
  }

  template <Loss kind>
  static void slope(const Tensor& grad_output, const LossOperands& operands, const Tensor& grad_input, bool reduced,
                    double scale) {
    const auto& [input, target, weights] = operands;
    const CudaGuard guard(input);
    for_floating_dtype(
        input.scalar_type(), "loss backward", [&, &input = input, &target = target, &weights = weights](auto scalar) {
          using T = decltype(scalar);
          using A = accumulate_t<T>;
          T* to = cu_output<T>(grad_input);
          const auto run = [&](auto... inputs) {
            const T* grad = cu_input<T>(grad_output);
            if (reduced)
              elementwise(guard, ReducedSlope<kind, T>{grad, static_cast<A>(scale)}, input.numel(), to, inputs...);
            else
              elementwise(guard, PointwiseSlope<kind, A>{}, input.numel(), to, grad, inputs...);
          };
          if constexpr (kind == Loss::weighted_logistic)
            run(cu_input<T>(input), cu_input<T>(target), cu_input<T>(weights));
          else
            run(cu_input<T>(input), cu_input<T>(target));
        });
  }
};

using Operators = LossOperators<Cuda>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) {
  m.impl("total", TORCH_BOX(&Operators::total));
  m.impl("mse_loss", TORCH_BOX(&Operators::mse_loss));
  m.impl("mse_loss_backward", TORCH_BOX(&Operators::mse_loss_backward));
  m.impl("bce_with_logits", TORCH_BOX(&Operators::bce_with_logits));
  m.impl("bce_with_logits_backward", TORCH_BOX(&Operators::bce_with_logits_backward));
}

}  // namespace manual_ops
