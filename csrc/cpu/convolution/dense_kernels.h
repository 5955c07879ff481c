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

// One block of the destination, all channels of a group. `weight` holds the group's panels, `bias` (or null) a value
// for each of their columns; `sources`, `sums` and `runs` are scratch memory.
template <class E, class T>
void gather_block(const Gather& plan, const Blocking& blocking, const Block& block, bool direct_source, const T* source,
                  const E* weight, const accumulate_t<T>* bias, T* destination, bool past_caches, bool far_sources,
                  E* sources, accumulate_t<T>* sums, Run* runs) {
  using A = accumulate_t<T>;
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  int64_t panel_size;
  panel_width<A>(plan.channels, panel_size);
  const int64_t panels = (plan.channels + panel_size - 1) / panel_size;
  const int64_t panel_step = plan.taps() * plan.source_channels * panel_size;
  const int64_t lanes = kLanes<A>;
  const int64_t at_once = panels * panel_step * static_cast<int64_t>(sizeof(A)) <= kPackedInCache ? panels : 1;
  destination += block.image * plan.destination.image + block.group * plan.channels * plan.destination.channel +
                 block.depth * plan.destination.axis[0];

  // Sums go to their place where it can hold them, else to [row][column][panels * panel_size].
  bool in_place = false;
  int64_t sums_row = block.columns.size() * panels * panel_size, sums_pixel = panels * panel_size;
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
    for (int64_t panel = 0; panel < panels; panel += at_once)
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
                 .b = weight + p * panel_step,
                 .b_step = panel_size,
                 .runs = runs,
                 .run_count = run - runs,
                 .run_length = merged ? taps * channels : channels,
                 .c = sums + (row - block.rows.begin) * sums_row + column * sums_pixel + p * panel_size,
                 .c_row = width.phases * sums_pixel,
                 .columns = in_place || columns == panel_size ? columns : (columns + lanes - 1) / lanes * lanes,
                 .bias = bias == nullptr || first_channel > 0 ? nullptr : bias + p * panel_size,
                 .accumulate = first_channel > 0,
                 .past_caches = in_place && past_caches,
                 .fetch_next = far_sources && direct_source && p == 0 && plan.taps() == 1});
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
  for (int64_t row = block.rows.begin; row < block.rows.end; row += whole_rows)
    copy_out(sums + (row - block.rows.begin) * sums_row, sums_pixel,
             destination + row * plan.destination.axis[1] + block.columns.begin * plan.destination.axis[2],
             plan.destination, plan.channels, whole_rows * block.columns.size());
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

// Where the micro-kernel reads a block's operands for its weight gradient: of a tap at depth plane 0, row 0 and column
// 0 of the block, and of the output's gradient.
template <class E>
struct WeightGradOperands {
  const E *input, *grad;
};

