// Window tables of pooling: which inputs an output reads, and which outputs read an input, an axis each. Padding,
// dilation, ceil_mode and adaptive windows differ here and nowhere else. The twin of window_positions in
// manual_ops/geometry.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pooling.h"

namespace manual_ops {

// Output o reads inputs first[o] + k*step for k in 0 .. count[o]-1, of which tap tap[o] + k lies there; all are inside
// the input, whatever the options. Input i is read by outputs cover_output[j] at taps cover_tap[j], for j in cover[i]
// .. cover[i+1]-1, in the order of the outputs.
struct AxisView {
  int64_t input, output;
  int64_t taps;         // of the largest window: the base of the winners' codes
  int64_t step;         // the dilation
  int64_t reach;        // from the first to the last input that a window reads, at most
  int64_t cover_reach;  // from the first to the last output that reads an input, at most
  int64_t cover_count;  // outputs that read an input, at most
  const int64_t *first, *count, *tap, *divisor, *cover, *cover_output, *cover_tap;
  // Outputs inner_begin .. inner_end-1 have whole windows, whose first inputs lie inner_stride apart.
  int64_t inner_begin, inner_end, inner_stride;
};

class WindowAxis {
 public:
  static WindowAxis sliding(int64_t input, int64_t output, int64_t kernel, int64_t stride, int64_t padding,
                            int64_t step, bool count_include_pad) {
    WindowAxis axis(input, output, kernel, step);
    for (int64_t o = 0; o < output; ++o) {
      const int64_t start = o * stride - padding, end = start + (kernel - 1) * step + 1;
      axis.add_window(start, std::min(end, input));
      // Padding counts as far as there is any: a last window of ceil_mode may reach beyond it.
      if (count_include_pad) axis.divisor_.back() = std::min(start + kernel, input + padding) - start;
    }
    axis.find_inner(stride);
    axis.cover_inputs();
    return axis;
  }

  static WindowAxis adaptive(int64_t input, int64_t output) {
    const int64_t pieces = std::max<int64_t>(1, output);
    WindowAxis axis(input, output, adaptive_taps(input, output), 1);
    for (int64_t o = 0; o < output; ++o) axis.add_window(o * input / pieces, ((o + 1) * input + pieces - 1) / pieces);
    if (input % pieces == 0) axis.find_inner(axis.taps_);
    axis.cover_inputs();
    return axis;
  }

  AxisView view() const {
    return {input_,
            output_,
            taps_,
            step_,
            reach_,
            cover_reach_,
            cover_count_,
            first_.data(),
            count_.data(),
            tap_.data(),
            divisor_.data(),
            cover_.data(),
            cover_output_.data(),
            cover_tap_.data(),
            inner_begin_,
            inner_end_,
            inner_stride_};
  }

 private:
  WindowAxis(int64_t input, int64_t output, int64_t taps, int64_t step)
      : input_(input), output_(output), taps_(taps), step_(step) {}

  void add_window(int64_t start, int64_t end) {
    const int64_t tap = start < 0 ? (step_ - 1 - start) / step_ : 0;
    const int64_t first = start + tap * step_;
    const int64_t count = first < end ? (end - first + step_ - 1) / step_ : 0;
    first_.push_back(first);
    count_.push_back(count);
    tap_.push_back(tap);
    divisor_.push_back(count);
    reach_ = std::max(reach_, (count - 1) * step_ + 1);
  }

  void find_inner(int64_t stride) {
    inner_stride_ = stride;
    while (inner_begin_ < output_ && count_[inner_begin_] < taps_) ++inner_begin_;
    inner_end_ = inner_begin_;
    while (inner_end_ < output_ && count_[inner_end_] == taps_) ++inner_end_;
  }

  void cover_inputs() {
    cover_.assign(input_ + 1, 0);
    for (int64_t o = 0; o < output_; ++o)
      for (int64_t k = 0; k < count_[o]; ++k) ++cover_[first_[o] + k * step_ + 1];
    for (int64_t i = 0; i < input_; ++i) {
      cover_count_ = std::max(cover_count_, cover_[i + 1]);
      cover_[i + 1] += cover_[i];
    }
    cover_output_.resize(cover_[input_]);
    cover_tap_.resize(cover_[input_]);
    std::vector<int64_t> next(cover_.begin(), cover_.end() - 1);
    for (int64_t o = 0; o < output_; ++o) {
      for (int64_t k = 0; k < count_[o]; ++k) {
        const int64_t j = next[first_[o] + k * step_]++;
        cover_output_[j] = o;
        cover_tap_[j] = tap_[o] + k;
      }
    }
    for (int64_t i = 0; i < input_; ++i)
      if (cover_[i] < cover_[i + 1])
        cover_reach_ = std::max(cover_reach_, cover_output_[cover_[i + 1] - 1] - cover_output_[cover_[i]] + 1);
  }

  int64_t input_, output_, taps_, step_, reach_ = 1, cover_reach_ = 1, cover_count_ = 1;
  int64_t inner_begin_ = 0, inner_end_ = 0, inner_stride_ = 1;
  std::vector<int64_t> first_, count_, tap_, divisor_, cover_, cover_output_, cover_tap_;
};

// What a pooling kernel needs to know of its tensors: axes D, H, W, of which the leading are 1 in one and two
// dimensions.
struct PoolGeometry {
  int64_t batch, channels;
  bool channels_last;
  AxisView d, h, w;
  double divisor_override;  // average pooling; 0 for none

  int64_t input_pixels() const { return d.input * h.input * w.input; }
  int64_t output_pixels() const { return d.output * h.output * w.output; }
};

}  // namespace manual_ops
