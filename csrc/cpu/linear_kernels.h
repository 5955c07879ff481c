// The blocks of a matrix product: a (rows, inner) times the transpose of b (columns, inner).
#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"

// Rows first .. first+count of the matrix, features k .. k+inner, as [feature][pitch] and as [row][pitch].
template <class T>
void pack_turned(const Matrix<T>& matrix, int64_t first, int64_t count, int64_t k, int64_t inner,
                 accumulate_t<T>* packed, int64_t pitch) {
  if (count < pitch) fill_zero(packed, inner * pitch);
  Layout layout;
  layout.channel = matrix.row;
  layout.axis[2] = matrix.column;
  copy_in(matrix.data + first * matrix.row + k * matrix.column, layout, count, inner, packed, pitch);
}
template <class T>
void pack_rows(const Matrix<T>& matrix, int64_t first, int64_t count, int64_t inner, accumulate_t<T>* packed) {
  Layout layout;
  layout.channel = matrix.column;
  layout.axis[2] = matrix.row;
  copy_in(matrix.data + first * matrix.row, layout, inner, count, packed, inner);
}

// One panel of the columns of the result, for a block of its rows. `a` holds these rows, `a_row` apart, with all of
// their features; `packed` and `sums` are scratch memory.
template <class T>
void multiply_panel(const accumulate_t<T>* a, int64_t a_row, int64_t rows, const Matrix<T>& b, int64_t columns,
                    int64_t inner, int64_t panel, const accumulate_t<T>* bias, T* output, accumulate_t<T>* packed,
                    accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  int64_t width;
  panel_width<A>(columns, width);
  const int64_t first = panel * width, count = columns - first < width ? columns - first : width;
  output += first;
  A* c = sums;
  int64_t c_row = width;
  if constexpr (std::is_same_v<T, A>) {
    c = output;
    c_row = columns;
  }
  const Run whole{0, 0};
  int64_t k = 0;
  do {  // once where there are no features, to store the bias
    const int64_t length = inner - k < kPackedFeatures ? inner - k : kPackedFeatures;
    pack_turned(b, first, count, k, length, packed, width);
    multiply_rows<A>(rows, {.a = a + k,
                            .a_row = a_row,
                            .a_step = 1,
                            .b = packed,
                            .b_step = width,
                            .runs = &whole,
                            .run_count = 1,
                            .run_length = length,
                            .c = c,
                            .c_row = c_row,
                            .columns = std::is_same_v<T, A> ? count : width,
                            .bias = bias == nullptr || k > 0 ? nullptr : bias + first,
                            .accumulate = k > 0});
    k += kPackedFeatures;
  } while (k < inner);
  if constexpr (!std::is_same_v<T, A>)
    for (int64_t row = 0; row < rows; ++row) convert(sums + row * width, output + row * columns, count);
}
