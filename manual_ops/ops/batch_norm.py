"""Batch normalisation, alone and fused with the ReLU and the residual that follow it, with every derivative of both.

Per channel, over the m values x_i that its images and positions hold,

    mean = sum_i x_i / m        var = sum_i (x_i - mean)^2 / m        rstd = 1 / sqrt(var + eps)
    xhat_i = (x_i - mean) * rstd
    y_i = w * xhat_i + b                                                                                   (forward)

w and b meet y through two sums alone: with g = dL/dy,

    dL/db = sum_i g_i        dL/dw = sum_i g_i * xhat_i                                                       (sums)

x meets y directly and through mean and rstd. One at a time,

    dmean/dx_j = 1/m
    dvar/dx_j  = 2 (x_j - mean) / m                           (the term with dmean has the factor sum (x_i - mean) = 0)
    drstd/dx_j = -1/2 rstd^3 dvar/dx_j = -rstd^2 * xhat_j / m                                                 (rstd)
    dxhat_i/dx_j = rstd * ([i = j] - 1/m - xhat_i * xhat_j / m)

so that, writing <.> for the mean over the channel and P for the symmetric matrix in the last line,

    dL/dx = w * rstd * P g        P g = g - <g> - xhat * <g xhat>                                       (input_grad)

P takes from g its mean and its share along xhat: what shifting and scaling x cannot change in y. In evaluation mode
mean and var are the running statistics, which are constants, and P is the identity.

Second derivatives. (forward) and (sums) are derivatives of one expression, w * sum(g xhat) + b * sum(g), so each one's
derivatives are the other's formula: for incoming gradients (q, p) of the two sums,

    (sums)         by g: q + p * xhat, which is (forward)        by x: p * rstd * P g, which is (input_grad)

For (input_grad) with the incoming gradient h, the number to differentiate is

    w * rstd * sum(h * P g) = m * w * rstd * (<gh> - <g><h> - a*c)        a = <g xhat>,  c = <h xhat>

    by g: w * rstd * P h                                                                    P is symmetric: (input_grad)
    by w: m * rstd * (<gh> - <g><h> - a*c)                                                               (projected_dot)
    by x: rstd changes by (rstd), a by rstd * P g / m and c by rstd * P h / m:
          -w * rstd^2 * (xhat * (<gh> - <g><h> - a*c) + c * P g + a * P h)
        = -w * rstd^2 * (xhat * (<gh> - <g><h> - 3*a*c) + c * (g - <g>) + a * (h - <h>))                   (second_grad)

(second_grad) is (forward) with other weights, plus g and h scaled per channel, under coefficients made of (sums),
(rstd) and a dot product per channel: all of them Functions here, so it can be differentiated as often as one likes. In
each Function mean and var come in as numbers that were computed once; what they owe to x is part of its derivative by
x. x -> (input_grad) is the gradient of x -> w * sum(g xhat), its derivative a Hessian: (second_grad) is also its
tangent.

ReLU passes g where its result r = relu(y + residual) is not <= 0 (a NaN passes) and stops it elsewhere; the masked g is
the residual's gradient and the g of all of the above.

Saved for backward: the input, the weight, and mean and var, one number a channel each; in evaluation mode the input
only if the weight needs a gradient. ReLU's mask is recomputed from these and the bias, by the forward's own arithmetic;
with a residual it is kept, one bit an element.

In the code: x is `input` (N, C, ...), w `weight`, b `bias`, g `grad_output`, m `count`; mean, var and sums have the
dtype of accumulation. `training` says that mean and var are the input's own.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from manual_ops import autocast, geometry, modes, recipes
from manual_ops.autograd import ManualFunction, sum_of_terms, transforms_active
from manual_ops.geometry import accumulation_dtype
from manual_ops.kernel import fold, in_front, kernel, unfold
from manual_ops.ops.channel_sum import ChannelSum, per_channel


def _others(input: Tensor) -> list[int]:
    return [dim for dim in range(input.dim()) if dim != 1]


def _count(input: Tensor) -> int:
    """How many values a channel holds."""
    return input.shape[0] * math.prod(input.shape[2:])


def _like_input(tensor: Tensor, input: Tensor) -> Tensor:
    """In the input's dtype and memory format."""
    return tensor.to(input.dtype).contiguous(memory_format=geometry.channels_last_format(input))


