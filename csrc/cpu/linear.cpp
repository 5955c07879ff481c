// The fully connected layer: one matrix product, on the micro-kernel of the dense convolution.
#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

namespace manual_ops {

// Element (i, k) lies at data[i*row + k*column]; one of the two strides is 1.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// Features of a panel that are packed at a time: 128 KB of a panel stay in the L2 cache while all rows meet them.
constexpr int64_t kPackedFeatures = 1024;
// Rows that meet a panel while it is packed. Packing then costs some 3 % of the product.
constexpr int64_t kBlockRows = 252;

}  // namespace manual_ops

#define MANUAL_OPS_KERNELS "cpu/linear_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// The matrix itself where one of its strides is 1, else a copy.
Tensor with_unit_stride(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : as_contiguous(matrix);
}

template <class T>
Matrix<T> matrix_of(const Tensor& tensor) {
  return {data<T>(tensor), tensor.stride(0), tensor.stride(1)};
}

// An element's sum runs over the features in one order, whatever block it is computed in.
template <class T>
void multiply(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output) {
  using A = accumulate_t<T>;
  const int64_t rows = input.size(0), inner = input.size(1), columns = weight.size(0);
  const Matrix<T> a = matrix_of<T>(input), b = matrix_of<T>(weight);
  T* result = mutable_data<T>(output);
  int64_t width;
  MANUAL_OPS_FOR_ISA(panel_width<A>(columns, width));
  const int64_t panels = (columns + width - 1) / width, blocks = (rows + kBlockRows - 1) / kBlockRows;
  std::vector<A> padded_bias;
  if (bias) {
    padded_bias.resize(panels * width);
    for (int64_t column = 0; column < columns; ++column)
      padded_bias[column] = static_cast<A>(data<T>(*bias)[column * bias->stride(0)]);
  }
  const bool direct = std::is_same_v<T, A> && a.column == 1;
  const int64_t work = rows / blocks * inner * width / 16;
  parallel_for(blocks * panels, work, [&](int64_t begin, int64_t end) {
    const Scratch<A> block_rows(direct ? 0 : kBlockRows * inner);
    const Scratch<A> packed(kPackedFeatures * width), sums(kBlockRows * width);
    int64_t packed_block = -1;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t block = index / panels, panel = index % panels;
      const int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
      const A* block_data = block_rows.data();
      int64_t block_row = inner;
      if constexpr (std::is_same_v<T, A>) {
        if (direct) block_data = a.data + first * a.row, block_row = a.row;
      }
      if (!direct && packed_block != block) {
        MANUAL_OPS_FOR_ISA(pack_rows(a, first, count, inner, block_rows.data()));
        packed_block = block;
      }
      MANUAL_OPS_FOR_ISA(multiply_panel(block_data, block_row, count, b, columns, inner, panel,
                                        bias ? padded_bias.data() : nullptr, result + first * columns, packed.data(),
                                        sums.data()));
    }
  });
}

// input (N, I) times the transpose of weight (F, I), of any strides.
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(input.dim() == 2 && weight.dim() == 2 && input.size(1) == weight.size(1),
                  "linear: input (N, I) and weight (F, I) must be matrices with one number of features");
  const int64_t rows = input.size(0), features = weight.size(0);
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == features), "linear: bias must be (F,)");
  Tensor output = new_tensor({rows, features}, input.scalar_type(), input);
  if (output.numel() == 0) return output;
  for_floating_dtype(input.scalar_type(), "linear", [&](auto scalar) {
    multiply<decltype(scalar)>(with_unit_stride(input), with_unit_stride(weight), bias, output);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace manual_ops
