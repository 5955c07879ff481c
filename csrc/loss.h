// The losses that share a loop, each a function of an input and a target, and their operators, which ask a device for
// the loops alone.
#pragma once

#include <optional>
#include <string>

#include "dense.h"

namespace manual_ops {

// `identity` is the input alone.
enum class Loss { identity, squared, logistic, weighted_logistic };

// The operands, dense and in one layout.
struct LossOperands {
  Tensor input, target, weights;

  LossOperands(const Tensor& input_any, const Tensor& target_any, const std::optional<Tensor>& weights_any)
      : input(as_dense(input_any)),
        target(matching(target_any)),
        weights(weights_any ? matching(*weights_any) : input) {}

  Tensor matching(const Tensor& other) const {
    STD_TORCH_CHECK(sizes_of(other) == sizes_of(input) && other.scalar_type() == input.scalar_type(),
                    "loss: the operands must have one shape and one dtype");
    return in_layout_of(other, input);
  }
};

inline bool is_reduced(const std::string& reduction) { return reduction != "none"; }

// What the sum is multiplied with. The mean of nothing is 0/0.
inline double scale_of(const std::string& reduction, int64_t count) {
  return reduction == "mean" ? 1.0 / static_cast<double>(count) : 1.0;
}

// A Device has
//   template <Loss kind> static void value(operands, output, reduced, scale);
//   template <Loss kind> static void slope(grad_output, operands, grad_input, reduced, scale);
// where `output` and `grad_output` are one number if `reduced`, else in the operands' layout.
template <class Device>
struct LossOperators {
  template <Loss kind>
  static Tensor forward(const LossOperands& operands, const std::string& reduction) {
    const Tensor& input = operands.input;
    const bool reduced = is_reduced(reduction);
    const Tensor output = reduced ? new_tensor({}, input.scalar_type(), input) : new_like(input);
    Device::template value<kind>(operands, output, reduced, scale_of(reduction, input.numel()));
    return output;
  }

  template <Loss kind>
  static Tensor backward(const Tensor& grad_any, const LossOperands& operands, const std::string& reduction) {
    const Tensor& input = operands.input;
    const bool reduced = is_reduced(reduction);
    STD_TORCH_CHECK(grad_any.scalar_type() == input.scalar_type() &&
                        (reduced ? grad_any.numel() == 1 : sizes_of(grad_any) == sizes_of(input)),
                    "loss backward: grad_output must have the shape and the dtype of the loss");
    const Tensor grad_output = reduced ? grad_any : in_layout_of(grad_any, input);
    const Tensor grad_input = new_like(input);
    Device::template slope<kind>(grad_output, operands, grad_input, reduced, scale_of(reduction, input.numel()));
    return grad_input;
  }

  static Tensor total(const Tensor& input, const std::string& reduction) {
    STD_TORCH_CHECK(is_reduced(reduction), "total: reduction must be sum or mean");
    return forward<Loss::identity>({input, input, std::nullopt}, reduction);
  }

  static Tensor mse_loss(const Tensor& input, const Tensor& target, const std::string& reduction) {
    return forward<Loss::squared>({input, target, std::nullopt}, reduction);
  }

  static Tensor mse_loss_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                  const std::string& reduction) {
    return backward<Loss::squared>(grad_output, {input, target, std::nullopt}, reduction);
  }

  static Tensor bce_with_logits(const Tensor& input, const Tensor& target, const std::optional<Tensor>& pos_weight,
                                const std::string& reduction) {
    const LossOperands operands{input, target, pos_weight};
    return pos_weight ? forward<Loss::weighted_logistic>(operands, reduction)
                      : forward<Loss::logistic>(operands, reduction);
  }

  static Tensor bce_with_logits_backward(const Tensor& grad_output, const Tensor& input, const Tensor& target,
                                         const std::optional<Tensor>& pos_weight, const std::string& reduction) {
    const LossOperands operands{input, target, pos_weight};
    return pos_weight ? backward<Loss::weighted_logistic>(grad_output, operands, reduction)
                      : backward<Loss::logistic>(grad_output, operands, reduction);
  }
};

}  // namespace manual_ops
