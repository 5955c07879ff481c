"""Average pooling in 1, 2 and 3 dimensions, over a sliding window or over adaptive pieces, every derivative of both.

Output o is the sum of the inputs in its window over its divisor:

    y[o] = 1/d[o] * sum over i in window(o) of x[i]                                                         (average)

d[o] is `divisor_override`, or the number of elements in the window. With count_include_pad the padding counts as
elements, but not what a window of ceil_mode has beyond the padding; without it only the elements of the input count. An
adaptive window has no padding. y is linear in x, so the gradient is the transposed sum: each input collects from the
windows that cover it,

    dL/dx[i] = sum over o with i in window(o) of  g[o] / d[o]            g = dL/dy                           (spread)

and since spread is linear in g, its derivative is the average again. "1/k^2 to each position" is spread only away from
the borders: d[o] differs where padding is not counted, or where ceil_mode cuts a window short.

Both sums run over boxes, so they are taken one axis after the other.

Saved for backward: shapes alone.

In the code: x is `input`, g `grad_output`; `window` is (kernel_size, stride, padding), all empty for adaptive pooling,
`divisor_override` is 0 for none, and `channels_last` is the memory format of the result.
"""

import math
from typing import Any

import torch
from torch import Tensor

from manual_ops import autocast, geometry, modes, recipes
from manual_ops.autograd import ManualFunction
from manual_ops.kernel import fold, kernel, unfold

_WINDOW = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, bool count_include_pad, SymInt divisor_override, "
    "bool channels_last"
)


def _with_dilation(kernel_size: Any, stride: Any, padding: Any) -> Any:
    return kernel_size, stride, padding, [1] * len(kernel_size)


def _sum_at(input: Tensor, dim: int, table: Tensor) -> Tensor:
    """Along `dim`, entry r of the result is the sum of input at table[r]; -1 stands for nothing. table: (R, K)."""
    table = table.to(input.device)
    rows = input.index_select(dim, table.clamp(min=0).flatten()).unflatten(dim, table.shape)
    there = (table >= 0).reshape(*table.shape, *(1,) * (input.dim() - 1 - dim))
    return torch.where(there, rows, 0).sum(dim + 1)


def _divisors(input_size: Any, output_size: Any, window: Any, count_include_pad: bool) -> list[Tensor]:
    """How many elements a window counts, an axis each: (O,). Their product is d."""
    counts = []
    for axis, (positions, inside) in enumerate(geometry.window_positions(input_size, output_size, window)):
        if count_include_pad and window[0]:
            end = input_size[axis] + window[2][axis]
            counts.append((positions < end).sum(1))
        else:
            counts.append(inside.sum(1))
    return counts


def _divided(input: Tensor, input_size: Any, window: Any, count_include_pad: bool, divisor_override: int) -> Tensor:
    """input (N, C, *O) over each output's divisor."""
    if divisor_override:
        return input / divisor_override
    divisor = torch.ones((), device=input.device)
    for counts in _divisors(input_size, input.shape[2:], window, count_include_pad):
        divisor = divisor.unsqueeze(-1) * counts.to(input)
    return input / divisor


def _average_pool_meta(input, output_size, kernel_size, stride, padding, *options):
    return geometry.empty_like_format(input, (*input.shape[:2], *output_size), input.dtype, options[-1])


@kernel(f"average_pool(Tensor input, SymInt[] output_size, {_WINDOW}) -> Tensor", meta=_average_pool_meta)
def average_pool(input, output_size, kernel_size, stride, padding, count_include_pad, divisor_override, channels_last):
    window = _with_dilation(kernel_size, stride, padding)
    sums = input.to(geometry.accumulation_dtype(input.dtype))
    for dim, (positions, inside) in enumerate(geometry.window_positions(input.shape[2:], output_size, window), start=2):
        sums = _sum_at(sums, dim, torch.where(inside, positions, -1))
    average = _divided(sums, input.shape[2:], window, count_include_pad, divisor_override)
    return _average_pool_meta(input, output_size, *window[:3], channels_last).copy_(average)  # (N, C, *O)


