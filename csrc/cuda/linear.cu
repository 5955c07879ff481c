// The fully connected layer: one product.
#include "cuda/product.h"
#include "dense.h"

namespace manual_ops {

namespace {

// input (N, I) times the transpose of weight (F, I), either of them contiguous or transposed.
Tensor linear(const Tensor& input_any, const Tensor& weight_any, const std::optional<Tensor>& bias_any) {
  STD_TORCH_CHECK(input_any.dim() == 2 && weight_any.dim() == 2 && input_any.size(1) == weight_any.size(1),
                  "linear: input (N, I) and weight (F, I) must be matrices with one number of features");
  STD_TORCH_CHECK(input_any.scalar_type() == weight_any.scalar_type(), "linear: the operands must have one dtype");
  const int64_t rows = input_any.size(0), features = weight_any.size(0);
  STD_TORCH_CHECK(!bias_any || (bias_any->dim() == 1 && bias_any->size(0) == features), "linear: bias must be (F,)");
  const CudaGuard guard(input_any);
  const Tensor output = new_tensor({rows, features}, input_any.scalar_type(), input_any);
  if (output.numel() == 0) return output;
  const Tensor input = is_dense(input_any) ? input_any : as_contiguous(input_any);
  const Tensor weight = is_dense(weight_any) ? weight_any : as_contiguous(weight_any);
  std::optional<Tensor> bias;
  if (bias_any) bias = as_contiguous(*bias_any);
  Product product;
  product.name = "linear";
  product.rows.lots = rows;
  product.rows.lot_x = input.stride(0);
  product.rows.lot_other = features;
  product.terms.lots = input.size(1);
  product.terms.lot_x = input.stride(1);
  product.terms.lot_other = weight.stride(1);
  product.terms.lots_fastest = true;
  product.columns = features;
  product.column_y = weight.stride(0);
  product.column_output = 1;
  product.x_by_terms = input.stride(1) == 1;
  product.y_by_terms = weight.stride(1) == 1;
  multiply(guard, product, input, weight, bias, output);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace manual_ops
