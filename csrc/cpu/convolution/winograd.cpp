// Convolution with windows of 3 x 3 taps at stride 1 by Winograd's F(4x4, 3x3); any taps along the depth.
//
// Each pass takes both of its operands to 36 points, multiplies there, and takes the products back. Where a result is
// not finite, because an operand is not or because a value at a point has no place in the type, it is made again
// directly: so an infinity meets the outputs that a direct convolution gives it, and no others.
//
// Scratch memory: up to kWeightBytes for the weight at its points, and in each thread what a block of patches takes, no
// more than that or than kLeastPatches patches.
#include "cpu/convolution/winograd.h"

#include <utility>

#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

#define MANUAL_OPS_KERNELS "cpu/convolution/winograd_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// The least channels on either side for which the fewer products pay for the way to the points and back.
constexpr int64_t kLeastWinogradChannels = 16;
// The same of the patches, since each call takes the weight there, and of the pixels of a patch that exist.
constexpr int64_t kLeastWinogradPatches = 12, kLeastPatchPixels = 8;
// A weight at its points is four times as large as in memory. So many bytes of it exist at a time.
constexpr int64_t kWeightBytes = 16 << 20;
// What a block's patches take at their points: as much as the weight, which each block reads once, and at least this.
constexpr int64_t kGatherBytes = 768 << 10, kWeightGradBytes = 2 << 20;
constexpr int64_t kLeastPatches = 28, kMostPatches = 512;
// So many blocks for threads to share, where that leaves enough patches to each.
constexpr int64_t kBlocks = 8;
// A weight gradient is summed in at most so many parts, each of at least so many blocks.
constexpr int64_t kParts = 8, kPartBlocks = 4;

int64_t count_patches(const Gather& plan) {
  return plan.batch * plan.axis[0].destination * ceil_div(plan.axis[1].destination, kPatch) *
         ceil_div(plan.axis[2].destination, kPatch);
}

// The patches of a convolution in blocks of one depth, of at most `most` patches where a strip has no more.
struct PatchBlocks {
  Patches patches;
  int64_t per_depth;             // blocks
  int64_t most_strips, largest;  // strips and patches of the largest block

  PatchBlocks(const Gather& plan, int64_t most) {
    patches.rows = ceil_div(plan.axis[1].destination, kPatch);
    patches.columns = ceil_div(plan.axis[2].destination, kPatch);
    patches.parts = ceil_div(patches.columns, most);
    patches.strips = plan.batch * patches.parts * patches.rows;
    patches.widest = ceil_div(patches.columns, patches.parts);
    per_depth = ceil_div(patches.strips, std::max<int64_t>(1, most / patches.widest));
    most_strips = ceil_div(patches.strips, per_depth);
    largest = most_strips * patches.widest;
  }
  Range strips(int64_t block) const {
    return {patches.strips * block / per_depth, patches.strips * (block + 1) / per_depth};
  }
  // Pixels of the largest stack, with `around` more on each axis.
  int64_t pixels(int64_t around) const {
    return (std::min(patches.rows, most_strips) * kPatch + around) * (patches.widest * kPatch + around);
  }
};

int64_t patches_for(int64_t bytes, int64_t bytes_of_patch) {
  return std::clamp<int64_t>(bytes / bytes_of_patch, kLeastPatches, kMostPatches);
}

// The taps along the depth that meet a plane of the source, for the destinations at `position` of an axis: their
// numbers, and the planes.
std::vector<std::pair<int64_t, int64_t>> depth_taps(const GatherAxis& depth, int64_t destination) {
  const int64_t phase = destination % depth.phases, position = destination / depth.phases * depth.step;
  std::vector<std::pair<int64_t, int64_t>> taps;
  for (int64_t tap = depth.first[phase]; tap < depth.first[phase + 1]; ++tap) {
    const int64_t plane = position + depth.offset[tap];
    if (plane >= 0 && plane < depth.source) taps.emplace_back(tap, plane);
  }
  return taps;
}

// What one panel of a group takes at its points.
template <class A>
struct PanelSizes {
  int64_t width, count;  // columns of one, panels of a group
  int64_t step, values;  // from point to point, and of one panel with all its points

  explicit PanelSizes(const Gather& plan) {
    MANUAL_OPS_FOR_ISA(panel_width<A>(plan.channels, width));
    count = ceil_div(plan.channels, width);
    step = plan.source_channels * width + 64 / static_cast<int64_t>(sizeof(A));
    values = plan.axis[0].taps * kPoints * step;
  }
  int64_t bytes() const { return values * static_cast<int64_t>(sizeof(A)); }
  int64_t at_once() const { return std::clamp<int64_t>(kWeightBytes / bytes(), 1, count); }
};

}  // namespace

