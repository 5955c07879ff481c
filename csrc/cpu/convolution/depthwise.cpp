// Depthwise convolution: every channel has a window of its own, so that there is nothing to multiply blocks of. Also
// groups of so few channels that a vector holds some of them, of channels_last tensors.
#include <utility>

#include "cpu/caches.h"
#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

namespace manual_ops {

// One tap, or some neighbours in a row of the window. `begin` .. `end` are the positions along the row, counted in
// sources (of one tap in destinations), at which it meets a source inside; that of position 0 is `source`.
struct DepthwiseTap {
  int64_t source, weight, begin, end;
  int64_t member;  // which channel of its group
};

// Element (z, y, x) of an operand lies at origin + z*depth + y*row + x*column. A packed one holds only the depths that
// are read, one after another.
struct Operand {
  int64_t origin, depth, row, column;
  bool packed;
};

// From destination to destination, and from tap to tap.
struct InputPitches {
  int64_t next_row, next_column, tap_row, tap_column, ahead_input, ahead_grad;
};

// What one unit of parallel work computes, and the sources that it reads.
struct DepthwisePart {
  int64_t image, depth, channel, channels;
  Range rows, columns, source_rows, source_columns;
};

}  // namespace manual_ops

#define MANUAL_OPS_KERNELS "cpu/convolution/depthwise_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// The copies of a part lie in the second-level cache, next to what is being read and written.
constexpr int64_t kCopyBytes = 256 * 1024;
// So many columns of a copy, and of a result.
constexpr int64_t kMostColumns = 512;
constexpr int64_t kLeastPixels = 56;
// At least so many parts, for threads to share, where there are as many images, channels and rows.
constexpr int64_t kLeastParts = 64;
// Weight gradients of channels_last tensors are summed in so many shares.
constexpr int64_t kShares = 16;

template <class A>
int64_t vector_lanes() {
  int64_t lanes = 0;
  MANUAL_OPS_FOR_ISA(vector_lanes<A>(&lanes));
  return lanes;
}

// Vectors of channels; the last overlaps the one before it where they do not divide the channels.
struct ChannelVectors {
  int64_t lanes, all, count;

  ChannelVectors(int64_t vector, int64_t channels)
      : lanes(std::min(vector, channels)), all(channels), count(ceil_div(channels, lanes)) {}
  int64_t first(int64_t index) const { return std::min(index * lanes, all - lanes); }
};

// How the planes of the destination are cut: nearly equal blocks of rows and columns.
struct PartList {
  int64_t images, depths, row_blocks, column_blocks;

  // Blocks whose copies, of `bytes` a pixel, fit into the cache, in parts enough for `vectors` vectors of channels.
  PartList(const Gather& plan, int64_t bytes, int64_t vectors) : PartList(plan) {
    const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
    column_blocks = ceil_div(width.destination, kMostColumns);
    const Range columns = reach(width, {0, ceil_div(width.destination, column_blocks)});
    int64_t rows = height.destination;
    const auto too_large = [&] {
      return reach(height, {0, rows}).size() * columns.size() * bytes > kCopyBytes ||
             images * depths * vectors * column_blocks * ceil_div(height.destination, rows) < kLeastParts;
    };
    while (rows > 8 && too_large()) rows = ceil_div(rows, 2);
    row_blocks = ceil_div(height.destination, rows);
  }

  // Whole rows, as few as sums in registers are worth their start for.
  explicit PartList(const Gather& plan) : images(plan.batch), depths(plan.axis[0].destination), column_blocks(1) {
    const int64_t rows = ceil_div(kLeastPixels, plan.axis[2].destination);
    row_blocks = ceil_div(plan.axis[1].destination, rows);
  }

  int64_t count() const { return images * depths * row_blocks * column_blocks; }

  DepthwisePart part(const Gather& plan, int64_t index, int64_t channel, int64_t channels) const {
    const GatherAxis &height = plan.axis[1], &width = plan.axis[2];
    const int64_t column = index % column_blocks, row = index / column_blocks % row_blocks;
    const int64_t plane = index / column_blocks / row_blocks;
    DepthwisePart part{.image = plane / depths, .depth = plane % depths, .channel = channel, .channels = channels};
    part.rows = {height.destination * row / row_blocks, height.destination * (row + 1) / row_blocks};
    part.columns = {width.destination * column / column_blocks, width.destination * (column + 1) / column_blocks};
    part.source_rows = clipped(reach(height, part.rows), height.source);
    part.source_columns = clipped(reach(width, part.columns), width.source);
    return part;
  }

