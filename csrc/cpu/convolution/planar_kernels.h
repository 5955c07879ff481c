// Dense convolution whose vectors hold neighbouring pixels, for few channels a group: a vector of them would be mostly
// empty. Forward and input gradient run on the micro-kernel: its rows are the destination's channels, its a is the
// weight and its b the sources, copied as PlanarCopy says.

#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"

// A few values: less than the call of a function.
template <class A>
inline void zero_few(A* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = 0;
    asm("" : "+r"(i));  // GCC would make it a call of memset
  }
}

// A line of a copy to come: `count` values from place `begin` on, zeros around them up to `pitch`, and whole vectors of
// them behind, which the next line overwrites.
template <class A, class T>
inline void copy_line(const T* from, int64_t begin, int64_t count, int64_t pitch, A* to) {
  zero_few(to, begin);
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store_vector<A>(to + begin + i, load_vector<A>(from + i));
  if (i < count) {
    store_vector<A>(to + begin + i, load<A>(from + i, FirstLanes{static_cast<int>(count - i)}));
    i += kLanes<A>;
  }
  zero_few(to + begin + i, pitch - begin - i);
}

// One plane of `channels` channels to its copy, with zeros for what lies outside of it. What lies `ahead` of it, which
// is copied next, is fetched into the caches.
template <class T>
void copy_planar(const T* plane, const Layout& layout, int64_t height, int64_t width, const PlanarCopy& copy,
                 int64_t channels, int64_t ahead, accumulate_t<T>* to) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t step = copy.column_step, source_pitch = step * layout.axis[2];
  const bool turned = layout.channel == 1 && channels > 1;
  for (int64_t row = copy.rows.begin; row < copy.rows.end; ++row)
    for (int64_t first = 0; first < step; ++first) {
      // Place k of a line is column `left` + k * step.
      accumulate_t<T>* line = to + copy.at(row - copy.rows.begin, first);
      const int64_t left = copy.columns.begin + first;
      int64_t begin = left < 0 ? (-left + step - 1) / step : 0,
              end = left < width ? (width - left + step - 1) / step : 0;
      if (end > copy.pitch) end = copy.pitch;
      if (row < 0 || row >= height || begin >= end) begin = end = copy.pitch;
      const T* pixel = plane + row * layout.axis[1] + (left + begin * step) * layout.axis[2];
      if (turned || begin == end || source_pitch > 1 || copy.row_step > 1)
        for (int64_t channel = 0; channel < channels; ++channel) {
          zero_few(line + channel * copy.channel, begin);
          zero_few(line + channel * copy.channel + end, copy.pitch - end);
        }
      if (begin == end) continue;
      if (turned) {
        for (int64_t k = begin; k < end; ++k)
          for (int64_t channel = 0; channel < channels; channel += kLine)
            prefetch(pixel + (k - begin) * source_pitch + channel + ahead);
        transpose(pixel, source_pitch, line + begin, copy.channel, end - begin, channels);
        continue;
      }
      for (int64_t channel = 0; channel < channels; ++channel, pixel += layout.channel, line += copy.channel) {
        for (int64_t k = 0; k < (end - begin) * source_pitch; k += kLine) prefetch(pixel + k + ahead);
        if (source_pitch == 1 && copy.row_step == 1)
          copy_line(pixel, begin, end - begin, copy.pitch, line);
        else if (source_pitch == 1)
          convert(pixel, line + begin, end - begin);
        else
          for (int64_t k = 0; k < end - begin; ++k)
            line[begin + k] = static_cast<accumulate_t<T>>(pixel[k * source_pitch]);
      }
    }
}

// The planes of the source that a block reads; how many these are.
template <class T>
int64_t copy_planar_sources(const Gather& plan, const Block& block, const PlanarCopy& copy, Range groups,
                            const T* source, accumulate_t<T>* to) {
  source += block.image * plan.source.image + groups.begin * plan.source_channels * plan.source.channel;
  int64_t copied = 0;
  for_taps(plan.axis[0], block.depth, [&](int64_t, int64_t plane) {
    copy_planar(source + plane * plan.source.axis[0], plan.source, plan.axis[1].source, plan.axis[2].source, copy,
                groups.size() * plan.source_channels, groups.size() * plan.source_channels * plan.source.channel,
                to + copied++ * copy.plane);
  });
  return copied;
}