bool winograd_serves(const Gather& plan) {
  for (int i = 1; i < kAxes; ++i) {
    const GatherAxis& axis = plan.axis[i];
    // As many destinations as windows inside a source padded by at most 2: every strip of patches meets the source.
    const bool fits = axis.taps == 3 && axis.phases == 1 && axis.step == 1 && axis.offset[0] >= -2 &&
                      axis.offset[0] <= 0 && axis.offset[2] == axis.offset[0] + 2 &&
                      axis.destination == axis.source - 2 * axis.offset[0] - 2;
    if (!fits) return false;
  }
  const int64_t patches = count_patches(plan);
  const int64_t pixels = plan.batch * plan.axis[0].destination * plan.axis[1].destination * plan.axis[2].destination;
  return plan.source_channels >= kLeastWinogradChannels && plan.channels >= kLeastWinogradChannels &&
         patches >= kLeastWinogradPatches && pixels >= kLeastPatchPixels * patches;
}

template <class T>
void winograd_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                     T* destination) {
  using A = accumulate_t<T>;
  constexpr int64_t kLine = 64 / sizeof(A);
  const PanelSizes<A> panels(plan);
  const int64_t at_once = panels.at_once(), depth_tap_count = plan.axis[0].taps;
  const int64_t channels = depth_tap_count * plan.source_channels + at_once * panels.width;
  const int64_t most = patches_for(std::max(kGatherBytes, at_once * panels.bytes()),
                                   kPoints * channels * static_cast<int64_t>(sizeof(A)));
  const int64_t shared = count_patches(plan) / kBlocks;
  const PatchBlocks blocks(plan, shared < kLeastPatches ? most : std::min(most, shared));
  const int64_t block_count = plan.axis[0].destination * blocks.per_depth;
  // Where a few blocks are all, the panels are shared too.
  const int64_t shares = block_count > kBlocks / 2 ? 1 : std::min(at_once, ceil_div(kBlocks, block_count));
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const int64_t source_step = blocks.largest * plan.source_channels + kLine;
  const int64_t product_step = blocks.largest * at_once * panels.width + kLine;
  const int64_t source_values = depth_tap_count * kPoints * source_step, product_values = kPoints * product_step;
  const int64_t pixel_values =
      std::max(blocks.pixels(2) * plan.source_channels, blocks.pixels(0) * at_once * panels.width);
  const Scratch<A> points(at_once * panels.values);
  std::vector<A> padded_bias(panels.count * panels.width);
  std::vector<Block> redone;

  for (int64_t group = 0; group < plan.groups; ++group) {
    std::vector<uint8_t> redo(panels.count * plan.axis[0].destination * blocks.patches.strips);
    if (bias != nullptr)
      for (int64_t channel = 0; channel < plan.channels; ++channel)
        padded_bias[channel] = static_cast<A>(bias[group * plan.channels + channel]);
    for (int64_t first = 0; first < panels.count; first += at_once) {
      const int64_t count = std::min(at_once, panels.count - first);
      parallel_for(count * depth_tap_count, 4 * panels.step * kTaps, [&](int64_t begin, int64_t end) {
        const Scratch<A> taps(kTaps * kChannelsAtOnce * panels.width);
        for (int64_t index = begin; index < end; ++index)
          MANUAL_OPS_FOR_ISA(winograd_weight(plan, layout, weight + group * layout.group,
                                             offsets.data() + index % depth_tap_count * kTaps,
                                             first + index / depth_tap_count,
                                             points.data() + index * kPoints * panels.step, panels.step, taps.data()));
      });

      // The patches of some strips of a block to their points.
      const auto transform = [&](int64_t block, Range strips, A* sources, A* pixels) {
        const auto taps = depth_taps(plan.axis[0], block / blocks.per_depth);
        const int64_t before = blocks.patches.count({blocks.strips(block % blocks.per_depth).begin, strips.begin});
        for (size_t index = 0; index < taps.size(); ++index) {
          A* to = sources + index * kPoints * source_step + before * plan.source_channels;
          MANUAL_OPS_FOR_ISA(winograd_sources(plan, blocks.patches, strips, taps[index].second,
                                              source + group * plan.source_channels * plan.source.channel,
                                              AtPoints<A>{to, plan.source_channels, source_step}, pixels));
        }
      };
      // A block's outputs of the panels from begin up to end.
      const auto multiply = [&](int64_t block, int64_t begin, int64_t end, const A* sources, A* products, A* pixels) {
        const int64_t depth = block / blocks.per_depth, pitch = (end - begin) * panels.width;
        const Range strips = blocks.strips(block % blocks.per_depth);
        std::vector<Run> runs;
        for (const auto& [tap, plane] : depth_taps(plan.axis[0], depth))
          runs.push_back({static_cast<int64_t>(runs.size()) * kPoints * source_step, tap * kPoints * panels.step});
        MANUAL_OPS_FOR_ISA(winograd_products(
            plan, AtPoints<const A>{sources, plan.source_channels, source_step}, blocks.patches.count(strips),
            runs.data(), static_cast<int64_t>(runs.size()), points.data() + (begin - first) * panels.values,
            panels.step, begin, end, AtPoints<A>{products, pitch, product_step}));
        const int64_t channel = begin * panels.width;
        MANUAL_OPS_FOR_ISA(
            winograd_outputs(plan, blocks.patches, strips, depth, AtPoints<const A>{products, pitch, product_step},
                             std::min(plan.channels, end * panels.width) - channel, padded_bias.data() + channel,
                             destination + (group * plan.channels + channel) * plan.destination.channel, pixels,
                             redo.data() + (begin * plan.axis[0].destination + depth) * blocks.patches.strips));
      };
      const int64_t block_work = blocks.largest * plan.source_channels * depth_tap_count * count * panels.width;
      if (shares == 1) {
        parallel_for(block_count, block_work, [&](int64_t begin, int64_t end) {
          const Scratch<A> sources(source_values), products(product_values), pixels(pixel_values);
          for (int64_t block = begin; block < end; ++block) {
            transform(block, blocks.strips(block % blocks.per_depth), sources.data(), pixels.data());
            multiply(block, first, first + count, sources.data(), products.data(), pixels.data());
          }
        });
        continue;
      }
      const Scratch<A> sources(source_values);
      for (int64_t block = 0; block < block_count; ++block) {
        const Range strips = blocks.strips(block % blocks.per_depth);
        parallel_for(strips.size(), block_work / count / strips.size(), [&](int64_t begin, int64_t end) {
          const Scratch<A> pixels(pixel_values);
          transform(block, {strips.begin + begin, strips.begin + end}, sources.data(), pixels.data());
        });
        parallel_for(shares, block_work / shares, [&](int64_t begin, int64_t end) {
          const Scratch<A> products(product_values), pixels(pixel_values);
          multiply(block, first + count * begin / shares, first + count * end / shares, sources.data(), products.data(),
                   pixels.data());
        });
      }
    }
    const int64_t strips = plan.axis[0].destination * blocks.patches.strips;
    for (int64_t strip = 0; strip < strips; ++strip) {
      bool found = false;
      for (int64_t panel = 0; panel < panels.count; ++panel) found = found || redo[panel * strips + strip];
      if (!found) continue;
      const int64_t depth = strip / blocks.patches.strips, first = strip % blocks.patches.strips;
      const Patches::Stack stack = blocks.patches.stack_at({first, first + 1});
      redone.push_back({stack.image, group, depth,
                        clipped({stack.rows.begin * kPatch, stack.rows.end * kPatch}, plan.axis[1].destination),
                        clipped({stack.columns.begin * kPatch, stack.columns.end * kPatch}, plan.axis[2].destination)});
    }
  }
  if (!redone.empty()) dense_gather_blocks(plan, layout, source, weight, bias, destination, redone);
}

