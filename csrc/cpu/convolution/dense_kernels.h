#include "cpu/convolution/copies.h"
#include "cpu/convolution/micro_kernel.h"
#include "cpu/convolution/panels.h"

// Packed weights up to this size stay in the L2 cache, so that each tile of pixels meets all of them; larger ones are
// multiplied a panel at a time with all of the block's pixels.
constexpr int64_t kPackedInCache = 300 * 1024;

// Where the micro-kernel reads the sources of a block: in place, or copied with their padding.
template <class A>
struct SourceView {
  const A* data;  // of source (0, rows.begin, columns.begin)
  int64_t plane, row, pixel;
  Range rows, columns;
};

// The source channels first .. first+count of the group that the block reads.
template <class T>
SourceView<accumulate_t<T>> view_source(const Gather& plan, const Block& block, const T* source, bool direct,
                                        int64_t first, int64_t count, accumulate_t<T>* scratch) {
  using A = accumulate_t<T>;
  const Layout& layout = plan.source;
  source += block.image * layout.image + (block.group * plan.source_channels + first) * layout.channel;
  if constexpr (std::is_same_v<T, A>) {
    if (direct) return {source, layout.axis[0], layout.axis[1], layout.axis[2], {0, 0}, {0, 0}};
  }
  SourceView<A> view;
  view.rows = clipped(reach(plan.axis[1], block.rows), plan.axis[1].source);
  view.columns = reach(plan.axis[2], block.columns);
  view.data = scratch;
  view.pixel = count;
  view.row = view.columns.size() * view.pixel;
  view.plane = view.rows.size() * view.row;
  const GatherAxis& depth = plan.axis[0];
  const int64_t phase = block.depth % depth.phases, position = block.depth / depth.phases * depth.step;
  for (int64_t tap = depth.first[phase]; tap < depth.first[phase + 1]; ++tap) {
    const int64_t plane = position + depth.offset[tap];
    if (plane < 0 || plane >= depth.source) continue;
    copy_padded(source + plane * layout.axis[0], layout, plan.axis[2].source, view.rows, view.columns, count, scratch);
    scratch += view.plane;
  }
  return view;
}

// One block of the destination, all channels of a group. `weight` holds the group's panels, `bias` (or null) a value
// for each of their columns; `sources`, `sums` and `runs` are scratch memory.
template <class T>
void gather_block(const Gather& plan, const Blocking& blocking, const Block& block, bool direct_source, const T* source,
                  const accumulate_t<T>* weight, const accumulate_t<T>* bias, T* destination, accumulate_t<T>* sources,
                  accumulate_t<T>* sums, Run* runs) {
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

  const int64_t depth_phase = block.depth % depth.phases, depth_position = block.depth / depth.phases * depth.step;
  int64_t first_channel = 0;
  do {
    const int64_t left = plan.source_channels - first_channel;
    const int64_t channels = left < blocking.source_channels ? left : blocking.source_channels;
    const SourceView<A> view = view_source(plan, block, source, direct_source, first_channel, channels, sources);
    for (int64_t panel = 0; panel < panels; panel += at_once)
      for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
        const int64_t row_phase = row % height.phases, row_position = row / height.phases * height.step;
        for (int64_t phase = 0; phase < width.phases; ++phase) {
          const Range q = positions(width, block.columns, phase);
          if (q.begin >= q.end) continue;
          const int64_t taps_begin = width.first[phase], taps = width.first[phase + 1] - taps_begin;
          const bool neighbours =
              taps > 0 && width.offset[taps_begin + taps - 1] - width.offset[taps_begin] == taps - 1;
          const bool merged = neighbours && view.pixel == plan.source_channels && channels == plan.source_channels;
          Run* run = runs;
          int64_t copied_planes = 0;
          for (int64_t d = depth.first[depth_phase]; d < depth.first[depth_phase + 1]; ++d) {
            const int64_t plane = depth_position + depth.offset[d];
            if (plane < 0 || plane >= depth.source) continue;
            const int64_t plane_start = (direct_source ? plane : copied_planes++) * view.plane;
            for (int64_t h = height.first[row_phase]; h < height.first[row_phase + 1]; ++h) {
              const int64_t source_row = row_position + height.offset[h];
              if (source_row < 0 || source_row >= height.source) continue;
              const int64_t row_start = plane_start + (source_row - view.rows.begin) * view.row;
              const int64_t row_taps = (d * height.taps + h) * width.taps + taps_begin;
              for (int64_t w = 0; w < (merged ? 1 : taps); ++w)
                *run++ = {row_start + (width.offset[taps_begin + w] - view.columns.begin) * view.pixel,
                          ((row_taps + w) * plan.source_channels + first_channel) * panel_size};
            }
          }
          const int64_t column = q.begin * width.phases + phase - block.columns.begin;
          for (int64_t p = panel; p < panel + at_once; ++p) {
            const int64_t columns = columns_of_panel<A>(plan.channels, p);
            multiply_rows<A>(
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
                 .accumulate = first_channel > 0});
          }
        }
      }
    first_channel += blocking.source_channels;
  } while (first_channel < plan.source_channels);
  if (in_place) return;

  const int64_t whole_rows = block.columns.size() == width.destination ? block.rows.size() : 1;
  for (int64_t row = block.rows.begin; row < block.rows.end; row += whole_rows)
    copy_out(sums + (row - block.rows.begin) * sums_row, sums_pixel,
             destination + row * plan.destination.axis[1] + block.columns.begin * plan.destination.axis[2],
             plan.destination, plan.channels, whole_rows * block.columns.size());
}

