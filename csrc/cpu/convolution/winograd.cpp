// Convolution with windows of 3 x 3 taps at stride 1 by Winograd's F(4x4, 3x3); any taps along the depth.
//
// Each pass takes both of its operands to 36 points, multiplies there, and takes the products back. Where a result is
// not finite, because an operand is not or because a value at a point has no place in the type, it is made again
// directly: so an infinity meets the outputs that a direct convolution gives it, and no others.
//
// Scratch memory: up to kWeightBytes for the weight at its points, and in each thread what a block of patches takes, no
// more than that or than kLeastPatches patches. Of few patches, up to kWeightBytes for all of them at their points, and
// in each thread what kChannelsAtOnce channels of a panel of the weight take, and the products of one panel. Where
// threads have groups of their own, each has all this for one of them.
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
constexpr int64_t kLeastWinogradPatches = 4, kLeastPatchPixels = 8;
// The same where a direct convolution would multiply pairs of bfloat16, twice as many values at a time.
constexpr int64_t kLeastOverPairs = 12, kLeastPixelsOverPairs = 13;
// A weight at its points is four times as large as in memory. So many bytes of it exist at a time.
constexpr int64_t kWeightBytes = 16 << 20;
// So many patches are few: then a large weight is not kept at its points, which would take longer to write and to read
// again than to multiply. Each thread takes a panel there by some channels at a time, and multiplies with all patches.
constexpr int64_t kFewPatches = 128;
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
  int64_t depth(int64_t block) const { return block / per_depth; }
  Range strips(int64_t block) const {
    const int64_t index = block % per_depth;
    return {patches.strips * index / per_depth, patches.strips * (index + 1) / per_depth};
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

  // Whether there are few patches for such a weight, `values` of one patch being kept at their points.
  bool of_few(const Gather& plan, int64_t values) const {
    const int64_t patches = count_patches(plan);
    return plan.axis[0].destination == 1 && patches <= kFewPatches && count * bytes() > kGatherBytes &&
           patches * kPoints * values * static_cast<int64_t>(sizeof(A)) <= kWeightBytes;
  }
};

// What kChannelsAtOnce channels of a panel take at their points, from one point to the next.
template <class A>
int64_t part_of_panel(const PanelSizes<A>& panels) {
  return kChannelsAtOnce * panels.width + 64 / static_cast<int64_t>(sizeof(A));
}

// body(channels) for all source channels, kChannelsAtOnce at a time.
template <class Body>
void for_channels(const Gather& plan, const Body& body) {
  for (int64_t first = 0; first < plan.source_channels; first += kChannelsAtOnce)
    body(Range{first, std::min(first + kChannelsAtOnce, plan.source_channels)});
}

// The sources under some strips of a block to their points, for each tap along the depth that meets a plane. `sources`
// are those of the whole block, `step` from point to point.
template <class T>
void sources_to_points(const Gather& plan, const PatchBlocks& blocks, int64_t block, Range some, const T* group_source,
                       accumulate_t<T>* sources, int64_t step, accumulate_t<T>* pixels) {
  using A = accumulate_t<T>;
  A* to = sources + blocks.patches.count({blocks.strips(block).begin, some.begin}) * plan.source_channels;
  for (const auto& [tap, plane] : depth_taps(plan.axis[0], blocks.depth(block))) {
    MANUAL_OPS_FOR_ISA(winograd_sources(plan, blocks.patches, some, plane, group_source,
                                        AtPoints<A>{to, plan.source_channels, step}, pixels));
    to += kPoints * step;
  }
}

// body(group) for all groups, on several threads where that keeps them all at work; else body does that itself.
template <class Body>
void for_groups(const Gather& plan, const Body& body) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) body(group);
  };
  if (plan.groups < torch::stable::get_num_threads()) return some(0, plan.groups);
  parallel_for(plan.groups, count_patches(plan) * plan.source_channels * plan.channels, some);
}

// A call of forward or input gradient.
template <class T>
class WinogradGather {
 public:
  using A = accumulate_t<T>;

