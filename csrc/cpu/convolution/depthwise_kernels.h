#include "cpu/convolution/copies.h"

// Planar (contiguous) depthwise convolution. A plane is copied with its padding, taken apart into its residues modulo
// the step: then every tap reads at a constant distance, and the whole plane is one long vector. Its rows have the same
// pitch in the copy and in the result, and what falls between two rows of the result is not stored.

// Copies source (first + k)*step, k = 0 .. count-1, with zeros where that lies outside 0 .. size-1.
template <class T>
void copy_residue(const T* source, int64_t size, int64_t first, int64_t step, int64_t count, accumulate_t<T>* to) {
  using A = accumulate_t<T>;
  int64_t begin = first < 0 ? (-first + step - 1) / step : 0, end = first < size ? (size - 1 - first) / step + 1 : 0;
  begin = begin < count ? begin : count;
  end = end < begin ? begin : end < count ? end : count;
  fill_zero(to, begin);
  if (step == 1)
    convert(source + first + begin, to + begin, end - begin);
  else
    for (int64_t k = begin; k < end; ++k) to[k] = static_cast<A>(source[first + k * step]);
  fill_zero(to + end, count - end);
}

// [depth tap inside][row residue][column residue][row][column]; a vector's width of zeros behind.
template <class T>
void copy_plane(const Gather& plan, const Block& block, const CopyAxis& rows, const CopyAxis& columns, const T* plane,
                accumulate_t<T>* to) {
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  const int64_t phase = block.depth % depth.phases, position = block.depth / depth.phases * depth.step;
  for (int64_t d = depth.first[phase]; d < depth.first[phase + 1]; ++d) {
    const int64_t source_depth = position + depth.offset[d];
    if (source_depth < 0 || source_depth >= depth.source) continue;
    for (int64_t row_residue = 0; row_residue < rows.step; ++row_residue)
      for (int64_t residue = 0; residue < columns.step; ++residue)
        for (int64_t k = 0; k < rows.size; ++k, to += columns.size) {
          const int64_t row = (rows.begin + k) * rows.step + row_residue;
          if (row < 0 || row >= height.source)
            fill_zero(to, columns.size);
          else
            copy_residue(plane + source_depth * plan.source.axis[0] + row * plan.source.axis[1], width.source,
                         columns.begin * columns.step + residue, columns.step, columns.size, to);
        }
  }
  fill_zero(to, kLanes<accumulate_t<T>>);
}

// The taps of one phase: where each finds its first source in the copy, and which tap it is.
static int64_t list_taps(const Gather& plan, const Block& block, const CopyAxis& rows, const CopyAxis& columns,
                         int64_t row_phase, int64_t column_phase, PlaneTap* taps) {
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  const int64_t phase = block.depth % depth.phases, position = block.depth / depth.phases * depth.step;
  int64_t count = 0, copied_depths = 0;
  for (int64_t d = depth.first[phase]; d < depth.first[phase + 1]; ++d) {
    const int64_t source_depth = position + depth.offset[d];
    if (source_depth < 0 || source_depth >= depth.source) continue;
    for (int64_t h = height.first[row_phase]; h < height.first[row_phase + 1]; ++h)
      for (int64_t w = width.first[column_phase]; w < width.first[column_phase + 1]; ++w) {
        const int64_t residues = (copied_depths * rows.step + rows.residue_of(height.offset[h])) * columns.step +
                                 columns.residue_of(width.offset[w]);
        taps[count++] = {(residues * rows.size + rows.position_of(height.offset[h])) * columns.size +
                             columns.position_of(width.offset[w]),
                         (d * height.taps + h) * width.taps + w};
      }
    ++copied_depths;
  }
  return count;
}

// sum[i] = bias + sum over taps of weight[tap] * source[tap.source + i], in whole vectors.
template <class A>
void correlate(const A* source, const PlaneTap* taps, int64_t tap_count, const A* weight, A bias, A* sum,
               int64_t count) {
  using V = Vector<A>;
  constexpr int kUnroll = 4;  // independent sums, to hide the latency of an addition
  int64_t i = 0;
  for (; i + kUnroll * kLanes<A> <= count; i += kUnroll * kLanes<A>) {
    V sums[kUnroll];
    for (int v = 0; v < kUnroll; ++v) sums[v] = bias - V{};
    for (int64_t tap = 0; tap < tap_count; ++tap) {
      const V factor = weight[taps[tap].weight] - V{};
      for (int v = 0; v < kUnroll; ++v) sums[v] += factor * load_lanes(source + taps[tap].source + i + v * kLanes<A>);
    }
    for (int v = 0; v < kUnroll; ++v) store_lanes(sums[v], sum + i + v * kLanes<A>);
  }
  for (; i < count; i += kLanes<A>) {
    V one = bias - V{};
    for (int64_t tap = 0; tap < tap_count; ++tap)
      one += (weight[taps[tap].weight] - V{}) * load_lanes(source + taps[tap].source + i);
    store_lanes(one, sum + i);
  }
}

