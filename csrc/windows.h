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
      axis.set_window(o, start, std::min(end, input));
      // Padding counts as far as there is any: a last window of ceil_mode may reach beyond it.
      if (count_include_pad) axis.divisor()[o] = std::min(start + kernel, input + padding) - start;
    }
    axis.find_inner(stride);
    axis.cover_inputs();
    return axis;
  }

  static WindowAxis adaptive(int64_t input, int64_t output) {
    const int64_t pieces = std::max<int64_t>(1, output);
    WindowAxis axis(input, output, adaptive_taps(input, output), 1);
    for (int64_t o = 0; o < output; ++o)
      axis.set_window(o, o * input / pieces, ((o + 1) * input + pieces - 1) / pieces);
    if (input % pieces == 0) axis.find_inner(axis.taps_);
    axis.cover_inputs();
    return axis;
  }

  AxisView view() const {
    return {
        input_,       output_,    taps_,        step_,     reach_,  cover_reach_,   cover_count_,
        first(),      count(),    tap(),        divisor(), cover(), covers_.data(), covers_.data() + cover()[input_],
        inner_begin_, inner_end_, inner_stride_};
  }

 private:
  WindowAxis(int64_t input, int64_t output, int64_t taps, int64_t step)
      : input_(input), output_(output), taps_(taps), step_(step), tables_(4 * output + input + 1) {}

  // All tables of a known size lie in one stretch: a small pooling spends more on allocating them than on filling them.
  int64_t* first() { return tables_.data(); }
  int64_t* count() { return first() + output_; }
  int64_t* tap() { return count() + output_; }
  int64_t* divisor() { return tap() + output_; }
  int64_t* cover() { return divisor() + output_; }
  const int64_t* first() const { return tables_.data(); }
  const int64_t* count() const { return first() + output_; }
  const int64_t* tap() const { return count() + output_; }
  const int64_t* divisor() const { return tap() + output_; }
  const int64_t* cover() const { return divisor() + output_; }

  void set_window(int64_t o, int64_t start, int64_t end) {
    tap()[o] = start < 0 ? (step_ - 1 - start) / step_ : 0;
    first()[o] = start + tap()[o] * step_;
    count()[o] = divisor()[o] = first()[o] < end ? (end - first()[o] + step_ - 1) / step_ : 0;
    reach_ = std::max(reach_, (count()[o] - 1) * step_ + 1);
  }

  void find_inner(int64_t stride) {
    inner_stride_ = stride;
    while (inner_begin_ < output_ && count()[inner_begin_] < taps_) ++inner_begin_;
    inner_end_ = inner_begin_;
    while (inner_end_ < output_ && count()[inner_end_] == taps_) ++inner_end_;
  }

  void cover_inputs() {
    int64_t* cover = this->cover();
    for (int64_t o = 0; o < output_; ++o)
      for (int64_t k = 0; k < count()[o]; ++k) ++cover[first()[o] + k * step_ + 1];
    for (int64_t i = 0; i < input_; ++i) {
      cover_count_ = std::max(cover_count_, cover[i + 1]);
      cover[i + 1] += cover[i];
    }
    covers_.resize(2 * cover[input_]);
    int64_t *outputs = covers_.data(), *taps = outputs + cover[input_];
    // cover[i] moves on to where the next output of input i goes, and so ends where that of input i+1 began.
    for (int64_t o = 0; o < output_; ++o) {
      for (int64_t k = 0; k < count()[o]; ++k) {
        const int64_t j = cover[first()[o] + k * step_]++;
        outputs[j] = o;
        taps[j] = tap()[o] + k;
      }
    }
    for (int64_t i = input_; i > 0; --i) cover[i] = cover[i - 1];
    cover[0] = 0;
    for (int64_t i = 0; i < input_; ++i)
      if (cover[i] < cover[i + 1])
        cover_reach_ = std::max(cover_reach_, outputs[cover[i + 1] - 1] - outputs[cover[i]] + 1);
  }

  int64_t input_, output_, taps_, step_, reach_ = 1, cover_reach_ = 1, cover_count_ = 1;
  int64_t inner_begin_ = 0, inner_end_ = 0, inner_stride_ = 1;
  std::vector<int64_t> tables_;  // first, count, tap, divisor and cover
  std::vector<int64_t> covers_;  // cover_output and cover_tap
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