  WinogradGather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                 T* destination)
      : plan_(plan),
        layout_(layout),
        source_(source),
        weight_(weight),
        bias_(bias),
        destination_(destination),
        offsets_(tap_offsets(plan, layout.window)),
        panels_(plan),
        few_(panels_.of_few(plan, plan.axis[0].taps * plan.source_channels)),
        at_once_(few_ ? 1 : panels_.at_once()),
        blocks_(plan, few_ ? kFewPatches : patches_of_block()),
        block_count_(plan.axis[0].destination * blocks_.per_depth),
        source_step_(blocks_.largest * plan.source_channels + kLine),
        product_step_(blocks_.largest * at_once_ * panels_.width + kLine),
        padded_bias_(padded_bias(plan, bias, panels_.count * panels_.width)),
        redo_(plan.groups * panels_.count * plan.axis[0].destination * blocks_.patches.strips) {}

  void run() {
    for_groups(plan_, [&](int64_t group) {
      if (few_) return of_few_patches(group);
      for (int64_t first = 0; first < panels_.count; first += at_once_)
        of_panels(group, {first, std::min(first + at_once_, panels_.count)});
    });
    const std::vector<Block> redone = not_finite();
    if (!redone.empty()) dense_gather_blocks(plan_, layout_, source_, weight_, bias_, destination_, redone);
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);

  int64_t patches_of_block() const {
    const int64_t channels = plan_.axis[0].taps * plan_.source_channels + at_once_ * panels_.width;
    const int64_t most = patches_for(std::max(kGatherBytes, at_once_ * panels_.bytes()),
                                     kPoints * channels * static_cast<int64_t>(sizeof(A)));
    const int64_t shared = count_patches(plan_) / kBlocks;
    return shared < kLeastPatches ? most : std::min(most, shared);
  }
  int64_t source_values() const { return plan_.axis[0].taps * kPoints * source_step_; }
  int64_t product_values() const { return kPoints * product_step_; }
  int64_t pixel_values() const {
    return std::max(blocks_.pixels(2) * plan_.source_channels, blocks_.pixels(0) * at_once_ * panels_.width);
  }
  auto taps(int64_t block) const { return depth_taps(plan_.axis[0], blocks_.depth(block)); }

  // The patches of some strips of a block.
  void to_points(int64_t group, int64_t block, Range some, A* sources, A* pixels) const {
    sources_to_points(plan_, blocks_, block, some, source_ + group * plan_.source_channels * plan_.source.channel,
                      sources, source_step_, pixels);
  }

  // A block's outputs, of some panels, from their points.
  void points_to_outputs(int64_t group, int64_t block, Range some, const A* products, A* pixels) {
    const int64_t depth = blocks_.depth(block), channel = some.begin * panels_.width;
    MANUAL_OPS_FOR_ISA(
        winograd_outputs(plan_, blocks_.patches, blocks_.strips(block), depth,
                         AtPoints<const A>{products, some.size() * panels_.width, product_step_},
                         std::min(plan_.channels, some.end * panels_.width) - channel,
                         padded_bias_.data() + group * panels_.count * panels_.width + channel,
                         destination_ + (group * plan_.channels + channel) * plan_.destination.channel, pixels,
                         redo_.data() + ((group * panels_.count + some.begin) * plan_.axis[0].destination + depth) *
                                            blocks_.patches.strips));
  }

  // All patches at their points in memory, the weight only as long as it is multiplied.
  void of_few_patches(int64_t group) {
    constexpr int64_t kBlock = 0;
    const Scratch<A> sources(source_values());
    const int64_t patches = blocks_.largest, strip_count = blocks_.strips(kBlock).size();
    const int64_t strip_work = 16 * kPoints * patches / strip_count * plan_.source_channels;
    parallel_for(strip_count, strip_work, [&](int64_t begin, int64_t end) {
      const Scratch<A> pixels(pixel_values());
      to_points(group, kBlock, {begin, end}, sources.data(), pixels.data());
    });
    const auto met = taps(kBlock);
    const int64_t step = part_of_panel(panels_);
    parallel_for(panels_.count, patches * panels_.values, [&](int64_t begin, int64_t end) {
      const Scratch<A> points(kPoints * step), window(kTaps * kChannelsAtOnce * panels_.width);
      const Scratch<A> products(product_values()), pixels(pixel_values());
      for (int64_t panel = begin; panel < end; ++panel) {
        bool accumulate = false;
        for (size_t index = 0; index < met.size(); ++index)
          for_channels(plan_, [&](Range channels) {
            MANUAL_OPS_FOR_ISA(winograd_weight(plan_, layout_, weight_ + group * layout_.group,
                                               offsets_.data() + met[index].first * kTaps, panel, channels,
                                               points.data(), step, window.data()));
            const A* from = sources.data() + index * kPoints * source_step_;
            const Run run{0, 0};
            MANUAL_OPS_FOR_ISA(winograd_products(plan_, AtPoints<const A>{from, plan_.source_channels, source_step_},
                                                 channels, patches, &run, 1, points.data(), step, {panel, panel + 1},
                                                 AtPoints<A>{products.data(), panels_.width, product_step_},
                                                 accumulate));
            accumulate = true;
          });
        if (!accumulate) std::fill_n(products.data(), product_values(), A(0));
        points_to_outputs(group, kBlock, {panel, panel + 1}, products.data(), pixels.data());
      }
    });
  }

  // A block's outputs of some of the panels whose weight is at its points.
  void multiply(int64_t group, int64_t block, const A* points, int64_t first, Range some, const A* sources, A* products,
                A* pixels) {
    std::vector<Run> runs;
    for (const auto& [tap, plane] : taps(block))
      runs.push_back({static_cast<int64_t>(runs.size()) * kPoints * source_step_, tap * kPoints * panels_.step});
    MANUAL_OPS_FOR_ISA(winograd_products(plan_, AtPoints<const A>{sources, plan_.source_channels, source_step_},
                                         {0, plan_.source_channels}, blocks_.patches.count(blocks_.strips(block)),
                                         runs.data(), static_cast<int64_t>(runs.size()),
                                         points + (some.begin - first) * panels_.values, panels_.step, some,
                                         AtPoints<A>{products, some.size() * panels_.width, product_step_}, false));
    points_to_outputs(group, block, some, products, pixels);
  }

  // The outputs of panels whose weight is taken to its points before.
  void of_panels(int64_t group, Range some) {
    const Scratch<A> points(some.size() * panels_.values);
    const int64_t depth_tap_count = plan_.axis[0].taps;
    parallel_for(some.size() * depth_tap_count, 4 * panels_.step * kTaps, [&](int64_t begin, int64_t end) {
      const Scratch<A> window(kTaps * kChannelsAtOnce * panels_.width);
      for (int64_t index = begin; index < end; ++index)
        MANUAL_OPS_FOR_ISA(winograd_weight(
            plan_, layout_, weight_ + group * layout_.group, offsets_.data() + index % depth_tap_count * kTaps,
            some.begin + index / depth_tap_count, {0, plan_.source_channels},
            points.data() + index * kPoints * panels_.step, panels_.step, window.data()));
    });

    const int64_t block_work = blocks_.largest * plan_.source_channels * depth_tap_count * some.size() * panels_.width;
    // Where a few blocks are all, the panels are shared too.
    const int64_t shares = block_count_ > kBlocks / 2 ? 1 : std::min(some.size(), ceil_div(kBlocks, block_count_));
    if (shares == 1) {
      parallel_for(block_count_, block_work, [&](int64_t begin, int64_t end) {
        const Scratch<A> sources(source_values()), products(product_values()), pixels(pixel_values());
        for (int64_t block = begin; block < end; ++block) {
          to_points(group, block, blocks_.strips(block), sources.data(), pixels.data());
          multiply(group, block, points.data(), some.begin, some, sources.data(), products.data(), pixels.data());
        }
      });
      return;
    }
    const Scratch<A> sources(source_values());
    for (int64_t block = 0; block < block_count_; ++block) {
      const Range all = blocks_.strips(block);
      parallel_for(all.size(), block_work / some.size() / all.size(), [&](int64_t begin, int64_t end) {
        const Scratch<A> pixels(pixel_values());
        to_points(group, block, {all.begin + begin, all.begin + end}, sources.data(), pixels.data());
      });
      parallel_for(shares, block_work / shares, [&](int64_t begin, int64_t end) {
        const Scratch<A> products(product_values()), pixels(pixel_values());
        multiply(group, block, points.data(), some.begin,
                 {some.begin + some.size() * begin / shares, some.begin + some.size() * end / shares}, sources.data(),
                 products.data(), pixels.data());
      });
    }
  }

  // The strips with an output that is not finite.
  std::vector<Block> not_finite() const {
    std::vector<Block> blocks;
    const Patches& patches = blocks_.patches;
    const int64_t strip_count = plan_.axis[0].destination * patches.strips;
    for (int64_t group = 0; group < plan_.groups; ++group)
      for (int64_t strip = 0; strip < strip_count; ++strip) {
        bool found = false;
        for (int64_t panel = 0; panel < panels_.count; ++panel)
          found = found || redo_[(group * panels_.count + panel) * strip_count + strip];
        if (!found) continue;
        const int64_t first = strip % patches.strips;
        const Patches::Stack stack = patches.stack_at({first, first + 1});
        blocks.push_back(
            {stack.image, group, strip / patches.strips,
             clipped({stack.rows.begin * kPatch, stack.rows.end * kPatch}, plan_.axis[1].destination),
             clipped({stack.columns.begin * kPatch, stack.columns.end * kPatch}, plan_.axis[2].destination)});
      }
    return blocks;
  }

  const Gather& plan_;
  const WeightLayout& layout_;
  const T *source_, *weight_, *bias_;
  T* destination_;
  const std::vector<int64_t> offsets_;
  const PanelSizes<A> panels_;
  const bool few_;
  const int64_t at_once_;  // panels whose outputs are made together
  const PatchBlocks blocks_;
  const int64_t block_count_, source_step_, product_step_;
  const std::vector<A> padded_bias_;
  std::vector<uint8_t> redo_;  // [group][panel][depth][strip]
};

