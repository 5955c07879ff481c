"""Convolution and transposed convolution in 1, 2 and 3 dimensions, every derivative of both.

What deep learning calls a convolution is a cross-correlation. Per axis, with stride s, padding p and dilation d,

    y[n, f, o] = bias[f] + sum over c, t of  x[n, c, o*s - p + t*d] * w[f, c, t]                              (forward)

where f runs over the output channels, c over the input channels of f's group, t over the taps of the window, and x is
zero outside its bounds. y is linear in x and linear in w, so with g = dL/dy the chain rule gives two more sums over the
same triples (o, t, i = o*s - p + t*d), each collected at another corner:

    dL/dw[f, c, t] = sum over n, o of     g[n, f, o] * x[n, c, o*s - p + t*d]                             (weight_grad)
    dL/dx[n, c, i] = sum over f, (o, t) with o*s - p + t*d = i of  g[n, f, o] * w[f, c, t]                  (input_grad)
    dL/dbias[f]    = sum over n, o of     g[n, f, o]                                                     (channel_sum)

The input gradient asks for outputs o = (i + p - t*d) / s that are whole: spread g with s-1 zeros between its entries
and it becomes a correlation with the flipped window. It needs the input's size, for the floor in the output size
forgets up to s-1 inputs that no window reaches. The weight gradient is a correlation in which g is the window, and
there the roles of stride and dilation are exchanged.

The three are one trilinear form, sum of g * w * x, differentiated by each of its arguments in turn. So each one's
derivatives are the other two, to every order:

    forward(x, w)      by x: input_grad(g, w)     by w: weight_grad(g, x)
    input_grad(g, w)   by g: forward(x, w)        by w: weight_grad(g, x)        x: the gradient that comes in
    weight_grad(g, x)  by g: forward(x, w)        by x: input_grad(g, w)         w: the gradient that comes in

Transposed convolution is input_grad used as a layer: its input is g, its output is x.

Saved for backward: the input only if the weight needs a gradient, the weight only if the input does.

In the code: x is `input`, w `weight`, g `grad_output`; shapes are (N, C, *I), (F, C/groups, *T) and (N, F, *O).
`options` is (stride, padding, dilation, groups, fast); what `fast` allows the native kernels is told in
`manual_ops.modes.set_precision`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_ops import autocast, geometry, modes, recipes
from manual_ops.autograd import ManualFunction, sum_of_terms
from manual_ops.kernel import fold, in_front, kernel, unfold
from manual_ops.ops.channel_sum import ChannelSum, per_channel

# Subscripts of einsum: the axes of the output and of the window.
_O, _T = "xyz", "uvw"


def _empty(shape: list[int], first: Tensor, second: Tensor) -> Tensor:
    return first.new_empty(shape).to(memory_format=_memory_format(first, second))


def _memory_format(first: Tensor, second: Tensor) -> torch.memory_format:
    """channels_last as soon as one of the two operands is, as in torch."""
    chosen = geometry.channels_last_format(first)
    return geometry.channels_last_format(second) if chosen is torch.contiguous_format else chosen


def _windows(input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, output_size: Any) -> Tensor:
    """The input under every window: (N, C, *I) -> (N, C, *O, *T), a view of the zero-padded input."""
    pads = []
    for axis in reversed(range(len(kernel_size))):
        reach = (output_size[axis] - 1) * stride[axis] + (kernel_size[axis] - 1) * dilation[axis] + 1
        pads += [padding[axis], max(0, reach - padding[axis] - input.shape[2 + axis])]
    padded = F.pad(input, pads)
    steps = padded.stride()
    return padded.as_strided(
        (*input.shape[:2], *output_size, *kernel_size),
        (
            *steps[:2],
            *(step * by for step, by in zip(steps[2:], stride, strict=True)),
            *(step * by for step, by in zip(steps[2:], dilation, strict=True)),
        ),
    )


def _spread(grad_output: Tensor, stride: Any) -> Tensor:
    """stride-1 zeros between neighbours, along each axis."""
    for axis, step in enumerate(stride, start=2):
        zeros_behind = F.pad(grad_output.unsqueeze(axis + 1).movedim(axis + 1, -1), (0, step - 1)).movedim(-1, axis + 1)
        spread = zeros_behind.flatten(axis, axis + 1)
        grad_output = spread.narrow(axis, 0, max(0, spread.shape[axis] - step + 1))
    return grad_output


def _conv_forward_meta(input, weight, bias, output_size, stride, padding, dilation, groups, fast=False):
    return _empty([input.shape[0], weight.shape[0], *output_size], input, weight)


@kernel(
    "conv_forward(Tensor input, Tensor weight, Tensor? bias, SymInt[] output_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool fast=False) -> Tensor",
    meta=_conv_forward_meta,
)
def conv_forward(input, weight, bias, output_size, stride, padding, dilation, groups, fast=False):
    axes = len(stride)
    o, t = _O[:axes], _T[:axes]
    x, w = map(geometry.widened, (input, weight))
    windows = _windows(x, weight.shape[2:], stride, padding, dilation, output_size).unflatten(1, (groups, -1))
    output = torch.einsum(f"ngc{o}{t},gfc{t}->ngf{o}", windows, w.unflatten(0, (groups, -1))).flatten(1, 2)
    if bias is not None:
        output = output + per_channel(bias, output.dim())
    return output.to(input.dtype).contiguous(memory_format=_memory_format(input, weight))  # (N, F, *O)


def _conv_input_grad_meta(grad_output, weight, bias, input_size, stride, padding, dilation, groups, fast=False):
    return _empty([grad_output.shape[0], weight.shape[1] * groups, *input_size], grad_output, weight)


@kernel(
    "conv_input_grad(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] input_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool fast=False) -> Tensor",
    meta=_conv_input_grad_meta,
)
def conv_input_grad(grad_output, weight, bias, input_size, stride, padding, dilation, groups, fast=False):
    axes = len(stride)
    o, t = _O[:axes], _T[:axes]
    g, w = map(geometry.widened, (grad_output, weight))
    flipped = w.flip(list(range(2, 2 + axes))).unflatten(0, (groups, -1))
    # Input i meets, at tap t of the flipped window, the spread gradient at i + p - d*(T-1) + t*d.
    first = [d * (size - 1) - p for d, size, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    spread = _spread(g, stride)
    crop = [max(0, -f) for f in first]
    for axis in range(axes):
        spread = spread.narrow(2 + axis, crop[axis], max(0, spread.shape[2 + axis] - crop[axis]))
    once = [1] * axes
    windows = _windows(spread, weight.shape[2:], once, [max(0, f) for f in first], dilation, input_size)
    windows = windows.unflatten(1, (groups, -1))
    grad_input = torch.einsum(f"ngf{o}{t},gfc{t}->ngc{o}", windows, flipped).flatten(1, 2)
    if bias is not None:
        grad_input = grad_input + per_channel(bias, grad_input.dim())
    return grad_input.to(grad_output.dtype).contiguous(memory_format=_memory_format(grad_output, weight))  # (N, C, *I)


def _conv_weight_grad_meta(grad_output, input, kernel_size, stride, padding, dilation, groups, fast=False):
    return _empty([grad_output.shape[1], input.shape[1] // groups, *kernel_size], input, grad_output)


@kernel(
    "conv_weight_grad(Tensor grad_output, Tensor input, SymInt[] kernel_size, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool fast=False) -> Tensor",
    meta=_conv_weight_grad_meta,
)
def conv_weight_grad(grad_output, input, kernel_size, stride, padding, dilation, groups, fast=False):
    axes = len(stride)
    o, t = _O[:axes], _T[:axes]
    g, x = map(geometry.widened, (grad_output, input))
    windows = _windows(x, kernel_size, stride, padding, dilation, grad_output.shape[2:]).unflatten(1, (groups, -1))
    grad_weight = torch.einsum(f"ngf{o},ngc{o}{t}->gfc{t}", g.unflatten(1, (groups, -1)), windows).flatten(0, 1)
    return grad_weight.to(input.dtype).contiguous(memory_format=_memory_format(input, grad_output))  # (F, C/groups, *T)


# Batch rules. A batch of images goes into the batch, a batch of weights into the channels that only the weight has, and
# a batch of both into the groups.


def _with_fast(options):
    """All five options: one that has its default, as `fast`, is left out on the way to a batch rule."""
    return (*options, False)[:5]


def _fold_convolution(op, batch_size, in_dims, moving, weight, bias, size, options):
    """conv_forward and conv_input_grad: `moving` is (N, channels, ...); only the weight's other channel differs."""
    moving_dim, weight_dim, bias_dim = in_dims[:3]
    *window, groups, fast = _with_fast(options)
    out_channel_of_weight = 0 if op in (conv_forward.native, conv_forward.python) else 1
    if weight_dim is None and moving_dim is not None:
        output = unfold(op(fold(moving, moving_dim, batch_size), weight, None, size, *window, groups, fast), batch_size)
    elif moving_dim is None and weight_dim is not None:
        inner_groups = groups if out_channel_of_weight == 0 else 1
        folded = fold(weight, weight_dim, batch_size, out_channel_of_weight, inner_groups)
        output = unfold(op(moving, folded, None, size, *window, groups, fast), batch_size, 1, groups)
    elif weight_dim is not None:
        operands = fold(moving, moving_dim, batch_size, 1), fold(weight, weight_dim, batch_size)
        output = unfold(op(*operands, None, size, *window, groups * batch_size, fast), batch_size, 1)
    else:
        output = op(moving, weight, None, size, *window, groups, fast).unsqueeze(0)
    if bias is None:
        return output, 0
    bias = in_front(bias, bias_dim, batch_size)  # (B, channels)
    return output + bias.reshape(batch_size, 1, -1, *(1,) * len(size)), 0


