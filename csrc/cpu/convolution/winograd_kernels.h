// Winograd's F(4x4, 3x3): the products of 4 x 4 outputs with a window of 3 x 3 taps, 36 instead of 144.
//
// Along one axis a window of taps g meets six neighbouring inputs d, and the convolution's trilinear form is
//
//     sum over k < 4, t < 3 of  y[k] * d[k+t] * g[t]   =   sum over j < 6 of  d[j] * c[j],
//
// where c are the coefficients of the product of two polynomials, Y(x) = sum of y[k] x^k and G(x) = sum of g[t] x^t. It
// has degree 5, so its values at six points give it, one product each: at the points 0, +-a, +-b and infinity (where
// the value is the highest coefficient). Interpolation, transposed, takes d to the points: for a point p to the
// coefficients of M_p(x) = the product of x - q over the other finite points q, times 1 / M_p(p), which goes to G. So
//
//     form = sum over p of  Y(p) * D(p) * G(p),      D(p) = sum over j of  M_p[j] * d[j],
//
// and what is true of the form is true of its derivatives:
//
//     output:           y = Y^T (D d * G g)           weight gradient:      g = G^T (D d * Y y)
//
// The input gradient is the output for the flipped window. In two dimensions each step is taken along both axes; sums
// over channels (output) and over places (weight gradient) are matrix products, one for each of the 36 pairs of points.
// Points whose powers stay near 1 keep the rounding errors small: a^2 = 1/2, b^2 = 2.

#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"
#include "cpu/convolution/panels.h"

template <class A>
struct Points {
  static constexpr A a = 0.70710678118654752440, b = 1.41421356237309504880;
  static constexpr A a2 = 0.5, b2 = 2, a3 = a * a2, b3 = b * b2;
  static constexpr A at_a = A(-2) / 3, at_b = A(1) / 6;  // 1 / M_p(p) for p = +-a, +-b; it is 1 at 0 and infinity
};

// The four maps along one axis. They read elements `from_step` apart and write them `to_step` apart.

// D: M_0 = x^4 - 5/2 x^2 + 1, M_a = (x + a)(x^3 - b^2 x), M_b = (x + b)(x^3 - a^2 x), M_infinity = x^5 - 5/2 x^3 + x.
template <class A>
[[gnu::always_inline]] inline void source_to_points(const vector_t<A>* d, int from_step, vector_t<A>* to, int to_step) {
  using P = Points<A>;
  using V = vector_t<A>;
  const V d1 = d[from_step], d2 = d[2 * from_step], d3 = d[3 * from_step], d4 = d[4 * from_step];
  const V even_a = d4 - P::b2 * d2, odd_a = P::a * (d3 - P::b2 * d1);
  const V even_b = d4 - P::a2 * d2, odd_b = P::b * (d3 - P::a2 * d1);
  to[0] = d[0] - A(2.5) * d2 + d4;
  to[to_step] = even_a + odd_a;
  to[2 * to_step] = even_a - odd_a;
  to[3 * to_step] = even_b + odd_b;
  to[4 * to_step] = even_b - odd_b;
  to[5 * to_step] = d1 - A(2.5) * d3 + d[5 * from_step];
}

// Y
template <class A>
[[gnu::always_inline]] inline void output_to_points(const vector_t<A>* y, int from_step, vector_t<A>* to, int to_step) {
  using P = Points<A>;
  using V = vector_t<A>;
  const V y0 = y[0], y1 = y[from_step], y2 = y[2 * from_step], y3 = y[3 * from_step];
  const V even_a = y0 + P::a2 * y2, odd_a = P::a * y1 + P::a3 * y3;
  const V even_b = y0 + P::b2 * y2, odd_b = P::b * y1 + P::b3 * y3;
  to[0] = y0;
  to[to_step] = even_a + odd_a;
  to[2 * to_step] = even_a - odd_a;
  to[3 * to_step] = even_b + odd_b;
  to[4 * to_step] = even_b - odd_b;
  to[5 * to_step] = y3;
}

// Y^T
template <class A>
[[gnu::always_inline]] inline void points_to_output(const vector_t<A>* m, int from_step, vector_t<A>* to, int to_step) {
  using P = Points<A>;
  using V = vector_t<A>;
  const V even_a = m[from_step] + m[2 * from_step], odd_a = m[from_step] - m[2 * from_step];
  const V even_b = m[3 * from_step] + m[4 * from_step], odd_b = m[3 * from_step] - m[4 * from_step];
  to[0] = m[0] + even_a + even_b;
  to[to_step] = P::a * odd_a + P::b * odd_b;
  to[2 * to_step] = P::a2 * even_a + P::b2 * even_b;
  to[3 * to_step] = P::a3 * odd_a + P::b3 * odd_b + m[5 * from_step];
}

