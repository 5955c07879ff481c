// Convolution with windows of one tap over contiguous planes: forward and input gradient.
//
// Scratch memory: the weight once more, its rows filled up, and in each thread the sources of a strip of pixels, of
// kStripBytes or one panel.
#include "cpu/caches.h"
#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

#define MANUAL_OPS_KERNELS "cpu/convolution/pointwise_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// What the sources of a strip take: they stay in the L2 cache while all of the weight meets them.
constexpr int64_t kStripBytes = 256 << 10;
// So many strips at least for threads to share.
constexpr int64_t kLeastStrips = 16;
// The share of the values of a plane's vectors that exist, in percent, below which vectors of channels are better; and
// the channels up to which few rows make a tile, which planar.cpp serves.
constexpr int64_t kLeastFilled = 90, kFewChannels = kMostLanes / 2;

}  // namespace

bool pointwise_serves(const Gather& plan) {
  int64_t pixels = 1;
  for (const GatherAxis& axis : plan.axis) {
    if (axis.taps != 1 || axis.step != 1 || axis.phases != 1 || axis.offset[0] != 0 || axis.source != axis.destination)
      return false;
    pixels *= axis.source;
  }
  return plan.source.channel == pixels && plan.destination.channel == pixels && plan.source_channels > 0 &&
         plan.channels > kFewChannels && 100 * pixels >= kLeastFilled * kMostLanes * ceil_div(pixels, kMostLanes);
}

template <class T>
void pointwise_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                      T* destination) {
  const int64_t pixels = plan.source.channel;
  int64_t tiles, tile_values, panel_pixels, panel_values;
  MANUAL_OPS_FOR_ISA(pointwise_sizes<T>(plan, tiles, tile_values, panel_pixels, panel_values));
  const Scratch<T> packed(plan.groups * tiles * tile_values);
  parallel_for(plan.groups * tiles, tile_values, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      MANUAL_OPS_FOR_ISA(pack_pointwise(plan, layout, weight + index / tiles * layout.group, index % tiles,
                                        packed.data() + index * tile_values));
  });

  const int64_t panels = ceil_div(pixels, panel_pixels);
  int64_t together = std::max<int64_t>(1, kStripBytes / (panel_values * static_cast<int64_t>(sizeof(T))));
  while (together > 1 && plan.batch * plan.groups * ceil_div(panels, together) < kLeastStrips)
    together = ceil_div(together, 2);
  const int64_t strips = ceil_div(panels, together);
  const bool past_caches =
      goes_past_caches(destination, plan.batch * plan.destination.image * sizeof(T), pixels * sizeof(T));
  const int64_t work = together * panel_values * plan.channels / 16;
  parallel_for(plan.batch * plan.groups * strips, work, [&](int64_t begin, int64_t end) {
    const Scratch<T> sources(together * panel_values);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t strip = index % strips, group = index / strips % plan.groups;
      const int64_t image = index / strips / plan.groups, first = strip * together * panel_pixels;
      MANUAL_OPS_FOR_ISA(pointwise_strip(
          plan, source + image * plan.source.image + group * plan.source_channels * pixels,
          packed.data() + group * tiles * tile_values, bias == nullptr ? nullptr : bias + group * plan.channels,
          destination + image * plan.destination.image + group * plan.channels * pixels,
          {first, std::min(first + together * panel_pixels, pixels)}, past_caches, sources.data()));
    }
  });
}

#define INSTANTIATE(T) \
  template void pointwise_gather<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
#undef INSTANTIATE

}  // namespace manual_ops