// body(tap, place of its sources in the copy) for the taps of these phases of a block that meet a plane of the source.
template <class Body>
void for_planar_taps(const Gather& plan, const Block& block, const PlanarCopy& copy, Range rows, int64_t row_phase,
                     Range columns, int64_t column_phase, const Body& body) {
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  int64_t copied = 0;
  for_taps(plan.axis[0], block.depth, [&](int64_t d, int64_t) {
    for (int64_t h = height.first[row_phase]; h < height.first[row_phase + 1]; ++h)
      for (int64_t w = width.first[column_phase]; w < width.first[column_phase + 1]; ++w)
        body((d * height.taps + h) * width.taps + w,
             copied * copy.plane + copy.at(rows.begin * height.step + height.offset[h] - copy.rows.begin,
                                           columns.begin * width.step + width.offset[w] - copy.columns.begin));
    ++copied;
  });
}

// The groups' outputs of one block. `weight` is [group][tap][source channel][channel]; `sources`, `sums` and `runs` are
// scratch memory, the sums of a channel `places` apart.
template <class T>
void planar_block(const Gather& plan, const Block& block, const PlanarCopy& copy, Range groups, const T* source,
                  const accumulate_t<T>* weight, const T* bias, T* destination, bool past_caches,
                  accumulate_t<T>* sources, accumulate_t<T>* sums, int64_t places, Run* runs) {
  using A = accumulate_t<T>;
  constexpr int64_t L = kLanes<A>;
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  const Layout& layout = plan.destination;
  const int64_t first_channel = groups.begin * plan.channels, channels = groups.size() * plan.channels;
  const int64_t wide = plan.channels <= kWideTileRows ? 4 : 2;  // vectors of a tile
  copy_planar_sources(plan, block, copy, groups, source, sources);
  destination += block.image * layout.image + first_channel * layout.channel + block.depth * layout.axis[0];

  for (int64_t row_phase = 0; row_phase < height.phases; ++row_phase)
    for (int64_t phase = 0; phase < width.phases; ++phase) {
      const Range rows = positions(height, block.rows, row_phase), columns = positions(width, block.columns, phase);
      if (rows.begin >= rows.end || columns.begin >= columns.end) continue;
      Run* run = runs;
      for_planar_taps(plan, block, copy, rows, row_phase, columns, phase, [&](int64_t tap, int64_t place) {
        *run++ = {tap * plan.source_channels * plan.channels, place};
      });
      const int64_t end = (rows.size() - 1) * copy.pitch + columns.size();
      if (bias != nullptr)
        for (int64_t channel = 0; channel < channels; ++channel)
          for (int64_t place = 0; place < end; ++place)
            sums[channel * places + place] = static_cast<A>(bias[first_channel + channel]);
      for (int64_t group = 0; group < groups.size(); ++group)
        for (int64_t place = 0; place < end; place += wide * L)
          multiply_rows<A>(plan.channels,
                           {.a = weight + (groups.begin + group) * plan.taps() * plan.source_channels * plan.channels,
                            .a_row = 1,
                            .a_step = plan.channels,
                            .b = sources + group * plan.source_channels * copy.channel + place,
                            .b_step = copy.channel,
                            .runs = runs,
                            .run_count = run - runs,
                            .run_length = plan.source_channels,
                            .c = sums + group * plan.channels * places + place,
                            .c_row = places,
                            .columns = (end - place > 2 * L ? wide
                                        : end - place > L   ? 2
                                                            : 1) *
                                       L,
                            .bias = nullptr,
                            .accumulate = bias != nullptr});

      const int64_t step = width.phases * layout.axis[2];
      T* to = destination + (rows.begin * height.phases + row_phase) * layout.axis[1] +
              (columns.begin * width.phases + phase) * layout.axis[2];
      if (step == 1 && height.phases == 1 && columns.size() == width.destination) {
        for (int64_t channel = 0; channel < channels; ++channel) {
          A* values = sums + channel * places;
          for (int64_t row = 1; row < rows.size(); ++row)
            convert(values + row * copy.pitch, values + row * columns.size(), columns.size());
          deliver(values, to + channel * layout.channel, rows.size() * columns.size(), past_caches);
        }
        continue;
      }
      for (int64_t row = 0; row < rows.size(); ++row, to += height.phases * layout.axis[1]) {
        const A* from = sums + row * copy.pitch;
        if (layout.channel == 1 && channels > 1) {
          transpose(from, places, to, step, channels, columns.size());
          continue;
        }
        for (int64_t channel = 0; channel < channels; ++channel, from += places) {
          T* line = to + channel * layout.channel;
          if (step == 1)
            convert(from, line, columns.size());
          else
            for (int64_t k = 0; k < columns.size(); ++k) line[k * step] = static_cast<T>(from[k]);
        }
      }
    }
  if (past_caches) finish_stores_past_caches();
}

