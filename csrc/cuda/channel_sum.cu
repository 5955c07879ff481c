// The gradient of a bias: the sum of grad_output over everything but the channel.
#include "cuda/channels.h"

namespace manual_ops {

namespace {

template <class T_>
struct Values {
  using T = T_;
  using A = accumulate_t<T>;
  static constexpr int kInputs = 1, kSums = 1;
  struct Channel {};
  const T* inputs[kInputs];

  CU_DEVICE void add(Channel, const A (&x)[1], A (&sums)[1]) const { sums[0] += x[0]; }
};

template <class T>
struct Store {
  T* output;
  CU_DEVICE void operator()(int64_t channel, const double (&sums)[1]) const {
    output[channel] = static_cast<T>(static_cast<accumulate_t<T>>(sums[0]));
  }
};

Tensor channel_sum(const Tensor& input_any) {
  const ChannelLayout layout(input_any, "channel_sum");
  const Tensor input = layout.arranged(input_any);
  const Tensor output = new_tensor({layout.channels}, input.scalar_type(), input);
  const CudaGuard guard(input);
  for_floating_dtype(input.scalar_type(), "channel_sum", [&](auto scalar) {
    using T = decltype(scalar);
    sum_channels(guard, Values<T>{{cu_input<T>(input)}}, Matrix(layout), Store<T>{cu_output<T>(output)}, input);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(manual_ops, CU_KEY, m) { m.impl("channel_sum", TORCH_BOX(&channel_sum)); }

}  // namespace manual_ops