template <class T>
void winograd_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                          T* grad_weight) {
  using A = accumulate_t<T>;
  constexpr int64_t kLine = 64 / sizeof(A);
  const PanelSizes<A> panels(plan);
  const int64_t at_once = panels.at_once(), depth_tap_count = plan.axis[0].taps, pitch = at_once * panels.width;
  const int64_t channels_of_patch = depth_tap_count * plan.source_channels + pitch;
  const PatchBlocks blocks(plan, patches_for(std::max(kWeightGradBytes, at_once * panels.bytes()),
                                             kPoints * channels_of_patch * static_cast<int64_t>(sizeof(A))));
  const int64_t source_step = blocks.largest * plan.source_channels + kLine, grad_step = blocks.largest * pitch + kLine;
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const int64_t block_count = plan.axis[0].destination * blocks.per_depth;
  const int64_t affordable = kWeightBytes / (at_once * panels.bytes());
  const int64_t parts = std::max<int64_t>(1, std::min({kParts, block_count / kPartBlocks, affordable}));
  const int64_t part_step = at_once * panels.values;
  const Scratch<A> sums(parts * part_step);

  for (int64_t group = 0; group < plan.groups; ++group)
    for (int64_t first = 0; first < panels.count; first += at_once) {
      const int64_t count = std::min(at_once, panels.count - first), channel = first * panels.width;
      const int64_t channels = std::min(plan.channels, (first + count) * panels.width) - channel;
      const T* group_input = input + group * plan.source_channels * plan.source.channel;
      const T* group_grad = grad_output + (group * plan.channels + channel) * plan.destination.channel;
      // Both loops over what a block has run on several threads where there is only one part.
      const auto add_block = [&](int64_t block, A* sources, A* grads, A* part) {
        const int64_t depth = block / blocks.per_depth;
        const Range strips = blocks.strips(block % blocks.per_depth);
        const auto taps = depth_taps(plan.axis[0], depth);
        const int64_t patches = blocks.patches.count(strips), tap_count = static_cast<int64_t>(taps.size());
        const int64_t strip_work = 16 * kPoints * patches / strips.size() * (plan.source_channels + channels);
        parallel_for(strips.size(), strip_work, [&](int64_t begin, int64_t end) {
          const Scratch<A> pixels(std::max(blocks.pixels(2) * plan.source_channels, blocks.pixels(0) * pitch));
          const Range some{strips.begin + begin, strips.begin + end};
          const int64_t before = blocks.patches.count({strips.begin, some.begin});
          for (int64_t index = 0; index < tap_count; ++index) {
            A* to = sources + index * kPoints * source_step + before * plan.source_channels;
            MANUAL_OPS_FOR_ISA(winograd_sources(plan, blocks.patches, some, taps[index].second, group_input,
                                                AtPoints<A>{to, plan.source_channels, source_step}, pixels.data()));
          }
          MANUAL_OPS_FOR_ISA(winograd_grads(plan, blocks.patches, some, depth, group_grad, channels,
                                            AtPoints<A>{grads + before * pitch, pitch, grad_step}, pixels.data()));
        });
        const int64_t product_work = patches * panels.step / 16;
        parallel_for(tap_count * count * kPoints, product_work, [&](int64_t begin, int64_t end) {
          for (int64_t index = begin; index < end; ++index) {
            const int64_t panel = index % count, point = index / count % kPoints, which = index / count / kPoints;
            MANUAL_OPS_FOR_ISA(winograd_weight_sums(
                plan, AtPoints<A>{sources + which * kPoints * source_step, plan.source_channels, source_step},
                AtPoints<A>{grads, pitch, grad_step}, patches, point, first + panel, first,
                part + panel * panels.values + (taps[which].first * kPoints + point) * panels.step));
          }
        });
      };
      const int64_t part_work = block_count / parts * blocks.largest * panels.step * count;
      parallel_for(parts, part_work, [&](int64_t begin, int64_t end) {
        const Scratch<A> sources(depth_tap_count * kPoints * source_step), grads(kPoints * grad_step);
        std::fill_n(sums.data() + begin * part_step, (end - begin) * part_step, A(0));
        for (int64_t part = begin; part < end; ++part)
          for (int64_t block = block_count * part / parts; block < block_count * (part + 1) / parts; ++block)
            add_block(block, sources.data(), grads.data(), sums.data() + part * part_step);
      });

      std::vector<uint8_t> finite(count * depth_tap_count, 1);
      parallel_for(count * depth_tap_count, 4 * panels.step * kTaps, [&](int64_t begin, int64_t end) {
        const Scratch<A> taps(kTaps * kChannelsAtOnce * panels.width);
        for (int64_t index = begin; index < end; ++index) {
          bool all = true;
          MANUAL_OPS_FOR_ISA(winograd_weight_grad(
              plan, layout, sums.data() + index * kPoints * panels.step, panels.step, parts, part_step,
              offsets.data() + index % depth_tap_count * kTaps, first + index / depth_tap_count,
              grad_weight + group * layout.group, taps.data(), all));
          finite[index] = all;
        }
      });
      if (std::find(finite.begin(), finite.end(), 0) != finite.end())
        return dense_weight_grad(plan, layout, input, grad_output, grad_weight);
    }
}

#define INSTANTIATE(T)                                                                                    \
  template void winograd_gather<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*); \
  template void winograd_weight_grad<T>(const Gather&, const WeightLayout&, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
