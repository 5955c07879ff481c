// Dense convolution whose vectors hold neighbouring pixels, for few channels: a vector of them would be mostly empty.
// The micro-kernel's rows are the destination's channels, its a is the weight and its b the source, copied to planes
// with their padding.
//
// Where neighbouring destinations of one phase read sources `step` apart, those are put next to one another: a row of a
// plane is [step][pixel]. A row of sums is [phase][channel][pixel].

#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"

// Where a block's sources lie in scratch memory, in values: [channel][plane][row][step][pixel]. Vectors read beyond the
// last pixel, but nothing of that is kept.
struct PlanarSource {
  Range rows, columns;  // of the source; columns outside of it too
  int64_t pixels, row, plane, channel;
};

template <class A>
PlanarSource planar_source(const Gather& plan, const Block& block, int64_t planes) {
  const int64_t step = plan.axis[2].step;
  PlanarSource view;
  view.rows = clipped(reach(plan.axis[1], block.rows), plan.axis[1].source);
  view.columns = reach(plan.axis[2], block.columns);
  view.pixels = (view.columns.size() + step - 1) / step + kLanes<A>;
  view.row = step * view.pixels;
  view.plane = view.rows.size() * view.row;
  view.channel = planes * view.plane;
  return view;
}

// The pixels of one row, of all channels; those outside the source are zero.
template <class T>
void copy_planar_row(const T* from, const Layout& layout, int64_t width, int64_t step, int64_t channels,
                     const PlanarSource& view, accumulate_t<T>* to) {
  for (int64_t first = 0; first < step; ++first, to += view.pixels) {
    // Pixel k is column `left` + k * step.
    const int64_t left = view.columns.begin + first, count = (view.columns.size() - first + step - 1) / step;
    const int64_t begin = left < 0 ? (-left + step - 1) / step : 0;
    const int64_t inside = left < width ? (width - left + step - 1) / step : 0, end = inside < count ? inside : count;
    for (int64_t channel = 0; channel < channels; ++channel) {
      accumulate_t<T>* row = to + channel * view.channel;
      fill_zero(row, begin < count ? begin : count);
      if (end < count) fill_zero(row + (end > 0 ? end : 0), count - (end > 0 ? end : 0));
    }
    if (begin >= end) continue;
    const T* pixel = from + (left + begin * step) * layout.axis[2];
    if (layout.channel == 1 && channels > 1) {
      transpose(pixel, step * layout.axis[2], to + begin, view.channel, end - begin, channels);
      continue;
    }
    for (int64_t channel = 0; channel < channels; ++channel) {
      const T* line = pixel + channel * layout.channel;
      accumulate_t<T>* row = to + channel * view.channel + begin;
      if (step * layout.axis[2] == 1) {
        convert(line, row, end - begin);
      } else {
        const int64_t pitch = step * layout.axis[2];
        for (int64_t k = 0; k < end - begin; ++k) row[k] = static_cast<accumulate_t<T>>(line[k * pitch]);
      }
    }
  }
}

// One row of sums to the destination, with the bias (or null).
template <class T>
void store_planar_row(const accumulate_t<T>* sums, int64_t pitch, const Layout& layout, int64_t channels, Range pixels,
                      int64_t phases, int64_t phase, const T* bias, T* to) {
  using A = accumulate_t<T>;
  for (int64_t channel = 0; channel < channels; ++channel) {
    const A* from = sums + channel * pitch;
    const A added = bias == nullptr ? A(0) : static_cast<A>(bias[channel]);
    T* line = to + channel * layout.channel + (pixels.begin * phases + phase) * layout.axis[2];
    const int64_t step = phases * layout.axis[2];
    if (step == 1)
      for (int64_t k = 0; k < pixels.size(); ++k) line[k] = static_cast<T>(from[k] + added);
    else
      for (int64_t k = 0; k < pixels.size(); ++k) line[k * step] = static_cast<T>(from[k] + added);
  }
}

// One block of the destination. `weight` is [tap][source channel][channel]; `sources`, `sums` and `runs` are scratch
// memory.
template <class T>
void planar_block(const Gather& plan, const Block& block, const T* source, const accumulate_t<T>* weight, const T* bias,
                  T* destination, accumulate_t<T>* sources, accumulate_t<T>* sums, Run* runs) {
  using A = accumulate_t<T>;
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  const int64_t depth_phase = block.depth % depth.phases, depth_position = block.depth / depth.phases * depth.step;
  const auto plane_of = [&](int64_t tap) { return depth_position + depth.offset[tap]; };
  const auto exists = [&](int64_t plane) { return plane >= 0 && plane < depth.source; };
  int64_t planes = 0;
  for (int64_t d = depth.first[depth_phase]; d < depth.first[depth_phase + 1]; ++d) planes += exists(plane_of(d));
  const PlanarSource view = planar_source<A>(plan, block, planes);
  source += block.image * plan.source.image;
  destination += block.image * plan.destination.image + block.depth * plan.destination.axis[0];

  int64_t copied = 0;
  for (int64_t d = depth.first[depth_phase]; d < depth.first[depth_phase + 1]; ++d) {
    if (!exists(plane_of(d))) continue;
    for (int64_t row = view.rows.begin; row < view.rows.end; ++row)
      copy_planar_row(source + plane_of(d) * plan.source.axis[0] + row * plan.source.axis[1], plan.source, width.source,
                      width.step, plan.source_channels, view,
                      sources + copied * view.plane + (row - view.rows.begin) * view.row);
    ++copied;
  }

  for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
    const int64_t row_phase = row % height.phases, row_position = row / height.phases * height.step;
    for (int64_t phase = 0; phase < width.phases; ++phase) {
      const Range q = positions(width, block.columns, phase);
      if (q.begin >= q.end) continue;
      Run* run = runs;
      copied = 0;
      for (int64_t d = depth.first[depth_phase]; d < depth.first[depth_phase + 1]; ++d) {
        if (!exists(plane_of(d))) continue;
        for (int64_t h = height.first[row_phase]; h < height.first[row_phase + 1]; ++h) {
          const int64_t source_row = row_position + height.offset[h];
          if (source_row < 0 || source_row >= height.source) continue;
          for (int64_t w = width.first[phase]; w < width.first[phase + 1]; ++w) {
            const int64_t column = q.begin * width.step + width.offset[w] - view.columns.begin;
            *run++ = {((d * height.taps + h) * width.taps + w) * plan.source_channels * plan.channels,
                      copied * view.plane + (source_row - view.rows.begin) * view.row +
                          column % width.step * view.pixels + column / width.step};
          }
        }
        ++copied;
      }
      const int64_t pitch = (q.size() + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
      for (int64_t first = 0; first < pitch; first += 2 * kLanes<A>)
        multiply_rows<A>(plan.channels, {.a = weight,
                                         .a_row = 1,
                                         .a_step = plan.channels,
                                         .b = sources + first,
                                         .b_step = view.channel,
                                         .runs = runs,
                                         .run_count = run - runs,
                                         .run_length = plan.source_channels,
                                         .c = sums + first,
                                         .c_row = pitch,
                                         .columns = pitch - first < 2 * kLanes<A> ? kLanes<A> : 2 * kLanes<A>,
                                         .bias = nullptr,
                                         .accumulate = false});
      store_planar_row(sums, pitch, plan.destination, plan.channels, q, width.phases, phase, bias,
                       destination + row * plan.destination.axis[1]);
    }
  }
}