// G
template <class A>
[[gnu::always_inline]] inline void window_to_points(const vector_t<A>* g, int from_step, vector_t<A>* to, int to_step) {
  using P = Points<A>;
  using V = vector_t<A>;
  const V g0 = g[0], g1 = g[from_step], g2 = g[2 * from_step];
  const V even_a = P::at_a * (g0 + P::a2 * g2), odd_a = (P::at_a * P::a) * g1;
  const V even_b = P::at_b * (g0 + P::b2 * g2), odd_b = (P::at_b * P::b) * g1;
  to[0] = g0;
  to[to_step] = even_a + odd_a;
  to[2 * to_step] = even_a - odd_a;
  to[3 * to_step] = even_b + odd_b;
  to[4 * to_step] = even_b - odd_b;
  to[5 * to_step] = g2;
}

// G^T
template <class A>
[[gnu::always_inline]] inline void points_to_window(const vector_t<A>* u, int from_step, vector_t<A>* to, int to_step) {
  using P = Points<A>;
  using V = vector_t<A>;
  const V even_a = P::at_a * (u[from_step] + u[2 * from_step]), odd_a = P::at_a * (u[from_step] - u[2 * from_step]);
  const V even_b = P::at_b * (u[3 * from_step] + u[4 * from_step]);
  const V odd_b = P::at_b * (u[3 * from_step] - u[4 * from_step]);
  to[0] = u[0] + even_a + even_b;
  to[to_step] = P::a * odd_a + P::b * odd_b;
  to[2 * to_step] = P::a2 * even_a + P::b2 * even_b + u[5 * from_step];
}

// A map along both axes: [kFrom][kFrom] to [kTo][kTo].
template <class A, int kFrom, int kTo, void (*kMap)(const vector_t<A>*, int, vector_t<A>*, int)>
[[gnu::always_inline]] inline void along_both_axes(const vector_t<A>* from, vector_t<A>* to) {
  vector_t<A> between[kTo * kFrom];
#pragma GCC unroll 6
  for (int column = 0; column < kFrom; ++column) kMap(from + column, kFrom, between + column, kFrom);
#pragma GCC unroll 6
  for (int row = 0; row < kTo; ++row) kMap(between + row * kFrom, 1, to + row * kTo, 1);
}

// Patches to their points, from pixels [rows*4 + kSize-4][columns*4 + kSize-4][channels]. The last vector of channels
// overlaps the one before it: there is at least one whole.
template <class A, int kSize, void (*kMap)(const vector_t<A>*, int, vector_t<A>*, int)>
void patches_to_points(const A* pixels, int64_t channels, int64_t rows, int64_t columns, const AtPoints<A>& to) {
  const int64_t pitch = (columns * kPatch + kSize - kPatch) * channels;
  A* at = to.at;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column, at += to.pitch) {
      const A* patch = pixels + row * kPatch * pitch + column * kPatch * channels;
      for (int64_t next = 0; next < channels; next += kLanes<A>) {
        const int64_t channel = next + kLanes<A> <= channels ? next : channels - kLanes<A>;
        vector_t<A> from[kSize * kSize], points[kPoints];
#pragma GCC unroll 36
        for (int i = 0; i < kSize * kSize; ++i)
          from[i] = load_vector<A>(patch + i / kSize * pitch + i % kSize * channels + channel);
        along_both_axes<A, kSize, 6, kMap>(from, points);
#pragma GCC unroll 36
        for (int i = 0; i < kPoints; ++i) store_vector<A>(at + i * to.step + channel, points[i]);
      }
    }
}