// Adds one block's share of a group's weight gradient to panels first_panel .. last_panel of `sums`, which are
// [panel][tap][input channel][panel_size]. The plan is forward's: its destination is grad_output.
template <class T>
void weight_grad_block(const Gather& plan, const Blocking& blocking, const Block& block, bool direct_input,
                       const T* input, const T* grad_output, int64_t first_panel, int64_t last_panel,
                       accumulate_t<T>* sums, accumulate_t<T>* inputs, accumulate_t<T>* grads, Run* runs) {
  using A = accumulate_t<T>;
  const GatherAxis &depth = plan.axis[0], &height = plan.axis[1], &width = plan.axis[2];
  int64_t panel_size;
  panel_width<A>(plan.channels, panel_size);
  const int64_t panel_step = plan.taps() * plan.source_channels * panel_size;
  const int64_t lanes = kLanes<A>;
  const int64_t first_out = first_panel * panel_size;
  const int64_t out_channels =
      (last_panel * panel_size < plan.channels ? last_panel * panel_size : plan.channels) - first_out;
  grad_output += block.image * plan.destination.image +
                 (block.group * plan.channels + first_out) * plan.destination.channel +
                 block.depth * plan.destination.axis[0] + block.rows.begin * plan.destination.axis[1] +
                 block.columns.begin * plan.destination.axis[2];

  int64_t grad_pixel = (last_panel - first_panel) * panel_size, grad_row = block.columns.size() * grad_pixel;
  const A* grad = grads;
  bool in_place = false;
  if constexpr (std::is_same_v<T, A>) {
    in_place = plan.destination.channel == 1 && out_channels == grad_pixel;
    if (in_place) {
      grad = grad_output;
      grad_pixel = plan.destination.axis[2];
      grad_row = plan.destination.axis[1];
    }
  }
  if (!in_place) {
    if (out_channels < grad_pixel) fill_zero(grads, block.rows.size() * grad_row);
    for (int64_t row = 0; row < block.rows.size(); ++row)
      copy_in(grad_output + row * plan.destination.axis[1], plan.destination, out_channels, block.columns.size(),
              grads + row * grad_row, grad_pixel);
  }

  for (int64_t first_channel = 0; first_channel < plan.source_channels; first_channel += blocking.source_channels) {
    const int64_t left = plan.source_channels - first_channel;
    const int64_t channels = left < blocking.source_channels ? left : blocking.source_channels;
    const SourceView<A> view = view_source(plan, block, input, direct_input, first_channel, channels, inputs);
    const bool merged = view.pixel == plan.source_channels && channels == plan.source_channels &&
                        width.offset[width.taps - 1] - width.offset[0] == width.taps - 1;
    int64_t copied_planes = 0;
    for (int64_t d = 0; d < depth.taps; ++d) {
      const int64_t plane = block.depth * depth.step + depth.offset[d];
      if (plane < 0 || plane >= depth.source) continue;
      const int64_t plane_start = (direct_input ? plane : copied_planes++) * view.plane;
      for (int64_t h = 0; h < height.taps; ++h) {
        Run* run = runs;
        for (int64_t row = block.rows.begin; row < block.rows.end; ++row) {
          const int64_t source_row = row * height.step + height.offset[h];
          if (source_row < 0 || source_row >= height.source) continue;
          *run++ = {plane_start + (source_row - view.rows.begin) * view.row, (row - block.rows.begin) * grad_row};
        }
        for (int64_t w = 0; w < (merged ? 1 : width.taps); ++w) {
          const int64_t column = block.columns.begin * width.step + width.offset[w] - view.columns.begin;
          const int64_t tap = (d * height.taps + h) * width.taps + w;
          for (int64_t panel = first_panel; panel < last_panel; ++panel)
            multiply_rows<A>(
                merged ? width.taps * channels : channels,
                {.a = view.data + column * view.pixel,
                 .a_row = 1,
                 .a_step = width.step * view.pixel,
                 .b = grad + (panel - first_panel) * panel_size,
                 .b_step = grad_pixel,
                 .runs = runs,
                 .run_count = run - runs,
                 .run_length = block.columns.size(),
                 .c = sums + panel * panel_step + (tap * plan.source_channels + first_channel) * panel_size,
                 .c_row = panel_size,
                 .columns = (columns_of_panel<A>(plan.channels, panel) + lanes - 1) / lanes * lanes,
                 .bias = nullptr,
                 .accumulate = true});
        }
      }
    }
  }
}
