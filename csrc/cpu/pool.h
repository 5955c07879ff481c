// What max and average pooling share on torch's side: from lists of options to window tables.
#pragma once

#include "cpu/common.h"
#include "windows.h"

namespace manual_ops {

inline Sizes spatial(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 3 && tensor.dim() <= 5, "pooling: a batched tensor of 1 to 3 axes is needed");
  return Sizes(tensor.sizes().begin() + 2, tensor.sizes().end());
}

inline Sizes with_spatial(const Tensor& like, const Sizes& axes) {
  Sizes sizes{like.size(0), like.size(1)};
  sizes.insert(sizes.end(), axes.begin(), axes.end());
  return sizes;
}

// The tables of all axes; an empty kernel_size stands for adaptive windows.
class PoolWindows {
 public:
  PoolWindows(const Tensor& like, const Sizes& input_size, const Sizes& output_size, const Sizes& kernel_size,
              const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool channels_last,
              bool count_include_pad = false, int64_t divisor_override = 0) {
    const size_t axes = like.dim() - 2, given = kernel_size.size();
    STD_TORCH_CHECK(input_size.size() == axes && output_size.size() == axes && (given == 0 || given == axes) &&
                        stride.size() == given && padding.size() == given && dilation.size() == given,
                    "pooling: one size and one option an axis are needed");
    STD_TORCH_CHECK(!channels_last || axes >= 2, "pooling: channels_last needs 2 or 3 axes");
    for (size_t axis = 0; axis < 3 - axes; ++axis) axes_.push_back(WindowAxis::sliding(1, 1, 1, 1, 0, 1, false));
    for (size_t axis = 0; axis < axes; ++axis) {
      const int64_t input = input_size[axis], output = output_size[axis];
      STD_TORCH_CHECK(input >= 0 && output >= 0, "pooling: a size is negative");
      if (given == 0) {
        axes_.push_back(WindowAxis::adaptive(input, output));
        continue;
      }
      STD_TORCH_CHECK(
          is_step(kernel_size[axis]) && is_step(stride[axis]) && is_step(padding[axis] + 1) && is_step(dilation[axis]),
          "pooling: a window option is out of range");
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
