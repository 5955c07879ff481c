// The losses that share a loop, each a function of an input and a target, and their operands.
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

inline void check_loss_grad(const Tensor& grad_output, const Tensor& input, bool reduced) {
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type() &&
                      (reduced ? grad_output.numel() == 1 : sizes_of(grad_output) == sizes_of(input)),
                  "loss backward: grad_output must have the shape and the dtype of the loss");
}

}  // namespace manual_ops
