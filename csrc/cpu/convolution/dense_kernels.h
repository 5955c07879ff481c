#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"
#include "cpu/convolution/panels.h"

// Packed weights up to this size stay in the L2 cache, so that each tile of pixels meets all of them; larger ones are
// multiplied a panel at a time with all of the block's pixels.
constexpr int64_t kPackedInCache = 300 * 1024;

// What operands E of the micro-kernel are made of, and how many to one.
template <class E>
using part_t = std::conditional_t<std::is_same_v<E, Bfloat16Pair>, BFloat16, E>;
template <class E>
constexpr int64_t kPartsOf = sizeof(E) / sizeof(part_t<E>);

// Where the micro-kernel reads the sources of a block: in place, or copied with their padding.
template <class E>
struct SourceView {
  const E* data;  // of source (0, rows.begin, columns.begin)
  int64_t plane, row, pixel;
  Range rows, columns;
};

// The source channels first .. first+count of the group that the block reads, counted in E.
template <class E, class T>
SourceView<E> view_source(const Gather& plan, const Block& block, const T* source, bool direct, int64_t first,
                          int64_t count, E* scratch) {
  const Layout& layout = plan.source;
  source += block.image * layout.image + (block.group * plan.source_channels + first) * kPartsOf<E> * layout.channel;
  if constexpr (std::is_same_v<T, part_t<E>>) {
    if (direct)
      return {reinterpret_cast<const E*>(source),
              layout.axis[0] / kPartsOf<E>,
              layout.axis[1] / kPartsOf<E>,
              layout.axis[2] / kPartsOf<E>,
              {0, 0},
              {0, 0}};
  }
  SourceView<E> view;
  view.rows = clipped(reach(plan.axis[1], block.rows), plan.axis[1].source);
  view.columns = reach(plan.axis[2], block.columns);
  view.data = scratch;
  view.pixel = count;
  view.row = view.columns.size() * view.pixel;
  view.plane = view.rows.size() * view.row;
  for_taps(plan.axis[0], block.depth, [&](int64_t, int64_t plane) {
    copy_padded(source + plane * layout.axis[0], layout, plan.axis[2].source, view.rows, view.columns,
                count * kPartsOf<E>, reinterpret_cast<part_t<E>*>(scratch));
    scratch += view.plane;
  });
  return view;
}

