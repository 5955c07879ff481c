"""Softmax cross-entropy and negative log-likelihood, every derivative of both.

A row is one sample, or one pixel of one: logits z_c for the classes c, and a target that says how likely each class is.
The target is a distribution t_c itself, or the index of the one class that is certain, t_c = [c = target]. With
label_smoothing eps, C classes and class weights w,

    q_c     = (1 - eps) * t_c + eps / C                      in a row whose index is ignore_index, q_c = 0 throughout
    lse     = log sum_k exp(z_k)
    loss_i  = sum_c w_c q_c * cost_c,   cost_c = -log softmax(z)_c = lse - z_c                           (cross_entropy)
    loss_i  = sum_c w_c q_c * cost_c,   cost_c = -input_c,           eps = 0                                  (nll_loss)

    reduction  "none": loss_i      "sum": sum_i loss_i      "mean": sum_i loss_i / D
    D = sum_i w[target_i] over the rows that are not ignored, for indices; the number of rows, for distributions

Let p = softmax(z), W = sum_c w_c q_c, and g_i the gradient of row i's loss: grad_output, over D for the mean. Because
dlse/dz_c = p_c,

    dL/dz_c = g * (W * p_c - w_c q_c)             = p - onehot where neither weights nor smoothing are      (input_grad)
    dL/dt_c = g * (1 - eps) * w_c * cost_c                                              for distributions
    dL/dw_c = sum_i g * q_c * cost_c                                                    for distributions

(torch does not differentiate by the weights of index targets.) input_grad is differentiated once more by g, z, q and w.
With v the gradient that comes in and e = sum_k p_k v_k, each by one use of dp_c/dz_k = p_c * ([c = k] - p_k),

    by g:   W * e - sum_c w_c q_c v_c             (then reduced as the loss is)
    by z_c: g * W * p_c * (v_c - e)               the softmax's own input_grad
    by q_c: g * w_c * (e - v_c)
    by w_c: sum_i g * q_c * (e - v_c)

in which the only function that is no product or sum is p = softmax(z), an operation of this package: so the third and
later derivatives are right as well.

Saved for backward: the logits and one lse per row; p is computed anew. The lse is kept as two numbers, max(z) and
log sum_k exp(z_k - max(z)): rounded to one it would lose the digits that tell the classes apart when all logits are
large.

In the code: z is `input`, g `grad_output` or, spread over the rows, `row_grad`, D `denominator`; shapes are (N, C, *d)
for input and distributions, (N, *d) for indices and rows, (C,) for the weight. `samples` is (), and under vmap the
shape of the batch that was folded into N: each sample of it is reduced by itself, and may bring its own weight.
"""

import math
from typing import Any

import torch
from torch import Tensor

from manual_ops import autocast, geometry, modes
from manual_ops.autograd import ManualFunction, sum_of_terms
from manual_ops.geometry import accumulation_dtype
from manual_ops.kernel import fold, in_front, kernel, unfold
from manual_ops.ops.channel_sum import per_channel
from manual_ops.ops.reduction import reduction_argument
from manual_ops.ops.softmax import LogSoftmax, Softmax, SoftmaxInputGrad


def _rows_shape(input: Tensor) -> list[int]:
    return [input.shape[0], *input.shape[2:]]