// The block of the planes (image, channel) first .. last. `weight` is [channel][tap].
template <class T>
void depthwise_planes(const Gather& plan, const Block& block, int64_t first, int64_t last, const T* source,
                      const accumulate_t<T>* weight, const T* bias, T* destination, accumulate_t<T>* copy,
                      accumulate_t<T>* sums, PlaneTap* taps) {
  using A = accumulate_t<T>;
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  const CopyAxis rows(height, block.rows), columns(width, block.columns);
  int64_t first_tap[kLargestStep * kLargestStep + 1] = {};
  for (int64_t phase = 0; phase < height.phases * width.phases; ++phase)
    first_tap[phase + 1] = first_tap[phase] + list_taps(plan, block, rows, columns, phase / width.phases,
                                                        phase % width.phases, taps + first_tap[phase]);
  for (int64_t plane = first; plane < last; ++plane) {
    const int64_t channel = plane % plan.groups;
    copy_plane(plan, block, rows, columns, source + plane * plan.source.channel, copy);
    T* to = destination + plane * plan.destination.channel + block.depth * plan.destination.axis[0];
    for (int64_t row_phase = 0; row_phase < height.phases; ++row_phase)
      for (int64_t phase = 0; phase < width.phases; ++phase) {
        const int64_t* segment = first_tap + row_phase * width.phases + phase;
        correlate(copy, taps + segment[0], segment[1] - segment[0], weight + channel * plan.taps(),
                  bias == nullptr ? A(0) : static_cast<A>(bias[channel]), sums,
                  (rows.q.size() - 1) * columns.size + columns.q.size());
        const Range stored_rows = positions(height, block.rows, row_phase);
        const Range stored = positions(width, block.columns, phase);
        for (int64_t q = stored_rows.begin; q < stored_rows.end; ++q) {
          const A* from = sums + (q - rows.q.begin) * columns.size + stored.begin - columns.q.begin;
          T* row = to + (q * height.phases + row_phase) * plan.destination.axis[1];
          if (width.phases == 1)
            convert(from, row + stored.begin, stored.size());
          else
            for (int64_t k = 0; k < stored.size(); ++k)
              row[(stored.begin + k) * width.phases + phase] = static_cast<T>(from[k]);
        }
      }
  }
}

// sums[k] = sum over rows and columns of grad[row][column] * copy[taps[k] + row*pitch + column], for kTaps taps at
// once. The rows of grad are as long as whole vectors; behind its end, copy holds other rows, whose infinities must not
// meet it.
template <class A, int kTaps>
void correlate_grad(const A* grad, int64_t grad_pitch, const A* copy, int64_t pitch, int64_t rows, int64_t columns,
                    const PlaneTap* taps, A* sums) {
  using V = Vector<A>;
  using Mask = decltype(V{} < V{});
  Mask lane;
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = i;
  const int64_t whole = columns / kLanes<A> * kLanes<A>;
  const Mask inside = lane < static_cast<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>(columns - whole);
  V sum[kTaps] = {};
  for (int64_t row = 0; row < rows; ++row, grad += grad_pitch, copy += pitch) {
    for (int64_t i = 0; i < whole; i += kLanes<A>) {
      const V g = load_lanes(grad + i);
#pragma GCC unroll 8
      for (int k = 0; k < kTaps; ++k) sum[k] += g * load_lanes(copy + taps[k].source + i);
    }
    if (whole == columns) continue;
    const V g = load_lanes(grad + whole);
#pragma GCC unroll 8
    for (int k = 0; k < kTaps; ++k) {
      const V x = load_lanes(copy + taps[k].source + whole);
      sum[k] += g * (inside ? x : V{});
    }
  }
  for (int k = 0; k < kTaps; ++k) {
    A total = 0;
    for (int i = 0; i < kLanes<A>; ++i) total += sum[k][i];
    sums[taps[k].weight] += total;
  }
}

