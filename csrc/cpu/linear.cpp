// The fully connected layer: one matrix product, by torch's BLAS, straight into the result.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/common.h"

namespace manual_ops {

namespace {

void fill_rows(const Tensor& output, const Tensor& row) {
  for_floating_dtype(output.scalar_type(), "linear", [&](auto scalar) {
    using T = decltype(scalar);
    const int64_t columns = output.size(1);
    parallel_for(output.size(0), columns, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::copy_n(data<T>(row), columns, mutable_data<T>(output) + i * columns);
    });
  });
}

// input (N, I) times the transpose of weight (F, I), of any strides. The functions called are torch's CPU kernels
// below the dispatcher, so that nothing is recorded for autograd.
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1),
                  "linear: input (N, I) and weight (F, I) must be matrices with one number of features");
  const int64_t rows = input.size(0), features = weight.size(0);
  Tensor output = new_tensor({rows, features}, input.scalar_type(), input);
  const Tensor turned = torch::stable::transpose(weight, 0, 1);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == features, "linear: bias must be (F,)");
    fill_rows(output, as_contiguous(*bias));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(output.get(), output.get(), input.get(), turned.get(), /*beta=*/1, /*alpha=*/1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(output.get(), input.get(), turned.get()));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace manual_ops
