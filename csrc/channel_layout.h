// How tensors (N, C, ...) lie, for operations that treat each channel on its own.
#pragma once

#include <optional>

#include "tensor.h"

namespace manual_ops {

using MaybeTensor = std::optional<Tensor>;

// Planes of one channel, or rows of all channels.
struct ChannelLayout {
  int64_t batch, channels, pixels, rows;  // `rows`: values of a channel
  bool channels_last, is_rows;

  ChannelLayout(const Tensor& input, const char* op) {
    STD_TORCH_CHECK(input.dim() >= 2, op, ": the input has fewer than 2 dimensions");
    batch = input.size(0), channels = input.size(1), pixels = 1;
    for (int64_t dim = 2; dim < input.dim(); ++dim) pixels *= input.size(dim);
    channels_last = is_channels_last(input);
    is_rows = channels_last || input.dim() == 2;
    rows = batch * pixels;
  }

  // Of an empty channel the statistics are those of one zero, not NaN.
  double count() const { return static_cast<double>(rows < 1 ? 1 : rows); }

  // Of a mask with a bit an element: planes are packed one by one, and eight rows share a row of bytes.
  Sizes mask_sizes() const {
    return is_rows ? Sizes{(rows + 7) / 8, channels} : Sizes{batch, channels, (pixels + 7) / 8};
  }

  Tensor arranged(const Tensor& tensor) const { return as_contiguous(tensor, channels_last); }
};

inline void check_same_shape(const Tensor& tensor, const Tensor& input, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == input.dim() && tensor.scalar_type() == input.scalar_type(), op, ": ", name,
                  " has another rank or dtype than the input");
  for (int64_t dim = 0; dim < input.dim(); ++dim)
    STD_TORCH_CHECK(tensor.size(dim) == input.size(dim), op, ": ", name, " has another shape than the input");
}

inline void check_channel_values(const Tensor& tensor, int64_t channels, const char* op) {
  STD_TORCH_CHECK(tensor.numel() == channels, op, ": expected one value for each of ", channels, " channels, got ",
                  tensor.numel());
}

}  // namespace manual_ops
