#include "cpu/convolution/plan.h"

#include <utility>

namespace manual_ops {

namespace {

// Sources and sums of a block: the share of a 1 MB L2 cache that leaves room for weights.
constexpr int64_t kBlockBytes = 192 * 1024;
// At least so many blocks, for threads to share, where the rows allow it.
constexpr int64_t kLeastBlocks = 8;
// Blocks are not cut below this many columns or source channels: a tile would not pay for its start.
constexpr int64_t kLeastColumns = 56, kLeastChannels = 64;

GatherPlan plan_of(const ConvGeometry& g, const Layout& source, const Layout& destination) {
  GatherPlan plan;
  plan.batch = g.batch;
  plan.groups = g.groups;
  plan.source = source;
  plan.destination = destination;
  return plan;
}

// Lays the (phase, offset) of each tap out as the axis wants them; taps of phases that do not exist are left out.
void fill_axis(GatherAxis& axis, std::vector<int64_t>& table, int64_t window, const std::vector<Range>& phase_offset) {
  std::vector<int64_t> order(window);
  for (int64_t tap = 0; tap < window; ++tap) order[tap] = tap;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::pair(phase_offset[a].begin, phase_offset[a].end) <
           std::pair(phase_offset[b].begin, phase_offset[b].end);
  });
  std::erase_if(order, [&](int64_t tap) { return phase_offset[tap].begin >= axis.phases; });
  axis.taps = static_cast<int64_t>(order.size());
  table.assign(2 * axis.taps + axis.phases + 1, 0);
  int64_t *tap = table.data(), *offset = tap + axis.taps, *first = offset + axis.taps;
  for (int64_t index = 0; index < axis.taps; ++index) {
    tap[index] = order[index];
    offset[index] = phase_offset[order[index]].end;
    ++first[phase_offset[order[index]].begin + 1];
  }
  for (int64_t phase = 0; phase < axis.phases; ++phase) first[phase + 1] += first[phase];
  axis.tap = tap;
  axis.offset = offset;
  axis.first = first;
}

int64_t offset_span(const GatherAxis& axis) {
  if (axis.taps == 0) return 0;
  const auto [low, high] = std::minmax_element(axis.offset, axis.offset + axis.taps);
  return *high - *low;
}

// The most sources that `destinations` neighbours read along an axis.
int64_t longest_reach(const GatherAxis& axis, int64_t destinations) {
  return ceil_div(destinations - 1, axis.phases) * axis.step + offset_span(axis) + 1;
}

}  // namespace

GatherPlan forward_plan(const ConvGeometry& g, const Layout& input, const Layout& output) {
  GatherPlan plan = plan_of(g, input, output);
  plan.source_channels = g.in_channels;
  plan.channels = g.out_channels;
  for (int i = 0; i < kAxes; ++i) {
    plan.axis[i].source = g.input[i];
    plan.axis[i].destination = g.output[i];
    plan.axis[i].step = g.stride[i];
    std::vector<Range> phase_offset;
    for (int64_t tap = 0; tap < g.window[i]; ++tap) phase_offset.push_back({0, tap * g.dilation[i] - g.padding[i]});
    fill_axis(plan.axis[i], plan.tables[i], g.window[i], phase_offset);
  }
  return plan;
}

// Input i = q*stride + phase is read through tap t by output (i + padding - t*dilation) / stride, where that is whole.
GatherPlan input_grad_plan(const ConvGeometry& g, const Layout& grad_output, const Layout& grad_input) {
  GatherPlan plan = plan_of(g, grad_output, grad_input);
  plan.source_channels = g.out_channels;
  plan.channels = g.in_channels;
  for (int i = 0; i < kAxes; ++i) {
    plan.axis[i].source = g.output[i];
    plan.axis[i].destination = g.input[i];
    // A stride beyond the input leaves one input to a phase, and the later phases without any.
    plan.axis[i].phases = std::min(g.stride[i], std::max<int64_t>(1, g.input[i]));
    std::vector<Range> phase_offset;
    for (int64_t tap = 0; tap < g.window[i]; ++tap) {
      const int64_t shift = tap * g.dilation[i] - g.padding[i];
      const int64_t phase = (shift % g.stride[i] + g.stride[i]) % g.stride[i];
      phase_offset.push_back({phase, (phase - shift) / g.stride[i]});
    }
    fill_axis(plan.axis[i], plan.tables[i], g.window[i], phase_offset);
  }
  return plan;
}

