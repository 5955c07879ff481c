"""The fully connected layer, every derivative of it.

    y[n, f]       = bias[f] + sum over i of  x[n, i] * w[f, i]               y = x w^T + bias
    dL/dx[n, i]   = sum over f of            g[n, f] * w[f, i]               g w
    dL/dw[f, i]   = sum over n of            g[n, f] * x[n, i]               g^T x
    dL/dbias[f]   = sum over n of            g[n, f]                         (channel_sum)

with g = dL/dy. All three products are linear(a, b) = a b^T of two of the matrices, turned as needed:

    g w = linear(g, w^T)          g^T x = linear(g^T, x^T)

so one Function is its own derivative, to every order.

Saved for backward: the input only if the weight needs a gradient, the weight only if the input does.

In the code: x is `input` (N, I), w `weight` (F, I), g `grad_output` (N, F).
"""

import math
from typing import Any

from torch import Tensor

from manual_ops import autocast, geometry, modes, recipes
from manual_ops.autograd import ManualFunction, sum_of_terms
from manual_ops.kernel import backend_of, fold, in_front, kernel, unfold
from manual_ops.ops.channel_sum import ChannelSum
from manual_ops.ops.convolution import conv_forward


@kernel(
    "linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor",
    meta=lambda input, weight, bias: input.new_empty(input.shape[0], weight.shape[0]),
)
def linear_kernel(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = geometry.accumulation_dtype(input.dtype)
    output = input.to(wide) @ weight.to(wide).t()
    if bias is not None:
        output = output + bias
    return output.to(input.dtype)  # (N, F)


@linear_kernel.batch_rule
def _(op: Any, batch_size: int, in_dims: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """A batch of inputs goes into N, one of weights into F, one of both into the groups of a convolution."""
    input_dim, weight_dim, bias_dim = in_dims
    if weight_dim is None and bias_dim is None:
        return unfold(op(fold(input, input_dim, batch_size), weight, bias), batch_size), 0
    biases = in_front(bias, bias_dim, batch_size)  # (B, F)
    if input_dim is None:
        weights = fold(weight, weight_dim, batch_size)  # (B * F, I)
        return unfold(op(input, weights, None if biases is None else biases.flatten()), batch_size, 1), 0
    inputs, weights = in_front(input, input_dim, batch_size), in_front(weight, weight_dim, batch_size)
    if inputs.numel() == 0 or weights.numel() == 0:  # a convolution has at least one channel
        sums = inputs.new_zeros(batch_size, inputs.shape[1], weights.shape[1])
        return (sums if biases is None else sums + biases.unsqueeze(1)), 0
    signal = inputs.mT.flatten(0, 1).unsqueeze(0)  # (1, B * I, N)
    window = weights.flatten(0, 1).unsqueeze(2)  # (B * F, I, 1)
    options = [inputs.shape[1]], [1], [0], [1], batch_size, False
    output = conv_forward(
        signal, window, None if biases is None else biases.flatten(), *options, backend=backend_of(op)
    )  # (1, B * F, N)
    return unfold(output, batch_size, 1).squeeze(1).mT, 0


class Linear(ManualFunction):
    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        return linear_kernel(input, weight, bias, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, weight, _, ctx.backend = inputs
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if weight_needs else None, weight if input_needs else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = Linear.call(grad_output, weight.t(), None, ctx.backend)
        if ctx.needs_input_grad[1]:
            grad_weight = Linear.call(grad_output.t(), input.t(), None, ctx.backend)
        if ctx.needs_input_grad[2]:
            grad_bias = ChannelSum.call(grad_output, ctx.backend)
        return grad_input, grad_weight, grad_bias, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor | None:
        input, weight, _, backend = inputs
        input_tangent, weight_tangent, bias_tangent, _ = tangents
        return sum_of_terms(
            None if input_tangent is None else Linear.call(input_tangent, weight, None, backend),
            None if weight_tangent is None else Linear.call(input, weight_tangent, None, backend),
            None if bias_tangent is None else bias_tangent.expand_as(output),
        )


def _check(input: Any, weight: Any, bias: Any) -> None:
    geometry.check_tensor("linear", "input", input)
    geometry.check_tensor("linear", "weight", weight)
    if bias is not None:
        geometry.check_tensor("linear", "bias", bias)
    if input.dim() == 0 or weight.dim() not in (1, 2):
        raise RuntimeError(
            "linear: input must have at least 1 dimension and weight 1 or 2, got the shapes "
            f"{tuple(input.shape)} and {tuple(weight.shape)}"
        )
    if input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"linear: input must have {weight.shape[-1]} features (weight.shape[-1]), got {input.shape[-1]} in the "
            f"shape {tuple(input.shape)}"
        )
    operands = {"weight": weight}
    if bias is not None:
        operands["bias"] = bias
    for name, operand in operands.items():
        geometry.check_alike("linear", name, operand, input, "dtype", "device")
    geometry.check_floating("linear", "input", input)
    if weight.dim() == 1 and bias is not None and (bias.dim() > 0 or input.dim() == 2):
        raise RuntimeError(
            "linear: bias must be a number, and input must not have 2 dimensions, where weight has 1 dimension; got "
            f"bias {tuple(bias.shape)}, input {tuple(input.shape)}"
        )


@recipes.unrecorded
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + bias: `torch.nn.functional.linear`.

    Args:
        input: (*, I), any number of leading dimensions.
        weight: (F, I) or (I,).
        bias: (F,) or None; another shape that broadcasts to the output's is added as it is. For a weight (I,) a number,
            and the input has then 1 dimension or more than 2.

    Returns:
        (*, F), or (*) for a weight (I,).

    Raises:
        RuntimeError: for shapes, dtypes or devices that do not go together.
        NotImplementedError: for dtypes that are not floating.
        TypeError: for anything but tensors.

    Formula: `manual_ops.ops.linear`.
    """
    input, weight, bias = autocast.cast("linear", input, weight, bias)
    _check(input, weight, bias)
    matrix = weight if weight.dim() == 2 else weight.unsqueeze(0)
    leading = input.shape[:-1]
    shape = (*leading, *weight.shape[:-1])
    rows = input.reshape(math.prod(leading), input.shape[-1])
    backend = modes.current_backend()
    if bias is not None and bias.shape == (1, *matrix.shape[:1]):
        bias = bias.squeeze(0)
    if bias is None or bias.shape == matrix.shape[:1]:
        return _product(rows, matrix, bias, backend).reshape(shape)
    if not _broadcasts(bias.shape, shape):
        raise RuntimeError(
            f"linear: bias must have the shape ({matrix.shape[0]},), or one that broadcasts to the output's {shape}, "
            f"got {tuple(bias.shape)}"
        )
    return _product(rows, matrix, None, backend).reshape(shape) + bias


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    output = Linear.call(rows, weight, bias, backend)
    if weight.requires_grad and recipes.active():
        recipes.keep(output, 0, rows)
    return output


def _broadcasts(shape: Any, target: Any) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, wanted) for size, wanted in pairs)
