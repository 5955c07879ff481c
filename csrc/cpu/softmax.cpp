// Softmax and log-softmax along one dimension, and their input gradients.
#include "softmax.h"

#include <utility>

#include "cpu/caches.h"
#include "cpu/intrinsics.h"
#include "cpu/scratch.h"

#define MANUAL_OPS_KERNELS "cpu/softmax_kernels.h"
#include "cpu/each_isa.h"

namespace manual_ops {

namespace {

// rows(first, count, scratch) on ranges of rows, or block(offset, first, count, scratch) on blocks of slices from
// the one at `first` of those at `offset`; the scratch has room for two slices a lane.
template <class A, class Rows, class Block>
void for_each_slice(const Slices& slices, const Rows& rows, const Block& block) {
  const auto& [outer, classes, inner] = slices;
  const int64_t work = 16 * classes;  // an exponential is about 16 operations
  if (outer * inner * classes == 0) return;
  if (inner == 1) {
    parallel_for(outer, work, [&, &classes = classes](int64_t begin, int64_t end) {
      const Scratch<A> scratch(2 * classes);
      rows(begin, end - begin, scratch.data());
    });
    return;
  }
  const int64_t blocks = (inner + plain::kBlock - 1) / plain::kBlock, pitch = classes * inner, width = inner;
  const int64_t scratch_size = 2 * classes * plain::kBlock;
  parallel_for(outer * blocks, work * std::min<int64_t>(inner, plain::kBlock), [&](int64_t begin, int64_t end) {
    const Scratch<A> scratch(scratch_size);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % blocks * plain::kBlock;
      block(index / blocks * pitch, first, static_cast<int>(std::min<int64_t>(plain::kBlock, width - first)),
            scratch.data());
    }
  });
}

template <bool kLog>
Tensor softmax_forward(const Tensor& input_any, int64_t dim) {
  // The output is contiguous in any case: channels_last inputs are transposed on the way.
  const bool channels_last = dim == 1 && is_channels_last(input_any);
  const Tensor input = channels_last ? input_any : as_contiguous(input_any);
  const Tensor output = new_tensor(sizes_of(input), input.scalar_type(), input);
  const Slices slices(input, dim);
  for_floating_dtype(input.scalar_type(), "softmax", [&](auto scalar) {
    using T = decltype(scalar);
    const T* x = data<T>(input);
    T* y = mutable_data<T>(output);
    using A = accumulate_t<T>;
    const bool past_caches = elementwise_goes_past_caches<T>(output.numel());
    for_each_slice<A>(
        slices,
        [&](int64_t first, int64_t count, A* scratch) {
          const int64_t at = first * slices.classes;
          MANUAL_OPS_FOR_ISA(softmax_rows<kLog>(x + at, y + at, count, slices.classes, scratch));
        },
        [&](int64_t offset, int64_t first, int count, A* scratch) {
          const T* from = x + offset + (channels_last ? first * slices.classes : first);
          MANUAL_OPS_FOR_ISA(softmax_block<kLog>(from, y + offset + first, slices.classes, slices.inner, count, scratch,
                                                 channels_last, past_caches));
        });
  });
  return output;
}

template <bool kLog>
Tensor softmax_input_grad(const Tensor& grad_output_any, const Tensor& output_any, int64_t dim) {
  const Tensor grad_output = as_contiguous(grad_output_any), output = as_contiguous(output_any);
  STD_TORCH_CHECK(sizes_of(grad_output) == sizes_of(output) && grad_output.scalar_type() == output.scalar_type(),
                  "softmax: grad_output and output must have one shape and dtype");
  const Tensor grad_input = new_tensor(sizes_of(output), output.scalar_type(), output);
  const Slices slices(output, dim);
  for_floating_dtype(output.scalar_type(), "softmax", [&](auto scalar) {
    using T = decltype(scalar);
    const T *g = data<T>(grad_output), *y = data<T>(output);
    T* x = mutable_data<T>(grad_input);
    using A = accumulate_t<T>;
    const bool past_caches = elementwise_goes_past_caches<T>(grad_input.numel());
    for_each_slice<A>(
        slices,
        [&](int64_t first, int64_t count, A* scratch) {
          const int64_t at = first * slices.classes;
          MANUAL_OPS_FOR_ISA(softmax_input_grad_rows<kLog>(g + at, y + at, x + at, count, slices.classes, scratch));
        },
        [&](int64_t offset, int64_t first, int count, A* scratch) {
          const int64_t at = offset + first;
          MANUAL_OPS_FOR_ISA(softmax_input_grad_block<kLog>(g + at, y + at, x + at, slices.classes, slices.inner, count,
                                                            scratch, past_caches));
        });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CPU, m) {
  m.impl("softmax_forward", TORCH_BOX(&softmax_forward<false>));
  m.impl("softmax_input_grad", TORCH_BOX(&softmax_input_grad<false>));
  m.impl("log_softmax_forward", TORCH_BOX(&softmax_forward<true>));
  m.impl("log_softmax_input_grad", TORCH_BOX(&softmax_input_grad<true>));
}

}  // namespace manual_ops