Range reach(const GatherAxis& axis, Range destinations) {
  Range all{0, 0};
  for (int64_t phase = 0; phase < axis.phases; ++phase) {
    const int64_t begin = axis.first[phase], end = axis.first[phase + 1];
    const Range q = positions(axis, destinations, phase);
    if (begin == end || q.begin >= q.end) continue;
    const Range one{q.begin * axis.step + axis.offset[begin], (q.end - 1) * axis.step + axis.offset[end - 1] + 1};
    if (all.begin == all.end) all = one;
    all = {std::min(all.begin, one.begin), std::max(all.end, one.end)};
  }
  return all;
}

int64_t copied_values(const Gather& plan, const Blocking& blocking) {
  const int64_t planes = std::min(plan.axis[0].taps, plan.axis[0].source);
  const int64_t rows = std::min(longest_reach(plan.axis[1], blocking.rows), plan.axis[1].source);
  return planes * rows * longest_reach(plan.axis[2], blocking.columns) * blocking.source_channels;
}

Blocking choose_blocking(const Gather& plan, bool direct, int64_t sum_width, int64_t element_size) {
  const int64_t height = plan.axis[1].destination, width = plan.axis[2].destination;
  Blocking b{height, width, std::max<int64_t>(1, plan.source_channels), 1, 1, 0};
  const auto too_large = [&] {
    return (copied_values(plan, b) + b.rows * b.columns * sum_width) * element_size > kBlockBytes;
  };
  while (b.rows > 1 && too_large()) b.rows = ceil_div(b.rows, 2);
  while (b.columns > kLeastColumns && too_large()) b.columns = ceil_div(b.columns, 2);
  while (!direct && b.source_channels > kLeastChannels && too_large())
    b.source_channels = ceil_div(b.source_channels, 2);
  const auto count = [&] {
    b.row_blocks = ceil_div(height, b.rows);
    b.column_blocks = ceil_div(width, b.columns);
    return b.count = plan.batch * plan.axis[0].destination * b.row_blocks * b.column_blocks;
  };
  while (b.rows > 1 && count() * plan.groups < kLeastBlocks) b.rows = ceil_div(b.rows, 2);
  while (b.columns > kLeastColumns && count() * plan.groups < kLeastBlocks) b.columns = ceil_div(b.columns, 2);
  count();
  return b;
}

Block block_at(const Gather& plan, const Blocking& b, int64_t index, int64_t group) {
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  const int64_t column = index % b.column_blocks, row = index / b.column_blocks % b.row_blocks;
  const int64_t plane = index / b.column_blocks / b.row_blocks;
  // Blocks of nearly one size.
  return {
      .image = plane / plan.axis[0].destination,
      .group = group,
      .depth = plane % plan.axis[0].destination,
      .rows = {height.destination * row / b.row_blocks, height.destination * (row + 1) / b.row_blocks},
      .columns = {width.destination * column / b.column_blocks, width.destination * (column + 1) / b.column_blocks}};
}

bool rows_need_no_padding(const Gather& plan) {
  const GatherAxis& width = plan.axis[2];
  for (int64_t phase = 0; phase < width.phases; ++phase) {
    const int64_t begin = width.first[phase], end = width.first[phase + 1];
    const int64_t last = positions(width, {0, width.destination}, phase).end - 1;
    if (begin < end && (width.offset[begin] < 0 || last * width.step + width.offset[end - 1] >= width.source))
      return false;
  }
  return true;
}

std::vector<int64_t> tap_offsets(const Gather& plan, const Layout& window) {
  std::vector<int64_t> offsets;
  for (int64_t d = 0; d < plan.axis[0].taps; ++d)
    for (int64_t h = 0; h < plan.axis[1].taps; ++h)
      for (int64_t w = 0; w < plan.axis[2].taps; ++w)
        offsets.push_back(plan.axis[0].tap[d] * window.axis[0] + plan.axis[1].tap[h] * window.axis[1] +
                          plan.axis[2].tap[w] * window.axis[2]);
  return offsets;
}

}  // namespace manual_ops