// Adds some blocks' share of a group's weight gradient to panels first_panel .. last_panel of `sums`, which are
// [panel][tap][input channel][panel_size]. The plan is forward's: its destination is grad_output. Where E is a pair, it
// is one of neighbouring pixels, of the gradient and of the sources under one column of the window. Scratch memory of a
// block: `inputs` of input_values, `grads` of grad_values; `runs` for the rows of all blocks.
template <class E, class T>
void weight_grad_blocks(const Gather& plan, const Blocking& blocking, const Block* blocks, int64_t count,
                        bool direct_input, const T* input, const T* grad_output, int64_t first_panel,
                        int64_t last_panel, accumulate_t<T>* sums, part_t<E>* inputs, int64_t input_values,
                        part_t<E>* grads, int64_t grad_values, Bfloat16Pair* input_pairs, Bfloat16Pair* grad_pairs,
                        Run* runs) {
  using A = accumulate_t<T>;
  using Part = part_t<E>;
  constexpr bool kPairs = kPartsOf<E> == 2;
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  int64_t panel_size;
  panel_width<A>(plan.channels, panel_size);
  const int64_t panel_step = plan.taps() * plan.source_channels * panel_size;
  const int64_t lanes = kLanes<A>;
  const int64_t first_out = first_panel * panel_size;
  const int64_t out_channels =
      (last_panel * panel_size < plan.channels ? last_panel * panel_size : plan.channels) - first_out;
  const int64_t all_columns = (last_panel - first_panel) * panel_size;
  // Of a row of the block, in E.
  const auto steps_of = [](const Block& block) { return (block.columns.size() + kPartsOf<E> - 1) / kPartsOf<E>; };
  bool in_place = false;
  if constexpr (std::is_same_v<T, Part>)
    in_place = plan.destination.channel == 1 && (kPairs || out_channels == all_columns);
  const int64_t grad_pixel = in_place && !kPairs ? plan.destination.axis[2] : all_columns;
  const auto grad_row_of = [&](const Block& block) {
    return in_place && !kPairs ? plan.destination.axis[1] : steps_of(block) * all_columns;
  };

  SourceView<Part> views[kMostTogether];
  WeightGradOperands<E> operands[kMostTogether];
  for (int64_t index = 0; index < count; ++index) {
    const Block& block = blocks[index];
    const T* from = grad_output + block.image * plan.destination.image +
                    (block.group * plan.channels + first_out) * plan.destination.channel +
                    block.depth * plan.destination.axis[0] + block.rows.begin * plan.destination.axis[1] +
                    block.columns.begin * plan.destination.axis[2];
    const Part* parts = grads + index * grad_values;
    int64_t pixel = all_columns, row_pitch = block.columns.size() * all_columns;
    if (in_place) {
      if constexpr (std::is_same_v<T, Part>) parts = from;
      pixel = plan.destination.axis[2];
      row_pitch = plan.destination.axis[1];
    } else {
      Part* to = grads + index * grad_values;
      if (out_channels < all_columns) fill_zero(to, block.rows.size() * row_pitch);
      for (int64_t row = 0; row < block.rows.size(); ++row)
        copy_in(from + row * plan.destination.axis[1], plan.destination, out_channels, block.columns.size(),
                to + row * row_pitch, pixel);
    }
    if constexpr (kPairs) {
      Bfloat16Pair* to = grad_pairs + index * grad_values;
      operands[index].grad = to;
      if (out_channels < all_columns) fill_zero(to, block.rows.size() * grad_row_of(block));
      for (int64_t row = 0; row < block.rows.size(); ++row)
        pair_pixels(parts + row * row_pitch, pixel, block.columns.size(), out_channels, to + row * grad_row_of(block),
                    all_columns);
    } else {
      operands[index].grad = parts;
    }
  }

  for (int64_t first_channel = 0; first_channel < plan.source_channels; first_channel += blocking.source_channels) {
    const int64_t left = plan.source_channels - first_channel;
    const int64_t channels = left < blocking.source_channels ? left : blocking.source_channels;
    for (int64_t index = 0; index < count; ++index)
      views[index] = view_source<Part>(plan, blocks[index], input, direct_input, first_channel, channels,
                                       inputs + index * input_values);
    const int64_t pixel = views[0].pixel;
    const bool merged = !kPairs && pixel == plan.source_channels && channels == plan.source_channels &&
                        width.offset[width.taps - 1] - width.offset[0] == width.taps - 1;
    for (int64_t w = 0; w < (merged ? 1 : width.taps); ++w) {
      for (int64_t index = 0; index < count; ++index) {
        const Block& block = blocks[index];
        const SourceView<Part>& view = views[index];
        const Part* from =
            view.data + (block.columns.begin * width.step + width.offset[w] - view.columns.begin) * pixel;
        if constexpr (kPairs) {
          Bfloat16Pair* to = input_pairs + index * input_values;
          operands[index].input = to;
          const Range rows = clipped(reach(height, block.rows), height.source);
          int64_t copied = 0;
          for_taps(depth, block.depth, [&](int64_t, int64_t plane) {
            const Part* line = from + (direct_input ? plane : copied++) * view.plane;
            for (int64_t row = rows.begin; row < rows.end; ++row, to += steps_of(block) * channels)
              pair_pixels(line + (row - view.rows.begin) * view.row, width.step * pixel, block.columns.size(), channels,
                          to, channels);
          });
        } else {
          operands[index].input = from;
        }
      }
      for (int64_t d = 0; d < depth.taps; ++d)
        for (int64_t h = 0; h < height.taps; ++h) {
          Run* run = runs;
          for (int64_t index = 0; index < count; ++index) {
            const Block& block = blocks[index];
            const Range rows = kPairs ? clipped(reach(height, block.rows), height.source) : views[index].rows;
            const int64_t row_pitch = kPairs ? steps_of(block) * channels : views[index].row;
            const int64_t plane_pitch = kPairs ? rows.size() * row_pitch : views[index].plane;
            const int64_t input_start = operands[index].input - operands[0].input;
            const int64_t grad_start = operands[index].grad - operands[0].grad;
            int64_t copied = 0;
            for_taps(depth, block.depth, [&](int64_t tap, int64_t plane) {
              const int64_t place = direct_input && !kPairs ? plane : copied++;
              if (tap != d) return;
              for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
                const int64_t source_row = row * height.step + height.offset[h];
                if (source_row < 0 || source_row >= height.source) continue;
                *run++ = {input_start + place * plane_pitch + (source_row - rows.begin) * row_pitch,
                          grad_start + (row - block.rows.begin) * grad_row_of(block)};
              }
            });
          }
          const int64_t tap = (d * height.taps + h) * width.taps + w;
          for (int64_t panel = first_panel; panel < last_panel; ++panel)
            multiply_rows<E>(
                merged ? width.taps * channels : channels,
                {.a = operands[0].input,
                 .a_row = 1,
                 .a_step = kPairs ? channels : width.step * pixel,
                 .b = operands[0].grad + (panel - first_panel) * panel_size,
                 .b_step = grad_pixel,
                 .runs = runs,
                 .run_count = run - runs,
                 .run_length = steps_of(blocks[0]),
                 .c = sums + panel * panel_step + (tap * plan.source_channels + first_channel) * panel_size,
                 .c_row = panel_size,
                 .columns = (columns_of_panel<A>(plan.channels, panel) + lanes - 1) / lanes * lanes,
                 .bias = nullptr,
                 .accumulate = true});
        }
    }
  }
}