// The way back of one row of patches: height x width outputs to[y*row + x*pixel + channel], plus a bias (or null). The
// values at the points, and the bias, go on to a whole vector. `finite` becomes false where an output is not.
template <class A>
void points_to_outputs(const AtPoints<const A>& from, int64_t height, int64_t width, int64_t channels, const A* bias,
                       A* to, int64_t row, int64_t pixel, bool& finite) {
  vector_t<A> zeros = {};
  const A* at = from.at;
  for (int64_t x = 0; x < width; x += kPatch, at += from.pitch)
    for (int64_t channel = 0; channel < channels; channel += kLanes<A>) {
      vector_t<A> points[kPoints], outputs[kPatch * kPatch], added = {};
#pragma GCC unroll 36
      for (int i = 0; i < kPoints; ++i) points[i] = load_vector<A>(at + i * from.step + channel);
      along_both_axes<A, 6, kPatch, points_to_output<A>>(points, outputs);
      if (bias != nullptr) added = load_vector<A>(bias + channel);
#pragma GCC unroll 16
      for (int i = 0; i < kPatch * kPatch; ++i) {
        outputs[i] += added;
        zeros += outputs[i] - outputs[i];
      }
      A* patch = to + x * pixel + channel;
      if (height == kPatch && width - x >= kPatch && channels - channel >= kLanes<A>) {
#pragma GCC unroll 16
        for (int i = 0; i < kPatch * kPatch; ++i)
          store_vector<A>(patch + i / kPatch * row + i % kPatch * pixel, outputs[i]);
      } else {
        A values[kPatch * kPatch][kLanes<A>];
        __builtin_memcpy(values, outputs, sizeof(values));
        for (int64_t i = 0; i < kPatch * kPatch; ++i)
          for (int64_t lane = 0; lane < kLanes<A>; ++lane)
            if (i / kPatch < height && i % kPatch < width - x && lane < channels - channel)
              patch[i / kPatch * row + i % kPatch * pixel + lane] = values[i][lane];
      }
    }
  for (int lane = 0; lane < kLanes<A>; ++lane) finite = finite && zeros[lane] == 0;
}

// A panel of `values` for each of the 9 taps to its points, `step` apart.
template <class A>
void taps_to_points(const A* panel, int64_t values, A* to, int64_t step) {
  for (int64_t i = 0; i < values; i += kLanes<A>) {
    vector_t<A> taps[kTaps], points[kPoints];
#pragma GCC unroll 9
    for (int tap = 0; tap < kTaps; ++tap) taps[tap] = load_vector<A>(panel + tap * values + i);
    along_both_axes<A, 3, 6, window_to_points<A>>(taps, points);
#pragma GCC unroll 36
    for (int point = 0; point < kPoints; ++point) store_vector<A>(to + point * step + i, points[point]);
  }
}

// The way back, of the sum of some parts in their order. `finite` becomes false where a tap is not.
template <class A>
void points_to_taps(const A* from, int64_t step, int64_t parts, int64_t part_step, int64_t values, A* panel,
                    bool& finite) {
  vector_t<A> zeros = {};
  for (int64_t i = 0; i < values; i += kLanes<A>) {
    vector_t<A> points[kPoints], taps[kTaps];
#pragma GCC unroll 36
    for (int point = 0; point < kPoints; ++point) points[point] = load_vector<A>(from + point * step + i);
    for (int64_t part = 1; part < parts; ++part)
#pragma GCC unroll 36
      for (int point = 0; point < kPoints; ++point)
        points[point] += load_vector<A>(from + part * part_step + point * step + i);
    along_both_axes<A, 6, 3, points_to_window<A>>(points, taps);
#pragma GCC unroll 9
    for (int tap = 0; tap < kTaps; ++tap) {
      zeros += taps[tap] - taps[tap];
      store_vector<A>(panel + tap * values + i, taps[tap]);
    }
  }
  for (int lane = 0; lane < kLanes<A>; ++lane) finite = finite && zeros[lane] == 0;
}

// Rows x columns of a plane of height x width pixels to [row][column][pixel]; what lies outside of it, or behind the
// channels, is zero.
template <class T>
void copy_rows(const T* plane, const Layout& layout, int64_t height, int64_t width, Range rows, Range columns,
               int64_t channels, accumulate_t<T>* to, int64_t pixel) {
  const Range inside = clipped(columns, width);
  for (int64_t row = rows.begin; row < rows.end; ++row, to += columns.size() * pixel) {
    const bool exists = row >= 0 && row < height;
    if (!exists || channels < pixel) fill_zero(to, columns.size() * pixel);
    if (!exists) continue;
    fill_zero(to, (inside.begin - columns.begin) * pixel);
    copy_in(plane + row * layout.axis[1] + inside.begin * layout.axis[2], layout, channels, inside.size(),
            to + (inside.begin - columns.begin) * pixel, pixel);
    fill_zero(to + (inside.end - columns.begin) * pixel, (columns.end - inside.end) * pixel);
  }
}

