// Depthwise convolution: every channel has a window of its own, so that there is nothing to multiply blocks of.
#include <utility>

#include "cpu/convolution/convolution.h"

namespace manual_ops {

// A tap's first source (elements from the start of the copy, or of the image) and its place in the weight.
struct PlaneTap {
  int64_t source, weight;
};

// The planar copy has a place for every residue of the stride, used or not: larger strides are for the dense kernels.
constexpr int64_t kLargestStep = 8;

// One axis of the copy: position k of residue r is source (begin + k)*step + r.
struct CopyAxis {
  int64_t step, begin, size;
  Range q;  // of the destinations

  CopyAxis(const GatherAxis& axis, Range destinations)
      : step(axis.step), q{destinations.begin / axis.phases, (destinations.end + axis.phases - 1) / axis.phases} {
    int64_t low = 0, high = 0;
    for (int64_t tap = 0; tap < axis.taps; ++tap) {
      const int64_t shift = shift_of(axis.offset[tap]);
      low = tap == 0 || shift < low ? shift : low;
      high = tap == 0 || shift > high ? shift : high;
    }
    begin = q.begin + low;
    size = q.size() + high - low;
  }
  int64_t residue_of(int64_t offset) const { return (offset % step + step) % step; }
  int64_t shift_of(int64_t offset) const { return (offset - residue_of(offset)) / step; }
  int64_t position_of(int64_t offset) const { return q.begin + shift_of(offset) - begin; }
};

}  // namespace manual_ops

#define MANUAL_OPS_KERNELS "cpu/convolution/depthwise_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// The channels-last weight gradient is summed in at most so many parts, which are added in their order.
constexpr int64_t kParts = 16;
// A vector of any instruction set is no longer than this many values.
constexpr int64_t kMostLanes = 16;

// [channel][tap], or [tap][channel], in the accumulation type and in the plan's order of taps.
template <class T>
std::vector<accumulate_t<T>> packed_weight(const Gather& plan, const WeightLayout& layout, const T* weight,
                                           bool channels_last) {
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const int64_t taps = plan.taps();
  std::vector<accumulate_t<T>> packed(plan.groups * taps);
  for (int64_t channel = 0; channel < plan.groups; ++channel)
    for (int64_t tap = 0; tap < taps; ++tap)
      packed[channels_last ? tap * plan.groups + channel : channel * taps + tap] =
          static_cast<accumulate_t<T>>(weight[channel * layout.group + offsets[tap]]);
  return packed;
}

// The most values that the copy of one source plane takes, and so the sums.
int64_t plane_values(const Gather& plan, const Blocking& blocking) {
  const auto length = [](const GatherAxis& axis, int64_t destinations) {
    const CopyAxis one(axis, {0, 1});  // a block that begins within a phase has one position more
    return axis.step * (one.size + (destinations + axis.phases - 1) / axis.phases);
  };
  return length(plan.axis[1], blocking.rows) * length(plan.axis[2], blocking.columns);
}

int64_t copy_values(const Gather& plan, const Blocking& blocking) {
  return std::min(plan.axis[0].taps, plan.axis[0].source) * plane_values(plan, blocking) + kMostLanes;
}

}  // namespace

bool depthwise_serves(const Gather& plan) {
  return plan.source_channels == 1 && plan.channels == 1 && plan.groups > 1 &&
         std::max(plan.axis[1].step, plan.axis[2].step) <= kLargestStep &&
         std::max(plan.axis[1].phases, plan.axis[2].phases) <= kLargestStep;
}

