"""Max pooling in 1, 2 and 3 dimensions, over a sliding window or over adaptive pieces, every derivative of both.

Output o looks at the inputs i(o, t) under the taps t of its window and takes the largest:

    y[o] = x[i(o, t*)]        t*(o) = the tap that wins                                                     (forward)

Taps are visited in row-major order, and tap t takes the lead if x[t] > m, the leader's value, or if x[t] is NaN: so the
first of equal values wins, and the last NaN. Padding takes no part; a window with nothing but padding is -inf.

A small change of x changes no winner, unless two values tie. With t* fixed y is linear in x: each output picks one
input, so the gradient of an output goes to its winner alone, and an input collects from the windows that it won,

    dL/dx[i] = sum over (o, t) with i(o, t) = i  of  [t = t*(o)] * g[o]          g = dL/dy                  (scatter)

which is linear in g in turn; its derivative picks the same elements again,

    v[o] = x'[i(o, t*(o))]                                                                                     (pick)

    forward(x)         by x: scatter(g)
    scatter(g)         by g: pick(x')
    pick(x')           by x': scatter(g)

Each is written as a gather: scatter visits the windows that cover an input, an axis at a time by table, and adds where
the winner's tap is the one that meets the input. No output is added to by two writers.

Saved for backward: t* alone, the tap's row-major number in the (largest) window: one byte an output, or an int32 where
windows have more than 256 taps. The position in the input follows from it, and so do torch's flat `indices`.

In the code: x is `input`, g `grad_output`, t* `winner`; `window` is (kernel_size, stride, padding, dilation), all empty
for adaptive pooling, and `channels_last` the memory format of the result.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from manual_ops import autocast, geometry, modes, recipes
from manual_ops.autograd import ManualFunction
from manual_ops.kernel import fold, kernel, unfold

_WINDOW = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool channels_last"
_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _winner_dtype(input_size, output_size, kernel_size):
    taps = math.prod(geometry.window_taps(input_size, output_size, kernel_size))
    return torch.uint8 if taps <= 256 else torch.int32


def _select(input: Tensor, indices: list[Tensor]) -> Tensor:
    """input at the given indices of each axis; an index out of range reads something that the caller must not use."""
    for dim, index in enumerate(indices, start=2):
        input = input.index_select(dim, index.clamp(0, input.shape[dim] - 1).to(input.device))
    return input


def _outer(op: Any, tables: list[Tensor], like: Tensor) -> Tensor:
    """One (O,) vector an axis, combined to (*O)."""
    result = tables[0].to(like.device)
    for table in tables[1:]:
        result = op(result.unsqueeze(-1), table.to(like.device))
    return result


def _taps(input: Tensor, output_size: Any, window: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each tap in row-major order: its number, the input under it (N, C, *O), and where that is inside (*O)."""
    tables = geometry.window_positions(input.shape[2:], output_size, window)
    for code, tap in enumerate(itertools.product(*(range(inside.shape[1]) for _, inside in tables))):
        columns = [(positions[:, t], inside[:, t]) for (positions, inside), t in zip(tables, tap, strict=True)]
        if all(inside.any() for _, inside in columns):
            value = _select(input, [positions for positions, _ in columns])
            yield code, value, _outer(torch.logical_and, [inside for _, inside in columns], input)


def _first_tap(input: Tensor, output_size: Any, window: Any) -> Tensor:
    """The number of the first tap that is not before the input: who leads before anyone has been compared. (*O)"""
    tables = geometry.window_positions(input.shape[2:], output_size, window)
    firsts = [(positions < 0).sum(1) for positions, _ in tables]
    code = firsts[0].to(input.device)
    for (_, inside), first in zip(tables[1:], firsts[1:], strict=True):
        code = code.unsqueeze(-1) * inside.shape[1] + first.to(input.device)
    return code


def _max_pool_forward_meta(input, output_size, kernel_size, stride, padding, dilation, channels_last):
    shape = (*input.shape[:2], *output_size)
    dtype = _winner_dtype(input.shape[2:], output_size, kernel_size)
    return (
        geometry.empty_like_format(input, shape, input.dtype, channels_last),
        geometry.empty_like_format(input, shape, dtype, channels_last),
    )


@kernel(
    f"max_pool_forward(Tensor input, SymInt[] output_size, {_WINDOW}) -> (Tensor, Tensor)", meta=_max_pool_forward_meta
)
def max_pool_forward(input, output_size, kernel_size, stride, padding, dilation, channels_last):
    window = kernel_size, stride, padding, dilation
    output, winner = _max_pool_forward_meta(input, output_size, *window, channels_last)
    lowest = -math.inf if input.is_floating_point() else torch.iinfo(input.dtype).min
    best = torch.full_like(output, lowest)
    code = _first_tap(input, output_size, window).expand(output.shape)
    for tap, value, inside in _taps(input, output_size, window):
        better = inside & ((value > best) | value.isnan())
        best = torch.where(better, value, best)
        code = torch.where(better, tap, code)
    return output.copy_(best), winner.copy_(code)  # (N, C, *O)


