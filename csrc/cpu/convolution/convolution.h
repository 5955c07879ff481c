// The parts that a convolution's operation is put together from. Every pointer is to a dense tensor whose place in
// memory the plan's layouts give; the scalar types T are double, float, BFloat16 and Half.
#pragma once

#include "cpu/common.h"
#include "cpu/convolution/plan.h"

namespace manual_ops {

// destination = gather(source, weight) + bias: forward and input gradient. An element of the weight lies at
// channel*channel_step + source channel*source_step + the tap's place in `window`; a group's weights begin
// `group` elements after those of the group before.
struct WeightLayout {
  Layout window;
  int64_t group, channel_step, source_step;
};

// Offsets, in elements, of one run of the micro-kernel.
struct Run {
  int64_t a, b;
};

// Two numbers that one step of the micro-kernel multiplies, kPairsAtOnce of them packed at a time.
struct Bfloat16Pair {
  uint16_t first, second;
};
constexpr int64_t kPairsAtOnce = 8;
// Blocks of a weight gradient that are multiplied together.
constexpr int64_t kMostTogether = 64;

// The bias (or null, for zeros) of the columns of all panels, `columns` for each group.
template <class T>
std::vector<accumulate_t<T>> padded_bias(const Gather& plan, const T* bias, int64_t columns) {
  std::vector<accumulate_t<T>> padded(plan.groups * columns);
  if (bias != nullptr)
    for (int64_t channel = 0; channel < plan.groups * plan.channels; ++channel)
      padded[channel / plan.channels * columns + channel % plan.channels] = static_cast<accumulate_t<T>>(bias[channel]);
  return padded;
}

template <class T>
void dense_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                  T* destination);

// The plan is forward's.
template <class T>
void dense_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                       T* grad_weight);

// The same for some blocks of the destination alone.
template <class T>
void dense_gather_blocks(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight,
                         const T* bias, T* destination, const std::vector<Block>& blocks);

// Few channels a group: planar_kernels.h.
bool planar_serves(const Gather& plan);
template <class T>
void planar_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                   T* destination);
bool planar_serves_weight_grad(const Gather& plan);
template <class T>
void planar_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                        T* grad_weight);

// Windows of one tap over contiguous planes, in float32 and float64: pointwise_kernels.h.
bool pointwise_serves(const Gather& plan);
template <class T>
void pointwise_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                      T* destination);

// Windows of 3 x 3 taps at stride 1, with enough channels, by F(4x4, 3x3): winograd_kernels.h. Whether it serves a
// gather, or a weight gradient.
template <class T>
bool winograd_serves(const Gather& plan, bool weight_grad);
template <class T>
void winograd_gather(const Gather& plan, const WeightLayout& layout, const T* source, const T* weight, const T* bias,
                     T* destination);
template <class T>
void winograd_weight_grad(const Gather& plan, const WeightLayout& layout, const T* input, const T* grad_output,
                          T* grad_weight);

// One channel a group on either side, or few in channels_last tensors. The source and the destination are both
// channels_last, or both contiguous.
template <class T>
bool depthwise_serves(const Gather& plan, bool channels_last);
template <class T>
void depthwise_gather(const Gather& plan, const WeightLayout& layout, bool channels_last, const T* source,
                      const T* weight, const T* bias, T* destination);
template <class T>
void depthwise_weight_grad(const Gather& plan, const WeightLayout& layout, bool channels_last, const T* input,
                           const T* grad_output, T* grad_weight);

}  // namespace manual_ops
