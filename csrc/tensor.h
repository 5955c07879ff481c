// What every operation needs on torch's side, on the CPU and on CUDA: dtype dispatch, allocation, memory formats.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "huge_pages.h"

namespace manual_ops {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// 16-bit types accumulate in float, the others in themselves.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The same of a dtype.
inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

// Calls body(T{}) with the scalar type of `dtype`.
template <class Body>
void for_floating_dtype(ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Half{});
    default:
      STD_TORCH_CHECK(false, op, ": the dtype is not one of float64, float32, bfloat16, float16");
  }
}

template <class T>
constexpr ScalarType scalar_type_of() {
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  if constexpr (std::is_same_v<T, double>) return ScalarType::Double;
  if constexpr (std::is_same_v<T, BFloat16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, Half>) return ScalarType::Half;
  if constexpr (std::is_same_v<T, uint8_t>) return ScalarType::Byte;
  if constexpr (std::is_same_v<T, int32_t>) return ScalarType::Int;
  if constexpr (std::is_same_v<T, int64_t>) return ScalarType::Long;
}

// The tensor's values, as what they are: another type would read past the end.
template <class T>
const T* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>(), "manual_ops: an operand has the wrong dtype");
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == scalar_type_of<T>(), "manual_ops: an operand has the wrong dtype");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Whether a stride, a dilation or a window's size is one with which positions do not overflow.
inline bool is_step(int64_t value) { return value >= 1 && value < (int64_t{1} << 31); }

// Dense with the channels innermost, and not contiguous as well: torch's channels_last (4 and 5 dimensions).
inline bool is_channels_last(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  if ((dims != 4 && dims != 5) || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  const auto matches = [&](int64_t dim) {
    const bool same = tensor.size(dim) == 1 || tensor.stride(dim) == expected;
    expected *= tensor.size(dim);
    return same;
  };
  if (!matches(1)) return false;
  for (int64_t dim = dims - 1; dim >= 2; --dim)
    if (!matches(dim)) return false;
  return matches(0);
}

inline MemoryFormat channels_last_format(int64_t dims) {
  return dims == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// The tensor itself where it is contiguous (or channels_last, if asked for), else a copy that is.
inline Tensor as_contiguous(const Tensor& tensor, bool channels_last = false) {
  if (channels_last) {
    return is_channels_last(tensor) ? tensor : torch::stable::contiguous(tensor, channels_last_format(tensor.dim()));
  }
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A tensor that was just made, uninitialised: on the CPU, in huge pages where it is large.
inline Tensor in_huge_pages(Tensor made) {
  const int64_t bytes = made.numel() * static_cast<int64_t>(made.element_size());
  if (bytes >= kHugePage && made.is_cpu()) advise_huge_pages(made.mutable_data_ptr(), bytes);
  return made;
}

// A new tensor on the device of `like`. Through the shim straight to the allocator: torch::stable::empty looks an
// operator up by its name, which takes as long as a small kernel.
inline Tensor new_tensor(const Sizes& sizes, ScalarType dtype, const Tensor& like, bool channels_last = false) {
  const size_t dims = sizes.size();
  Sizes strides(dims);
  int64_t step = 1;
  if (channels_last) {
    strides[1] = 1;
    step = sizes[1];
    for (size_t dim = dims - 1; dim >= 2; step *= sizes[dim--]) strides[dim] = step;
    strides[0] = step;
  } else {
    for (size_t dim = dims; dim-- > 0; step *= std::max<int64_t>(1, sizes[dim])) strides[dim] = step;
  }
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(dims), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, index, &made));
  return in_huge_pages(Tensor(made));
}

inline Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }

}  // namespace manual_ops