// A call of the weight gradient; the plan is forward's.
template <class T>
class WinogradWeightGrad {
 public:
  using A = accumulate_t<T>;

  WinogradWeightGrad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                     T* grad_weight)
      : plan_(plan),
        layout_(layout),
        input_(input),
        grad_output_(grad_output),
        grad_weight_(grad_weight),
        offsets_(tap_offsets(plan, layout.window)),
        panels_(plan),
        few_(panels_.of_few(plan, plan.axis[0].taps * plan.source_channels + panels_.count * panels_.width)),
        at_once_(few_ ? panels_.count : panels_.at_once()),
        pitch_(at_once_ * panels_.width),
        blocks_(plan, few_ ? kFewPatches : patches_of_block()),
        source_step_(blocks_.largest * plan.source_channels + kLine),
        grad_step_(blocks_.largest * pitch_ + kLine) {}

  // Whether all values are finite.
  bool run() const {
    std::vector<uint8_t> finite(plan_.groups, 1);
    for_groups(plan_, [&](int64_t group) {
      if (few_) {
        finite[group] = of_few_patches(group);
        return;
      }
      for (int64_t first = 0; first < panels_.count && finite[group]; first += at_once_)
        finite[group] = of_panels(group, {first, std::min(first + at_once_, panels_.count)});
    });
    return std::find(finite.begin(), finite.end(), 0) == finite.end();
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);

  int64_t patches_of_block() const {
    const int64_t channels = plan_.axis[0].taps * plan_.source_channels + pitch_;
    return patches_for(std::max(kWeightGradBytes, at_once_ * panels_.bytes()),
                       kPoints * channels * static_cast<int64_t>(sizeof(A)));
  }
  int64_t source_values() const { return plan_.axis[0].taps * kPoints * source_step_; }
  int64_t grad_values() const { return kPoints * grad_step_; }

  // A block's sources, and its gradients of some panels, to their points.
  void to_points(int64_t group, int64_t block, Range some, A* sources, A* grads) const {
    const int64_t depth = blocks_.depth(block), channel = some.begin * panels_.width;
    const Range all = blocks_.strips(block);
    const int64_t channels = std::min(plan_.channels, some.end * panels_.width) - channel;
    const T* input = input_ + group * plan_.source_channels * plan_.source.channel;
    const T* grad = grad_output_ + (group * plan_.channels + channel) * plan_.destination.channel;
    const int64_t strip_work =
        16 * kPoints * blocks_.patches.count(all) / all.size() * (plan_.source_channels + channels);
    parallel_for(all.size(), strip_work, [&](int64_t begin, int64_t end) {
      const Scratch<A> pixels(std::max(blocks_.pixels(2) * plan_.source_channels, blocks_.pixels(0) * pitch_));
      const Range own{all.begin + begin, all.begin + end};
      sources_to_points(plan_, blocks_, block, own, input, sources, source_step_, pixels.data());
      const int64_t before = blocks_.patches.count({all.begin, own.begin});
      MANUAL_OPS_FOR_ISA(winograd_grads(plan_, blocks_.patches, own, depth, grad, channels,
                                        AtPoints<A>{grads + before * pitch_, pitch_, grad_step_}, pixels.data()));
    });
  }

  // The weight gradient of one tap along the depth, of a panel and some channels, from the sum of parts.
  bool from_points(int64_t group, int64_t tap, int64_t panel, Range channels, const A* sums, int64_t step,
                   int64_t parts, int64_t part_step, A* window) const {
    bool finite = true;
    MANUAL_OPS_FOR_ISA(winograd_weight_grad(plan_, layout_, sums, step, parts, part_step, offsets_.data() + tap * kTaps,
                                            panel, channels, grad_weight_ + group * layout_.group, window, finite));
    return finite;
  }

  // All patches at their points in memory, the sums only as long as they are made.
  bool of_few_patches(int64_t group) const {
    constexpr int64_t kBlock = 0;
    const Scratch<A> sources(source_values()), grads(grad_values());
    to_points(group, kBlock, {0, panels_.count}, sources.data(), grads.data());
    const auto met = depth_taps(plan_.axis[0], kBlock);
    const int64_t taps = plan_.axis[0].taps, patches = blocks_.largest, step = part_of_panel(panels_);
    std::vector<uint8_t> finite(panels_.count * taps, 1);
    parallel_for(panels_.count * taps, patches * panels_.step * kPoints, [&](int64_t begin, int64_t end) {
      const Scratch<A> sums(kPoints * step), window(kTaps * kChannelsAtOnce * panels_.width);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t panel = index / taps, tap = index % taps;
        // A tap that meets no source has no patches to sum.
        const auto place = std::find_if(met.begin(), met.end(), [&](const auto& one) { return one.first == tap; });
        const int64_t count = place == met.end() ? 0 : patches, which = count == 0 ? 0 : place - met.begin();
        const A* from = sources.data() + which * kPoints * source_step_;
        for_channels(plan_, [&](Range channels) {
          for (int64_t point = 0; point < kPoints; ++point)
            MANUAL_OPS_FOR_ISA(winograd_weight_sums(plan_, AtPoints<const A>{from, plan_.source_channels, source_step_},
                                                    channels, AtPoints<const A>{grads.data(), pitch_, grad_step_},
                                                    panel * panels_.width, count, point, panel,
                                                    sums.data() + point * step, false));
          if (!from_points(group, tap, panel, channels, sums.data(), step, 1, 0, window.data())) finite[index] = 0;
        });
      }
    });
    return std::find(finite.begin(), finite.end(), 0) == finite.end();
  }

  // Some panels, summed block by block in parts of their own.
  bool of_panels(int64_t group, Range some) const {
    const int64_t depth_tap_count = plan_.axis[0].taps, count = some.size();
    const int64_t block_count = plan_.axis[0].destination * blocks_.per_depth;
    const int64_t affordable = kWeightBytes / (at_once_ * panels_.bytes());
    const int64_t parts = std::max<int64_t>(1, std::min({kParts, block_count / kPartBlocks, affordable}));
    const int64_t part_step = at_once_ * panels_.values;
    const Scratch<A> sums(parts * part_step);
    // Both loops over what a block has run on several threads where there is only one part.
    const auto add_block = [&](int64_t block, A* sources, A* grads, A* part) {
      to_points(group, block, some, sources, grads);
      const int64_t patches = blocks_.patches.count(blocks_.strips(block));
      const auto taps = depth_taps(plan_.axis[0], blocks_.depth(block));
      const int64_t tap_count = static_cast<int64_t>(taps.size());
      parallel_for(tap_count * count * kPoints, patches * panels_.step / 16, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t panel = index % count, point = index / count % kPoints, which = index / count / kPoints;
          const A* from = sources + which * kPoints * source_step_;
          MANUAL_OPS_FOR_ISA(winograd_weight_sums(
              plan_, AtPoints<const A>{from, plan_.source_channels, source_step_}, {0, plan_.source_channels},
              AtPoints<const A>{grads, pitch_, grad_step_}, panel * panels_.width, patches, point, some.begin + panel,
              part + panel * panels_.values + (taps[which].first * kPoints + point) * panels_.step, true));
        }
      });
    };
    const int64_t part_work = block_count / parts * blocks_.largest * panels_.step * count;
    parallel_for(parts, part_work, [&](int64_t begin, int64_t end) {
      const Scratch<A> sources(source_values()), grads(grad_values());
      std::fill_n(sums.data() + begin * part_step, (end - begin) * part_step, A(0));
      for (int64_t part = begin; part < end; ++part)
        for (int64_t block = block_count * part / parts; block < block_count * (part + 1) / parts; ++block)
          add_block(block, sources.data(), grads.data(), sums.data() + part * part_step);
    });

    std::vector<uint8_t> finite(count * depth_tap_count, 1);
    parallel_for(count * depth_tap_count, 4 * panels_.step * kTaps, [&](int64_t begin, int64_t end) {
      const Scratch<A> window(kTaps * kChannelsAtOnce * panels_.width);
      for (int64_t index = begin; index < end; ++index)
        finite[index] = from_points(group, index % depth_tap_count, some.begin + index / depth_tap_count,
                                    {0, plan_.source_channels}, sums.data() + index * kPoints * panels_.step,
                                    panels_.step, parts, part_step, window.data());
    });
    return std::find(finite.begin(), finite.end(), 0) == finite.end();
  }

  const Gather& plan_;
  const WeightLayout& layout_;
  const T *input_, *grad_output_;
  T* grad_weight_;
  const std::vector<int64_t> offsets_;
  const PanelSizes<A> panels_;
  const bool few_;
  const int64_t at_once_;  // panels whose gradients are at their points together
  const int64_t pitch_;    // columns of these
  const PatchBlocks blocks_;
  const int64_t source_step_, grad_step_;
};

}  // namespace

