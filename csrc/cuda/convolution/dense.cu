// The three passes as products:
//
//                    row                  column            term                     x             y
//     forward        image, output pixel  output channel    input channel, tap       input         weight
//     input_grad     image, input pixel   input channel     output channel, tap      grad_output   weight
//     weight_grad    input channel, tap   output channel    image, output pixel      input         grad_output
//
// Terms of channels and taps go through the weight in the order of x's layout: neighbouring channels, or taps.
#include "cuda/convolution/dense.h"

#include <numeric>

#include "cuda/product.h"

namespace manual_ops {

namespace {

// With this many neighbouring pixels a weight gradient's threads share a row of pixels, else the channels of one.
constexpr int64_t kPixelsTogether = 8;

void check_positions(const char* op, const ConvGeometry& g) {
  for (int axis = 0; axis < kAxes; ++axis) {
    const int64_t limit = int64_t{1} << 32, reach = (g.window[axis] - 1) * g.dilation[axis];
    const bool small = g.window[axis] < limit && g.output[axis] < limit && g.input[axis] < limit;
    STD_TORCH_CHECK(small && positions_are_distinct(axis, g.input[axis] + g.padding[axis],
                                                    (g.output[axis] - 1) * g.stride[axis] + reach),
                    op, ": an axis with its padding is too long, ", g.input[axis], " elements");
  }
}

Layout of_images(const Tensor& tensor, const int64_t (&size)[kAxes], bool channels_last) {
  return Layout(tensor.size(1), size, channels_last);
}

// Images and pixels: what a pixel adds to the position, and to the place in x and in the other memory.
Walk pixels_of(const ConvGeometry& g, const int64_t (&size)[kAxes], const int64_t (&step)[kAxes], const Layout& x,
               const Layout& other) {
  Walk walk;
  walk.lots = g.batch;
  walk.lot_x = x.image;
  walk.lot_other = other.image;
  for (int axis = 0; axis < kAxes; ++axis) {
    Walk::Axis& along = walk.axis[axis];
    along.size[0] = size[axis];
    along.x = step[axis] * x.axis[axis];
    along.other = other.axis[axis];
    along.at = static_cast<uint32_t>(step[axis]);
  }
  return walk;
}

// Outputs begin `padding` before the input.
Walk outputs_of(const ConvGeometry& g, const Layout& input, const Layout& output) {
  Walk walk = pixels_of(g, g.output, g.stride, input, output);
  for (int axis = 0; axis < kAxes; ++axis)
    walk.axis[axis].begin = {-g.padding[axis] * input.axis[axis], 0, static_cast<uint32_t>(-g.padding[axis]), 0};
  return walk;
}

// Input channels and taps, in the input's memory and in the weight's.
Walk taps_of(const ConvGeometry& g, const Layout& input, const Layout& weight, bool channels_fastest) {
  Walk walk;
  walk.lots = g.in_channels;
  walk.lot_x = input.channel;
  walk.lot_other = weight.channel;
  walk.lots_fastest = channels_fastest;
  for (int axis = 0; axis < kAxes; ++axis) {
    Walk::Axis& along = walk.axis[axis];
    along.size[0] = g.window[axis];
    along.x = g.dilation[axis] * input.axis[axis];
    along.other = weight.axis[axis];
    along.at = static_cast<uint32_t>(g.dilation[axis]);
  }
  return walk;
}

}  // namespace

void dense_forward(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, bool weight_last,
                   const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& output) {
  const Layout x = of_images(input, g.input, channels_last), window(g.in_channels, g.window, weight_last);
  const Layout out = of_images(output, g.output, channels_last);
  Product product;
  product.name = "conv_forward";
  check_positions(product.name, g);
  product.rows = outputs_of(g, x, out);
  product.terms = taps_of(g, x, window, channels_last);
  for (int axis = 0; axis < kAxes; ++axis) product.inside[axis] = static_cast<uint32_t>(g.input[axis]);
  product.columns = g.out_channels;
  product.column_y = window.image;
  product.column_output = product.channel_step = out.channel;
  product.groups = g.groups;
  product.group_x = g.in_channels * x.channel;
  product.group_y = g.out_channels * window.image;
  product.group_output = g.out_channels * out.channel;
  multiply(guard, product, input, weight, bias, output);
}

void dense_input_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, bool weight_last,
                      const Tensor& grad_output, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Tensor& grad_input) {
  const Layout x = of_images(grad_output, g.output, channels_last), window(g.in_channels, g.window, weight_last);
  const Layout out = of_images(grad_input, g.input, channels_last);
  Product product;
  product.name = "conv_input_grad";
  check_positions(product.name, g);
  constexpr int64_t kSteps[kAxes] = {1, 1, 1};
  product.rows = pixels_of(g, g.input, kSteps, x, out);
  product.terms.lots = g.out_channels;
  product.terms.lot_x = x.channel;
  product.terms.lot_other = window.image;
  product.terms.lots_fastest = channels_last;
  product.phased = true;
  for (int axis = 0; axis < kAxes; ++axis) {
    product.inside[axis] = static_cast<uint32_t>(g.output[axis]);
    PhaseAxis& phase = product.phase[axis];
    phase.stride = g.stride[axis];
    phase.padding = g.padding[axis];
    phase.dilation = g.dilation[axis];
    phase.common = std::gcd(g.dilation[axis], g.stride[axis]);
    phase.period = g.stride[axis] / phase.common;
    phase.inverse = inverse_modulo(g.dilation[axis] / phase.common, phase.period);
    // A stride beyond the input leaves one input to a phase, and the later phases without any.
    const int64_t phases = product.phases[axis] = std::min(g.stride[axis], g.input[axis]);
    phase.longer_rows = g.input[axis] % phases;
    phase.more_taps = g.window[axis] % phase.period;
    phase.row_step = out.axis[axis];
    phase.tap_step = window.axis[axis];
    Walk::Axis &row = product.rows.axis[axis], &tap = product.terms.axis[axis];
    row.size[0] = g.input[axis] / phases;
    if (phase.longer_rows > 0) row.size[1] = g.input[axis] / phases + 1;
    row.other *= phases;
    tap.size[0] = g.window[axis] / phase.period;
    if (phase.more_taps > 0) tap.size[1] = g.window[axis] / phase.period + 1;
    tap.size[2] = 0;
    // Each tap further reads dilation / stride outputs back.
    const int64_t back = g.dilation[axis] / phase.common;
    tap.x = -back * x.axis[axis];
    tap.other = phase.period * window.axis[axis];
    tap.at = static_cast<uint32_t>(-back);
  }
  product.columns = g.in_channels;
  product.column_y = window.channel;
  product.column_output = product.channel_step = out.channel;
  product.y_by_terms = !channels_last && g.taps() > 1;
  product.groups = g.groups;
  product.group_x = g.out_channels * x.channel;
  product.group_y = g.out_channels * window.image;
  product.group_output = g.in_channels * out.channel;
  multiply(guard, product, grad_output, weight, bias, grad_input);
}

void dense_weight_grad(const CudaGuard& guard, const ConvGeometry& g, bool channels_last, bool weight_last,
                       const Tensor& grad_output, const Tensor& input, const Tensor& grad_weight) {
  const Layout x = of_images(input, g.input, channels_last), window(g.in_channels, g.window, weight_last);
  const Layout y = of_images(grad_output, g.output, channels_last);
  Product product;
  product.name = "conv_weight_grad";
  check_positions(product.name, g);
  product.rows = taps_of(g, x, window, weight_last);
  product.terms = outputs_of(g, x, y);
  for (int axis = 0; axis < kAxes; ++axis) product.inside[axis] = static_cast<uint32_t>(g.input[axis]);
  product.columns = g.out_channels;
  product.column_y = y.channel;
  product.column_output = window.image;
  product.x_by_terms = product.y_by_terms = !channels_last && g.output[kAxes - 1] >= kPixelsTogether;
  product.groups = g.groups;
  product.group_x = g.in_channels * x.channel;
  product.group_y = g.out_channels * y.channel;
  product.group_output = g.out_channels * window.image;
  multiply(guard, product, input, grad_output, std::nullopt, grad_weight);
}

}  // namespace manual_ops