def _empty_like(input: Tensor) -> Tensor:
    return input.new_empty(input.shape).to(memory_format=geometry.channels_last_format(input))


def _xhat(input: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    x = input.to(accumulation_dtype(input.dtype))
    if mean is None or var is None:
        return x
    return (x - per_channel(mean, x.dim())) * per_channel((var + eps).rsqrt(), x.dim())


def _normalise(input, residual, mean, var, weight, bias, eps):
    """y, plus the residual: what the ReLU sees, in the input's dtype."""
    y = _xhat(input, mean, var, eps)
    if weight is not None:
        y = y * per_channel(weight, y.dim())
    if bias is not None:
        y = y + per_channel(bias, y.dim())
    if residual is not None:
        y = y + residual
    return y.to(input.dtype)


# The mask has one bit an element, eight to a byte, lowest first. Contiguous inputs are packed plane by plane, as
# (N, C, bytes); where the channels are innermost, eight rows (pixels) share a row of bytes: (bytes, C).


def _is_rows(input: Tensor) -> bool:
    return input.dim() == 2 or geometry.channels_last_format(input) is not torch.contiguous_format


def _mask_shape(input: Tensor) -> list[int]:
    batch, channels, *size = input.shape
    pixels = math.prod(size)
    return [(batch * pixels + 7) // 8, channels] if _is_rows(input) else [batch, channels, (pixels + 7) // 8]


def _pack(passes: Tensor, rows: bool) -> Tensor:
    if rows:
        bits = passes.movedim(1, -1).flatten(0, -2).movedim(0, -1)  # (C, N * pixels)
    else:
        bits = passes.reshape(*passes.shape[:2], math.prod(passes.shape[2:]))  # (N, C, pixels)
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    mask = (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)
    return mask.movedim(-1, 0).contiguous() if rows else mask


def _unpack(mask: Tensor, shape: torch.Size) -> Tensor:
    rows = mask.dim() == 2
    batch, channels, *size = shape
    mask = mask.movedim(0, -1) if rows else mask
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    bits = bits.flatten(-2)
    if rows:
        return bits.narrow(-1, 0, batch * math.prod(size)).movedim(-1, 0).reshape(batch, *size, channels).movedim(-1, 1)
    return bits.narrow(-1, 0, math.prod(size)).reshape(shape)


def _forward_meta(input, residual, mean, var, weight, bias, eps, relu):
    statistics = input.new_empty(input.shape[1:2], dtype=accumulation_dtype(input.dtype))
    mask_shape = _mask_shape(input) if relu and residual is not None else [0]
    mask = input.new_empty(mask_shape, dtype=torch.uint8)
    return _empty_like(input), statistics, torch.empty_like(statistics), mask


@kernel(
    "batch_norm_forward(Tensor input, Tensor? residual, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, "
    "float eps, bool relu) -> (Tensor, Tensor, Tensor, Tensor)",
    meta=_forward_meta,
)
def batch_norm_forward(input, residual, mean, var, weight, bias, eps, relu):
    """(forward), with the statistics that it used (a copy where they are given) and the mask, empty unless needed."""
    accumulated = accumulation_dtype(input.dtype)
    if mean is None:
        count = max(1, _count(input))
        mean = (input.sum(_others(input), dtype=torch.float64) / count).to(accumulated)
        centred = input - per_channel(mean, input.dim())
        var = centred.square().sum(_others(input)) / count
    else:
        mean, var = mean.to(accumulated, copy=True), var.to(accumulated, copy=True)
    output = _normalise(input, residual, mean, var, weight, bias, eps)
    mask = input.new_empty(0, dtype=torch.uint8)
    if relu:
        passes = ~(output <= 0)
        output = torch.where(passes, output, 0)
        if residual is not None:
            mask = _pack(passes, _is_rows(input))
    return _like_input(output, input), mean, var, mask


@kernel(
    "batch_norm_relu_mask(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    meta=lambda input, *_: input.new_empty(_mask_shape(input), dtype=torch.uint8),
)
def batch_norm_relu_mask(input, mean, var, weight, bias, eps):
    """Where relu(y) passes its gradient, from y's arithmetic alone."""
    return _pack(~(_normalise(input, None, mean, var, weight, bias, eps) <= 0), _is_rows(input))


def _masked_grad_meta(grad_output, mask):
    rows = mask.dim() == 2 and grad_output.dim() > 2
    channels_last = torch.channels_last if grad_output.dim() == 4 else torch.channels_last_3d
    empty = grad_output.new_empty(grad_output.shape)
    return empty.to(memory_format=channels_last) if rows else empty


@kernel("batch_norm_masked_grad(Tensor grad_output, Tensor mask) -> Tensor", meta=_masked_grad_meta)
def batch_norm_masked_grad(grad_output, mask):
    """grad_output where the mask has a bit, 0 elsewhere, in the memory format of the input that the mask is of."""
    masked = torch.where(_unpack(mask, grad_output.shape) != 0, grad_output, 0)
    if mask.dim() == 3 or masked.dim() == 2:
        return masked.contiguous()
    return masked.contiguous(memory_format=torch.channels_last if masked.dim() == 4 else torch.channels_last_3d)


def _empty_sums(input: Tensor) -> Tensor:
    return input.new_empty((2, input.shape[1]), dtype=accumulation_dtype(input.dtype))


@kernel(
    "batch_norm_sums(Tensor grad_output, Tensor input, Tensor? mean, Tensor? var, float eps) -> Tensor",
    meta=lambda grad_output, input, *_: _empty_sums(input),
)
def batch_norm_sums(grad_output, input, mean, var, eps):
    """(sums): sum g and sum g * xhat, or sum g * x where there are no statistics."""
    g = grad_output.to(accumulation_dtype(grad_output.dtype))
    return torch.stack([g.sum(_others(g)), (g * _xhat(input, mean, var, eps)).sum(_others(g))])  # (2, C)


@kernel(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "float eps, bool relu) -> (Tensor, Tensor)",
    meta=lambda grad_output, input, *_: (_empty_like(input), _empty_sums(input)),
)
def batch_norm_backward(grad_output, input, mean, var, weight, bias, eps, relu):
    """(input_grad) in training, with its (sums); `relu` masks grad_output first, and only that looks at the bias."""
    g = grad_output.to(accumulation_dtype(grad_output.dtype))
    if relu:
        g = torch.where(_normalise(input, None, mean, var, weight, bias, eps) <= 0, 0, g)
    xhat = _xhat(input, mean, var, eps)
    sums = torch.stack([g.sum(_others(g)), (g * xhat).sum(_others(g))])
    mean_g, mean_gxhat = (per_channel(total, g.dim()) for total in sums / max(1, _count(input)))
    scale = (var + eps).rsqrt() if weight is None else weight * (var + eps).rsqrt()
    return _like_input((g - mean_g - xhat * mean_gxhat) * per_channel(scale, g.dim()), input), sums


@kernel("channel_scale(Tensor input, Tensor scale) -> Tensor", meta=lambda input, scale: _empty_like(input))
def channel_scale(input, scale):
    return _like_input(input * per_channel(scale, input.dim()), input)


@kernel(
    "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, SymInt count, "
    "float momentum) -> ()",
    meta=lambda *_: None,
)
def batch_norm_update(running_mean, running_var, mean, var, count, momentum):
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance: count / (count - 1) * var."""
    unbiased = var * (count / (count - 1))
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        running.copy_((1 - momentum) * running.to(batch.dtype) + momentum * batch)


# Batch rules: channels do not meet, so a batch becomes more of them.


def _channel_dim(dims: int) -> int:
    return 0 if dims == 1 else 1


def _fold_into_channels(op, batch_size, in_dims, *args):
    folded = (
        fold(arg, dim, batch_size, _channel_dim(arg.dim() - (dim is not None))) if isinstance(arg, Tensor) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    )
    outputs = op(*folded)
    if isinstance(outputs, Tensor):
        return unfold(outputs, batch_size, _channel_dim(outputs.dim())), 0
    return tuple(unfold(output, batch_size, _channel_dim(output.dim())) for output in outputs), (0,) * len(outputs)


for _kernel in (
    batch_norm_forward,
    batch_norm_relu_mask,
    batch_norm_masked_grad,
    batch_norm_sums,
    batch_norm_backward,
    channel_scale,
):
    _kernel.batch_rule(_fold_into_channels)


@batch_norm_update.batch_rule
def _(op, batch_size, in_dims, running_mean, running_var, mean, var, count, momentum):
    if in_dims[0] is None or in_dims[1] is None:
        raise RuntimeError(
            "batch_norm: running_mean and running_var are updated in place and must be batched under vmap where the "
            "input is; or let the module track no running statistics"
        )
    statistics = zip((running_mean, running_var, mean, var), in_dims, strict=False)
    return op(*(in_front(tensor, dim, batch_size) for tensor, dim in statistics), count, momentum), None


class ChannelScale(ManualFunction):
    """input * scale per channel; the scale has the dtype of accumulation."""

    @staticmethod
    def forward(input, scale, backend):
        return channel_scale(input, scale, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, scale, ctx.backend = inputs
        input_needs, scale_needs, _ = ctx.needs_input_grad
        ctx.save_for_backward(input if scale_needs else None, scale if input_needs else None)

    @staticmethod
    def backward(ctx, grad_output):
        input, scale = ctx.saved_tensors
        grad_input = ChannelScale.call(grad_output, scale, ctx.backend) if ctx.needs_input_grad[0] else None
        grad_scale = ChannelDot.call(grad_output, input, ctx.backend) if ctx.needs_input_grad[1] else None
        return grad_input, grad_scale, None

    @staticmethod
    def tangent(inputs, output, tangents):
        input, scale, backend = inputs
        return sum_of_terms(
            None if tangents[0] is None else ChannelScale.call(tangents[0], scale, backend),
            None if tangents[1] is None else ChannelScale.call(input, tangents[1], backend),
        )


class ChannelDot(ManualFunction):
    """sum of first * second per channel, in the dtype of accumulation."""

    @staticmethod
    def forward(first, second, backend):
        return batch_norm_sums(first, second, None, None, 0.0, backend=backend)[1].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        first, second, ctx.backend = inputs
        first_needs, second_needs, _ = ctx.needs_input_grad
        ctx.save_for_backward(first if second_needs else None, second if first_needs else None)

    @staticmethod
    def backward(ctx, grad_output):
        first, second = ctx.saved_tensors
        by_first = ChannelScale.call(second, grad_output, ctx.backend) if ctx.needs_input_grad[0] else None
        by_second = ChannelScale.call(first, grad_output, ctx.backend) if ctx.needs_input_grad[1] else None
        return by_first, by_second, None

    @staticmethod
    def tangent(inputs, output, tangents):
        first, second, backend = inputs
        return sum_of_terms(
            None if tangents[0] is None else ChannelDot.call(tangents[0], second, backend),
            None if tangents[1] is None else ChannelDot.call(first, tangents[1], backend),
        )


class Rstd(ManualFunction):
    """(rstd): 1 / sqrt(var + eps) as a function of the input whose variance var is."""

    @staticmethod
    def forward(input, mean, var, eps, backend):
        return (var + eps).rsqrt()

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, mean, var, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(input, mean, var)

    @staticmethod
    def backward(ctx, grad_output):
        input, mean, var = ctx.saved_tensors
        rstd = Rstd.call(input, mean, var, ctx.eps, ctx.backend)
        scale = -grad_output * rstd.square() / _count(input)
        grad_input, *_ = BatchNorm.call(input, scale, None, mean, var, True, ctx.eps, ctx.backend)
        return grad_input, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        input, mean, var, eps, backend = inputs
        if tangents[0] is None:
            return None
        sums = BatchNormSums.call(tangents[0], input, mean, var, True, eps, backend)
        return -Rstd.call(*inputs).square() * sums[1] / _count(input)


class BatchNorm(ManualFunction):
    """(forward). Without mean and var they are computed; either way they are returned."""

    @staticmethod
    def forward(input, weight, bias, mean, var, training, eps, backend):
        return batch_norm_forward(input, None, mean, var, weight, bias, eps, False, backend=backend)[:3]

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, _, _, ctx.training, ctx.eps, ctx.backend = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        ctx.dtypes = _dtypes(weight, bias)
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.saves_input = weight_needs or (ctx.training and input_needs)
        ctx.save_for_backward(input if ctx.saves_input else None, weight if input_needs else None, mean, var)

    @staticmethod
    def backward(ctx, grad_output, *_):
        gradients = _gradients(ctx, grad_output, *ctx.saved_tensors, ctx.needs_input_grad[:3])
        return *gradients, None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        input, weight, _, _, _, training, eps, backend = inputs
        _, mean, var = output
        return _tangent(input, weight, mean, var, training, eps, backend, *tangents[:3])


class BatchNormSums(ManualFunction):
    """(sums), (2, C): the gradients of bias and weight, in the dtype of accumulation."""

    @staticmethod
    def forward(grad_output, input, mean, var, training, eps, backend):
        return batch_norm_sums(grad_output, input, mean, var, eps, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, mean, var, ctx.training, ctx.eps, ctx.backend = inputs
        grad_needs, input_needs, *_ = ctx.needs_input_grad
        needs_input = grad_needs or (ctx.training and input_needs)
        ctx.save_for_backward(grad_output if input_needs else None, input if needs_input else None, mean, var)

    @staticmethod
    def backward(ctx, grad_sums):
        grad_output, input, mean, var = ctx.saved_tensors
        by_bias, by_weight = grad_sums[0], grad_sums[1]
        by_grad = by_input = None
        if ctx.needs_input_grad[0]:
            by_grad, *_ = BatchNorm.call(input, by_weight, by_bias, mean, var, ctx.training, ctx.eps, ctx.backend)
        if ctx.needs_input_grad[1]:
            by_input = _input_grad(grad_output, input, by_weight, mean, var, ctx.training, ctx.eps, ctx.backend)
        return by_grad, by_input, None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        grad_output, input, mean, var, training, eps, backend = inputs
        by_grad = by_input = None
        if tangents[0] is not None:
            by_grad = BatchNormSums.call(tangents[0], *inputs[1:])
        if tangents[1] is not None and training:
            by_input = _projected_dot(grad_output, tangents[1], input, mean, var, eps, backend)
        elif tangents[1] is not None:
            by_input = ChannelDot.call(grad_output, tangents[1], backend) * (var + eps).rsqrt()
        return sum_of_terms(by_grad, None if by_input is None else torch.stack([torch.zeros_like(by_input), by_input]))


class BatchNormInputGrad(ManualFunction):
    """(input_grad) in training, and as a by-product its (sums)."""

    @staticmethod
    def forward(grad_output, input, weight, mean, var, eps, backend):
        return batch_norm_backward(grad_output, input, mean, var, weight, None, eps, False, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, weight, mean, var, ctx.eps, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.weight_dtype = None if weight is None else weight.dtype
        grad_needs, input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            grad_output if input_needs or weight_needs else None,
            input,
            weight if grad_needs or input_needs else None,
            mean,
            var,
        )

    @staticmethod
    def backward(ctx, grad_grad_input, *_):
        grad_output, input, weight, mean, var = ctx.saved_tensors
        rest = input, mean, var, ctx.eps, ctx.backend
        by_grad = by_input = by_weight = None
        if ctx.needs_input_grad[0]:
            by_grad = _input_grad(grad_grad_input, input, weight, mean, var, True, ctx.eps, ctx.backend)
        if ctx.needs_input_grad[1]:
            by_input = _second_grad(grad_output, grad_grad_input, weight, *rest)
        if ctx.needs_input_grad[2]:
            by_weight = _projected_dot(grad_output, grad_grad_input, *rest).to(ctx.weight_dtype)
        return by_grad, by_input, by_weight, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        grad_output, input, weight, mean, var, eps, backend = inputs
        grad_tangent, input_tangent, weight_tangent, *_ = tangents
        rest = mean, var, True, eps, backend
        return sum_of_terms(
            None if grad_tangent is None else _input_grad(grad_tangent, input, weight, *rest),
            None
            if input_tangent is None
            else _second_grad(grad_output, input_tangent, weight, input, mean, var, eps, backend),
            None if weight_tangent is None else _input_grad(grad_output, input, weight_tangent, *rest),
        )


class MaskedGrad(ManualFunction):
    """grad_output where the mask has a bit: linear, and its own transpose."""

    @staticmethod
    def forward(grad_output, mask, backend):
        return batch_norm_masked_grad(grad_output, mask, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, ctx.backend = inputs
        ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx, grad_masked):
        (mask,) = ctx.saved_tensors
        return MaskedGrad.call(grad_masked, mask, ctx.backend), None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        _, mask, backend = inputs
        return MaskedGrad.call(tangents[0], mask, backend)


class BatchNormRelu(ManualFunction):
    """relu((forward) + residual), with the statistics and, where there is a residual, the mask."""

    @staticmethod
    def forward(input, residual, weight, bias, mean, var, training, eps, backend):
        return batch_norm_forward(input, residual, mean, var, weight, bias, eps, True, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, residual, weight, bias, _, _, ctx.training, ctx.eps, ctx.backend = inputs
        _, mean, var, mask = output
        ctx.mark_non_differentiable(mean, var, mask)
        ctx.dtypes = _dtypes(weight, bias)
        input_needs, _, weight_needs, bias_needs, *_ = ctx.needs_input_grad
        recomputes = residual is None and (input_needs or weight_needs or bias_needs)
        ctx.saves_input = recomputes or weight_needs or (ctx.training and input_needs)
        ctx.save_for_backward(
            input if ctx.saves_input else None,
            weight if recomputes or input_needs else None,
            mean,
            var,
            bias if recomputes else None,
            None if residual is None else mask,
        )

    @staticmethod
    def backward(ctx, grad_output, *_):
        input, weight, mean, var, bias, mask = ctx.saved_tensors
        input_needs, residual_needs, *affine_need = ctx.needs_input_grad[:4]
        if mask is None and ctx.training and input_needs and not _differentiating():
            # One kernel for mask, sums and gradient: the masked gradient never meets memory.
            options = ctx.eps, True
            grad_input, sums = batch_norm_backward(
                grad_output, input, mean, var, weight, bias, *options, backend=ctx.backend
            )
            return grad_input, None, *_affine_gradients(sums, ctx.dtypes, affine_need), *(None,) * 5
        if mask is None:
            # Bits have no derivative, hence a kernel and no Function.
            mask = batch_norm_relu_mask(input, mean, var, weight, bias, ctx.eps, backend=ctx.backend)
        masked = MaskedGrad.call(grad_output, mask, ctx.backend)
        needs = (input_needs, *affine_need)
        grad_input, grad_weight, grad_bias = _gradients(ctx, masked, input, weight, mean, var, needs)
        return grad_input, masked if residual_needs else None, grad_weight, grad_bias, *(None,) * 5

    @staticmethod
    def tangent(inputs, output, tangents):
        input, residual, weight, bias, _, _, training, eps, backend = inputs
        _, mean, var, mask = output
        if residual is None:
            mask = batch_norm_relu_mask(input, mean, var, weight, bias, eps, backend=backend)
        input_tangent, residual_tangent, *affine_tangents = tangents[:4]
        normalised = _tangent(input, weight, mean, var, training, eps, backend, input_tangent, *affine_tangents)
        return MaskedGrad.call(sum_of_terms(normalised, residual_tangent), mask, backend)


def _differentiating() -> bool:
    """Whether what a backward computes may be differentiated in its turn."""
    return torch.is_grad_enabled() or transforms_active()


def _dtypes(weight: Tensor | None, bias: Tensor | None) -> tuple[Any, Any]:
    return None if weight is None else weight.dtype, None if bias is None else bias.dtype


def _affine_gradients(sums, dtypes, needs):
    """The gradients of weight and bias that are needed, in their dtypes."""
    grad_bias, grad_weight = sums.unbind()
    return grad_weight.to(dtypes[0]) if needs[0] else None, grad_bias.to(dtypes[1]) if needs[1] else None


def _gradients(ctx, grad_output, input, weight, mean, var, needs):
    """The gradients of input, weight and bias that are needed."""
    input_needs, weight_needs, bias_needs = needs
    grad_input = sums = None
    if input_needs and ctx.training:
        grad_input, sums = BatchNormInputGrad.call(grad_output, input, weight, mean, var, ctx.eps, ctx.backend)
    elif input_needs:
        grad_input = _input_grad(grad_output, None, weight, mean, var, False, ctx.eps, ctx.backend)
    if bias_needs and not weight_needs and sums is None:
        return grad_input, None, ChannelSum.call(grad_output.to(mean.dtype), ctx.backend).to(ctx.dtypes[1])
    if not (weight_needs or bias_needs):
        return grad_input, None, None
    if sums is None or _differentiating():
        sums = BatchNormSums.call(grad_output, input, mean, var, ctx.training, ctx.eps, ctx.backend)
    return grad_input, *_affine_gradients(sums, ctx.dtypes, (weight_needs, bias_needs))


def _tangent(input, weight, mean, var, training, eps, backend, input_tangent, weight_tangent, bias_tangent):
    """The tangent of (forward)."""
    by_input = by_weight = by_bias = None
    if input_tangent is not None:
        by_input = _input_grad(input_tangent, input, weight, mean, var, training, eps, backend)
    if weight_tangent is not None:
        by_weight, *_ = BatchNorm.call(input, weight_tangent, None, mean, var, training, eps, backend)
    if bias_tangent is not None:
        by_bias = per_channel(bias_tangent, input.dim()).expand(input.shape).to(input.dtype)
    return sum_of_terms(by_input, by_weight, by_bias)


def _input_grad(grad_output, input, weight, mean, var, training, eps, backend):
    """(input_grad) in either mode; in evaluation it does not look at the input."""
    if training:
        return BatchNormInputGrad.call(grad_output, input, weight, mean, var, eps, backend)[0]
    rstd = (var + eps).rsqrt()
    return ChannelScale.call(grad_output, rstd if weight is None else weight * rstd, backend)


def _means(first, second, input, mean, var, eps, backend):
    """<first>, <second>, <first xhat>, <second xhat> and <first second>."""
    count = max(1, _count(input))
    first_sums = BatchNormSums.call(first, input, mean, var, True, eps, backend) / count
    second_sums = BatchNormSums.call(second, input, mean, var, True, eps, backend) / count
    product = ChannelDot.call(first, second, backend) / count
    return first_sums[0], second_sums[0], first_sums[1], second_sums[1], product


def _projected_dot(grad_output, other, input, mean, var, eps, backend):
    """(projected_dot): rstd * sum(other * P grad_output)."""
    mean_g, mean_h, a, c, mean_gh = _means(grad_output, other, input, mean, var, eps, backend)
    return _count(input) * Rstd.call(input, mean, var, eps, backend) * (mean_gh - mean_g * mean_h - a * c)


def _second_grad(grad_output, other, weight, input, mean, var, eps, backend):
    """(second_grad)."""
    mean_g, mean_h, a, c, mean_gh = _means(grad_output, other, input, mean, var, eps, backend)
    factor = -Rstd.call(input, mean, var, eps, backend).square()
    if weight is not None:
        factor = factor * weight
    along_xhat = factor * (mean_gh - mean_g * mean_h - 3 * a * c)
    constant = -factor * (c * mean_g + a * mean_h)
    by_xhat, *_ = BatchNorm.call(input, along_xhat, constant, mean, var, True, eps, backend)
    by_grad = ChannelScale.call(grad_output, factor * c, backend)
    return by_xhat + by_grad + ChannelScale.call(other, factor * a, backend)


def _check(op, input, running_mean, running_var, weight, bias, training, momentum, eps):
    """Raises as torch does, in torch's order; returns momentum and eps as floats."""
    geometry.check_tensor(op, "input", input)
    eps = geometry.real(op, "eps", eps)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{op}: eps must be {'positive in training' if training else 'at least 0'}, got {eps}")
    momentum = geometry.real(op, "momentum", momentum)
    geometry.check_bool(op, "training", training)
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    present = {name: tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in present.items():
        geometry.check_tensor(op, name, tensor)
    if input.dim() < 2:
        error = RuntimeError if present or not training else IndexError
        raise error(f"{op}: input must have at least 2 dimensions, (N, C, ...), got {tuple(input.shape)}")
    geometry.check_floating(op, "input", input)
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError(f"{op}: running_mean and running_var must be given in evaluation mode")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var must be given both or not at all")
    for name, tensor in present.items():
        if tensor.numel() != input.shape[1] or (name.startswith("running") and tensor.dim() != 1):
            raise RuntimeError(f"{op}: {name} must have the shape ({input.shape[1]},), got {tuple(tensor.shape)}")
        geometry.check_alike(op, name, tensor, input, "device")
        if name.startswith("running") and tensor.requires_grad:
            raise RuntimeError(f"{op}: {name} is updated in place or constant, and may not require a gradient")
    dtypes = {tensor.dtype for tensor in present.values()}
    if len(dtypes) > 1 or not dtypes <= {input.dtype, accumulation_dtype(input.dtype)}:
        listed = ", ".join(f"{name} {tensor.dtype}" for name, tensor in present.items())
        raise RuntimeError(
            f"{op}: {', '.join(present)} must all have the dtype of input, {input.dtype}, or, for a 16-bit input, "
            f"all be float32; got {listed}"
        )
    return momentum, eps


def _check_several_values(op, input):
    geometry.check_tensor(op, "input", input)
    if input.dim() == 0:
        raise IndexError(f"{op}: input must have at least 2 dimensions, (N, C, ...), got ()")
    if _count(input) == 1:
        raise ValueError(
            f"{op}: expected more than 1 value per channel in training, got an input of shape {tuple(input.shape)}"
        )


def _update_running(input, running_mean, running_var, mean, var, momentum, backend):
    if running_mean is not None and input.numel() > 0:
        batch_norm_update(running_mean, running_var, mean, var, _count(input), momentum, backend=backend)


@recipes.unrecorded
def batch_norm(input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05):
    """Batch normalisation: `torch.nn.functional.batch_norm`.

    Args:
        input: (N, C, ...), two dimensions or more.
        running_mean: (C,), what evaluation subtracts; in training it may be None, and is updated in place otherwise.
        running_var: (C,), likewise, what evaluation divides by the root of.
        weight: (C,) or None, a factor a channel.
        bias: (C,) or None, added after it.
        training: normalise with the statistics of this input, and move the running ones towards them.
        momentum: how far: running = (1 - momentum) * running + momentum * batch (whose variance is the unbiased one).
        eps: added to the variance under the root.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        ValueError: for one value a channel in training, for an eps that is negative (or 0 in training), for one running
            statistic without the other.
        RuntimeError: for shapes, dtypes or devices that do not go together, or no running statistics in evaluation.
        TypeError: for arguments of another type.
        NotImplementedError: for an input that is not floating.

    Formula: `manual_ops.ops.batch_norm`, (forward).
    """
    if training:
        _check_several_values("batch_norm", input)
    momentum, eps = _check("batch_norm", input, running_mean, running_var, weight, bias, training, momentum, eps)
    backend = modes.current_backend()
    statistics = (None, None) if training else (running_mean, running_var)
    affine = _flat(weight), _flat(bias)
    output, mean, var = BatchNorm.call(input, *affine, *statistics, training, eps, backend)
    if output.requires_grad and recipes.active():
        _note(output, input, None, mean, var, *affine, eps, False, backend)
    if training:
        _update_running(input, running_mean, running_var, mean, var, momentum, backend)
    return output


@recipes.unrecorded
def batch_norm_relu(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-05,
    residual=None,
):
    """relu(batch_norm(input, ...) + residual), in one pass and without keeping what lies between.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps: as in `batch_norm`.
        residual: a tensor of the input's shape and dtype, or None.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        RuntimeError: for a residual of another shape, dtype or device; further as `batch_norm`.

    Formula: `manual_ops.ops.batch_norm`.
    """
    input, residual = autocast.cast("batch_norm_relu", input, residual)
    if training:
        _check_several_values("batch_norm_relu", input)
    momentum, eps = _check("batch_norm_relu", input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        geometry.check_tensor("batch_norm_relu", "residual", residual)
        geometry.check_alike("batch_norm_relu", "residual", residual, input, "shape", "dtype", "device")
    backend = modes.current_backend()
    statistics = (None, None) if training else (running_mean, running_var)
    affine = _flat(weight), _flat(bias)
    output, mean, var, _ = BatchNormRelu.call(input, residual, *affine, *statistics, training, eps, backend)
    if output.requires_grad and recipes.active():
        _note(output, input, residual, mean, var, *affine, eps, True, backend)
    if training:
        _update_running(input, running_mean, running_var, mean, var, momentum, backend)
    return output


def _note(output, input, residual, mean, var, weight, bias, eps, relu, backend):
    """For lean mode: the output, made again of the statistics, has the same bits."""
    if output.grad_fn.saves_input:
        recipes.keep(output, 0, input)
    again = functools.partial(_again, eps=eps, relu=relu, backend=backend)
    statistics = mean.detach(), var.detach()
    recipes.made(output, again, input, residual, *statistics, weight, bias)


def _again(input, residual, mean, var, weight, bias, *, eps, relu, backend):
    return batch_norm_forward(input, residual, mean, var, weight, bias, eps, relu, backend=backend)[0]


def _flat(parameter: Tensor | None) -> Tensor | None:
    """(C,), from any shape with C elements, as torch's forward takes it."""
    return parameter if parameter is None or parameter.dim() == 1 else parameter.reshape(-1)