def _class_weight(weight: Tensor | None, input: Tensor, samples: Any) -> Tensor | None:
    """The weight as (1, C, 1, ...), or (N, C, 1, ...) if every sample has its own."""
    if weight is None:
        return None
    if weight.dim() > 1:
        weight = weight.flatten(0, -2).repeat_interleave(input.shape[0] // max(1, math.prod(samples)), 0)  # (N, C)
    else:
        weight = weight.unsqueeze(0)
    return geometry.widened(weight).reshape(*weight.shape, *(1,) * (input.dim() - 2))


def _smoothed(target: Tensor, classes: int, label_smoothing: float, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """q, for either kind of target: (N, C, *d)."""
    if target.is_floating_point():
        q = target.to(dtype)
    else:
        q = (target.unsqueeze(1) == per_channel(torch.arange(classes, device=target.device), target.dim() + 1)).to(
            dtype
        )
    if label_smoothing:
        q = (1 - label_smoothing) * q + label_smoothing / max(1, classes)
    if not target.is_floating_point():
        q = q.masked_fill((target == ignore_index).unsqueeze(1), 0)
    return q


def _weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else weight * values


def _expected_cost(cost: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float):
    """sum_c w_c q_c cost_c of every row, (N, *d); an index reads its own class only, however infinite the others."""
    if target.is_floating_point():
        q = _smoothed(target, cost.shape[1], label_smoothing, ignore_index, cost.dtype)
        return (_weighted(q, weight) * cost).sum(1)
    kept = target != ignore_index
    cost = _weighted(cost, weight)
    index = torch.where(kept, target, 0).unsqueeze(1)
    expected = cost.gather(1, index).squeeze(1) if cost.shape[1] else cost.sum(1)
    if label_smoothing:
        expected = (1 - label_smoothing) * expected + label_smoothing / max(1, cost.shape[1]) * cost.sum(1)
    return torch.where(kept, expected, 0)


def _sum_by_sample(rows: Tensor, samples: Any) -> Tensor:
    return rows.reshape(*samples, rows.numel() // max(1, math.prod(samples))).sum(-1)


def _reduced(rows: Tensor, denominator: Tensor, reduction: str, samples: Any = ()) -> Tensor:
    return rows if reduction == "none" else _sum_by_sample(rows, samples) / denominator


def _denominator(target: Tensor, weight: Tensor | None, input: Tensor, reduction: str, samples: Any, ignore_index: int):
    """D of every sample, and 1 where the reduction is no mean."""
    ones = input.new_ones([input.shape[0], 1, *input.shape[2:]], dtype=accumulation_dtype(input.dtype))
    if reduction != "mean":
        return ones.new_ones(samples)
    if target.is_floating_point():
        return _sum_by_sample(ones, samples) if input.shape[1] else ones.new_zeros(samples)  # as torch
    row_weight = _expected_cost(ones.expand(input.shape), target, weight, ignore_index, 0.0)
    return _sum_by_sample(row_weight, samples)


def _row_grad(grad_output: Tensor, denominator: Tensor, input: Tensor, reduction: str, samples: Any = ()) -> Tensor:
    """The gradient of every row's loss, as (N, 1, *d) or what broadcasts to it."""
    if reduction == "none":
        return grad_output.unsqueeze(1).to(denominator.dtype)
    by_sample = (grad_output / denominator).reshape(math.prod(samples), *(1,) * (input.dim() - 1))
    if not samples:
        return by_sample
    return by_sample.repeat_interleave(input.shape[0] // max(1, math.prod(samples)), 0)


def _check_target(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    if target.is_floating_point():
        return
    bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if bad.numel():
        raise IndexError(f"{op}: target {int(bad[0])} is out of bounds for {classes} classes")


def _loss_meta(input, reduction, samples):
    return input.new_empty(_rows_shape(input) if reduction == "none" else samples)


def _denominator_meta(input, samples):
    return input.new_empty(samples, dtype=accumulation_dtype(input.dtype))


def _cross_entropy_forward_meta(input, target, weight, reduction, samples, ignore_index, label_smoothing):
    lse = input.new_empty([2, *_rows_shape(input)], dtype=accumulation_dtype(input.dtype))
    return _loss_meta(input, reduction, samples), lse, _denominator_meta(input, samples)


@kernel(
    "cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, str reduction, SymInt[] samples, "
    "SymInt ignore_index, float label_smoothing) -> (Tensor loss, Tensor lse, Tensor denominator)",
    meta=_cross_entropy_forward_meta,
)
def cross_entropy_forward(input, target, weight, reduction, samples, ignore_index, label_smoothing):
    _check_target("cross_entropy", target, input.shape[1], ignore_index)
    z, w = geometry.widened(input), _class_weight(weight, input, samples)
    maximum = z.amax(1, keepdim=True) if z.numel() else z.sum(1, keepdim=True)
    log_sum = torch.log(torch.exp(z - maximum).sum(1, keepdim=True))
    rows = _expected_cost(log_sum - (z - maximum), target, w, ignore_index, label_smoothing)
    denominator = _denominator(target, w, input, reduction, samples, ignore_index)
    loss = _reduced(rows, denominator, reduction, samples)
    lse = torch.stack([maximum.squeeze(1), log_sum.squeeze(1)]).contiguous()
    return loss.to(input.dtype).contiguous(), lse, denominator


def _cross_entropy_input_grad_meta(grad_output, input, *_):
    return input.new_empty(input.shape).to(memory_format=geometry.channels_last_format(input))


@kernel(
    "cross_entropy_input_grad(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor lse, "
    "Tensor denominator, str reduction, SymInt[] samples, SymInt ignore_index, float label_smoothing) -> Tensor",
    meta=_cross_entropy_input_grad_meta,
)
def cross_entropy_input_grad(
    grad_output, input, target, weight, lse, denominator, reduction, samples, ignore_index, label_smoothing
):
    _check_target("cross_entropy", target, input.shape[1], ignore_index)
    z, w = geometry.widened(input), _class_weight(weight, input, samples)
    maximum, log_sum = lse.unsqueeze(2)
    p = torch.exp((z - maximum) - log_sum)
    wq = _weighted(_smoothed(target, input.shape[1], label_smoothing, ignore_index, z.dtype), w)
    g = _row_grad(grad_output, denominator, input, reduction, samples)
    if not target.is_floating_point():
        g = torch.where((target == ignore_index).unsqueeze(1), 0, g)  # 0 / D, were every row ignored
    grad_input = g * (wq.sum(1, keepdim=True) * p - wq)
    return grad_input.to(input.dtype).contiguous(memory_format=geometry.channels_last_format(input))  # (N, C, *d)


def _nll_loss_forward_meta(input, target, weight, reduction, samples, ignore_index):
    return _loss_meta(input, reduction, samples), _denominator_meta(input, samples)


@kernel(
    "nll_loss_forward(Tensor input, Tensor target, Tensor? weight, str reduction, SymInt[] samples, "
    "SymInt ignore_index) -> (Tensor loss, Tensor denominator)",
    meta=_nll_loss_forward_meta,
)
def nll_loss_forward(input, target, weight, reduction, samples, ignore_index):
    _check_target("nll_loss", target, input.shape[1], ignore_index)
    w = _class_weight(weight, input, samples)
    rows = _expected_cost(-geometry.widened(input), target, w, ignore_index, 0.0)
    denominator = _denominator(target, w, input, reduction, samples, ignore_index)
    return _reduced(rows, denominator, reduction, samples).to(input.dtype).contiguous(), denominator


def _nll_loss_input_grad_meta(grad_output, target, weight, denominator, classes, *_):
    return grad_output.new_empty([target.shape[0], classes, *target.shape[1:]])


@kernel(
    "nll_loss_input_grad(Tensor grad_output, Tensor target, Tensor? weight, Tensor denominator, SymInt classes, "
    "str reduction, SymInt[] samples, SymInt ignore_index) -> Tensor",
    meta=_nll_loss_input_grad_meta,
)
def nll_loss_input_grad(grad_output, target, weight, denominator, classes, reduction, samples, ignore_index):
    _check_target("nll_loss", target, classes, ignore_index)
    q = _smoothed(target, classes, 0.0, ignore_index, denominator.dtype)
    g = _row_grad(grad_output, denominator, q, reduction, samples)
    grad_input = torch.where(q == 0, 0, -g * _weighted(q, _class_weight(weight, q, samples)))
    return grad_input.to(grad_output.dtype).contiguous()  # (N, C, *d)


# Batch rules. The batch goes in front of N, and into `samples`, which keeps the reductions apart.


def _fold_weight(weight: Tensor | None, at: int | None, batch_size: int, samples: Any) -> Tensor | None:
    """(C,) for all, or (*samples, C), -> (C,) for all, or (B, *samples, C)."""
    if weight is None or (at is None and weight.dim() == 1):
        return weight
    weight = in_front(weight, at, batch_size)  # (B, C) or (B, *samples, C)
    if weight.dim() == 2:
        weight = weight.reshape(batch_size, *(1,) * len(samples), -1).expand(-1, *samples, -1)
    return weight


@cross_entropy_forward.batch_rule
def _(op, batch_size, in_dims, input, target, weight, reduction, samples, *options):
    loss, lse, denominator = op(
        fold(input, in_dims[0], batch_size),
        fold(target, in_dims[1], batch_size),
        _fold_weight(weight, in_dims[2], batch_size, samples),
        reduction,
        [batch_size, *samples],
        *options,
    )
    loss = unfold(loss, batch_size) if reduction == "none" else loss
    return (loss, unfold(lse, batch_size, 1), denominator), (0, 0, 0)


@cross_entropy_input_grad.batch_rule
def _(op, batch_size, in_dims, grad_output, input, target, weight, lse, denominator, reduction, samples, *options):
    grad_input = op(
        (fold if reduction == "none" else in_front)(grad_output, in_dims[0], batch_size),
        fold(input, in_dims[1], batch_size),
        fold(target, in_dims[2], batch_size),
        _fold_weight(weight, in_dims[3], batch_size, samples),
        fold(lse, in_dims[4], batch_size, 1),
        in_front(denominator, in_dims[5], batch_size),
        reduction,
        [batch_size, *samples],
        *options,
    )
    return unfold(grad_input, batch_size), 0


@nll_loss_forward.batch_rule
def _(op, batch_size, in_dims, input, target, weight, reduction, samples, ignore_index):
    loss, denominator = op(
        fold(input, in_dims[0], batch_size),
        fold(target, in_dims[1], batch_size),
        _fold_weight(weight, in_dims[2], batch_size, samples),
        reduction,
        [batch_size, *samples],
        ignore_index,
    )
    return (unfold(loss, batch_size) if reduction == "none" else loss, denominator), (0, 0)


@nll_loss_input_grad.batch_rule
def _(op, batch_size, in_dims, grad_output, target, weight, denominator, classes, reduction, samples, ignore_index):
    grad_input = op(
        (fold if reduction == "none" else in_front)(grad_output, in_dims[0], batch_size),
        fold(target, in_dims[1], batch_size),
        _fold_weight(weight, in_dims[2], batch_size, samples),
        in_front(denominator, in_dims[3], batch_size),
        classes,
        reduction,
        [batch_size, *samples],
        ignore_index,
    )
    return unfold(grad_input, batch_size), 0


def _summed_to(weight: Tensor, terms: Tensor) -> Tensor:
    """The sum of (N, C, *d) over all but the classes, in the dtype of the weight."""
    return terms.sum([dim for dim in range(terms.dim()) if dim != 1]).to(weight.dtype)


def _refuse_index_weight(target: Tensor) -> None:
    if not target.is_floating_point():
        raise RuntimeError("the weight of index targets is not differentiable")


class CrossEntropy(ManualFunction):
    @staticmethod
    def forward(input, target, weight, reduction, ignore_index, label_smoothing, backend):
        options = reduction, (), ignore_index, label_smoothing
        return cross_entropy_forward(input, target, weight, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, *ctx.options = inputs
        _, lse, denominator = output
        ctx.mark_non_differentiable(lse, denominator)
        input_needs, _, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            input, target if input_needs or weight_needs else None, weight, lse if input_needs else None, denominator
        )

    @staticmethod
    def backward(ctx, grad_output, *_):
        input, target, weight, lse, denominator = ctx.saved_tensors
        reduction, ignore_index, label_smoothing, backend = ctx.options
        by_input = by_target = by_weight = None
        if ctx.needs_input_grad[0]:
            by_input = CrossEntropyInputGrad.call(grad_output, input, target, weight, lse, denominator, *ctx.options)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            row_grad = _row_grad(grad_output, denominator, input, reduction)
            cost = -geometry.widened(LogSoftmax.call(input, 1, backend))
        if ctx.needs_input_grad[1]:
            w = _class_weight(weight, input, ())
            by_target = (_weighted((1 - label_smoothing) * row_grad, w) * cost).to(input.dtype)
        if ctx.needs_input_grad[2]:
            _refuse_index_weight(target)
            q = _smoothed(target, input.shape[1], label_smoothing, ignore_index, cost.dtype)
            by_weight = _summed_to(weight, row_grad * q * cost)
        return by_input, by_target, by_weight, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        input, target, weight, reduction, ignore_index, label_smoothing, backend = inputs
        input_tangent, target_tangent, weight_tangent, *_ = tangents
        w = _class_weight(weight, input, ())
        by_input = by_target = by_weight = None
        if input_tangent is not None:
            t, p = geometry.widened(input_tangent), geometry.widened(Softmax.call(input, 1, backend))
            by_input = _expected_cost((t * p).sum(1, keepdim=True) - t, target, w, ignore_index, label_smoothing)
        if target_tangent is not None or weight_tangent is not None:
            cost = -geometry.widened(LogSoftmax.call(input, 1, backend))
        if target_tangent is not None:
            by_target = (_weighted((1 - label_smoothing) * geometry.widened(target_tangent), w) * cost).sum(1)
        if weight_tangent is not None:
            _refuse_index_weight(target)
            t = _class_weight(weight_tangent, input, ())
            by_weight = _expected_cost(cost, target, t, ignore_index, label_smoothing)
        rows = sum_of_terms(by_input, by_target, by_weight)
        return _reduced(rows, output[2], reduction).to(input.dtype)


class CrossEntropyInputGrad(ManualFunction):
    @staticmethod
    def forward(
        grad_output, input, target, weight, lse, denominator, reduction, ignore_index, label_smoothing, backend
    ):
        options = reduction, (), ignore_index, label_smoothing
        return cross_entropy_input_grad(grad_output, input, target, weight, lse, denominator, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, grad_input):
        grad_output, input, target, weight, _, denominator, *ctx.options = inputs
        ctx.save_for_backward(
            grad_output if any(ctx.needs_input_grad[1:4]) else None, input, target, weight, denominator
        )

    @staticmethod
    def backward(ctx, grad_grad_input):
        grad_output, input, target, weight, denominator = ctx.saved_tensors
        reduction, ignore_index, label_smoothing, backend = ctx.options
        v, p = geometry.widened(grad_grad_input), geometry.widened(Softmax.call(input, 1, backend))
        w = _class_weight(weight, input, ())
        q = _smoothed(target, input.shape[1], label_smoothing, ignore_index, p.dtype)
        wq = _weighted(q, w)
        expected = (p * v).sum(1, keepdim=True)
        by_grad_output = by_input = by_target = by_weight = None
        if any(ctx.needs_input_grad[1:4]):
            row_grad = _row_grad(grad_output, denominator, input, reduction)
        if ctx.needs_input_grad[0]:
            rows = (wq * (expected - v)).sum(1)
            by_grad_output = _reduced(rows, denominator, reduction).to(grad_grad_input.dtype)
        if ctx.needs_input_grad[1]:
            curvature = SoftmaxInputGrad.call(v, p, 1, backend)
            by_input = (row_grad * wq.sum(1, keepdim=True) * curvature).to(input.dtype)
        if ctx.needs_input_grad[2]:
            by_target = (_weighted((1 - label_smoothing) * row_grad, w) * (expected - v)).to(target.dtype)
        if ctx.needs_input_grad[3]:
            _refuse_index_weight(target)
            by_weight = _summed_to(weight, row_grad * q * (expected - v))
        return by_grad_output, by_input, by_target, by_weight, *(None,) * 6

    @staticmethod
    def tangent(inputs, grad_input, tangents):
        grad_output, input, target, weight, _, denominator, *options = inputs
        grad_tangent, input_tangent, target_tangent, weight_tangent, *_ = tangents
        reduction, ignore_index, label_smoothing, backend = options
        p, w = geometry.widened(Softmax.call(input, 1, backend)), _class_weight(weight, input, ())
        q = _smoothed(target, input.shape[1], label_smoothing, ignore_index, p.dtype)
        row_grad = _row_grad(grad_output, denominator, input, reduction)
        by_grad_output = by_input = by_wq = None
        if grad_tangent is not None:
            by_grad_output = CrossEntropyInputGrad.call(grad_tangent, *inputs[1:])
        if input_tangent is not None:
            moved = SoftmaxInputGrad.call(geometry.widened(input_tangent), p, 1, backend)
            by_input = (row_grad * _weighted(q, w).sum(1, keepdim=True) * moved).to(input.dtype)
        if weight_tangent is not None:
            _refuse_index_weight(target)
        wq_tangent = sum_of_terms(
            None if target_tangent is None else _weighted((1 - label_smoothing) * geometry.widened(target_tangent), w),
            None if weight_tangent is None else _class_weight(weight_tangent, input, ()) * q,
        )
        if wq_tangent is not None:
            by_wq = (row_grad * (wq_tangent.sum(1, keepdim=True) * p - wq_tangent)).to(input.dtype)
        return sum_of_terms(by_grad_output, by_input, by_wq)


class NllLoss(ManualFunction):
    """Linear in the input: its derivative is NllLossInputGrad, whose derivative is NllLoss."""

    @staticmethod
    def forward(input, target, weight, reduction, ignore_index, backend):
        return nll_loss_forward(input, target, weight, reduction, (), ignore_index, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, weight, *ctx.options = inputs
        _, denominator = output
        ctx.mark_non_differentiable(denominator)
        ctx.classes = input.shape[1]
        ctx.save_for_backward(target, weight, denominator)

    @staticmethod
    def backward(ctx, grad_output, *_):
        by_input = NllLossInputGrad.call(grad_output, *ctx.saved_tensors, ctx.classes, *ctx.options)
        return by_input, None, None, None, None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        loss, _ = NllLoss.call(tangents[0], *inputs[1:])
        return loss


class NllLossInputGrad(ManualFunction):
    @staticmethod
    def forward(grad_output, target, weight, denominator, classes, reduction, ignore_index, backend):
        options = classes, reduction, (), ignore_index
        return nll_loss_input_grad(grad_output, target, weight, denominator, *options, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, grad_input):
        _, target, weight, _, _, *ctx.options = inputs
        ctx.save_for_backward(target, weight)

    @staticmethod
    def backward(ctx, grad_grad_input):
        by_grad_output, _ = NllLoss.call(grad_grad_input, *ctx.saved_tensors, *ctx.options)
        return by_grad_output, *(None,) * 7

    @staticmethod
    def tangent(inputs, grad_input, tangents):
        return NllLossInputGrad.call(tangents[0], *inputs[1:])


def _check_tensors(op: str, input: Any, target: Any, weight: Any) -> None:
    for name, value in (("input", input), ("target", target), ("weight", weight)):
        if name != "weight" or value is not None:
            geometry.check_tensor(op, name, value)
            geometry.check_alike(op, name, value, input, "device")


def _check_weight(op: str, input: Tensor, weight: Tensor | None) -> None:
    classes = input.shape[0 if input.dim() == 1 else 1]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise RuntimeError(f"{op}: weight must have one entry per class, ({classes},), got {tuple(weight.shape)}")


def _check_indices(op: str, input: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Raises unless target (N, *d) and input (N, C, *d) belong together; or () or (1,) and (C,)."""
    geometry.check_floating(op, "input", input)
    if input.dim() == 1:
        if tuple(target.shape) not in ((), (1,)) and not target.is_floating_point():
            raise ValueError(f"{op}: target must be one index, of the shape () or (1,), {_shapes(input, target)}")
    elif input.shape[0] != (target.shape[0] if target.dim() else 0):
        raise ValueError(f"{op}: target must have the batch size of input, {input.shape[0]}, {_shapes(input, target)}")
    elif list(target.shape) != _rows_shape(input):
        raise RuntimeError(f"{op}: target must have the shape {tuple(_rows_shape(input))}, {_shapes(input, target)}")
    if target.dtype not in ((torch.int64, torch.uint8) if input.dim() < 3 else (torch.int64,)):
        wanted = "int64 or uint8 class indices" if input.dim() < 3 else "int64 class indices, one for every pixel"
        raise RuntimeError(f"{op}: target must be {wanted}, got {target.dtype}")
    _check_weight(op, input, weight)
    if weight is None:
        return
    geometry.check_alike(op, "weight", weight, input, "dtype")
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: weight must not require a gradient where target holds indices")


def _shapes(input: Tensor, target: Tensor) -> str:
    return f"got target {tuple(target.shape)} with input {tuple(input.shape)}"


def _check_distributions(op: str, input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> None:
    if not target.is_floating_point():
        raise RuntimeError(f"{op}: target must be floating where it has the shape of input, got {target.dtype}")
    if ignore_index >= 0:
        raise RuntimeError(f"{op}: ignore_index must be negative where target holds probabilities, got {ignore_index}")
    if input.dim() == 0:
        raise IndexError(f"{op}: input must have a dimension of classes, got the shape ()")
    _check_weight(op, input, weight)
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is not None:
            geometry.check_floating(op, name, tensor)


def cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
):
    """The cross-entropy between targets and the softmax of logits: `torch.nn.functional.cross_entropy`.

    Args:
        input: logits (C,), (N, C) or (N, C, *d).
        target: class indices () or (1,), (N,), (N, *d), in int64 or uint8; or probabilities of input's shape, which are
            differentiable.
        weight: (C,), one factor per class, or None; differentiable where target holds probabilities.
        size_average, reduce: deprecated, they set reduction.
        ignore_index: the index of the rows that count nothing.
        reduction: "none", "sum", or "mean": over the weights of the rows that count, for indices, over the number of
            rows, for probabilities.
        label_smoothing: the share, 0 to 1, of the target that is spread evenly over the classes.

    Returns:
        A number, or the loss of every row, () or (N, *d), for reduction "none".

    Raises:
        IndexError: for an index outside 0 .. C-1 that is not ignore_index.
        RuntimeError: for shapes, dtypes, devices or options that do not go together.
        TypeError: for arguments of another type.
        ValueError: for another reduction, and for batch sizes that differ.
        NotImplementedError: for dtypes that are not floating.

    Formula: `manual_ops.ops.cross_entropy`, (cross_entropy).
    """
    op = "cross_entropy"
    input, target, weight = autocast.cast(op, input, target, weight)
    _check_tensors(op, input, target, weight)
    ignore_index = geometry.whole(op, "ignore_index", ignore_index)
    label_smoothing = geometry.real(op, "label_smoothing", label_smoothing)
    reduction = reduction_argument(op, size_average, reduce, reduction)
    if not 0 <= label_smoothing <= 1:
        raise RuntimeError(f"{op}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if target.shape == input.shape:
        _check_distributions(op, input, target, weight, ignore_index)
        dtype = torch.promote_types(input.dtype, target.dtype)
        dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
        input, target = input.to(dtype), target.to(dtype)
        weight = None if weight is None else weight.to(dtype)
    else:
        if input.dim() == 0:
            raise IndexError(f"{op}: input must have a dimension of classes, got the shape ()")
        _check_indices(op, input, target, weight)
        target = target.long()
    options = reduction, ignore_index, label_smoothing, modes.current_backend()
    if input.dim() > 1:
        return CrossEntropy.call(input, target, weight, *options)[0]
    target = target.unsqueeze(0) if target.is_floating_point() else target.reshape(1)
    return CrossEntropy.call(input.unsqueeze(0), target, weight, *options)[0].reshape(())


def nll_loss(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
    """The negative log-likelihood of class indices: `torch.nn.functional.nll_loss`.

    Args:
        input: log-probabilities (C,), (N, C) or (N, C, *d).
        target: class indices () or (1,), (N,), (N, *d), in int64 or uint8.
        weight, size_average, ignore_index, reduce, reduction: as for `cross_entropy`.

    Returns:
        A number, or the loss of every row, () or (N, *d), for reduction "none".

    Raises:
        ValueError: for an input without dimensions, which is an IndexError there; further as `cross_entropy`.

    Formula: `manual_ops.ops.cross_entropy`, (nll_loss).
    """
    op = "nll_loss"
    input, target, weight = autocast.cast(op, input, target, weight)
    _check_tensors(op, input, target, weight)
    ignore_index = geometry.whole(op, "ignore_index", ignore_index)
    reduction = reduction_argument(op, size_average, reduce, reduction)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have a dimension of classes, got the shape ()")
    _check_indices(op, input, target, weight)
    options = reduction, ignore_index, modes.current_backend()
    if input.dim() > 1:
        return NllLoss.call(input, target.long(), weight, *options)[0]
    return NllLoss.call(input.unsqueeze(0), target.long().reshape(1), weight, *options)[0].reshape(())
