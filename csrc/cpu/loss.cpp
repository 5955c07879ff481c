// Mean squared error and binary cross-entropy with logits, pointwise or reduced in a fixed order.
#include "loss.h"

#include <utility>

#include "cpu/caches.h"
#include "cpu/common.h"
#include "cpu/intrinsics.h"

#define MANUAL_OPS_KERNELS "cpu/loss_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// Blocks of this many elements are summed on their own, and the blocks' sums are added in their order in double, so
// that the split over threads does not show in the bits.
constexpr int64_t kBlock = 4096;

// What one element costs, in scalar operations.
constexpr int64_t work(Loss kind) { return kind == Loss::identity || kind == Loss::squared ? 1 : 16; }

struct Cpu {
  template <Loss kind>
  static void value(const LossOperands& operands, const Tensor& output, bool reduced, double scale) {
    const auto& [input, target, weights] = operands;
    const int64_t count = input.numel();
    for_floating_dtype(
        input.scalar_type(), "loss", [&, &input = input, &target = target, &weights = weights](auto scalar) {
          using T = decltype(scalar);
          if (!reduced) {
            const bool past_caches = elementwise_goes_past_caches<T>(count);
            parallel_for(count, work(kind), [&](int64_t begin, int64_t end) {
              MANUAL_OPS_FOR_ISA(losses<kind, T>(data<T>(input) + begin, data<T>(target) + begin,
                                                 data<T>(weights) + begin, mutable_data<T>(output) + begin, end - begin,
                                                 past_caches));
            });
            return;
          }
          const int64_t blocks = (count + kBlock - 1) / kBlock;
          std::vector<double> partial(blocks);
          parallel_for(blocks, kBlock * work(kind), [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
              const int64_t first = block * kBlock;
              MANUAL_OPS_FOR_ISA(sum_losses<kind, T>(data<T>(input) + first, data<T>(target) + first,
                                                     data<T>(weights) + first, &partial[block],
                                                     std::min(kBlock, count - first)));
            }
          });
          double sum = 0;
          for (double part : partial) sum += part;
          *mutable_data<T>(output) = static_cast<T>(sum * scale);
        });
  }

  template <Loss kind>
  static void slope(const Tensor& grad_output, const LossOperands& operands, const Tensor& grad_input, bool reduced,
                    double scale) {
    const auto& [input, target, weights] = operands;
    for_floating_dtype(
        input.scalar_type(), "loss backward", [&, &input = input, &target = target, &weights = weights](auto scalar) {
          using T = decltype(scalar);
          const bool past_caches = elementwise_goes_past_caches<T>(input.numel());
          parallel_for(input.numel(), work(kind), [&](int64_t begin, int64_t end) {
            const T* grad = data<T>(grad_output);
            const T *x = data<T>(input) + begin, *t = data<T>(target) + begin, *w = data<T>(weights) + begin;
            T* result = mutable_data<T>(grad_input) + begin;
            if (reduced) {
              MANUAL_OPS_FOR_ISA(loss_backward<kind, true, T>(grad, scale, x, t, w, result, end - begin, past_caches));
            } else {
              MANUAL_OPS_FOR_ISA(
                  loss_backward<kind, false, T>(grad + begin, scale, x, t, w, result, end - begin, past_caches));
            }
          });
        });
  }
};

using Operators = LossOperators<Cpu>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("total", TORCH_BOX(&Operators::total));
  m.impl("mse_loss", TORCH_BOX(&Operators::mse_loss));
  m.impl("mse_loss_backward", TORCH_BOX(&Operators::mse_loss_backward));
  m.impl("bce_with_logits", TORCH_BOX(&Operators::bce_with_logits));
  m.impl("bce_with_logits_backward", TORCH_BOX(&Operators::bce_with_logits_backward));
}

}  // namespace manual_ops
