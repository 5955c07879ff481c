// What max and average pooling share on torch's side: from lists of options to window tables.
#pragma once

#include "cpu/common.h"
#include "pooling.h"
#include "windows.h"

namespace manual_ops {

// The tables of all axes; an empty kernel_size stands for adaptive windows.
class PoolWindows {
 public:
  PoolWindows(const Tensor& like, const Sizes& input_size, const Sizes& output_size, const Sizes& kernel_size,
              const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool channels_last,
              bool count_include_pad = false, int64_t divisor_override = 0) {
    check_windows(like, input_size, output_size, kernel_size, stride, padding, dilation, channels_last);
    const size_t axes = input_size.size();
    axes_.reserve(3);
    for (size_t axis = 0; axis < 3 - axes; ++axis) axes_.push_back(WindowAxis::sliding(1, 1, 1, 1, 0, 1, false));
    for (size_t axis = 0; axis < axes; ++axis) {
      const int64_t input = input_size[axis], output = output_size[axis];
      if (kernel_size.empty()) {
        axes_.push_back(WindowAxis::adaptive(input, output));
        continue;
      }
      axes_.push_back(WindowAxis::sliding(input, output, kernel_size[axis], stride[axis], padding[axis], dilation[axis],
                                          count_include_pad));
    }
    geometry = {like.size(0),
                like.size(1),
                channels_last,
                axes_[0].view(),
                axes_[1].view(),
                axes_[2].view(),
                static_cast<double>(divisor_override)};
  }
  PoolWindows(const PoolWindows&) = delete;

  PoolGeometry geometry;  // points into the tables below

 private:
  std::vector<WindowAxis> axes_;
};

}  // namespace manual_ops
