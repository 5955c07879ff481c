// Mean squared error and binary cross-entropy with logits, pointwise or reduced in a fixed order.
#include "loss.h"

#define MANUAL_OPS_KERNELS "cpu/loss_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// Blocks of this many elements are summed on their own, and the blocks' sums are added in their order in double, so
// that the split over threads does not show in the bits.
constexpr int64_t kBlock = 4096;

// What one element costs, in scalar operations.
constexpr int64_t work(Loss kind) { return kind == Loss::identity || kind == Loss::squared ? 1 : 16; }

template <Loss kind>
Tensor forward(const LossOperands& operands, const std::string& reduction) {
  const auto& [input, target, weights] = operands;
  const int64_t count = input.numel();
  const Tensor output = is_reduced(reduction) ? new_tensor({}, input.scalar_type(), input) : new_like(input);
  for_floating_dtype(input.scalar_type(), "loss", [&](auto scalar) {
    using T = decltype(scalar);
    if (!is_reduced(reduction)) {
      parallel_for(count, work(kind), [&](int64_t begin, int64_t end) {
        MANUAL_OPS_FOR_ISA(losses<kind, T>(data<T>(input) + begin, data<T>(target) + begin, data<T>(weights) + begin,
                                           mutable_data<T>(output) + begin, end - begin));
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
    *mutable_data<T>(output) = static_cast<T>(sum * scale_of(reduction, count));
  });
  return output;
}

template <Loss kind>
Tensor backward(const Tensor& grad_any, const LossOperands& operands, const std::string& reduction) {
  const auto& [input, target, weights] = operands;
  const bool reduced = is_reduced(reduction);
  check_loss_grad(grad_any, input, reduced);
  const Tensor grad_output = reduced ? grad_any : in_layout_of(grad_any, input);
  const Tensor grad_input = new_like(input);
  const double scale = scale_of(reduction, input.numel());
  for_floating_dtype(input.scalar_type(), "loss backward", [&](auto scalar) {
    using T = decltype(scalar);
    parallel_for(input.numel(), work(kind), [&](int64_t begin, int64_t end) {
      const T* grad = data<T>(grad_output);
      const T *x = data<T>(input) + begin, *t = data<T>(target) + begin, *w = data<T>(weights) + begin;
      T* result = mutable_data<T>(grad_input) + begin;
      if (reduced) {
        MANUAL_OPS_FOR_ISA(loss_backward<kind, true, T>(grad, scale, x, t, w, result, end - begin));
      } else {
        MANUAL_OPS_FOR_ISA(loss_backward<kind, false, T>(grad + begin, scale, x, t, w, result, end - begin));
      }
    });
  });
  return grad_input;
}

Tensor total(const Tensor& input, const std::string& reduction) {
  STD_TORCH_CHECK(is_reduced(reduction), "total: reduction must be sum or mean");
  return forward<Loss::identity>({input, input, std::nullopt}, reduction);
}

Tensor mse_loss(const Tensor& input, const Tensor& target, const std::string& reduction) {
  return forward<Loss::squared>({input, target, std::nullopt}, reduction);
}

Tensor mse_loss_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                         const std::string& reduction) {
  return backward<Loss::squared>(grad_output, {input, target, std::nullopt}, reduction);
}

Tensor bce_with_logits(const Tensor& input, const Tensor& target, const std::optional<Tensor>& pos_weight,
                       const std::string& reduction) {
  const LossOperands operands{input, target, pos_weight};
  return pos_weight ? forward<Loss::weighted_logistic>(operands, reduction)
                    : forward<Loss::logistic>(operands, reduction);
}

Tensor bce_with_logits_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                const std::optional<Tensor>& pos_weight, const std::string& reduction) {
  const LossOperands operands{input, target, pos_weight};
  return pos_weight ? backward<Loss::weighted_logistic>(grad_output, operands, reduction)
                    : backward<Loss::logistic>(grad_output, operands, reduction);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("total", TORCH_BOX(&total));
  m.impl("mse_loss", TORCH_BOX(&mse_loss));
  m.impl("mse_loss_backward", TORCH_BOX(&mse_loss_backward));
  m.impl("bce_with_logits", TORCH_BOX(&bce_with_logits));
  m.impl("bce_with_logits_backward", TORCH_BOX(&bce_with_logits_backward));
}

}  // namespace manual_ops