// Adds one block of one plane to the gradient of its channel's window, `sums` [tap].
template <class T>
void depthwise_plane_weight_grad(const Gather& plan, const Block& block, const T* input, const T* grad_output,
                                 accumulate_t<T>* sums, accumulate_t<T>* copy, accumulate_t<T>* grad, PlaneTap* taps) {
  using A = accumulate_t<T>;
  const CopyAxis rows(plan.axis[1], block.rows), columns(plan.axis[2], block.columns);
  const int64_t count = block.columns.size(), pitch = (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  copy_plane(plan, block, rows, columns, input + block.image * plan.source.image + block.group * plan.source.channel,
             copy);
  grad_output += block.image * plan.destination.image + block.group * plan.destination.channel +
                 block.depth * plan.destination.axis[0] + block.columns.begin;
  for (int64_t row = 0; row < block.rows.size(); ++row) {
    convert(grad_output + (block.rows.begin + row) * plan.destination.axis[1], grad + row * pitch, count);
    fill_zero(grad + row * pitch + count, pitch - count);
  }
  const int64_t tap_count = list_taps(plan, block, rows, columns, 0, 0, taps);
  int64_t tap = 0;
  for (; tap + 5 <= tap_count; tap += 5)
    correlate_grad<A, 5>(grad, pitch, copy, columns.size, block.rows.size(), count, taps + tap, sums);
  for (; tap + 2 <= tap_count; tap += 2)
    correlate_grad<A, 2>(grad, pitch, copy, columns.size, block.rows.size(), count, taps + tap, sums);
  if (tap < tap_count)
    correlate_grad<A, 1>(grad, pitch, copy, columns.size, block.rows.size(), count, taps + tap, sums);
}

// Channels-last depthwise convolution: vectors over channels.

// The taps of axis `axis` that destination `position` meets inside the source: tap index and source, one after another.
template <class Body>
inline void for_taps(const GatherAxis& axis, int64_t position, const Body& body) {
  const int64_t phase = position % axis.phases, first = position / axis.phases * axis.step;
  for (int64_t tap = axis.first[phase]; tap < axis.first[phase + 1]; ++tap) {
    const int64_t source = first + axis.offset[tap];
    if (source >= 0 && source < axis.source) body(tap, source);
  }
}

// kPixels pixels, which meet the same taps, by kVectors vectors of channels.
template <class T, int kPixels, int kVectors>
inline void depthwise_tile(const T* source, int64_t source_step, const accumulate_t<T>* weight, const PlaneTap* taps,
                           int64_t tap_count, const accumulate_t<T>* bias, T* destination, int64_t destination_step) {
  using A = accumulate_t<T>;
  Vector<A> sum[kPixels][kVectors];
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kPixels; ++i) sum[i][v] = bias == nullptr ? Vector<A>{} : load_lanes(bias + v * kLanes<A>);
  for (int64_t tap = 0; tap < tap_count; ++tap)
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> factor = load_lanes(weight + taps[tap].weight + v * kLanes<A>);
      for (int i = 0; i < kPixels; ++i)
        sum[i][v] += factor * load_lanes(source + taps[tap].source + i * source_step + v * kLanes<A>);
    }
  for (int i = 0; i < kPixels; ++i)
    for (int v = 0; v < kVectors; ++v) store_lanes(sum[i][v], destination + i * destination_step + v * kLanes<A>);
}

template <class T, int kPixels>
void depthwise_pixels(int64_t channels, const T* source, int64_t source_step, const accumulate_t<T>* weight,
                      const PlaneTap* taps, int64_t tap_count, const accumulate_t<T>* bias, T* destination,
                      int64_t destination_step) {
  using A = accumulate_t<T>;
  constexpr int kVectors = kPixels == 1 ? 4 : 2;
  int64_t c = 0;
  for (; c + kVectors * kLanes<A> <= channels; c += kVectors * kLanes<A>)
    depthwise_tile<T, kPixels, kVectors>(source + c, source_step, weight + c, taps, tap_count,
                                         bias == nullptr ? nullptr : bias + c, destination + c, destination_step);
  for (; c + kLanes<A> <= channels; c += kLanes<A>)
    depthwise_tile<T, kPixels, 1>(source + c, source_step, weight + c, taps, tap_count,
                                  bias == nullptr ? nullptr : bias + c, destination + c, destination_step);
  for (; c < channels; ++c)
    for (int i = 0; i < kPixels; ++i) {
      A sum = bias == nullptr ? A(0) : bias[c];
      for (int64_t tap = 0; tap < tap_count; ++tap)
        sum += static_cast<A>(source[taps[tap].source + i * source_step + c]) * weight[taps[tap].weight + c];
      destination[i * destination_step + c] = static_cast<T>(sum);
    }
}