// One block of the destination, the channels of some panels of a group. `weight` holds these panels, `bias` (or null) a
// value for each column of all panels of the group; `sources`, `sums` and `runs` are scratch memory.
template <class E, class T>
void gather_block(const Gather& plan, const Blocking& blocking, const Block& block, Range panels, bool direct_source,
                  const T* source, const E* weight, const accumulate_t<T>* bias, T* destination, bool past_caches,
                  bool far_sources, E* sources, accumulate_t<T>* sums, Run* runs) {
  using A = accumulate_t<T>;
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  int64_t panel_size;
  panel_width<A>(plan.channels, panel_size);
  const int64_t panel_step = plan.taps() * plan.source_channels * panel_size;
  const int64_t lanes = kLanes<A>, first_of_panels = panels.begin * panel_size;
  const int64_t at_once =
      panels.size() * panel_step * static_cast<int64_t>(sizeof(A)) <= kPackedInCache ? panels.size() : 1;
  destination += block.image * plan.destination.image +
                 (block.group * plan.channels + first_of_panels) * plan.destination.channel +
                 block.depth * plan.destination.axis[0];

  // Sums go to their place where it can hold them, else to [row][column][columns of the panels].
  bool in_place = false;
  int64_t sums_pixel = panels.size() * panel_size, sums_row = block.columns.size() * sums_pixel;
  if constexpr (std::is_same_v<T, A>) {
    in_place = plan.destination.channel == 1 && blocking.source_channels >= plan.source_channels;
    if (in_place) {
      sums = destination + block.rows.begin * plan.destination.axis[1] + block.columns.begin * plan.destination.axis[2];
      sums_row = plan.destination.axis[1];
      sums_pixel = plan.destination.axis[2];
    }
  }

  int64_t first_channel = 0;
  do {
    const int64_t left = plan.source_channels - first_channel;
    const int64_t channels = left < blocking.source_channels ? left : blocking.source_channels;
    const SourceView<E> view = view_source<E>(plan, block, source, direct_source, first_channel, channels, sources);
    for (int64_t panel = panels.begin; panel < panels.end; panel += at_once)
      for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
        for (int64_t phase = 0; phase < width.phases; ++phase) {
          const Range q = positions(width, block.columns, phase);
          if (q.begin >= q.end) continue;
          const int64_t taps_begin = width.first[phase], taps = width.first[phase + 1] - taps_begin;
          const bool neighbours =
              taps > 0 && width.offset[taps_begin + taps - 1] - width.offset[taps_begin] == taps - 1;
          const bool merged = neighbours && view.pixel == plan.source_channels && channels == plan.source_channels;
          Run* run = runs;
          int64_t copied_planes = 0;
          for_taps(depth, block.depth, [&](int64_t d, int64_t plane) {
            const int64_t plane_start = (direct_source ? plane : copied_planes++) * view.plane;
            for_taps(height, row, [&](int64_t h, int64_t source_row) {
              const int64_t row_start = plane_start + (source_row - view.rows.begin) * view.row;
              const int64_t row_taps = (d * height.taps + h) * width.taps + taps_begin;
              for (int64_t w = 0; w < (merged ? 1 : taps); ++w)
                *run++ = {row_start + (width.offset[taps_begin + w] - view.columns.begin) * view.pixel,
                          ((row_taps + w) * plan.source_channels + first_channel) * panel_size};
            });
          });
          const int64_t column = q.begin * width.phases + phase - block.columns.begin;
          for (int64_t p = panel; p < panel + at_once; ++p) {
            const int64_t columns = columns_of_panel<A>(plan.channels, p);
            multiply_rows<E>(
                q.size(),
                {.a = view.data + q.begin * width.step * view.pixel,
                 .a_row = width.step * view.pixel,
                 .a_step = 1,
                 .b = weight + (p - panels.begin) * panel_step,
                 .b_step = panel_size,
                 .runs = runs,
                 .run_count = run - runs,
                 .run_length = merged ? taps * channels : channels,
                 .c =
                     sums + (row - block.rows.begin) * sums_row + column * sums_pixel + (p - panels.begin) * panel_size,
                 .c_row = width.phases * sums_pixel,
                 .columns = in_place || columns == panel_size ? columns : (columns + lanes - 1) / lanes * lanes,
                 .bias = bias == nullptr || first_channel > 0 ? nullptr : bias + p * panel_size,
                 .accumulate = first_channel > 0,
                 .past_caches = in_place && past_caches,
                 .fetch_next = far_sources && direct_source && p == panels.begin && plan.taps() == 1});
          }
        }
      }
    first_channel += blocking.source_channels;
  } while (first_channel < plan.source_channels);
  if (in_place) {
    if (past_caches) finish_stores_past_caches();
    return;
  }

  const int64_t whole_rows = block.columns.size() == width.destination ? block.rows.size() : 1;
  const int64_t left = plan.channels - first_of_panels, channels = left < sums_pixel ? left : sums_pixel;
  for (int64_t row = block.rows.begin; row < block.rows.end; row += whole_rows)
    copy_out(sums + (row - block.rows.begin) * sums_row, sums_pixel,
             destination + row * plan.destination.axis[1] + block.columns.begin * plan.destination.axis[2],
             plan.destination, channels, whole_rows * block.columns.size());
}

// Pixels `step` apart in pairs, of one row: [pair][channel]. A pair behind the last pixel is filled up with zero.
inline void pair_pixels(const BFloat16* from, int64_t step, int64_t pixels, int64_t channels, Bfloat16Pair* to,
                        int64_t to_pitch) {
  for (int64_t pixel = 0; pixel < pixels; pixel += 2, from += 2 * step, to += to_pitch) {
    if (pixel + 1 < pixels) {
      join_pairs(from, from + step, channels, to);
    } else {
      for (int64_t channel = 0; channel < channels; ++channel) to[channel] = {from[channel].x, 0};
    }
  }
}

// What some blocks' weight gradients are made in. The scratch memory of block k begins at k times its size of one
// block.
template <class E>
struct WeightGradScratch {
  part_t<E>* inputs;                       // input_values for each block
  part_t<E>* grads;                        // grad_values
  Bfloat16Pair *input_pairs, *grad_pairs;  // as many, where E is a pair
  int64_t input_values, grad_values;
  Run* runs;  // for the rows of all blocks
};

