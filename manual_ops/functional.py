"""The operations as functions: `torch.nn.functional`'s names, argument order and defaults.

Names of torch.nn.functional that manual_ops does not replace (`dropout`, `pad`, ...) are torch's own, so that
`import manual_ops.functional as F` is enough in a model.
"""

from typing import Any

import torch.nn.functional

from manual_ops.ops.activation import gelu, hardtanh, leaky_relu, leaky_relu_, relu, relu6, relu_, sigmoid, silu, tanh
from manual_ops.ops.average_pool import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
)
from manual_ops.ops.batch_norm import batch_norm, batch_norm_relu
from manual_ops.ops.convolution import (
    conv1d,
    conv2d,
    conv3d,
    conv_transpose1d,
    conv_transpose2d,
    conv_transpose3d,
)
from manual_ops.ops.cross_entropy import cross_entropy, nll_loss
from manual_ops.ops.linear import linear
from manual_ops.ops.loss import binary_cross_entropy_with_logits, mse_loss
from manual_ops.ops.max_pool import (
    adaptive_max_pool1d,
    adaptive_max_pool1d_with_indices,
    adaptive_max_pool2d,
    adaptive_max_pool2d_with_indices,
    adaptive_max_pool3d,
    adaptive_max_pool3d_with_indices,
    max_pool1d,
    max_pool1d_with_indices,
    max_pool2d,
    max_pool2d_with_indices,
    max_pool3d,
    max_pool3d_with_indices,
)
from manual_ops.ops.softmax import log_softmax, softmax

__all__ = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "batch_norm",
    "batch_norm_relu",
    "binary_cross_entropy_with_logits",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "cross_entropy",
    "gelu",
    "leaky_relu",
    "leaky_relu_",
    "linear",
    "log_softmax",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "mse_loss",
    "nll_loss",
    "relu",
    "relu6",
    "relu_",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]

# Names that torch has for operations of the above.
ALIASES = {
    function.__name__: function
    for function in (
        adaptive_max_pool1d_with_indices,
        adaptive_max_pool2d_with_indices,
        adaptive_max_pool3d_with_indices,
        hardtanh,
        max_pool1d_with_indices,
        max_pool2d_with_indices,
        max_pool3d_with_indices,
    )
}


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.functional, name)
