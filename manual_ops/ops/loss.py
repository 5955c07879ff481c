"""Mean squared error and binary cross-entropy with logits, every derivative of both.

With input x and target t, elementwise,

    squared error   l = (x - t)^2                                        dl/dx = 2 (x - t)           dl/dt = -dl/dx
    cross-entropy   l = (1 - t) x + q sp(-x),   q = 1 + (p - 1) t        dl/dx = q S(x) - p t
                    dl/dt = -x + (p - 1) sp(-x)                          dl/dp = t sp(-x)

where S is the logistic sigmoid, p is pos_weight (1 where there is none), and sp(-x) = log(1 + exp(-x)) = -log S(x), for
which S'/S = 1 - S gives the slope above. Written sp(-x) = max(-x, 0) + log(1 + exp(-|x|)) nothing overflows; and sp(-x)
is the loss itself at t = 1, p = 1.

A reduced loss is s * sum of l, with s = 1 or 1/n, so its backward is the slope times s * grad_output. That product is a
Function again, linear in grad_output, with

    d(2 (x - t))   = 2 dx - 2 dt
    d(q S - p t)   = q S (1 - S) dx + ((p - 1) S - p) dt + t (S - 1) dp

Saved for backward: the input and the target (and pos_weight). `weight` multiplies the pointwise losses afterwards, and
`total` adds them up.

In the code: x is `input`, t `target`, p `pos_weight`, s `_scale(reduction, n)`.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from manual_ops import autocast, geometry, modes
from manual_ops.autograd import ManualFunction, sum_of_terms
from manual_ops.kernel import backend_of, in_front, kernel
from manual_ops.ops.activation import Activate
from manual_ops.ops.channel_sum import channel_sum
from manual_ops.ops.reduction import reduction_argument


def _scale(reduction: str, count: int) -> float:
    return 1 / max(1, count) if reduction == "mean" else 1.0


def _empty(like: Tensor) -> Tensor:
    """Uninitialised, in the layout of an elementwise result: the operand's order of dimensions."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.preserve_format
    return torch.empty_like(like, memory_format=layout)


def _empty_loss(input: Tensor, reduction: str) -> Tensor:
    return _empty(input) if reduction == "none" else input.new_empty(())


def _reduced(losses: Tensor, reduction: str, like: Tensor) -> Tensor:
    """Pointwise losses in the accumulation dtype, reduced and rounded."""
    if reduction == "none":
        return _empty(like).copy_(losses)
    return (losses.sum() if reduction == "sum" else losses.mean()).to(like.dtype)


def _product(like: Tensor, scale: float, *factors: Any) -> Tensor:
    """scale * factors, formed in the accumulation dtype (1/n alone would be lost in 16 bits) and rounded once.

    A number comes as a tensor of as many dimensions as `like` has: torch cannot multiply numbers of an empty batch.
    """
    product: Any = scale
    for factor in factors:
        factor = geometry.widened(factor)
        product = product * (factor if factor.dim() else factor.reshape((1,) * like.dim()))
    return product.to(like.dtype)


def _sample_totals(op: Any, values: Tensor, reduction: str) -> Tensor:
    """The sum or the mean of each sample: (B, ...) -> (B,)."""
    count = math.prod(values.shape[1:])
    samples = geometry.widened(values).reshape(1, values.shape[0], count)
    totals = channel_sum(samples, backend=backend_of(op))
    return (totals / count if reduction == "mean" else totals).to(values.dtype)