  // The most sources and destinations of a part.
  std::pair<int64_t, int64_t> pixels(const Gather& plan) const {
    std::pair<int64_t, int64_t> most{0, 0};
    for (int64_t index = 0; index < row_blocks * column_blocks; ++index) {
      const DepthwisePart one = part(plan, index, 0, 0);
      most.first = std::max(most.first, one.source_rows.size() * one.source_columns.size());
      most.second = std::max(most.second, one.rows.size() * one.columns.size());
    }
    return most;
  }
};

int64_t copied_planes(const Gather& plan) { return std::min(plan.axis[0].taps, plan.axis[0].source); }

int64_t all_channels(const Gather& plan) { return plan.groups * plan.channels; }

// [tap][source channel of a group][channel], in the accumulation type and in the plan's order of taps; a vector may be
// read past the end.
template <class T>
std::vector<accumulate_t<T>> packed_weight(const Gather& plan, const WeightLayout& layout, const T* weight) {
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  std::vector<accumulate_t<T>> packed(plan.taps() * plan.source_channels * all_channels(plan) + kMostLanes);
  auto to = packed.begin();
  for (const int64_t offset : offsets)
    for (int64_t source_channel = 0; source_channel < plan.source_channels; ++source_channel)
      for (int64_t group = 0; group < plan.groups; ++group)
        for (int64_t channel = 0; channel < plan.channels; ++channel)
          *to++ = static_cast<accumulate_t<T>>(weight[group * layout.group + channel * layout.channel_step +
                                                      source_channel * layout.source_step + offset]);
  return packed;
}

// Channels_last tensors that need no conversion are read in place, vectors over their channels.
template <class T>
bool in_place(const Gather& plan, bool channels_last, int64_t lanes) {
  return std::is_same_v<T, accumulate_t<T>> && channels_last && all_channels(plan) >= lanes;
}

}  // namespace

template <class T>
bool depthwise_serves(const Gather& plan, bool channels_last) {
  if (plan.groups == 1 || plan.source_channels != plan.channels) return false;
  if (plan.channels == 1) return true;
  const int64_t lanes = vector_lanes<accumulate_t<T>>();
  return channels_last && plan.channels < lanes && lanes % plan.channels == 0 && all_channels(plan) >= lanes &&
         isa() != Isa::plain;  // which moves lanes one by one
}

template <class T>
void depthwise_gather(const Gather& plan, const WeightLayout& layout, bool channels_last, const T* source,
                      const T* weight, const T* bias, T* destination) {
  using A = accumulate_t<T>;
  const int64_t lanes = vector_lanes<A>(), taps = plan.taps() * plan.source_channels;
  const std::vector<A> packed = packed_weight(plan, layout, weight);
  std::vector<A> wide_bias(all_channels(plan) + kMostLanes);
  if (bias != nullptr)
    for (int64_t channel = 0; channel < all_channels(plan); ++channel)
      wide_bias[channel] = static_cast<A>(bias[channel]);
  const ChannelVectors vectors(lanes, all_channels(plan));
  const GatherAxis &height = plan.axis[1], &width = plan.axis[2];

  if constexpr (std::is_same_v<T, A>) {
    if (in_place<T>(plan, channels_last, lanes)) {
      const bool past_caches = goes_past_caches(destination, plan.batch * plan.destination.image * sizeof(A),
                                                all_channels(plan) * sizeof(A));
      parallel_for(plan.batch * plan.axis[0].destination * height.destination,
                   width.destination * all_channels(plan) * taps / 8, [&](int64_t begin, int64_t end) {
                     std::vector<DepthwiseTap> list(taps);
                     MANUAL_OPS_FOR_ISA(depthwise_rows(plan, begin, end, source, packed.data(), wide_bias.data(),
                                                       destination, past_caches, list.data()));
                   });
      return;
    }
  }
  const PartList parts(plan, copied_planes(plan) * lanes * sizeof(A), vectors.count);
  const auto [sources, destinations] = parts.pixels(plan);
  // Of the result so many rows at a time that they are turned back in whole squares.
  const int64_t columns = ceil_div(width.destination, parts.column_blocks);
  const int64_t result_rows = destinations <= kMostColumns ? height.destination : ceil_div(lanes, columns);
  parallel_for(parts.count() * vectors.count, destinations * taps / 4, [&](int64_t begin, int64_t end) {
    const Scratch<A> copy(copied_planes(plan) * sources * lanes), result(result_rows * columns * lanes);
    std::fill(copy.data(), copy.data() + copied_planes(plan) * sources * lanes, A(0));
    std::vector<DepthwiseTap> list(taps);
    for (int64_t item = begin; item < end; ++item) {
      const DepthwisePart part =
          parts.part(plan, item / vectors.count, vectors.first(item % vectors.count), vectors.lanes);
      MANUAL_OPS_FOR_ISA(depthwise_part(plan, part, source, packed.data(), wide_bias.data(), destination, copy.data(),
                                        result.data(), result_rows, list.data()));
    }
  });
}

