// The names of the activations, which all kernels share.
#pragma once

namespace manual_ops {

enum class Activation { relu, relu6, leaky_relu, sigmoid, tanh, silu, gelu, gelu_tanh };

}  // namespace manual_ops
