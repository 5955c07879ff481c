// Window arithmetic that the CPU and CUDA kernels share. One and two axes are three with leading axes of size 1.
#pragma once

#include <cstdint>
#include <utility>

namespace manual_ops {

constexpr int kAxes = 3;  // depth, height, width

// A convolution's sizes. Along an axis, output o and tap t meet the input o*stride - padding + t*dilation.
struct ConvGeometry {
  int64_t batch = 0, groups = 1;
  int64_t in_channels = 0, out_channels = 0;  // of one group
  int64_t input[kAxes] = {1, 1, 1}, output[kAxes] = {1, 1, 1}, window[kAxes] = {1, 1, 1};
  int64_t stride[kAxes] = {1, 1, 1}, padding[kAxes] = {0, 0, 0}, dilation[kAxes] = {1, 1, 1};

  int64_t taps() const { return window[0] * window[1] * window[2]; }
};

inline int64_t product(const int64_t (&sizes)[kAxes]) { return sizes[0] * sizes[1] * sizes[2]; }

// The x from 0 to b-1 with a*x = 1 modulo b, for numbers without a common divisor.
inline int64_t inverse_modulo(int64_t a, int64_t b) {
  int64_t previous = b, rest = a % b, of_previous = 0, of_rest = 1;
  while (rest != 0) {
    const int64_t quotient = previous / rest;
    previous = std::exchange(rest, previous - quotient * rest);
    of_previous = std::exchange(of_rest, of_previous - quotient * of_rest);
  }
  return (of_previous % b + b) % b;
}

// Where element (n, c, position) of a dense (N, C, ...) tensor lies: contiguous or channels_last.
struct Layout {
  int64_t image = 0, channel = 0, axis[kAxes] = {0, 0, 0};

  Layout() = default;
  Layout(int64_t channels, const int64_t (&size)[kAxes], bool channels_last) {
    const int64_t pixels = product(size);
    image = channels * pixels;
    channel = channels_last ? 1 : pixels;
    axis[2] = channels_last ? channels : 1;
    axis[1] = size[2] * axis[2];
    axis[0] = size[1] * axis[1];
  }
};

}  // namespace manual_ops