template <class T>
void depthwise_weight_grad(const Gather& plan, const WeightLayout& layout, bool channels_last, const T* input,
                           const T* grad_output, T* grad_weight) {
  using A = accumulate_t<T>;
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const int64_t lanes = vector_lanes<A>(), taps = plan.taps() * plan.channels;
  const ChannelVectors vectors(lanes, all_channels(plan));
  // Channels of groups are read again and again: from a copy, in which a vector's do not lie powers of two apart.
  const bool direct = in_place<T>(plan, channels_last, lanes) && plan.channels == 1;
  const PartList parts =
      direct ? PartList(plan) : PartList(plan, copied_planes(plan) * lanes * sizeof(A), vectors.count);
  const auto [sources, destinations] = parts.pixels(plan);
  const int64_t columns = ceil_div(plan.axis[2].destination, parts.column_blocks);
  // The parts are summed in shares, whose sums are added in their order: threads do not show in the bits. Of
  // channels_last tensors all channels of a share are one item of work, so that rows are read from end to end.
  const int64_t together = channels_last ? vectors.count : 1;
  const int64_t shares = std::min(parts.count(), channels_last ? kShares : ceil_div(kLeastParts, vectors.count));
  std::vector<A> sums(shares * vectors.count * taps * lanes);
  const int64_t work = parts.count() / shares * destinations * together * taps / 4;
  parallel_for(shares * vectors.count / together, work, [&](int64_t begin, int64_t end) {
    const int64_t copied = direct ? 0 : copied_planes(plan) * sources * lanes;
    const Scratch<A> copy(copied), grad(direct ? 0 : destinations * lanes);
    std::fill(copy.data(), copy.data() + copied, A(0));
    if (!direct) std::fill(grad.data(), grad.data() + destinations * lanes, A(0));
    std::vector<uint8_t> inside(columns);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t share = item * together / vectors.count, first = item * together % vectors.count;
      for (int64_t index = parts.count() * share / shares; index < parts.count() * (share + 1) / shares; ++index)
        for (int64_t vector = first; vector < first + together; ++vector)
          MANUAL_OPS_FOR_ISA(depthwise_weight_grad_part(
              plan, parts.part(plan, index, vectors.first(vector), vectors.lanes), direct, input, grad_output,
              sums.data() + (share * vectors.count + vector) * taps * lanes, copy.data(), grad.data(), inside.data()));
    }
  });
  // [share][vector][channel of the output in its group][tap][lane, a channel of the input]
  for (int64_t channel = 0; channel < all_channels(plan); ++channel) {
    const int64_t vector = channel / vectors.lanes, lane = channel - vectors.first(vector);
    T* to = grad_weight + channel / plan.channels * layout.group + channel % plan.channels * layout.source_step;
    for (int64_t member = 0; member < plan.channels; ++member)
      for (int64_t tap = 0; tap < plan.taps(); ++tap) {
        A sum = 0;
        for (int64_t share = 0; share < shares; ++share)
          sum += sums[((share * vectors.count + vector) * taps + member * plan.taps() + tap) * lanes + lane];
        to[member * layout.channel_step + offsets[tap]] = static_cast<T>(sum);
      }
  }
}

#define INSTANTIATE(T)                                                                                           \
  template bool depthwise_serves<T>(const Gather&, bool);                                                        \
  template void depthwise_gather<T>(const Gather&, const WeightLayout&, bool, const T*, const T*, const T*, T*); \
  template void depthwise_weight_grad<T>(const Gather&, const WeightLayout&, bool, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
