// How the dense and the depthwise convolutions walk over their operands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "geometry.h"

namespace manual_ops {

// One axis of a convolution that gathers: forward, and the input gradient. The destinations are `phases` interleaved
// classes; destination q*phases + phase reads the sources q*step + offset, one for each tap of its phase. Forward has
// one phase and step = stride. The input gradient has `stride` phases and step 1: so no tap meets a zero between
// outputs.
struct GatherAxis {
  int64_t source = 1, destination = 1;  // sizes
  int64_t phases = 1, step = 1;
  int64_t taps = 0;
  const int64_t* tap = nullptr;     // [taps] which tap of the weight; those of a phase lie together, offsets ascending
  const int64_t* offset = nullptr;  // [taps]
  const int64_t* first = nullptr;   // [phases + 1] where a phase's taps begin
};

struct Gather {
  int64_t batch = 0, groups = 1, source_channels = 0, channels = 0;  // channels of one group
  GatherAxis axis[kAxes];
  Layout source, destination;
  int64_t taps() const { return axis[0].taps * axis[1].taps * axis[2].taps; }
};

// Owns the tables that a Gather points into.
struct GatherPlan : Gather {
  std::vector<int64_t> tables[kAxes];
};

GatherPlan forward_plan(const ConvGeometry& g, const Layout& input, const Layout& output);
GatherPlan input_grad_plan(const ConvGeometry& g, const Layout& grad_output, const Layout& grad_input);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A vector of any instruction set is no longer than this many values.
constexpr int64_t kMostLanes = 16;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range clipped(Range range, int64_t size) {
  const int64_t begin = std::max<int64_t>(range.begin, 0), end = std::min(range.end, size);
  return begin < end ? Range{begin, end} : Range{0, 0};
}

// The q of the destinations q*phases + phase among these.
inline Range positions(const GatherAxis& axis, Range destinations, int64_t phase) {
  return {(destinations.begin - phase + axis.phases - 1) / axis.phases,
          (destinations.end - phase + axis.phases - 1) / axis.phases};
}

// The sources along one axis that these destinations read, those outside the source among them.
Range reach(const GatherAxis& axis, Range destinations);

// What one unit of parallel work computes: some rows and columns of one plane of one image and group.
struct Block {
  int64_t image, group, depth;
  Range rows, columns;
};

// How the destination is cut into blocks. It depends on the shape alone, never on the number of threads.
struct Blocking {
  int64_t rows, columns;    // of the destination, in a block
  int64_t source_channels;  // that are read at a time, which bounds the scratch memory
  int64_t row_blocks, column_blocks;
  int64_t count;  // blocks of all images, without the groups
};

// `sum_width`: how many values a destination takes in scratch memory; `direct`: sources are read in place.
Blocking choose_blocking(const Gather& plan, bool direct, int64_t sum_width, int64_t element_size);

// Block number 0 <= index < blocking.count of a group.
Block block_at(const Gather& plan, const Blocking& blocking, int64_t index, int64_t group);

// The most values that a block copies from the source.
int64_t copied_values(const Gather& plan, const Blocking& blocking);

// Whether every source that is read lies inside its row, so that rows need no padding.
bool rows_need_no_padding(const Gather& plan);

// Where each tap lies in a window of this layout, in the plan's order of taps.
std::vector<int64_t> tap_offsets(const Gather& plan, const Layout& window);

}  // namespace manual_ops