// Of a row of a block, in E: a pair is one of neighbouring pixels.
template <class E>
int64_t steps_of(const Block& block) {
  return (block.columns.size() + kPartsOf<E> - 1) / kPartsOf<E>;
}

// The gradient of a block as the micro-kernel's b, of some channels; it lies in place, or in scratch memory with
// `columns` columns, zeros behind the last channel.
template <class E, class T>
const E* weight_grad_gradient(const Gather& plan, const Block& block, const T* grad_output, int64_t first_channel,
                              int64_t channels, int64_t columns, bool in_place, part_t<E>* scratch,
                              Bfloat16Pair* pairs) {
  using Part = part_t<E>;
  const Layout& layout = plan.destination;
  const T* from = grad_output + block.image * layout.image +
                  (block.group * plan.channels + first_channel) * layout.channel + block.depth * layout.axis[0] +
                  block.rows.begin * layout.axis[1] + block.columns.begin * layout.axis[2];
  const Part* parts = scratch;
  int64_t pixel = columns, row_pitch = block.columns.size() * columns;
  if (in_place) {
    if constexpr (std::is_same_v<T, Part>) parts = from;
    pixel = layout.axis[2];
    row_pitch = layout.axis[1];
  } else {
    if (channels < columns) fill_zero(scratch, block.rows.size() * row_pitch);
    for (int64_t row = 0; row < block.rows.size(); ++row)
      copy_in(from + row * layout.axis[1], layout, channels, block.columns.size(), scratch + row * row_pitch, pixel);
  }
  if constexpr (std::is_same_v<E, Part>) {
    return parts;
  } else {
    const int64_t pairs_row = steps_of<E>(block) * columns;
    if (channels < columns) fill_zero(pairs, block.rows.size() * pairs_row);
    for (int64_t row = 0; row < block.rows.size(); ++row)
      pair_pixels(parts + row * row_pitch, pixel, block.columns.size(), channels, pairs + row * pairs_row, columns);
    return pairs;
  }
}

// Where the micro-kernel reads the sources under column `w` of the window: of plane 0, row 0 and column 0 of the block.
template <class E>
struct WeightGradInput {
  const E* data;
  int64_t plane, row;
  Range rows;        // that are there
  bool every_plane;  // or those alone that a tap reads
};

template <class E>
WeightGradInput<E> weight_grad_input(const Gather& plan, const Block& block, const SourceView<part_t<E>>& view,
                                     bool in_place, int64_t channels, int64_t w, Bfloat16Pair* pairs) {
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  const part_t<E>* from =
      view.data + (block.columns.begin * width.step + width.offset[w] - view.columns.begin) * view.pixel;
  if constexpr (std::is_same_v<E, part_t<E>>) {
    return {from, view.plane, view.row, view.rows, in_place};
  } else {
    const Range rows = clipped(reach(height, block.rows), height.source);
    const int64_t row_pitch = steps_of<E>(block) * channels;
    Bfloat16Pair* to = pairs;
    int64_t copied = 0;
    for_taps(plan.axis[0], block.depth, [&](int64_t, int64_t plane) {
      const part_t<E>* line = from + (in_place ? plane : copied++) * view.plane;
      for (int64_t row = rows.begin; row < rows.end; ++row, to += row_pitch)
        pair_pixels(line + (row - view.rows.begin) * view.row, width.step * view.pixel, block.columns.size(), channels,
                    to, channels);
    });
    return {pairs, rows.size() * row_pitch, row_pitch, rows, false};
  }
}

// The rows of a block that row `h` of the window meets a source from, at tap `d` of the depth: from `input` and `grad`
// on, added to the list.
template <class E>
Run* add_weight_grad_runs(const Gather& plan, const Block& block, const WeightGradInput<E>& from, int64_t d, int64_t h,
                          int64_t input, int64_t grad, int64_t grad_row, Run* run) {
  const GatherAxis& height = plan.axis[1];
  int64_t copied = 0;
  for_taps(plan.axis[0], block.depth, [&](int64_t tap, int64_t plane) {
    const int64_t place = from.every_plane ? plane : copied++;
    if (tap != d) return;
    for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
      const int64_t source_row = row * height.step + height.offset[h];
      if (source_row < 0 || source_row >= height.source) continue;
      *run++ = {input + place * from.plane + (source_row - from.rows.begin) * from.row,
                grad + (row - block.rows.begin) * grad_row};
    }
  });
  return run;
}

