// Dense convolution of few channels a group.
//
// Scratch memory: the weight once more, and in each thread the copies and the sums of a block of one bundle of groups,
// which choose_blocking() keeps near 192 KB, with sums of a weight gradient one vector for each of their values.
#include <utility>

#include "cpu/caches.h"
#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

namespace manual_ops {

namespace {

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The kernels work on so many values at once at the most, some of them behind the last one that is kept.
constexpr int64_t kMostPlaces = 4 * kMostLanes;

// Where a block's sources lie when they are copied, with the zeros around them: [channel][depth][row phase]
// [column phase][row][column]. Neighbouring destinations read sources `step` apart, so these are sorted by their
// position modulo the step; then the sources of one tap lie side by side, and from row to row of one pitch. So a whole
// block is one long row to the kernels. What they make of the places at the end of each pitch is not kept.
struct PlanarCopy {
  Range rows, columns;  // of the source, also those outside of it
  int64_t row_step, column_step;
  int64_t pitch, column_phase, row_phase, plane, channel;

  PlanarCopy(Range rows, Range columns, int64_t row_step, int64_t column_step, int64_t planes)
      : rows(rows), columns(columns), row_step(row_step), column_step(column_step) {
    pitch = ceil_div(columns.size(), column_step);
    column_phase = ceil_div(rows.size(), row_step) * pitch;
    row_phase = column_step * column_phase;
    plane = row_step * row_phase;
    channel = planes * plane + kMostLanes;  // not a power of two, of which few would fit into a cache
  }
  // Of a source `row` and `column` behind the first.
  int64_t at(int64_t row, int64_t column) const {
    return row % row_step * row_phase + column % column_step * column_phase + row / row_step * pitch +
           column / column_step;
  }
  int64_t values(int64_t channels) const { return channels * channel + kMostPlaces; }
};

PlanarCopy planar_copy(const Gather& plan, const Block& block) {
  return {reach(plan.axis[1], block.rows), reach(plan.axis[2], block.columns), plan.axis[1].step, plan.axis[2].step,
          std::min(plan.axis[0].taps, plan.axis[0].source)};
}

// From channel to channel of a block's sums, or gradients, with room for the vector that ends the last row.
int64_t planar_places(const PlanarCopy& copy, const Block& block) {
  return round_up(block.rows.size() * std::max(copy.pitch, block.columns.size()) + kMostLanes, kMostPlaces);
}

}  // namespace

}  // namespace manual_ops

#define MANUAL_OPS_KERNELS "cpu/convolution/planar_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// A weight gradient is summed in at most so many parts, which are added in their order.
constexpr int64_t kParts = 8;

// The share of the values computed that are kept, in percent.
int64_t filled(int64_t kept, int64_t computed) { return 100 * kept / std::max<int64_t>(1, computed); }

// The groups that a block takes together: of channels_last tensors as many as it takes to fill vectors with channels,
// for these are turned into planes and back.
int64_t groups_together(const Gather& plan) {
  const bool channels_last = plan.source.channel == 1 || plan.destination.channel == 1;
  const int64_t few = std::max<int64_t>(1, std::min(plan.source_channels, plan.channels));
  return channels_last ? std::min(plan.groups, ceil_div(kMostLanes, few)) : 1;
}

// Blocks of so many groups at a time.
struct PlanarBlocks {
  int64_t together, bundles;
  Blocking blocking;
  int64_t copied, places;  // the most values, and places of a channel, of a block

  PlanarBlocks(const Gather& plan, int64_t element_size)
      : together(groups_together(plan)), bundles(ceil_div(plan.groups, together)) {
    Gather bundled = plan;
    bundled.groups = bundles;
    bundled.source_channels *= together;
    bundled.channels *= together;
    blocking = choose_blocking(bundled, false, bundled.channels, element_size);
    copied = places = 0;
    for (int64_t index = 0; index < blocking.row_blocks * blocking.column_blocks; ++index) {
      const Block block = block_at(plan, blocking, index, 0);
      const PlanarCopy copy = planar_copy(plan, block);
      copied = std::max(copied, copy.values(bundled.source_channels));
      places = std::max(places, planar_places(copy, block));
    }
  }
  Range groups(const Gather& plan, int64_t bundle) const {
    return {bundle * together, std::min(plan.groups, (bundle + 1) * together)};
  }
};

// Beyond so many channels the dense convolution serves: sooner where they lie together.
int64_t most_channels(const Gather& plan) {
  return plan.groups == 1 || plan.destination.channel == 1 ? kMostLanes / 2 : kMostLanes;
}

}  // namespace

