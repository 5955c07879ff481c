// The losses that share a loop, each a function of an input and a target; `identity` is the input alone.
#pragma once

namespace manual_ops {

enum class Loss { identity, squared, logistic, weighted_logistic };

}  // namespace manual_ops