def _batched_loss(op: Any, batch_size: int, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    """The reduction runs over one sample at a time, so it follows the pointwise losses of all of them."""
    *operands, reduction = args
    losses = op(*(in_front(operand, dim, batch_size) for operand, dim in zip(operands, in_dims, strict=False)), "none")
    return (losses if reduction == "none" else _sample_totals(op, losses, reduction)), 0


def _batched_backward(op: Any, batch_size: int, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    *operands, reduction = args
    grads, *operands = (in_front(operand, dim, batch_size) for operand, dim in zip(operands, in_dims, strict=False))
    if reduction != "none":
        sample = operands[0].shape[1:]
        grads = grads.reshape(batch_size, *(1,) * len(sample)).expand_as(operands[0])
        gradients = op(grads, *operands, "none")
        return _product(gradients, _scale(reduction, math.prod(sample)), gradients), 0
    return op(grads, *operands, "none"), 0


@kernel("total(Tensor input, str reduction) -> Tensor", meta=lambda input, reduction: input.new_empty(()))
def total(input: Tensor, reduction: str) -> Tensor:
    return _reduced(geometry.widened(input), reduction, input)


@total.batch_rule
def _(op: Any, batch_size: int, in_dims: Any, input: Tensor, reduction: str) -> tuple[Tensor, int]:
    return _sample_totals(op, input.movedim(in_dims[0], 0), reduction), 0


class Total(ManualFunction):
    """The sum or the mean of all elements, in an order that does not depend on the number of threads."""

    @staticmethod
    def forward(input: Tensor, reduction: str, backend: str) -> Tensor:
        return total(input, reduction, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, ctx.reduction, _ = inputs
        ctx.shape = input.shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad = grad_output.reshape((1,) * len(ctx.shape))
        return _product(grad, _scale(ctx.reduction, math.prod(ctx.shape)), grad).expand(ctx.shape), None, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor:
        _, *options = inputs
        return Total.call(tangents[0], *options)


@kernel(
    "mse_loss(Tensor input, Tensor target, str reduction) -> Tensor",
    meta=lambda input, target, reduction: _empty_loss(input, reduction),
)
def mse_loss_kernel(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    x, t = map(geometry.widened, (input, target))
    return _reduced((x - t) * (x - t), reduction, input)


@kernel(
    "mse_loss_backward(Tensor grad_output, Tensor input, Tensor target, str reduction) -> Tensor",
    meta=lambda grad_output, input, target, reduction: _empty(input),
)
def mse_loss_backward(grad_output: Tensor, input: Tensor, target: Tensor, reduction: str) -> Tensor:
    g, x, t = map(geometry.widened, (grad_output, input, target))
    return _empty(input).copy_(g * _scale(reduction, input.numel()) * 2 * (x - t))


mse_loss_kernel.batch_rule(_batched_loss)
mse_loss_backward.batch_rule(_batched_backward)


@kernel(
    "bce_with_logits(Tensor input, Tensor target, Tensor? pos_weight, str reduction) -> Tensor",
    meta=lambda input, target, pos_weight, reduction: _empty_loss(input, reduction),
)
def bce_with_logits(input: Tensor, target: Tensor, pos_weight: Tensor | None, reduction: str) -> Tensor:
    x, t = map(geometry.widened, (input, target))
    softplus = torch.log1p(torch.exp(-x.abs())) + (-x).clamp(min=0)  # of -x
    q = 1 if pos_weight is None else 1 + (geometry.widened(pos_weight) - 1) * t
    return _reduced((1 - t) * x + q * softplus, reduction, input)


@kernel(
    "bce_with_logits_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? pos_weight, str reduction) "
    "-> Tensor",
    meta=lambda grad_output, input, target, pos_weight, reduction: _empty(input),
)
def bce_with_logits_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, pos_weight: Tensor | None, reduction: str
) -> Tensor:
    g, x, t = map(geometry.widened, (grad_output, input, target))
    z = torch.exp(-x.abs())
    sigmoid = torch.where(x < 0, z, 1) / (1 + z)
    if pos_weight is None:
        slope = sigmoid - t
    else:
        p = geometry.widened(pos_weight)
        slope = (1 + (p - 1) * t) * sigmoid - p * t
    return _empty(input).copy_(g * _scale(reduction, input.numel()) * slope)


bce_with_logits.batch_rule(_batched_loss)
bce_with_logits_backward.batch_rule(_batched_backward)


def _summed(terms: Tensor, reduction: str, backend: str) -> Tensor:
    """The reduction of pointwise losses, or of the terms of a derivative."""
    return terms if reduction == "none" else Total.call(terms, reduction, backend)


class MseLoss(ManualFunction):
    @staticmethod
    def forward(input: Tensor, target: Tensor, reduction: str, backend: str) -> Tensor:
        return mse_loss_kernel(input, target, reduction, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, target, ctx.reduction, ctx.backend = inputs
        ctx.save_for_backward(input, target)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        input, target = ctx.saved_tensors
        gradient = MseLossBackward.call(grad_output, input, target, ctx.reduction, ctx.backend)
        input_needs, target_needs, *_ = ctx.needs_input_grad
        return gradient if input_needs else None, -gradient if target_needs else None, None, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor:
        input, target, reduction, backend = inputs
        difference = sum_of_terms(tangents[0], None if tangents[1] is None else -tangents[1])
        assert difference is not None
        slope = MseLossBackward.call(torch.ones_like(input), input, target, "none", backend)
        return _summed(difference * slope, reduction, backend)


class MseLossBackward(ManualFunction):
    @staticmethod
    def forward(grad_output: Tensor, input: Tensor, target: Tensor, reduction: str, backend: str) -> Tensor:
        return mse_loss_backward(grad_output, input, target, reduction, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        grad_output, input, target, ctx.reduction, ctx.backend = inputs
        ctx.count = input.numel()
        grad_needs, *operands_need = ctx.needs_input_grad[:3]
        operands = (input, target) if grad_needs else (None, None)
        ctx.save_for_backward(grad_output if any(operands_need) else None, *operands)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_output, input, target = ctx.saved_tensors
        by_grad_output = by_input = None
        grad_needs, input_needs, target_needs, *_ = ctx.needs_input_grad
        if grad_needs:
            slopes = MseLossBackward.call(grad, input, target, "none", ctx.backend)
            by_grad_output = _summed(slopes, ctx.reduction, ctx.backend)
        if input_needs or target_needs:
            by_input = _product(grad, 2 * _scale(ctx.reduction, ctx.count), grad_output, grad)
        return (
            by_grad_output,
            by_input if input_needs else None,
            -by_input if target_needs and by_input is not None else None,
            None,
            None,
        )

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor | None:
        grad_output, input, target, reduction, backend = inputs
        grad_tangent, input_tangent, target_tangent, *_ = tangents
        difference = sum_of_terms(input_tangent, None if target_tangent is None else -target_tangent)
        return sum_of_terms(
            None if grad_tangent is None else MseLossBackward.call(grad_tangent, input, target, reduction, backend),
            None
            if difference is None
            else _product(input, 2 * _scale(reduction, input.numel()), grad_output, difference),
        )


class BceWithLogits(ManualFunction):
    @staticmethod
    def forward(input: Tensor, target: Tensor, pos_weight: Tensor | None, reduction: str, backend: str) -> Tensor:
        return bce_with_logits(input, target, pos_weight, reduction, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, target, pos_weight, ctx.reduction, ctx.backend = inputs
        ctx.save_for_backward(input, target, pos_weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        input, target, pos_weight = ctx.saved_tensors
        by_input = by_target = by_weight = None
        input_needs, target_needs, weight_needs, *_ = ctx.needs_input_grad
        if input_needs:
            by_input = BceWithLogitsBackward.call(grad_output, input, target, pos_weight, ctx.reduction, ctx.backend)
        scale = _scale(ctx.reduction, input.numel())
        if target_needs:
            by_target = _product(target, scale, grad_output, _slope_by_target(input, target, pos_weight, ctx.backend))
        if weight_needs:
            by_weight = _product(target, scale, grad_output, target, _softplus(input, target, ctx.backend))
        return by_input, by_target, by_weight, None, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor | None:
        input, target, pos_weight, reduction, backend = inputs
        input_tangent, target_tangent, weight_tangent, *_ = tangents
        ones = torch.ones_like(input)
        moved = sum_of_terms(
            None
            if input_tangent is None
            else input_tangent * BceWithLogitsBackward.call(ones, input, target, pos_weight, "none", backend),
            None if target_tangent is None else target_tangent * _slope_by_target(input, target, pos_weight, backend),
            None if weight_tangent is None else weight_tangent * target * _softplus(input, target, backend),
        )
        return None if moved is None else _summed(moved, reduction, backend)


def _softplus(input: Tensor, target: Tensor, backend: str) -> Tensor:
    """sp(-x), which is the loss at t = 1; times t it is dl/dp."""
    return BceWithLogits.call(input, torch.ones_like(target), None, "none", backend)


def _slope_by_target(input: Tensor, target: Tensor, pos_weight: Tensor | None, backend: str) -> Tensor:
    return -input if pos_weight is None else (pos_weight - 1) * _softplus(input, target, backend) - input


class BceWithLogitsBackward(ManualFunction):
    @staticmethod
    def forward(
        grad_output: Tensor, input: Tensor, target: Tensor, pos_weight: Tensor | None, reduction: str, backend: str
    ) -> Tensor:
        return bce_with_logits_backward(grad_output, input, target, pos_weight, reduction, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        grad_output, input, target, pos_weight, ctx.reduction, ctx.backend = inputs
        operands_need = any(ctx.needs_input_grad[1:4])
        ctx.save_for_backward(grad_output if operands_need else None, input, target, pos_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_output, input, target, pos_weight = ctx.saved_tensors
        by_grad_output = None
        if ctx.needs_input_grad[0]:
            slopes = BceWithLogitsBackward.call(grad, input, target, pos_weight, "none", ctx.backend)
            by_grad_output = _summed(slopes, ctx.reduction, ctx.backend)
        by_operands: list[Tensor | None] = [None, None, None]
        if any(ctx.needs_input_grad[1:4]):
            scale = _scale(ctx.reduction, input.numel())
            by_operands = [
                _product(grad, scale, grad_output, grad, bend) if needed else None
                for bend, needed in zip(
                    _bends(input, target, pos_weight, ctx.backend), ctx.needs_input_grad[1:4], strict=True
                )
            ]
        return by_grad_output, *by_operands, None, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor | None:
        grad_output, input, target, pos_weight, reduction, backend = inputs
        grad_tangent, *operand_tangents = tangents[:4]
        moved = None
        if any(tangent is not None for tangent in operand_tangents):
            bends = _bends(input, target, pos_weight, backend)
            pairs = zip(bends, operand_tangents, strict=True)
            moved = sum_of_terms(*(None if tangent is None else bend * tangent for bend, tangent in pairs))
        return sum_of_terms(
            None
            if grad_tangent is None
            else BceWithLogitsBackward.call(grad_tangent, input, target, pos_weight, reduction, backend),
            None if moved is None else _product(input, _scale(reduction, input.numel()), grad_output, moved),
        )


def _bends(input: Tensor, target: Tensor, pos_weight: Tensor | None, backend: str) -> tuple[Tensor, Any, Tensor]:
    """The derivatives of dl/dx by x, t and p."""
    s = Activate.call(input, "sigmoid", None, backend)
    if pos_weight is None:
        return s * (1 - s), torch.full_like(s, -1), target * (s - 1)
    return (1 + (pos_weight - 1) * target) * s * (1 - s), (pos_weight - 1) * s - pos_weight, target * (s - 1)


def _check_operand(op: str, name: str, operand: Any, input: Tensor) -> None:
    geometry.check_tensor(op, name, operand)
    geometry.check_alike(op, name, operand, input, "device")


def _check_broadcasts(op: str, name: str, operand: Tensor, input: Tensor) -> None:
    pairs = zip(reversed(operand.shape), reversed(input.shape), strict=False)
    if operand.dim() > input.dim() or any(size not in (1, wanted) for size, wanted in pairs):
        raise RuntimeError(
            f"{op}: {name} must broadcast to the input's shape {tuple(input.shape)}, got {tuple(operand.shape)}"
        )


def _promoted(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that holds either."""
    if input.dtype is target.dtype:
        return input, target  # conversions to what is there already cost as much as a small kernel
    dtype = torch.promote_types(input.dtype, target.dtype)
    return input.to(dtype), target.to(dtype)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """(x - t)^2, its mean or its sum: `torch.nn.functional.mse_loss`.

    Args:
        input: any shape.
        target: the input's shape; another that broadcasts with it is a warning.
        size_average, reduce: deprecated ways to say `reduction`.
        reduction: "none", "mean" or "sum".
        weight: the input's shape; multiplies the squared errors, and the mean is then divided by its sum.

    Returns:
        A scalar, or the broadcast shape for "none".

    Raises:
        ValueError: for another reduction, or a weight of another shape than the input's.
        RuntimeError: for shapes or devices that do not go together.
        NotImplementedError: for dtypes that are not floating.
        TypeError: for anything but tensors.

    Formula: `manual_ops.ops.loss`.
    """
    op = "mse_loss"
    input, target = autocast.cast(op, input, target)
    geometry.check_tensor(op, "input", input)
    _check_operand(op, "target", target, input)
    if target.shape != input.shape:
        warnings.warn(
            f"{op}: the target's shape {tuple(target.shape)} is not the input's {tuple(input.shape)}; they are "
            "broadcast, which is rarely what is meant",
            stacklevel=2,
        )
    if weight is not None and size_average is None and reduce is None and reduction == "elementwise_mean":
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum' where there is a weight, got {reduction!r}")
    reduction = reduction_argument(op, size_average, reduce, reduction)
    x, t = _promoted(input, target)
    if x.shape != t.shape:
        try:
            x, t = torch.broadcast_tensors(x, t)
        except RuntimeError as error:
            raise RuntimeError(
                f"{op}: target must broadcast with the input's shape {tuple(input.shape)}, got {tuple(target.shape)}"
            ) from error
    geometry.check_floating(op, "input", x)
    backend = modes.current_backend()
    if weight is None:
        return MseLoss.call(x, t, reduction, backend)
    _check_operand(op, "weight", weight, input)
    if weight.shape != input.shape:
        raise ValueError(f"{op}: weight must have the input's shape {tuple(input.shape)}, got {tuple(weight.shape)}")
    weight = weight if weight.is_floating_point() else weight.to(x.dtype)
    weighted = MseLoss.call(x, t, "none", backend) * weight
    if reduction == "none":
        return weighted
    summed = Total.call(weighted, "sum", backend)
    return summed if reduction == "sum" else summed / Total.call(weight, "sum", backend)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """-p t log S(x) - (1 - t) log(1 - S(x)): `torch.nn.functional.binary_cross_entropy_with_logits`.

    Args:
        input: logits x, any shape.
        target: probabilities t, the input's shape.
        weight: multiplies the losses; broadcasts to the input's shape. As in torch only the transforms of torch.func
            and forward mode differentiate by it and by pos_weight.
        size_average, reduce: deprecated ways to say `reduction`.
        reduction: "none", "mean" or "sum".
        pos_weight: p, multiplies the losses of the positive class; broadcasts to the input's shape.

    Returns:
        A scalar, or the input's shape for "none".

    Raises:
        ValueError: for another reduction, or a target of another shape than the input's.
        RuntimeError: for shapes, dtypes or devices that do not go together, and where weight or pos_weight requires a
            gradient.
        NotImplementedError: for an input that is not floating.
        TypeError: for anything but tensors.

    Formula: `manual_ops.ops.loss`.
    """
    op = "binary_cross_entropy_with_logits"
    input, target, weight, pos_weight = autocast.cast(op, input, target, weight, pos_weight)
    geometry.check_tensor(op, "input", input)
    _check_operand(op, "target", target, input)
    reduction = reduction_argument(op, size_average, reduce, reduction)
    if target.shape != input.shape:
        raise ValueError(f"{op}: target must have the input's shape {tuple(input.shape)}, got {tuple(target.shape)}")
    geometry.check_floating(op, "input", input)
    if target.dtype not in geometry.FLOATING_DTYPES:
        raise RuntimeError(f"{op}: target must be a floating tensor, got {target.dtype}")
    factors = {"weight": weight, "pos_weight": pos_weight}
    for name, factor in factors.items():
        if factor is not None:
            _check_operand(op, name, factor, input)
            _check_broadcasts(op, name, factor, input)
    x, t = _promoted(input, target)
    p = None if pos_weight is None else pos_weight.to(x.dtype).expand(x.shape)
    if reduction == "none" and t.is_contiguous(memory_format=geometry.channels_last_format(t)):
        x = x.contiguous(memory_format=geometry.channels_last_format(t))  # the output has the target's layout
    if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        for name, factor in factors.items():
            if factor is not None and factor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} must not require a gradient outside torch.func, as in torch, but does"
                )
    backend = modes.current_backend()
    if weight is None:
        return BceWithLogits.call(x, t, p, reduction, backend).to(target.dtype)
    weighted = (BceWithLogits.call(x, t, p, "none", backend) * weight).to(target.dtype)
    return _summed(weighted, reduction, backend)