@conv_forward.batch_rule
def _(op, batch_size, in_dims, input, weight, bias, output_size, *options):
    return _fold_convolution(op, batch_size, in_dims, input, weight, bias, output_size, options)


@conv_input_grad.batch_rule
def _(op, batch_size, in_dims, grad_output, weight, bias, input_size, *options):
    return _fold_convolution(op, batch_size, in_dims, grad_output, weight, bias, input_size, options)


@conv_weight_grad.batch_rule
def _(op, batch_size, in_dims, grad_output, input, kernel_size, *options):
    grad_dim, input_dim = in_dims[:2]
    *window, groups, fast = _with_fast(options)
    if input_dim is None:
        folded = fold(grad_output, grad_dim, batch_size, 1, groups)
        return unfold(op(folded, input, kernel_size, *window, groups, fast), batch_size, 0, groups), 0
    if grad_dim is None:
        folded = fold(input, input_dim, batch_size, 1, groups)
        return unfold(op(grad_output, folded, kernel_size, *window, groups, fast), batch_size, 1), 0
    operands = fold(grad_output, grad_dim, batch_size, 1), fold(input, input_dim, batch_size, 1)
    return unfold(op(*operands, kernel_size, *window, groups * batch_size, fast), batch_size), 0


class ConvForward(ManualFunction):
    @staticmethod
    def forward(input, weight, bias, output_size, options, backend):
        return conv_forward(input, weight, bias, output_size, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, _, ctx.options, ctx.backend = inputs
        ctx.input_size, ctx.kernel_size = input.shape[2:], weight.shape[2:]
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(input if weight_needs else None, weight if input_needs else None)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = ConvInputGrad.call(grad_output, weight, None, ctx.input_size, ctx.options, ctx.backend)
        if ctx.needs_input_grad[1]:
            grad_weight = ConvWeightGrad.call(grad_output, input, ctx.kernel_size, ctx.options, ctx.backend)
        if ctx.needs_input_grad[2]:
            grad_bias = ChannelSum.call(grad_output, ctx.backend)
        return grad_input, grad_weight, grad_bias, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        input, weight, _, *rest = inputs
        input_tangent, weight_tangent, bias_tangent, *_ = tangents
        return sum_of_terms(
            None if input_tangent is None else ConvForward.call(input_tangent, weight, None, *rest),
            None if weight_tangent is None else ConvForward.call(input, weight_tangent, None, *rest),
            None if bias_tangent is None else per_channel(bias_tangent, output.dim()).expand_as(output),
        )


class ConvInputGrad(ManualFunction):
    @staticmethod
    def forward(grad_output, weight, bias, input_size, options, backend):
        return conv_input_grad(grad_output, weight, bias, input_size, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, _, _, ctx.options, ctx.backend = inputs
        ctx.output_size, ctx.kernel_size = grad_output.shape[2:], weight.shape[2:]
        grad_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(grad_output if weight_needs else None, weight if grad_needs else None)

    @staticmethod
    def backward(ctx, input):
        grad_output, weight = ctx.saved_tensors
        by_grad_output = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_grad_output = ConvForward.call(input, weight, None, ctx.output_size, ctx.options, ctx.backend)
        if ctx.needs_input_grad[1]:
            by_weight = ConvWeightGrad.call(grad_output, input, ctx.kernel_size, ctx.options, ctx.backend)
        if ctx.needs_input_grad[2]:
            by_bias = ChannelSum.call(input, ctx.backend)
        return by_grad_output, by_weight, by_bias, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        grad_output, weight, _, *rest = inputs
        grad_tangent, weight_tangent, bias_tangent, *_ = tangents
        return sum_of_terms(
            None if grad_tangent is None else ConvInputGrad.call(grad_tangent, weight, None, *rest),
            None if weight_tangent is None else ConvInputGrad.call(grad_output, weight_tangent, None, *rest),
            None if bias_tangent is None else per_channel(bias_tangent, output.dim()).expand_as(output),
        )


class ConvWeightGrad(ManualFunction):
    @staticmethod
    def forward(grad_output, input, kernel_size, options, backend):
        return conv_weight_grad(grad_output, input, kernel_size, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, _, ctx.options, ctx.backend = inputs
        ctx.output_size, ctx.input_size = grad_output.shape[2:], input.shape[2:]
        grad_needs, input_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(grad_output if input_needs else None, input if grad_needs else None)

    @staticmethod
    def backward(ctx, weight):
        grad_output, input = ctx.saved_tensors
        by_grad_output = by_input = None
        if ctx.needs_input_grad[0]:
            by_grad_output = ConvForward.call(input, weight, None, ctx.output_size, ctx.options, ctx.backend)
        if ctx.needs_input_grad[1]:
            by_input = ConvInputGrad.call(grad_output, weight, None, ctx.input_size, ctx.options, ctx.backend)
        return by_grad_output, by_input, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        grad_output, input, *rest = inputs
        grad_tangent, input_tangent, *_ = tangents
        return sum_of_terms(
            None if grad_tangent is None else ConvWeightGrad.call(grad_tangent, input, *rest),
            None if input_tangent is None else ConvWeightGrad.call(grad_output, input_tangent, *rest),
        )


def _check_operands(op: str, axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, out_channels: int) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            geometry.check_alike(op, name, tensor, input, "dtype", "device")
    if bias is not None and tuple(bias.shape) != (out_channels,):
        raise RuntimeError(f"{op}: bias must have the shape ({out_channels},), got {tuple(bias.shape)}")
    if any(size == 0 for size in weight.shape[2:]):
        raise RuntimeError(f"{op}: weight must have a window of at least one tap, got {tuple(weight.shape)}")
    if any(size == 0 for size in input.shape[-axes:]) and all(size > 0 for size in input.shape[:-axes]):
        raise RuntimeError(f"{op}: input may have no images or no channels, but not no pixels: {tuple(input.shape)}")


def _check_ranks(op: str, axes: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    geometry.check_tensor(op, "input", input)
    geometry.check_tensor(op, "weight", weight)
    if bias is not None:
        geometry.check_tensor(op, "bias", bias)
    if weight.dim() != axes + 2:
        raise RuntimeError(f"{op}: weight must have {axes + 2} dimensions, got the shape {tuple(weight.shape)}")
    if input.dim() not in (axes + 1, axes + 2):
        raise RuntimeError(
            f"{op}: input must have {axes + 2} dimensions, or {axes + 1} unbatched, got the shape {tuple(input.shape)}"
        )
    geometry.check_floating(op, "input", input)


def _check_window(op: str, stride: Any, padding: Any, dilation: Any, groups: Any) -> None:
    for name, values, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
        if any(value < least for value in values):
            raise RuntimeError(f"{op}: {name} must be at least {least}, got {values}")
    if groups < 1:
        raise RuntimeError(f"{op}: groups must be at least 1, got {groups}")


@recipes.unrecorded
def _convolution(op, axes, input, weight, bias, stride, padding, dilation, groups):
    input, weight, bias = autocast.cast(op, input, weight, bias)
    _check_ranks(op, axes, input, weight, bias)
    stride = geometry.per_axis(op, "stride", stride, axes)
    dilation = geometry.per_axis(op, "dilation", dilation, axes)
    groups = geometry.whole(op, "groups", groups)
    kernel_size = weight.shape[2:]
    if isinstance(padding, str) and padding == "same":
        if any(step != 1 for step in stride):
            raise RuntimeError(f"{op}: padding='same' needs stride 1, got {stride}")
        left = [d * (size - 1) // 2 for d, size in zip(dilation, kernel_size, strict=True)]
    elif isinstance(padding, str) and padding != "valid":
        raise RuntimeError(f"{op}: padding must be ints, 'same' or 'valid', got {padding!r}")
    else:
        left = geometry.per_axis(op, "padding", 0 if isinstance(padding, str) else padding, axes)
    _check_window(op, stride, left, dilation, groups)
    if weight.shape[0] % groups or weight.shape[0] < groups:
        raise RuntimeError(f"{op}: weight's {weight.shape[0]} output channels must be a multiple of groups={groups}")
    channels = input.shape[-axes - 1]
    if channels != weight.shape[1] * groups:
        raise RuntimeError(
            f"{op}: input must have {weight.shape[1] * groups} channels (weight.shape[1]={weight.shape[1]} times "
            f"groups={groups}), got {channels} in the shape {tuple(input.shape)}"
        )
    _check_operands(op, axes, input, weight, bias, weight.shape[0])

    input_size = input.shape[-axes:]
    if isinstance(padding, str) and padding == "same":
        output_size = list(input_size)
    else:
        output_size = geometry.window_output_size(input_size, kernel_size, stride, left, dilation)
    if any(size <= 0 for size in output_size):
        raise RuntimeError(
            f"{op}: the window (kernel_size={list(kernel_size)}, dilation={dilation}) is larger than the padded input "
            f"(size={list(input_size)}, padding={left})"
        )
    batched = input if input.dim() == axes + 2 else input.unsqueeze(0)
    options = (stride, left, dilation, groups, modes.current_precision() == "fast")
    output = ConvForward.call(batched, weight, bias, output_size, options, modes.current_backend())
    if weight.requires_grad and recipes.active():
        recipes.keep(output, 0, batched)
    return output if batched is input else output.squeeze(0)


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """1-d convolution (cross-correlation): `torch.nn.functional.conv1d`.

    Args:
        input: (N, C, L) or (C, L).
        weight: (F, C / groups, T).
        bias: (F,) or None.
        stride: step of the window, in input elements; an int or a tuple with one int an axis, as all of these.
        padding: zeros put on both sides of an axis, or "valid" (none) or "same" (the output has the input's size).
        dilation: distance between the taps of the window.
        groups: how many independent convolutions the channels are cut into.

    Returns:
        (N, F, L_out) or (F, L_out), L_out = floor((L + 2*padding - dilation*(T-1) - 1) / stride) + 1.

    Raises:
        RuntimeError: for shapes, dtypes, devices or options that do not go together.
        TypeError: for arguments of another type.
        NotImplementedError: for dtypes that are not floating.

    Formula: `manual_ops.ops.convolution`, (forward).
    """
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """2-d convolution: `torch.nn.functional.conv2d`.

    Args, returns and errors are those of `conv1d`, with input (N, C, H, W) or (C, H, W), weight (F, C / groups, T, U).
    """
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """3-d convolution: `torch.nn.functional.conv3d`.

    Args, returns and errors are those of `conv1d`, with input (N, C, D, H, W) or (C, D, H, W), weight
    (F, C / groups, S, T, U).
    """
    return _convolution("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


@recipes.unrecorded
def _conv_transpose(op, axes, input, weight, bias, stride, padding, output_padding, groups, dilation):
    input, weight, bias = autocast.cast(op, input, weight, bias)
    _check_ranks(op, axes, input, weight, bias)
    stride = geometry.per_axis(op, "stride", stride, axes)
    padding = geometry.per_axis(op, "padding", padding, axes)
    output_padding = geometry.per_axis(op, "output_padding", output_padding, axes)
    dilation = geometry.per_axis(op, "dilation", dilation, axes)
    groups = geometry.whole(op, "groups", groups)
    _check_window(op, stride, padding, dilation, groups)
    for extra, step, dil in zip(output_padding, stride, dilation, strict=True):
        if extra < 0 or (extra >= step and extra >= dil):
            raise RuntimeError(
                f"{op}: output_padding must be at least 0 and smaller than stride or dilation, got {output_padding} "
                f"with stride={stride}, dilation={dilation}"
            )
    channels = input.shape[-axes - 1]
    if channels != weight.shape[0]:
        raise RuntimeError(
            f"{op}: input must have {weight.shape[0]} channels (weight.shape[0]), got {channels} in the shape "
            f"{tuple(input.shape)}"
        )
    if weight.shape[0] % groups or weight.shape[0] < groups:
        raise RuntimeError(f"{op}: weight's {weight.shape[0]} input channels must be a multiple of groups={groups}")
    if weight.shape[1] == 0:
        raise RuntimeError(f"{op}: weight must have at least 1 output channel, got the shape {tuple(weight.shape)}")
    _check_operands(op, axes, input, weight, bias, weight.shape[1] * groups)
    output_size = [
        (size - 1) * step - 2 * pad + dil * (kernel_size - 1) + extra + 1
        for size, step, pad, dil, kernel_size, extra in zip(
            input.shape[-axes:], stride, padding, dilation, weight.shape[2:], output_padding, strict=True
        )
    ]
    if any(size <= 0 for size in output_size):
        raise RuntimeError(f"{op}: the output would have the size {output_size}: padding={padding} is too large")
    batched = input if input.dim() == axes + 2 else input.unsqueeze(0)
    options = (stride, padding, dilation, groups, modes.current_precision() == "fast")
    output = ConvInputGrad.call(batched, weight, bias, output_size, options, modes.current_backend())
    if weight.requires_grad and recipes.active():
        recipes.keep(output, 0, batched)
    return output if batched is input else output.squeeze(0)


def conv_transpose1d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """1-d transposed convolution: `torch.nn.functional.conv_transpose1d`.

    The input gradient of a convolution, as a layer: each input element spreads its window over the output.

    Args:
        input: (N, C, L) or (C, L).
        weight: (C, F / groups, T), the weight of the convolution that this one transposes.
        bias: (F,) or None.
        stride: distance, in output elements, between the windows of neighbouring inputs.
        padding: outputs cut from both ends.
        output_padding: outputs added at the far end, less than stride or dilation: sizes that the convolution's floor
            maps to one and the same are told apart by it.
        groups: how many independent convolutions the channels are cut into.
        dilation: distance between the taps of the window.

    Returns:
        (N, F, L_out) or (F, L_out), L_out = (L-1)*stride - 2*padding + dilation*(T-1) + output_padding + 1.

    Raises:
        RuntimeError: for shapes, dtypes, devices or options that do not go together.
        TypeError: for arguments of another type.
        NotImplementedError: for dtypes that are not floating.

    Formula: `manual_ops.ops.convolution`, (input_grad).
    """
    return _conv_transpose(
        "conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """2-d transposed convolution: `torch.nn.functional.conv_transpose2d`; see `conv_transpose1d`."""
    return _conv_transpose(
        "conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """3-d transposed convolution: `torch.nn.functional.conv_transpose3d`; see `conv_transpose1d`."""
    return _conv_transpose(
        "conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )
