// Dense convolution to few channels.
#include <utility>

#include "cpu/convolution/convolution.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

#define MANUAL_OPS_KERNELS "cpu/convolution/planar_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

constexpr int64_t kMostLanes = 16;  // of any vector

// The share of vectors' lanes that hold something, in percent, where so many values are put into them.
int64_t filled(int64_t count) { return 100 * count / ((count + kMostLanes - 1) / kMostLanes * kMostLanes); }

}  // namespace

bool planar_serves(const Gather& plan) {
  const GatherAxis& width = plan.axis[2];
  const int64_t pixels = width.destination / width.phases;
  return plan.groups == 1 && plan.channels <= kMostLanes / 2 && filled(pixels) > filled(plan.channels);
}

template <class T>
void planar_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                   T* destination) {
  using A = accumulate_t<T>;
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const Scratch<A> packed(plan.taps() * plan.source_channels * plan.channels);
  A* to = packed.data();
  for (const int64_t offset : offsets)
    for (int64_t source_channel = 0; source_channel < plan.source_channels; ++source_channel)
      for (int64_t channel = 0; channel < plan.channels; ++channel)
        *to++ = static_cast<A>(weight[offset + source_channel * layout.source_step + channel * layout.channel_step]);

  Blocking blocking = choose_blocking(plan, false, 0, sizeof(A));
  blocking.source_channels = plan.source_channels;
  // A copied row is longer by a vector for each step.
  const int64_t rows = std::min(plan.axis[0].taps, plan.axis[0].source) * plan.axis[1].source;
  const int64_t copied =
      copied_values(plan, blocking) + rows * plan.axis[2].step * (kMostLanes + 1) * plan.source_channels;
  const int64_t work = blocking.rows * blocking.columns * plan.taps() * plan.source_channels * plan.channels / 16;
  parallel_for(blocking.count, work, [&](int64_t begin, int64_t end) {
    const Scratch<A> sources(copied), sums(plan.channels * (blocking.columns + kMostLanes));
    const Scratch<Run> runs(plan.taps());
    for (int64_t index = begin; index < end; ++index)
      MANUAL_OPS_FOR_ISA(planar_block(plan, block_at(plan, blocking, index, 0), source, packed.data(), bias,
                                      destination, sources.data(), sums.data(), runs.data()));
  });
}

#define INSTANTIATE(T) \
  template void planar_gather<T>(const Gather&, const WeightLayout&, const T*, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