def _max_pool_scatter_meta(grad_output, winner, input_size, kernel_size, stride, padding, dilation, channels_last):
    shape = (*grad_output.shape[:2], *input_size)
    return geometry.empty_like_format(grad_output, shape, grad_output.dtype, channels_last)


@kernel(
    f"max_pool_scatter(Tensor grad_output, Tensor winner, SymInt[] input_size, {_WINDOW}) -> Tensor",
    meta=_max_pool_scatter_meta,
)
def max_pool_scatter(grad_output, winner, input_size, kernel_size, stride, padding, dilation, channels_last):
    window = kernel_size, stride, padding, dilation
    output_size = grad_output.shape[2:]
    grad_input = _max_pool_scatter_meta(grad_output, winner, input_size, *window, channels_last)
    total = torch.zeros_like(grad_input, dtype=geometry.accumulation_dtype(grad_output.dtype))
    tables = geometry.window_positions(input_size, output_size, window)
    covers = [geometry.covering_windows(*table, size) for table, size in zip(tables, input_size, strict=True)]
    for which in itertools.product(*(range(outputs.shape[1]) for outputs, _ in covers)):
        columns = [(outputs[:, j], taps[:, j]) for (outputs, taps), j in zip(covers, which, strict=True)]
        inside = _outer(torch.logical_and, [outputs >= 0 for outputs, _ in columns], winner)
        code = torch.zeros((), dtype=torch.int64, device=winner.device)
        for (_, inside_axis), (_, taps) in zip(tables, columns, strict=True):
            code = code.unsqueeze(-1) * inside_axis.shape[1] + taps.to(
                winner.device
            )  # (*I): the tap that meets input i
        outputs = [outputs for outputs, _ in columns]
        won = inside & (_select(winner, outputs) == code)
        total = total + torch.where(won, _select(grad_output, outputs), 0)
    return grad_input.copy_(total)  # (N, C, *I)


def _max_pool_pick_meta(input, winner, kernel_size, stride, padding, dilation, channels_last):
    return geometry.empty_like_format(input, winner.shape, input.dtype, channels_last)


@kernel(f"max_pool_pick(Tensor input, Tensor winner, {_WINDOW}) -> Tensor", meta=_max_pool_pick_meta)
def max_pool_pick(input, winner, kernel_size, stride, padding, dilation, channels_last):
    window = kernel_size, stride, padding, dilation
    output = _max_pool_pick_meta(input, winner, *window, channels_last)
    picked = torch.zeros_like(output)
    for tap, value, inside in _taps(input, winner.shape[2:], window):
        picked = torch.where(inside & (winner == tap), value, picked)
    return output.copy_(picked)  # (N, C, *O)


# Batch rules: the batch goes into N.


@max_pool_forward.batch_rule
def _(op, batch_size, in_dims, input, *options):
    outputs = op(fold(input, in_dims[0], batch_size), *options)
    return tuple(unfold(output, batch_size) for output in outputs), (0, 0)


@max_pool_scatter.batch_rule
@max_pool_pick.batch_rule
def _(op, batch_size, in_dims, moving, winner, *options):
    moving, winner = fold(moving, in_dims[0], batch_size), fold(winner, in_dims[1], batch_size)
    return unfold(op(moving, winner, *options), batch_size), 0