// sums[i][runs[k].b] += sum over places of g[i][place] * x[runs[k].a + place], for a few rows i and runs k. Each is a
// vector, whose lanes are added in the end.
template <class A, int kRows, int kRuns>
[[gnu::noinline]] void multiply_planes(const A* g, int64_t g_row, const A* x, const Run* runs, int64_t places, A* sums,
                                       int64_t sums_row) {
  vector_t<A> sum[kRows][kRuns] = {};
  const A* at[kRuns];
#pragma GCC unroll 8
  for (int k = 0; k < kRuns; ++k) at[k] = x + runs[k].a;
  for (int64_t place = 0; place < places; place += kLanes<A>) {
    vector_t<A> left[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) left[i] = load_vector<A>(g + i * g_row + place);
#pragma GCC unroll 8
    for (int k = 0; k < kRuns; ++k) {
      const vector_t<A> right = load_vector<A>(at[k] + place);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i][k] += left[i] * right;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < kRuns; ++k) {
      A* to = sums + (i * sums_row + runs[k].b) * kLanes<A>;
      store_vector<A>(to, load_vector<A>(to) + sum[i][k]);
    }
}

template <class A, int kRows>
void multiply_planes_of(const A* g, int64_t g_row, const A* x, const Run* runs, int64_t run_count, int64_t places,
                        A* sums, int64_t sums_row) {
  constexpr int kMost = kVectorBytes == 64 ? 6 : 2;  // 4 rows of them, of a g each, and an x fit into the registers
  int64_t k = 0;
  for (; k + kMost <= run_count; k += kMost)
    multiply_planes<A, kRows, kMost>(g, g_row, x, runs + k, places, sums, sums_row);
  for (; k + kMost / 2 <= run_count; k += kMost / 2)
    multiply_planes<A, kRows, kMost / 2>(g, g_row, x, runs + k, places, sums, sums_row);
  for (; k < run_count; ++k) multiply_planes<A, kRows, 1>(g, g_row, x, runs + k, places, sums, sums_row);
}

// Adds one block's share of the groups' weight gradients to `sums`, [group][channel][source channel][tap][lane]. The
// plan is forward's.
template <class T>
void planar_weight_grad_block(const Gather& plan, const Block& block, const PlanarCopy& copy, Range groups,
                              const T* input, const T* grad_output, accumulate_t<T>* sums, accumulate_t<T>* inputs,
                              accumulate_t<T>* grads, int64_t places, Run* runs) {
  using A = accumulate_t<T>;
  const Layout& layout = plan.destination;
  const int64_t channels = groups.size() * plan.channels, taps = plan.taps();
  const int64_t written = copy_planar_sources(plan, block, copy, groups, input, inputs) * copy.plane;
  // The kernel reads places behind the last.
  for (int64_t channel = 0; channel < groups.size() * plan.source_channels; ++channel)
    fill_zero(inputs + channel * copy.channel + written,
              copy.channel - written < kMostPlaces ? copy.channel - written : kMostPlaces);
  fill_zero(inputs + groups.size() * plan.source_channels * copy.channel, kMostPlaces);
  // The gradient with the pitch of the sources, zeros at the end of each row and behind the last.
  PlanarCopy at(block.rows, {block.columns.begin, block.columns.begin + copy.pitch}, 1, 1, 1);
  at.channel = places;
  const int64_t rounded = (at.plane + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
  copy_planar(grad_output + block.image * layout.image + groups.begin * plan.channels * layout.channel +
                  block.depth * layout.axis[0],
              layout, block.rows.end, block.columns.end, at, channels, channels * layout.channel, grads);
  for (int64_t channel = 0; channel < channels; ++channel)
    zero_few(grads + channel * places + at.plane, rounded - at.plane);

  Run* run = runs;
  for (int64_t channel = 0; channel < plan.source_channels; ++channel)
    for_planar_taps(plan, block, copy, block.rows, 0, block.columns, 0, [&](int64_t tap, int64_t place) {
      *run++ = {channel * copy.channel + place, channel * taps + tap};
    });
  const int64_t sums_row = plan.source_channels * taps;
  for (int64_t group = 0; group < groups.size(); ++group)
    for (int64_t row = 0; row < plan.channels; row += 4) {
      const auto multiply = [&](auto rows) {
        multiply_planes_of<A, decltype(rows)::value>(
            grads + (group * plan.channels + row) * places, places,
            inputs + group * plan.source_channels * copy.channel, runs, run - runs, rounded,
            sums + (group * plan.channels + row) * sums_row * kLanes<A>, sums_row);
      };
      const int64_t left = plan.channels - row;
      left >= 4   ? multiply(std::integral_constant<int, 4>())
      : left == 3 ? multiply(std::integral_constant<int, 3>())
      : left == 2 ? multiply(std::integral_constant<int, 2>())
                  : multiply(std::integral_constant<int, 1>());
    }
}

// The sums of `count` vectors' lanes.
template <class A>
void add_lanes(const A* vectors, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = sum_of_lanes<A>(load_vector<A>(vectors + i * kLanes<A>));
}