// Adds the share of some blocks, of one width, of panels first_panel .. last_panel of a group's weight gradient to
// `sums`, which are these panels' [tap][input channel][panel_size]. The plan is forward's: its destination is
// grad_output.
template <class E, class T>
void weight_grad_blocks(const Gather& plan, const Blocking& blocking, const Block* blocks, int64_t count,
                        bool input_in_place, const T* input, const T* grad_output, int64_t first_panel,
                        int64_t last_panel, accumulate_t<T>* sums, const WeightGradScratch<E>& scratch) {
  using A = accumulate_t<T>;
  constexpr bool kPairs = kPartsOf<E> == 2;
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  int64_t panel_size;
  panel_width<A>(plan.channels, panel_size);
  const int64_t panel_step = plan.taps() * plan.source_channels * panel_size;
  const int64_t first_out = first_panel * panel_size, all_columns = last_panel * panel_size - first_out;
  const int64_t out_channels = plan.channels - first_out < all_columns ? plan.channels - first_out : all_columns;
  const bool grad_in_place =
      std::is_same_v<T, part_t<E>> && plan.destination.channel == 1 && (kPairs || out_channels == all_columns);
  const bool grad_read_there = grad_in_place && !kPairs;
  const int64_t grad_row = grad_read_there ? plan.destination.axis[1] : steps_of<E>(blocks[0]) * all_columns;

  const E* grads[kMostTogether];
  for (int64_t k = 0; k < count; ++k)
    grads[k] =
        weight_grad_gradient<E>(plan, blocks[k], grad_output, first_out, out_channels, all_columns, grad_in_place,
                                scratch.grads + k * scratch.grad_values, scratch.grad_pairs + k * scratch.grad_values);

  SourceView<part_t<E>> views[kMostTogether];
  WeightGradInput<E> inputs[kMostTogether];
  for (int64_t first_channel = 0; first_channel < plan.source_channels; first_channel += blocking.source_channels) {
    const int64_t left = plan.source_channels - first_channel;
    const int64_t channels = left < blocking.source_channels ? left : blocking.source_channels;
    for (int64_t k = 0; k < count; ++k)
      views[k] = view_source<part_t<E>>(plan, blocks[k], input, input_in_place, first_channel, channels,
                                        scratch.inputs + k * scratch.input_values);
    const bool merged = !kPairs && views[0].pixel == plan.source_channels && channels == plan.source_channels &&
                        width.offset[width.taps - 1] - width.offset[0] == width.taps - 1;
    for (int64_t w = 0; w < (merged ? 1 : width.taps); ++w) {
      for (int64_t k = 0; k < count; ++k)
        inputs[k] = weight_grad_input<E>(plan, blocks[k], views[k], input_in_place, channels, w,
                                         scratch.input_pairs + k * scratch.input_values);
      for (int64_t d = 0; d < depth.taps; ++d)
        for (int64_t h = 0; h < height.taps; ++h) {
          Run* run = scratch.runs;
          for (int64_t k = 0; k < count; ++k)
            run = add_weight_grad_runs(plan, blocks[k], inputs[k], d, h, inputs[k].data - inputs[0].data,
                                       grads[k] - grads[0], grad_row, run);
          const int64_t tap = (d * height.taps + h) * width.taps + w;
          for (int64_t panel = first_panel; panel < last_panel; ++panel)
            multiply_rows<E>(merged ? width.taps * channels : channels,
                             {.a = inputs[0].data,
                              .a_row = 1,
                              .a_step = kPairs ? channels : width.step * views[0].pixel,
                              .b = grads[0] + (panel - first_panel) * panel_size,
                              .b_step = grad_read_there ? plan.destination.axis[2] : all_columns,
                              .runs = scratch.runs,
                              .run_count = run - scratch.runs,
                              .run_length = steps_of<E>(blocks[0]),
                              .c = sums + (panel - first_panel) * panel_step +
                                   (tap * plan.source_channels + first_channel) * panel_size,
                              .c_row = panel_size,
                              .columns = whole_lanes<A>(columns_of_panel<A>(plan.channels, panel)),
                              .bias = nullptr,
                              .accumulate = true});
        }
    }
  }
}
