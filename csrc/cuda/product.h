// Products of two operands that are read through index arithmetic, nothing of them copied: what dense convolutions and
// the linear layer are made of.
//
//     output[row, column] = bias[column] + sum over terms of  x[row, term] * y[column, term]
//
// A row and a term are indices of up to four digits: a lot (an image, or a channel) and a position along three axes
// (of an image, or of a window). A digit moves the place in each operand's memory by a step of its own, so the place of
// x[row, term] is the sum of what the row and the term add to it. Along each axis the two also add up to a position; x
// is zero where that is outside.
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/cu.h"
#include "geometry.h"

namespace manual_ops {

// A divisor, of 32-bit indices by a multiplication.
struct Size {
  int64_t value = 1;
  Divider<int32_t> divider;

  Size() = default;
  Size(int64_t size) : value(size), divider(std::max<int64_t>(1, size)) {}
};

// Where an axis begins, and which of its sizes it has.
struct Begin {
  int64_t x, other;
  uint32_t at;
  int size;
};

// The digits of a row or of a term. `other` is the output's memory for a row, y's for a term; positions are counted
// modulo 2^32.
struct Walk {
  struct Axis {
    Size size[3];
    int64_t x = 0, other = 0;
    uint32_t at = 0;
    Begin begin{};
  };
  Axis axis[kAxes];  // the last is the fastest
  Size lots;
  int64_t lot_x = 0, lot_other = 0;
  bool lots_fastest = false;
};

// An axis whose rows are cut into phases: the destinations q*phases + phase read through the taps
// first, first + period, ... alone, so that no term meets a zero between the outputs of a strided convolution.
struct PhaseAxis {
  int64_t stride = 1, padding = 0, dilation = 1;
  int64_t common = 1, period = 1, inverse = 0;  // gcd(dilation, stride), stride / common, 1 / dilation modulo period
  int64_t longer_rows = 0, more_taps = 0;       // phases below it have one row more, first taps below it one tap more
  int64_t row_step = 0, tap_step = 0;           // in the output, in y
};

struct Product {
  const char* name;  // of the operation, for its messages
  Walk rows, terms;
  uint32_t inside[kAxes] = {1, 1, 1};  // the axes of x
  int64_t columns = 0, column_y = 0, column_output = 0;
  int64_t groups = 1, group_x = 0, group_y = 0, group_output = 0;
  int64_t phases[kAxes] = {1, 1, 1};
  PhaseAxis phase[kAxes];
  bool phased = false;
  // Whether neighbouring terms lie together in memory, rather than neighbouring rows or columns.
  bool x_by_terms = false, y_by_terms = true;
  // Which channel an element of the output belongs to: (its place / channel_step) % (groups * columns).
  int64_t channel_step = 1;
};

// Whether `inside` and `at` can tell positions in this range, of steps that add up to at most `reach`, from any other.
inline bool positions_are_distinct(int axis, int64_t size, int64_t reach) {
  const int64_t limit = int64_t{1} << (axis == 0 ? 29 : 32);
  return size < limit && reach < limit;
}

// All operands have one dtype; the output is not empty.
void multiply(const CudaGuard& guard, Product product, const Tensor& x, const Tensor& y,
              const std::optional<Tensor>& bias, const Tensor& output);

}  // namespace manual_ops