class MaxPool(ManualFunction):
    @staticmethod
    def forward(input, output_size, window, channels_last, backend):
        return max_pool_forward(input, output_size, *window, channels_last, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, ctx.window, ctx.channels_last, ctx.backend = inputs
        _, winner = output
        ctx.input_size = input.shape[2:]
        ctx.mark_non_differentiable(winner)
        ctx.save_for_backward(winner)

    @staticmethod
    def backward(ctx, grad_output, *_):
        (winner,) = ctx.saved_tensors
        options = ctx.window, ctx.channels_last, ctx.backend
        return MaxPoolScatter.call(grad_output, winner, ctx.input_size, *options), None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        _, _, *options = inputs
        return MaxPoolPick.call(tangents[0], output[1], *options)


class MaxPoolScatter(ManualFunction):
    @staticmethod
    def forward(grad_output, winner, input_size, window, channels_last, backend):
        return max_pool_scatter(grad_output, winner, input_size, *window, channels_last, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, winner, _, ctx.window, ctx.channels_last, ctx.backend = inputs
        ctx.save_for_backward(winner)

    @staticmethod
    def backward(ctx, input, *_):
        (winner,) = ctx.saved_tensors
        options = ctx.window, ctx.channels_last, ctx.backend
        return MaxPoolPick.call(input, winner, *options), None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        _, *rest = inputs
        return MaxPoolScatter.call(tangents[0], *rest)


class MaxPoolPick(ManualFunction):
    @staticmethod
    def forward(input, winner, window, channels_last, backend):
        return max_pool_pick(input, winner, *window, channels_last, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, winner, ctx.window, ctx.channels_last, ctx.backend = inputs
        ctx.input_size = input.shape[2:]
        ctx.save_for_backward(winner)

    @staticmethod
    def backward(ctx, grad_output, *_):
        (winner,) = ctx.saved_tensors
        options = ctx.window, ctx.channels_last, ctx.backend
        return MaxPoolScatter.call(grad_output, winner, ctx.input_size, *options), None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        _, *rest = inputs
        return MaxPoolPick.call(tangents[0], *rest)


def _flat_indices(winner: Tensor, input_size: Any, window: Any) -> Tensor:
    """torch's indices: the winner's row-major position in its plane of the input, int64."""
    axes, output_size = len(input_size), winner.shape[2:]
    taps = geometry.window_taps(input_size, output_size, window[0])
    code, flat, pitch = winner.to(torch.int64), torch.zeros((), dtype=torch.int64, device=winner.device), 1
    for axis in reversed(range(axes)):
        outputs = torch.arange(output_size[axis], device=winner.device)
        if window[0]:
            start, step = outputs * window[1][axis] - window[2][axis], window[3][axis]
        else:
            start, step = outputs * input_size[axis] // max(1, output_size[axis]), 1
        position = start.reshape(-1, *(1,) * (axes - 1 - axis)) + code % taps[axis] * step
        flat, pitch, code = flat + position * pitch, pitch * input_size[axis], code // taps[axis]
    return flat  # (N, C, *O)


def _pool(op, axes, input, output_size, window, return_indices):
    (input,) = autocast.cast(op, input)
    backend = modes.current_backend()
    if input.dtype in _INTEGER_DTYPES:
        backend = "python"  # nothing to differentiate, nobody's bottleneck
    else:
        geometry.check_floating(op, "input", input)
    batched = input if input.dim() == axes + 2 else input.contiguous().unsqueeze(0)
    if axes == 1 and geometry.prefers_channels_last(batched.unsqueeze(2)):
        # Channels innermost, as an image of height 1: then the output's are innermost too.
        image = geometry.window_of_image(window)
        results = _pool(op, 2, batched.unsqueeze(2), [1, *output_size], image, return_indices)
        return tuple(result.squeeze(2) for result in results) if return_indices else results.squeeze(2)
    # torch's adaptive pools of 3 dimensions return contiguous tensors whatever they are given.
    adaptive = window is geometry.ADAPTIVE
    channels_last = not (axes == 3 and adaptive) and geometry.prefers_channels_last(batched)
    results = MaxPool.call(batched, output_size, window, channels_last, backend)
    if return_indices:
        results = results[0], _flat_indices(results[1], batched.shape[2:], window)
    else:
        results = results[:1]
    results = results if batched is input else tuple(result.squeeze(0) for result in results)
    return results if return_indices else results[0]


@recipes.unrecorded
def _max_pool(op, axes, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices):
    geometry.check_tensor(op, "input", input)
    geometry.check_bool(op, "ceil_mode", ceil_mode)
    window = geometry.pool_window(op, axes, input, kernel_size, stride, padding, dilation)
    if math.prod(window[0]) >= 2**31:
        raise NotImplementedError(f"{op}: a window may have 2^31 - 1 taps at most, got kernel_size={window[0]}")
    output_size = geometry.pool_output_size(op, input.shape[-axes:], window, ceil_mode)
    return _pool(op, axes, input, output_size, window, return_indices)


def max_pool1d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """1-d max pooling: `torch.nn.functional.max_pool1d`.

    Args:
        input: (N, C, L) or (C, L).
        kernel_size: taps of the window; an int or a tuple with one int an axis, as the next three.
        stride: step of the window, in input elements; kernel_size if None.
        padding: elements put on both sides of an axis that never win; at most half of kernel_size.
        dilation: distance between the taps of the window.
        ceil_mode: keep a last window that sticks out at the end, if it starts inside the input or the left padding.
        return_indices: return the winners' positions as well.

    Returns:
        (N, C, L_out) or (C, L_out), L_out = floor((L + 2*padding - dilation*(kernel_size-1) - 1) / stride) + 1, ceil
        for ceil_mode; with return_indices a pair of it and the int64 row-major positions of the winners in their
        planes.

    Raises:
        RuntimeError: for shapes or options that do not go together.
        TypeError: for arguments of another type.
        NotImplementedError: for bool and complex dtypes.

    Formula: `manual_ops.ops.max_pool`, (forward).
    """
    return _max_pool("max_pool1d", 1, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool2d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """2-d max pooling: `torch.nn.functional.max_pool2d`.

    Args, returns and errors are those of `max_pool1d`, with input (N, C, H, W) or (C, H, W).
    """
    return _max_pool("max_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool3d(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """3-d max pooling: `torch.nn.functional.max_pool3d`.

    Args, returns and errors are those of `max_pool1d`, with input (N, C, D, H, W) or (C, D, H, W).
    """
    return _max_pool("max_pool3d", 3, input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def max_pool1d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    """`max_pool1d`, with the positions of the winners whatever return_indices says, as torch's function of the name."""
    op = "max_pool1d_with_indices"
    return _max_pool(op, 1, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool2d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    """`max_pool2d`, with the positions of the winners; see `max_pool1d_with_indices`."""
    op = "max_pool2d_with_indices"
    return _max_pool(op, 2, input, kernel_size, stride, padding, dilation, ceil_mode, True)


def max_pool3d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    """`max_pool3d`, with the positions of the winners; see `max_pool1d_with_indices`."""
    op = "max_pool3d_with_indices"
    return _max_pool(op, 3, input, kernel_size, stride, padding, dilation, ceil_mode, True)


@recipes.unrecorded
def _adaptive_max_pool(op, axes, input, output_size, return_indices):
    geometry.check_tensor(op, "input", input)
    sizes = geometry.adaptive_output_size(op, axes, input, output_size)
    geometry.check_pool_input(op, axes, input)
    return _pool(op, axes, input, sizes, geometry.ADAPTIVE, return_indices)


def adaptive_max_pool1d(input, output_size, return_indices=False):
    """1-d max pooling of the input cut into pieces: `torch.nn.functional.adaptive_max_pool1d`.

    Args:
        input: (N, C, L) or (C, L).
        output_size: L_out; an int or a tuple with one int an axis (None, where there are several: as the input).
        return_indices: return the winners' positions as well.

    Returns:
        (N, C, L_out) or (C, L_out); output o is the largest of inputs floor(o*L/L_out) .. ceil((o+1)*L/L_out) - 1. With
        return_indices a pair of it and the int64 row-major positions of the winners in their planes.

    Raises:
        RuntimeError: for shapes or sizes that do not go together.
        TypeError: for arguments of another type.
        NotImplementedError: for bool and complex dtypes.

    Formula: `manual_ops.ops.max_pool`, (forward).
    """
    return _adaptive_max_pool("adaptive_max_pool1d", 1, input, output_size, return_indices)


def adaptive_max_pool2d(input, output_size, return_indices=False):
    """2-d max pooling of the input cut into pieces: `torch.nn.functional.adaptive_max_pool2d`.

    Args, returns and errors are those of `adaptive_max_pool1d`, with input (N, C, H, W) or (C, H, W).
    """
    return _adaptive_max_pool("adaptive_max_pool2d", 2, input, output_size, return_indices)


def adaptive_max_pool3d(input, output_size, return_indices=False):
    """3-d max pooling of the input cut into pieces: `torch.nn.functional.adaptive_max_pool3d`.

    Args, returns and errors are those of `adaptive_max_pool1d`, with input (N, C, D, H, W) or (C, D, H, W).
    """
    return _adaptive_max_pool("adaptive_max_pool3d", 3, input, output_size, return_indices)


def adaptive_max_pool1d_with_indices(input, output_size, return_indices=False):
    """`adaptive_max_pool1d`, with the positions of the winners; see `max_pool1d_with_indices`."""
    return _adaptive_max_pool("adaptive_max_pool1d_with_indices", 1, input, output_size, True)


def adaptive_max_pool2d_with_indices(input, output_size, return_indices=False):
    """`adaptive_max_pool2d`, with the positions of the winners; see `max_pool1d_with_indices`."""
    return _adaptive_max_pool("adaptive_max_pool2d_with_indices", 2, input, output_size, True)


def adaptive_max_pool3d_with_indices(input, output_size, return_indices=False):
    """`adaptive_max_pool3d`, with the positions of the winners; see `max_pool1d_with_indices`."""
    return _adaptive_max_pool("adaptive_max_pool3d_with_indices", 3, input, output_size, True)