// One row of the destination, all channels. `weight` is [tap][channel].
template <class T>
void depthwise_row(const Gather& plan, int64_t image, int64_t depth, int64_t row, const T* source,
                   const accumulate_t<T>* weight, const accumulate_t<T>* bias, T* destination, PlaneTap* taps) {
  constexpr int kPixels = 4;
  const GatherAxis& width = plan.axis[2];
  const int64_t channels = plan.groups;
  source += image * plan.source.image;
  destination += image * plan.destination.image + depth * plan.destination.axis[0] + row * plan.destination.axis[1];
  for (int64_t phase = 0; phase < width.phases; ++phase) {
    const int64_t begin = width.first[phase], end = width.first[phase + 1];
    const Range q = positions(width, {0, width.destination}, phase);
    for (int64_t k = q.begin; k < q.end;) {
      const int64_t column = k * width.phases + phase;
      int64_t count = 0;
      for_taps(plan.axis[0], depth, [&](int64_t d, int64_t z) {
        for_taps(plan.axis[1], row, [&](int64_t h, int64_t y) {
          for_taps(width, column, [&](int64_t w, int64_t x) {
            taps[count++] = {z * plan.source.axis[0] + y * plan.source.axis[1] + x * plan.source.axis[2],
                             ((d * plan.axis[1].taps + h) * width.taps + w) * channels};
          });
        });
      });
      const bool all_inside = begin < end && k + kPixels <= q.end && k * width.step + width.offset[begin] >= 0 &&
                              (k + kPixels - 1) * width.step + width.offset[end - 1] < width.source;
      T* to = destination + column * channels;
      if (all_inside)
        depthwise_pixels<T, kPixels>(channels, source, width.step * channels, weight, taps, count, bias, to,
                                     width.phases * channels);
      else
        depthwise_pixels<T, 1>(channels, source, 0, weight, taps, count, bias, to, 0);
      k += all_inside ? kPixels : 1;
    }
  }
}

// sum[channel] += sum over `count` pixels of grad * input, kVectors vectors of channels.
template <class T, int kVectors>
inline void add_products(const T* grad, int64_t grad_step, const T* input, int64_t input_step, int64_t count,
                         accumulate_t<T>* sum) {
  using A = accumulate_t<T>;
  Vector<A> sums[kVectors] = {};
  for (int64_t i = 0; i < count; ++i, grad += grad_step, input += input_step)
    for (int v = 0; v < kVectors; ++v) sums[v] += load_lanes(grad + v * kLanes<A>) * load_lanes(input + v * kLanes<A>);
  for (int v = 0; v < kVectors; ++v) store_lanes(load_lanes(sum + v * kLanes<A>) + sums[v], sum + v * kLanes<A>);
}

// Adds one row of grad_output to the weight's gradient, `sums` [tap][channel]. The plan is forward's.
template <class T>
void depthwise_row_weight_grad(const Gather& plan, int64_t image, int64_t depth, int64_t row, const T* input,
                               const T* grad_output, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  const int64_t channels = plan.groups;
  const GatherAxis& width = plan.axis[2];
  input += image * plan.source.image;
  grad_output += image * plan.destination.image + depth * plan.destination.axis[0] + row * plan.destination.axis[1];
  for_taps(plan.axis[0], depth, [&](int64_t d, int64_t z) {
    for_taps(plan.axis[1], row, [&](int64_t h, int64_t y) {
      for (int64_t w = 0; w < width.taps; ++w) {
        const int64_t offset = width.offset[w];
        const int64_t begin = offset < 0 ? (-offset + width.step - 1) / width.step : 0;
        int64_t end = offset < width.source ? (width.source - 1 - offset) / width.step + 1 : 0;
        end = end < width.destination ? end : width.destination;
        if (begin >= end) continue;
        const T* x = input + z * plan.source.axis[0] + y * plan.source.axis[1] +
                     (begin * width.step + offset) * plan.source.axis[2];
        const T* g = grad_output + begin * plan.destination.axis[2];
        const int64_t x_step = width.step * plan.source.axis[2], g_step = plan.destination.axis[2];
        A* sum = sums + ((d * plan.axis[1].taps + h) * width.taps + w) * channels;
        int64_t c = 0;
        for (; c + 4 * kLanes<A> <= channels; c += 4 * kLanes<A>)
          add_products<T, 4>(g + c, g_step, x + c, x_step, end - begin, sum + c);
        for (; c + kLanes<A> <= channels; c += kLanes<A>)
          add_products<T, 1>(g + c, g_step, x + c, x_step, end - begin, sum + c);
        for (; c < channels; ++c) {
          A total = 0;
          for (int64_t i = 0; i < end - begin; ++i)
            total += static_cast<A>(g[i * g_step + c]) * static_cast<A>(x[i * x_step + c]);
          sum[c] += total;
        }
      }
    });
  });
}
