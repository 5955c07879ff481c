// What the kernels of cross-entropy and negative log-likelihood share on the CPU and on CUDA: the operands' checks.
#pragma once

#include "tensor.h"

namespace manual_ops {

enum class Target { index, smoothed_index, distribution };

// q = hard * t + soft, but nothing in the rows of ignore_index; weight_sum is over the classes.
template <class A>
struct Smoothing {
  A hard, soft, weight_sum;
  int64_t ignore_index;
};

// (N, C, *d) as rows, one for each sample and pixel. Classes are `pitch` apart. `samples` are those of the vmapped
// batch, each of which is reduced by itself.
struct Rows {
  int64_t images, classes, pixels = 1, samples = 1, pitch, rows;
  bool strided;

  Rows(const Sizes& sizes, const Sizes& sample_shape, bool channels_last) {
    STD_TORCH_CHECK(sizes.size() >= 2, "cross_entropy: input needs at least 2 dimensions");
    images = sizes[0];
    classes = sizes[1];
    for (size_t dim = 2; dim < sizes.size(); ++dim) pixels *= sizes[dim];
    for (int64_t size : sample_shape) samples *= size;
    STD_TORCH_CHECK(samples > 0 ? images % samples == 0 : images == 0, "cross_entropy: samples must divide the batch");
    strided = pixels > 1 && !channels_last;
    pitch = strided ? pixels : 1;
    rows = images * pixels;
  }
};

inline bool is_distribution(const Tensor& target) { return target.scalar_type() != ScalarType::Long; }

// Input and target side by side in memory, with the classes innermost if the input has them so.
struct CrossEntropyOperands {
  bool channels_last;
  Tensor input, target;

  CrossEntropyOperands(const Tensor& input_any, const Tensor& target_any)
      : channels_last(is_channels_last(input_any)),
        input(as_contiguous(input_any, channels_last)),
        target(as_contiguous(target_any, channels_last && is_distribution(target_any))) {
    if (is_distribution(target)) {
      STD_TORCH_CHECK(sizes_of(target) == sizes_of(input) && target.scalar_type() == input.scalar_type(),
                      "cross_entropy: a distribution must have the shape and dtype of input");
    } else {
      STD_TORCH_CHECK(target.numel() * input.size(1) == input.numel() || input.size(1) == 0,
                      "cross_entropy: one index a row");
    }
  }
};

inline void check_rows(const Tensor& target, const Rows& rows) {
  STD_TORCH_CHECK(is_distribution(target) || target.numel() == rows.rows, "cross_entropy: target has ", target.numel(),
                  " indices for ", rows.rows, " rows");
}

inline void check_class_weight(const Tensor& weight, const Rows& rows) {
  STD_TORCH_CHECK(weight.numel() == rows.classes || weight.numel() == rows.samples * rows.classes,
                  "cross_entropy: weight has ", weight.numel(), " entries for ", rows.classes, " classes");
}

// grad_output, and the denominator beside it, are those of the rows or of the samples.
inline void check_row_grad(const Tensor& grad_output, const Tensor& denominator, bool reduced, const Rows& rows) {
  STD_TORCH_CHECK(grad_output.numel() == (reduced ? rows.samples : rows.rows) && denominator.numel() == rows.samples,
                  "cross_entropy: grad_output and denominator must have the shape of the loss");
}

inline void check_lse(const Tensor& lse, const Rows& rows) {
  STD_TORCH_CHECK(lse.numel() == 2 * rows.rows, "cross_entropy: lse has ", lse.numel(), " entries for ", rows.rows,
                  " rows");
}

// What the forward passes return, not filled: losses and denominators; `lse` is (2, the shape of the rows).
struct CrossEntropyResults {
  Tensor loss, denominator;
  Sizes lse_sizes;

  CrossEntropyResults(const Tensor& input, const std::string& reduction, const Sizes& samples)
      : CrossEntropyResults(input, reduction, samples, rows_shape(sizes_of(input))) {}

  Tensor new_lse(const Tensor& input) const {
    return new_tensor(lse_sizes, accumulation_type(input.scalar_type()), input);
  }

 private:
  CrossEntropyResults(const Tensor& input, const std::string& reduction, const Sizes& samples, const Sizes& rows)
      : loss(new_tensor(reduction == "none" ? rows : samples, input.scalar_type(), input)),
        denominator(new_tensor(samples, accumulation_type(input.scalar_type()), input)),
        lse_sizes(rows) {
    lse_sizes.insert(lse_sizes.begin(), 2);
  }

  static Sizes rows_shape(Sizes sizes) {
    sizes.erase(sizes.begin() + 1);
    return sizes;
  }
};

}  // namespace manual_ops