template <class T>
void depthwise_gather(const Gather& plan, const WeightLayout& layout, bool channels_last, const T* source,
                      const T* weight, const T* bias, T* destination) {
  using A = accumulate_t<T>;
  const std::vector<A> packed = packed_weight(plan, layout, weight, channels_last);
  if (channels_last) {
    std::vector<A> wide_bias;
    if (bias != nullptr) wide_bias.assign(bias, bias + plan.groups);
    const int64_t height = plan.axis[1].destination, depth = plan.axis[0].destination;
    parallel_for(plan.batch * depth * height, plan.axis[2].destination * plan.groups * plan.taps() / 8,
                 [&](int64_t begin, int64_t end) {
                   std::vector<PlaneTap> taps(plan.taps());
                   for (int64_t row = begin; row < end; ++row)
                     MANUAL_OPS_FOR_ISA(depthwise_row(
                         plan, row / height / depth, row / height % depth, row % height, source, packed.data(),
                         bias == nullptr ? nullptr : wide_bias.data(), destination, taps.data()));
                 });
    return;
  }
  const Blocking blocking = choose_blocking(plan, false, 1, sizeof(A));
  const int64_t planes = plan.batch * plan.groups, blocks = blocking.count / plan.batch;
  const int64_t work = blocking.rows * blocking.columns * plan.taps() / 8;
  parallel_for(blocks * planes, work, [&](int64_t begin, int64_t end) {
    std::vector<A> copy(copy_values(plan, blocking)), sums(plane_values(plan, blocking) + kMostLanes);
    std::vector<PlaneTap> taps(plan.taps());
    while (begin < end) {
      const int64_t block = begin / planes, last = std::min(end, (block + 1) * planes);
      MANUAL_OPS_FOR_ISA(depthwise_planes(plan, block_at(plan, blocking, block, 0), begin - block * planes,
                                          last - block * planes, source, packed.data(), bias, destination, copy.data(),
                                          sums.data(), taps.data()));
      begin = last;
    }
  });
}

template <class T>
void depthwise_weight_grad(const Gather& plan, const WeightLayout& layout, bool channels_last, const T* input,
                           const T* grad_output, T* grad_weight) {
  using A = accumulate_t<T>;
  const std::vector<int64_t> offsets = tap_offsets(plan, layout.window);
  const int64_t channels = plan.groups, taps = plan.taps();
  if (channels_last) {
    const int64_t height = plan.axis[1].destination, depth = plan.axis[0].destination;
    const int64_t rows = plan.batch * depth * height, parts = std::max<int64_t>(1, std::min(rows, kParts));
    std::vector<A> sums(parts * taps * channels);
    parallel_for(parts, rows / parts * plan.axis[2].destination * channels * taps / 8, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
          MANUAL_OPS_FOR_ISA(depthwise_row_weight_grad(plan, row / height / depth, row / height % depth, row % height,
                                                       input, grad_output, sums.data() + part * taps * channels));
    });
    for (int64_t channel = 0; channel < channels; ++channel)
      for (int64_t tap = 0; tap < taps; ++tap) {
        A sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += sums[(part * taps + tap) * channels + channel];
        grad_weight[channel * layout.group + offsets[tap]] = static_cast<T>(sum);
      }
    return;
  }
  const Blocking blocking = choose_blocking(plan, false, 1, sizeof(A));
  parallel_for(channels, blocking.count * blocking.rows * blocking.columns * taps / 8, [&](int64_t begin, int64_t end) {
    std::vector<A> copy(copy_values(plan, blocking)), sums(taps);
    std::vector<A> grad(blocking.rows * (blocking.columns + kMostLanes));
    std::vector<PlaneTap> list(taps);
    for (int64_t channel = begin; channel < end; ++channel) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (int64_t block = 0; block < blocking.count; ++block)
        MANUAL_OPS_FOR_ISA(depthwise_plane_weight_grad(plan, block_at(plan, blocking, block, channel), input,
                                                       grad_output, sums.data(), copy.data(), grad.data(),
                                                       list.data()));
      for (int64_t tap = 0; tap < taps; ++tap)
        grad_weight[channel * layout.group + offsets[tap]] = static_cast<T>(sums[tap]);
    }
  });
}

#define INSTANTIATE(T)                                                                                           \
  template void depthwise_gather<T>(const Gather&, const WeightLayout&, bool, const T*, const T*, const T*, T*); \
  template void depthwise_weight_grad<T>(const Gather&, const WeightLayout&, bool, const T*, const T*, T*);
INSTANTIATE(double)
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace manual_ops