@kernel(f"average_spread(Tensor grad_output, SymInt[] input_size, {_WINDOW}) -> Tensor", meta=_average_pool_meta)
def average_spread(
    grad_output, input_size, kernel_size, stride, padding, count_include_pad, divisor_override, channels_last
):
    window = _with_dilation(kernel_size, stride, padding)
    shares = grad_output.to(geometry.accumulation_dtype(grad_output.dtype))
    shares = _divided(shares, input_size, window, count_include_pad, divisor_override)
    tables = geometry.window_positions(input_size, grad_output.shape[2:], window)
    for dim, (table, size) in enumerate(zip(tables, input_size, strict=True), start=2):
        outputs, _ = geometry.covering_windows(*table, size)
        shares = _sum_at(shares, dim, outputs)
    return _average_pool_meta(grad_output, input_size, *window[:3], channels_last).copy_(shares)  # (N, C, *I)


@average_pool.batch_rule
@average_spread.batch_rule
def _(op, batch_size, in_dims, moving, *options):
    """Fold the batch into N."""
    return unfold(op(fold(moving, in_dims[0], batch_size), *options), batch_size), 0


class AveragePool(ManualFunction):
    @staticmethod
    def forward(input, output_size, options, backend):
        return average_pool(input, output_size, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, ctx.options, ctx.backend = inputs
        ctx.input_size = input.shape[2:]

    @staticmethod
    def backward(ctx, grad_output, *_):
        return AverageSpread.call(grad_output, ctx.input_size, ctx.options, ctx.backend), None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        return AveragePool.call(tangents[0], *inputs[1:])


class AverageSpread(ManualFunction):
    @staticmethod
    def forward(grad_output, input_size, options, backend):
        return average_spread(grad_output, input_size, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, _, ctx.options, ctx.backend = inputs
        ctx.output_size = grad_output.shape[2:]

    @staticmethod
    def backward(ctx, input, *_):
        return AveragePool.call(input, ctx.output_size, ctx.options, ctx.backend), None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        return AverageSpread.call(tangents[0], *inputs[1:])


def _pool(op, axes, input, output_size, options):
    (input,) = autocast.cast(op, input)
    geometry.check_floating(op, "input", input)
    batched = input if input.dim() == axes + 2 else input.contiguous().unsqueeze(0)
    if axes == 1 and geometry.prefers_channels_last(batched.unsqueeze(2)):
        return _as_image(op, batched, output_size, options)
    # torch's average pools of 3 dimensions return contiguous tensors whatever they are given.
    options = (*options, axes < 3 and geometry.prefers_channels_last(batched))
    output = AveragePool.call(batched, output_size, options, modes.current_backend())
    return output if batched is input else output.squeeze(0)


def _as_image(op, input, output_size, options):
    """A signal (N, C, L) whose channels are innermost, as an image of height 1: the output's are innermost too."""
    *window, count_include_pad, divisor_override = options
    window = geometry.window_of_image(window)
    output = _pool(op, 2, input.unsqueeze(2), [1, *output_size], (*window, count_include_pad, divisor_override))
    return output.squeeze(2)


@recipes.unrecorded
def _avg_pool(op, axes, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override=None):
    geometry.check_tensor(op, "input", input)
    geometry.check_bool(op, "ceil_mode", ceil_mode)
    geometry.check_bool(op, "count_include_pad", count_include_pad)
    if divisor_override is not None:
        divisor_override = geometry.whole(op, "divisor_override", divisor_override)
    window = geometry.pool_window(op, axes, input, kernel_size, stride, padding, 1)
    if divisor_override is not None and divisor_override == 0:
        raise RuntimeError(f"{op}: divisor_override must not be 0")
    if axes == 3 and any(size < kernel for size, kernel in zip(input.shape[-3:], window[0], strict=True)):
        # As torch, and for 3 dimensions alone: the padding does not help.
        raise RuntimeError(f"{op}: input must be as large as kernel_size={window[0]}, got {tuple(input.shape)}")
    output_size = geometry.pool_output_size(op, input.shape[-axes:], window, ceil_mode)
    return _pool(op, axes, input, output_size, (*window[:3], count_include_pad, divisor_override or 0))


def avg_pool1d(input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True):
    """1-d average pooling: `torch.nn.functional.avg_pool1d`.

    Args:
        input: (N, C, L) or (C, L).
        kernel_size: elements in the window; an int or a tuple with one int an axis, as the next two.
        stride: step of the window, in input elements; kernel_size if None.
        padding: zeros put on both sides of an axis; at most half of kernel_size.
        ceil_mode: keep a last window that sticks out at the end, if it starts inside the input or the left padding.
        count_include_pad: whether the padding counts in the divisor.

    Returns:
        (N, C, L_out) or (C, L_out), L_out = floor((L + 2*padding - kernel_size) / stride) + 1, ceil for ceil_mode.

    Raises:
        RuntimeError: for shapes or options that do not go together.
        TypeError: for arguments of another type.
        NotImplementedError: for dtypes that are not floating.

    Formula: `manual_ops.ops.average_pool`, (average).
    """
    return _avg_pool("avg_pool1d", 1, input, kernel_size, stride, padding, ceil_mode, count_include_pad)


def avg_pool2d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """2-d average pooling: `torch.nn.functional.avg_pool2d`.

    Args, returns and errors are those of `avg_pool1d`, with input (N, C, H, W) or (C, H, W), and

        divisor_override: divides every window's sum, in place of the number of its elements.
    """
    return _avg_pool(
        "avg_pool2d", 2, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


def avg_pool3d(
    input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """3-d average pooling: `torch.nn.functional.avg_pool3d`.

    Args, returns and errors are those of `avg_pool2d`, with input (N, C, D, H, W) or (C, D, H, W).
    """
    return _avg_pool(
        "avg_pool3d", 3, input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )


@recipes.unrecorded
def _adaptive_avg_pool(op, axes, input, output_size):
    geometry.check_tensor(op, "input", input)
    sizes = geometry.adaptive_output_size(op, axes, input, output_size)
    options = (*geometry.ADAPTIVE[:3], False, 0)
    if any(size != 1 for size in sizes):
        geometry.check_pool_input(op, axes, input)
        return _pool(op, axes, input, sizes, options)
    # For one piece an axis torch takes the mean of the last axes: even of none, which is NaN, and where there are
    # several of them it does not ask what stands before.
    if axes == 1 or input.dim() in (axes + 1, axes + 2):
        geometry.check_pool_dimensions(op, axes, input)
        return _pool(op, axes, input, sizes, options)
    if input.dim() < axes:
        raise IndexError(f"{op}: input must have at least {axes} dimensions, got the shape {tuple(input.shape)}")
    leading, size = input.shape[:-axes], input.shape[-axes:]
    return _pool(op, axes, input.reshape(math.prod(leading), *size), sizes, options).reshape(*leading, *sizes)


def adaptive_avg_pool1d(input, output_size):
    """1-d average pooling of the input cut into pieces: `torch.nn.functional.adaptive_avg_pool1d`.

    Args:
        input: (N, C, L) or (C, L).
        output_size: L_out; an int or a tuple with one int an axis (None, where there are several: as the input).

    Returns:
        (N, C, L_out) or (C, L_out); output o is the mean of inputs floor(o*L/L_out) .. ceil((o+1)*L/L_out) - 1.

    Raises:
        RuntimeError: for shapes or sizes that do not go together.
        TypeError: for arguments of another type.
        NotImplementedError: for dtypes that are not floating.

    Formula: `manual_ops.ops.average_pool`, (average).
    """
    return _adaptive_avg_pool("adaptive_avg_pool1d", 1, input, output_size)


def adaptive_avg_pool2d(input, output_size):
    """2-d average pooling of the input cut into pieces: `torch.nn.functional.adaptive_avg_pool2d`.

    Args, returns and errors are those of `adaptive_avg_pool1d`, with input (N, C, H, W) or (C, H, W).
    """
    return _adaptive_avg_pool("adaptive_avg_pool2d", 2, input, output_size)


def adaptive_avg_pool3d(input, output_size):
    """3-d average pooling of the input cut into pieces: `torch.nn.functional.adaptive_avg_pool3d`.

    Args, returns and errors are those of `adaptive_avg_pool1d`, with input (N, C, D, H, W) or (C, D, H, W).
    """
    return _adaptive_avg_pool("adaptive_avg_pool3d", 3, input, output_size)