// The sources under `strips`, at plane `depth`, to their points. `pixels` is scratch memory.
template <class T>
void winograd_sources(const Gather& plan, const Patches& patches, Range strips, int64_t depth, const T* source,
                      AtPoints<accumulate_t<T>> to, accumulate_t<T>* pixels) {
  using A = accumulate_t<T>;
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  while (strips.begin < strips.end) {
    const Patches::Stack stack = patches.stack_at(strips);
    const T* plane = source + stack.image * plan.source.image + depth * plan.source.axis[0];
    copy_rows(plane, plan.source, height.source, width.source,
              {stack.rows.begin * kPatch + height.offset[0], stack.rows.end * kPatch + height.offset[2]},
              {stack.columns.begin * kPatch + width.offset[0], stack.columns.end * kPatch + width.offset[2]},
              plan.source_channels, pixels, plan.source_channels);
    patches_to_points<A, kPatch + 2, source_to_points<A>>(pixels, plan.source_channels, stack.rows.size(),
                                                          stack.columns.size(), to);
    to.at += stack.count() * to.pitch;
    strips.begin += stack.rows.size();
  }
}

// `channels` of the output's gradient over `strips`, at plane `depth`, to their points.
template <class T>
void winograd_grads(const Gather& plan, const Patches& patches, Range strips, int64_t depth, const T* grad,
                    int64_t channels, AtPoints<accumulate_t<T>> to, accumulate_t<T>* pixels) {
  using A = accumulate_t<T>;
  while (strips.begin < strips.end) {
    const Patches::Stack stack = patches.stack_at(strips);
    const T* plane = grad + stack.image * plan.destination.image + depth * plan.destination.axis[0];
    copy_rows(plane, plan.destination, plan.axis[1].destination, plan.axis[2].destination,
              {stack.rows.begin * kPatch, stack.rows.end * kPatch},
              {stack.columns.begin * kPatch, stack.columns.end * kPatch}, channels, pixels, to.pitch);
    patches_to_points<A, kPatch, output_to_points<A>>(pixels, to.pitch, stack.rows.size(), stack.columns.size(), to);
    to.at += stack.count() * to.pitch;
    strips.begin += stack.rows.size();
  }
}

// `channels` of the outputs of `strips`, from their points to plane `depth` of the destination. redo[strip] becomes 1
// where an output is not finite.
template <class T>
void winograd_outputs(const Gather& plan, const Patches& patches, Range strips, int64_t depth,
                      AtPoints<const accumulate_t<T>> from, int64_t channels, const accumulate_t<T>* bias,
                      T* destination, accumulate_t<T>* pixels, uint8_t* redo) {
  using A = accumulate_t<T>;
  const Layout& layout = plan.destination;
  const int64_t height = plan.axis[1].destination, width = plan.axis[2].destination;
  while (strips.begin < strips.end) {
    const Patches::Stack stack = patches.stack_at(strips);
    const Range columns = clipped({stack.columns.begin * kPatch, stack.columns.end * kPatch}, width);
    const Range rows = clipped({stack.rows.begin * kPatch, stack.rows.end * kPatch}, height);
    T* plane = destination + stack.image * layout.image + depth * layout.axis[0] + rows.begin * layout.axis[1] +
               columns.begin * layout.axis[2];
    A* to = pixels;
    int64_t row = columns.size() * from.pitch, pixel = from.pitch;
    bool in_place = false;
    if constexpr (std::is_same_v<T, A>) {
      in_place = layout.channel == 1;
      if (in_place) {
        to = plane;
        row = layout.axis[1];
        pixel = layout.axis[2];
      }
    }
    for (int64_t y = 0; y < rows.size(); y += kPatch) {
      bool finite = true;
      points_to_outputs<A>(from, rows.size() - y < kPatch ? rows.size() - y : kPatch, columns.size(), channels, bias,
                           to + y * row, row, pixel, finite);
      if (!finite) redo[strips.begin] = 1;
      from.at += stack.columns.size() * from.pitch;
      ++strips.begin;
    }
    if (in_place) continue;
    const int64_t whole_rows = columns.size() == width ? rows.size() : 1;
    for (int64_t y = 0; y < rows.size(); y += whole_rows)
      copy_out(pixels + y * row, pixel, plane + y * layout.axis[1], layout, channels, whole_rows * columns.size());
  }
}