bool planar_serves(const Gather& plan) {
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
  const int64_t rows = ceil_div(height.destination, height.phases), columns = ceil_div(width.destination, width.phases);
  const int64_t pitch = columns + (width.taps > 0 ? width.offset[width.taps - 1] - width.offset[0] : 0) / width.step;
  const int64_t of_places = filled(rows * columns, round_up((rows - 1) * pitch + columns, kMostLanes));
  return plan.channels <= most_channels(plan) &&
         (of_places > filled(plan.channels, round_up(plan.channels, kMostLanes)) ||
          (plan.channels > kMostLanes / 2 && of_places > 75));
}

bool planar_serves_weight_grad(const Gather& plan) {
  return plan.groups > 1 && std::max(plan.source_channels, plan.channels) <= most_channels(plan);
}

template <class T>
void planar_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                   T* destination) {
  using A = accumulate_t<T>;
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const Scratch<A> packed(plan.groups * plan.taps() * plan.source_channels * plan.channels);
  A* to = packed.data();  // [group][tap][source channel][channel]
  for (int64_t group = 0; group < plan.groups; ++group)
    for (const int64_t offset : offsets)
      for (int64_t source_channel = 0; source_channel < plan.source_channels; ++source_channel)
        for (int64_t channel = 0; channel < plan.channels; ++channel)
          *to++ = static_cast<A>(weight[group * layout.group + offset + source_channel * layout.source_step +
                                        channel * layout.channel_step]);

  const PlanarBlocks blocks(plan, sizeof(A));
  const int64_t work =
      blocks.places * blocks.together * plan.taps() * plan.source_channels * plan.channels / kMostLanes;
  const bool past_caches = goes_past_caches(destination, plan.batch * plan.destination.image * sizeof(T), 64);
  parallel_for(blocks.blocking.count * blocks.bundles, work, [&](int64_t begin, int64_t end) {
    const Scratch<A> sources(blocks.copied), sums(blocks.together * plan.channels * blocks.places);
    const Scratch<Run> runs(plan.taps());
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_at(plan, blocks.blocking, index / blocks.bundles, 0);
      MANUAL_OPS_FOR_ISA(planar_block(
          plan, block, planar_copy(plan, block), blocks.groups(plan, index % blocks.bundles), source, packed.data(),
          bias, destination, past_caches, sources.data(), sums.data(), blocks.places, runs.data()));
    }
  });
}

template <class T>
void planar_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                        T* grad_weight) {
  using A = accumulate_t<T>;
  const PlanarBlocks blocks(plan, sizeof(A));
  const int64_t taps = plan.taps(), values = plan.channels * plan.source_channels * taps;
  const int64_t parts = std::max<int64_t>(1, std::min(blocks.blocking.count, kParts / blocks.bundles));
  std::vector<A> sums(parts * plan.groups * values);
  const int64_t work = blocks.blocking.count / parts * blocks.places * blocks.together * values / kMostLanes;
  parallel_for(parts * blocks.bundles, work, [&](int64_t begin, int64_t end) {
    const Scratch<A> inputs(blocks.copied), grads(blocks.together * plan.channels * blocks.places);
    const Scratch<A> vectors(blocks.together * values * kMostLanes);
    const Scratch<Run> runs(plan.source_channels * taps);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t part = index / blocks.bundles;
      const Range groups = blocks.groups(plan, index % blocks.bundles);
      std::fill(vectors.data(), vectors.data() + groups.size() * values * kMostLanes, A(0));
      for (int64_t b = blocks.blocking.count * part / parts; b < blocks.blocking.count * (part + 1) / parts; ++b) {
        const Block block = block_at(plan, blocks.blocking, b, 0);
        MANUAL_OPS_FOR_ISA(planar_weight_grad_block(plan, block, planar_copy(plan, block), groups, input, grad_output,
                                                    vectors.data(), inputs.data(), grads.data(), blocks.places,
                                                    runs.data()));
      }
      MANUAL_OPS_FOR_ISA(add_lanes(vectors.data(), groups.size() * values,
                                   sums.data() + (part * plan.groups + groups.begin) * values));
    }
  });

  // A gradient is zero behind the last place of a row, where the input need not be: an infinity there has no part in
  // the result, but zero times it is no number. So where a result is none it is made again.
  bool finite = true;
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const A* from = sums.data();
  for (int64_t group = 0; group < plan.groups; ++group)
    for (int64_t channel = 0; channel < plan.channels; ++channel)
      for (int64_t source_channel = 0; source_channel < plan.source_channels; ++source_channel)
        for (const int64_t offset : offsets) {
          A sum = 0;
          for (int64_t part = 0; part < parts; ++part) sum += from[part * plan.groups * values];
          ++from;
          finite = finite && sum - sum == 0;
          grad_weight[group * layout.group + channel * layout.channel_step + source_channel * layout.source_step +
                      offset] = static_cast<T>(sum);
        }
  if (!finite) dense_weight_grad(plan, layout, input, grad_output, grad_weight);
}

#define INSTANTIATE(T)                                                                                  \
  template void planar_gather<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*); \
  template void planar_weight_grad<T>(const Gather&, const WeightLayout&, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