template <class T>
bool winograd_serves(const Gather& plan, bool weight_grad) {
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
  if (plan.source_channels < kLeastWinogradChannels || plan.channels < kLeastWinogradChannels) return false;
  if (std::is_same_v<T, BFloat16> && multiplies_bfloat16() && plan.source_channels % 2 == 0) {
    // Ahead of pairs are weight gradients, whose pairs would have to be made first; patches that are nearly full; and
    // few, under a weight that stays in the cache.
    const bool full = pixels >= kLeastPixelsOverPairs * patches, few = patches <= kFewPatches;
    if (patches < kLeastOverPairs || !(weight_grad || full || few)) return false;
  }
  return patches >= kLeastWinogradPatches && pixels >= kLeastPatchPixels * patches;
}

template <class T>
void winograd_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                     T* destination) {
  WinogradGather<T>(plan, layout, source, weight, bias, destination).run();
}

template <class T>
void winograd_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                          T* grad_weight) {
  if (!WinogradWeightGrad<T>(plan, layout, input, grad_output, grad_weight).run())
    dense_weight_grad(plan, layout, input, grad_output, grad_weight);
}

#define INSTANTIATE(T)                                                                                    \
  template bool winograd_serves<T>(const Gather&, bool);                                                  \
  template void winograd_gather<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*); \
  template void winograd_weight_grad<T>(const Gather&, const WeightLayout&, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