// products = sources * weight at every point, or products += that, of some channels of the source and some panels.
// `weight` is [panel][tap of the depth][point][channel][column], of these channels; the products have the
// columns of these panels.
template <class A>
void winograd_products(const Gather& plan, const AtPoints<const A>& sources, Range channels, int64_t patches,
                       const Run* runs, int64_t run_count, const A* weight, int64_t weight_step, Range panels,
                       const AtPoints<A>& products, bool accumulate) {
  int64_t width;
  panel_width<A>(plan.channels, width);
  for (int64_t point = 0; point < kPoints; ++point)
    for (int64_t panel = panels.begin; panel < panels.end; ++panel)
      multiply_rows<A>(patches,
                       {.a = sources.at + point * sources.step + channels.begin,
                        .a_row = sources.pitch,
                        .a_step = 1,
                        .b = weight + ((panel - panels.begin) * plan.axis[0].taps * kPoints + point) * weight_step,
                        .b_step = width,
                        .runs = runs,
                        .run_count = run_count,
                        .run_length = channels.size(),
                        .c = products.at + point * products.step + (panel - panels.begin) * width,
                        .c_row = products.pitch,
                        .columns = whole_lanes<A>(columns_of_panel<A>(plan.channels, panel)),
                        .bias = nullptr,
                        .accumulate = accumulate});
}

// sums = transposed sources * grads at one point, or sums += that: of some channels of the source and one panel, the
// column `first_column` of the gradients and those after it. Sums are [channel][column].
template <class A>
void winograd_weight_sums(const Gather& plan, const AtPoints<const A>& sources, Range channels,
                          const AtPoints<const A>& grads, int64_t first_column, int64_t patches, int64_t point,
                          int64_t panel, A* sums, bool accumulate) {
  int64_t width;
  panel_width<A>(plan.channels, width);
  const Run run{0, 0};
  multiply_rows<A>(channels.size(), {.a = sources.at + point * sources.step + channels.begin,
                                     .a_row = 1,
                                     .a_step = sources.pitch,
                                     .b = grads.at + point * grads.step + first_column,
                                     .b_step = grads.pitch,
                                     .runs = &run,
                                     .run_count = 1,
                                     .run_length = patches,
                                     .c = sums,
                                     .c_row = width,
                                     .columns = whole_lanes<A>(columns_of_panel<A>(plan.channels, panel)),
                                     .bias = nullptr,
                                     .accumulate = accumulate});
}

// A panel of one group's weight, for some channels of the source and one tap along the depth, to its points. `taps` is
// scratch memory.
template <class T>
void winograd_weight(const Gather& plan, const WeightLayout& layout, const T* weight, const int64_t* tap_offset,
                     int64_t panel, Range channels, accumulate_t<T>* to, int64_t step, accumulate_t<T>* taps) {
  using A = accumulate_t<T>;
  int64_t width;
  panel_width<A>(plan.channels, width);
  for (int64_t first = channels.begin; first < channels.end; first += kChannelsAtOnce) {
    const int64_t left = channels.end - first, count = left < kChannelsAtOnce ? left : kChannelsAtOnce;
    pack_panel(weight + first * layout.source_step, layout.channel_step, layout.source_step, tap_offset, kTaps, count,
               plan.channels, panel, taps);
    taps_to_points(taps, count * width, to + (first - channels.begin) * width, step);
  }
}

// The way back, of the sum of some parts. `finite` becomes false where a value is not.
template <class T>
void winograd_weight_grad(const Gather& plan, const WeightLayout& layout, const accumulate_t<T>* sums, int64_t step,
                          int64_t parts, int64_t part_step, const int64_t* tap_offset, int64_t panel, Range channels,
                          T* grad_weight, accumulate_t<T>* taps, bool& finite) {
  using A = accumulate_t<T>;
  int64_t width;
  panel_width<A>(plan.channels, width);
  for (int64_t first = channels.begin; first < channels.end; first += kChannelsAtOnce) {
    const int64_t left = channels.end - first, count = left < kChannelsAtOnce ? left : kChannelsAtOnce;
    points_to_taps(sums + (first - channels.begin) * width, step, parts, part_step, count * width, taps, finite);
    unpack_panel(taps, 0, 1, layout.channel_step, layout.source_step, tap_offset, kTaps, count, plan.channels, panel,
                 grad_weight + first * layout.source_step);
  }
}
