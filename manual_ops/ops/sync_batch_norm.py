"""Batch normalisation over the batch of a whole process group, of which each process holds a part of its own.

The formulas are those of `manual_ops.ops.batch_norm`, with every sum over a channel taken over all processes: process k
holds m_k values of it (none, if its part is empty), and with N = sum_k m_k

    mean = sum_k m_k mean_k / N
    var  = sum_k m_k (var_k + (mean_k - mean)^2) / N      the values' squares around mean_k, then mean_k's around mean
                                                                                                         (statistics)
    xhat_i = (x_i - mean) * rstd          rstd = 1 / sqrt(var + eps)
    y_i = w_k * xhat_i + b_k                                                                              (forward)

Here k is the process that holds x_i. Its w_k and b_k are the same numbers everywhere in a data-parallel training, but
each process owns a copy, whose gradient is its own share alone (DistributedDataParallel averages the shares):

    dL/db_k = sum of g_i over the x_i of process k        dL/dw_k = likewise of g_i * xhat_i                    (sums)

The loss L is the sum of the losses of all processes. mean and rstd meet all of them, so x's gradient holds two sums
that run through the group. With u_i = w_k g_i and <.> for the mean over all N values,

    dL/dx = rstd * P u        P u = u - <u> - xhat * <u xhat>                                             (input_grad)
    <u> = sum_k w_k dL/db_k / N           <u xhat> = sum_k w_k dL/dw_k / N

Forward gathers one (m_k, mean_k, var_k) from each process; backward adds the 2C numbers of the last line.

The sum over the group is linear: s = sum_j v_j arrives at each process, dL/dv_j = sum_k dL/ds_k, which is such a sum
again, and so is its tangent (AllReduce). With it the second derivatives are those of batch_norm, process by process.
For incoming gradients q, p of the two (sums), which may differ between processes as w_k may:

    (sums)         by g: q + p * xhat, which is (forward)        by x: rstd * P (p g), which is (input_grad)

For (input_grad) with the incoming gradient h, the number to differentiate is, summed over all processes,

    sum(h * rstd * P u) = N * rstd * (<uh> - <u><h> - a*c)        a = <u xhat>,  c = <h xhat>

    by g: w_k * rstd * P h              by w_k: sum of g_i * rstd * (P h)_i over the values of process k
    by x: -rstd^2 * (xhat * (<uh> - <u><h> - 3*a*c) + c * (u - <u>) + a * (h - <h>))                      (second_grad)

    drstd/dx_j = -rstd^2 * xhat_j / N, so that an incoming e_k on each process gives x the gradient
    -rstd^2 * xhat / N * sum_k e_k                                                                              (rstd)

Every process must take part in every sum: the processes must differentiate by the same things, as under
DistributedDataParallel, or they wait for each other in vain.

Saved for backward: the input, the weight, mean, var and N. In the code: g is `grad_output`, N `count`, a tensor, since
it comes from other processes; mean, var and the sums have the dtype of accumulation. A process group goes by its name.
"""

from typing import Any

import torch
from torch import distributed

from manual_ops import modes
from manual_ops.autograd import ManualFunction, sum_of_terms
from manual_ops.kernel import Kernel, in_front
from manual_ops.ops.batch_norm import (
    ChannelDot,
    ChannelScale,
    _affine_gradients,
    _check,
    _count,
    _differentiating,
    _dtypes,
    _flat,
    batch_norm_forward,
    batch_norm_sums,
    batch_norm_update,
    channel_scale,
)
from manual_ops.ops.channel_sum import ChannelSum, per_channel


def _group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group  # not in a torch without distributed

    return _resolve_process_group(name)  # type: ignore[arg-type]


# The collectives are operators, so that transforms and torch.compile see them as they see the kernels. There is nothing
# in them to write in C++.


def _all_reduce(input, group):
    """The sum over the processes."""
    total = input.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=_group(group))
    return total


def _all_gather(input, group):
    """What each process holds, stacked: (processes, ...)."""
    process_group = _group(group)
    input = input.contiguous()
    gathered = [torch.empty_like(input) for _ in range(process_group.size())]
    distributed.all_gather(gathered, input, group=process_group)
    return torch.stack(gathered)


all_reduce = Kernel(
    "all_reduce(Tensor input, str group) -> Tensor", lambda input, group: input.new_empty(input.shape), _all_reduce
)
all_gather = Kernel(
    "all_gather(Tensor input, str group) -> Tensor",
    lambda input, group: input.new_empty((_group(group).size(), *input.shape)),
    _all_gather,
)


@all_reduce.batch_rule
def _(op, batch_size, in_dims, input, group):
    return op(input, group), in_dims[0]


@all_gather.batch_rule
def _(op, batch_size, in_dims, input, group):
    return op(in_front(input, in_dims[0], batch_size), group), 1


class AllReduce(ManualFunction):
    """The sum over the processes: linear, and its own transpose."""

    @staticmethod
    def forward(input, group, backend):
        return all_reduce(input, group, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.group, ctx.backend = inputs

    @staticmethod
    def backward(ctx, grad_output):
        return AllReduce.call(grad_output, ctx.group, ctx.backend), None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        return AllReduce.call(tangents[0], *inputs[1:])


def _statistics(input, eps, group, backend):
    """(statistics), and the count as a float64 number: exact, and nothing to wait for on a GPU."""
    _, mean, var, _ = batch_norm_forward(input, None, None, None, None, None, eps, False, backend=backend)
    own = torch.cat([mean.new_full((1,), _count(input), dtype=torch.float64), mean.double(), var.double()])
    gathered = all_gather(own, group, backend=backend)  # (processes, 1 + 2C)
    counts, means, variances = gathered.split([1, mean.shape[0], mean.shape[0]], 1)
    count = counts.sum()
    divisor = count.clamp(min=1)
    total_mean = (counts * means).sum(0) / divisor
    total_var = (counts * (variances + (means - total_mean).square())).sum(0) / divisor
    return total_mean.to(mean.dtype), total_var.to(var.dtype), count


class SyncBatchNorm(ManualFunction):
    """(forward). Without mean, var and count they are computed; either way they are returned."""

    @staticmethod
    def forward(input, weight, bias, mean, var, count, eps, group, backend):
        if mean is None:
            mean, var, count = _statistics(input, eps, group, backend)
        else:
            count = count.clone()
        output, mean, var, _ = batch_norm_forward(input, None, mean, var, weight, bias, eps, False, backend=backend)
        return output, mean, var, count

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, _, _, _, *ctx.options = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.dtypes = _dtypes(weight, bias)
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        needs_input = input_needs or weight_needs
        ctx.save_for_backward(input if needs_input else None, weight if input_needs else None, *output[1:])

    @staticmethod
    def backward(ctx, grad_output, *_):
        input, weight, *statistics = ctx.saved_tensors
        rest = *statistics, *ctx.options
        input_needs, *affine_need = ctx.needs_input_grad[:3]
        grad_input = sums = None
        if input is None:
            grad_bias = ChannelSum.call(grad_output.to(statistics[0].dtype), ctx.options[-1]).to(ctx.dtypes[1])
            return None, None, grad_bias, *(None,) * 6
        if input_needs:
            grad_input, sums = SyncInputGrad.call(grad_output, input, weight, *rest)
        if any(affine_need) and (sums is None or _differentiating()):
            sums = SyncSums.call(grad_output, input, *rest)
        affine = _affine_gradients(sums, ctx.dtypes, affine_need) if any(affine_need) else (None, None)
        return grad_input, *affine, *(None,) * 6

    @staticmethod
    def tangent(inputs, output, tangents):
        input, weight, _, _, _, _, *options = inputs
        rest = *output[1:], *options
        by_input = by_weight = by_bias = None
        if tangents[0] is not None:
            by_input = _projected(tangents[0], input, rest)
            if weight is not None:
                by_input = ChannelScale.call(by_input, weight.to(rest[0].dtype), options[-1])
        if tangents[1] is not None:
            by_weight = SyncBatchNorm.call(input, tangents[1], None, *rest)[0]
        if tangents[2] is not None:
            by_bias = per_channel(tangents[2], input.dim()).expand(input.shape).to(input.dtype)
        return sum_of_terms(by_input, by_weight, by_bias)


class SyncSums(ManualFunction):
    """(sums) of this process, (2, C): the gradients of bias and weight, in the dtype of accumulation."""

    @staticmethod
    def forward(grad_output, input, mean, var, count, eps, group, backend):
        return batch_norm_sums(grad_output, input, mean, var, eps, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, mean, var, count, *ctx.options = inputs
        ctx.save_for_backward(grad_output if ctx.needs_input_grad[1] else None, input, mean, var, count)

    @staticmethod
    def backward(ctx, grad_sums):
        grad_output, input, *statistics = ctx.saved_tensors
        rest = *statistics, *ctx.options
        by_bias, by_weight = grad_sums[0], grad_sums[1]
        by_grad = by_input = None
        if ctx.needs_input_grad[0]:
            by_grad = SyncBatchNorm.call(input, by_weight, by_bias, *rest)[0]
        if ctx.needs_input_grad[1]:
            by_input = SyncInputGrad.call(grad_output, input, by_weight, *rest)[0]
        return by_grad, by_input, *(None,) * 6

    @staticmethod
    def tangent(inputs, output, tangents):
        grad_output, input, *rest = inputs
        by_grad = by_input = None
        if tangents[0] is not None:
            by_grad = SyncSums.call(tangents[0], input, *rest)
        if tangents[1] is not None:
            by_weight = ChannelDot.call(grad_output, _projected(tangents[1], input, rest), rest[-1])
            by_input = torch.stack([torch.zeros_like(by_weight), by_weight])
        return sum_of_terms(by_grad, by_input)


class SyncInputGrad(ManualFunction):
    """(input_grad), and as a by-product this process's (sums)."""

    @staticmethod
    def forward(grad_output, input, weight, mean, var, count, eps, group, backend):
        sums = batch_norm_sums(grad_output, input, mean, var, eps, backend=backend)
        through_group = sums if weight is None else weight * sums
        mean_u, mean_uxhat = (all_reduce(through_group, group, backend=backend) / count).unbind()
        rstd = (var + eps).rsqrt()
        # 16-bit tensors are widened here, so that the difference of the terms is rounded, not the terms.
        scaled = channel_scale(grad_output.to(mean.dtype), rstd if weight is None else weight * rstd, backend=backend)
        shift, slope = -rstd * mean_u, -rstd * mean_uxhat
        grad_input, *_ = batch_norm_forward(
            input.to(mean.dtype), scaled, mean, var, slope, shift, eps, False, backend=backend
        )
        return grad_input.to(input.dtype), sums

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, weight, mean, var, count, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.weight_dtype = None if weight is None else weight.dtype
        grad_needs, input_needs, weight_needs, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            grad_output if input_needs or weight_needs else None,
            input,
            weight if grad_needs or input_needs else None,
            mean,
            var,
            count,
        )

    @staticmethod
    def backward(ctx, grad_grad_input, *_):
        grad_output, input, weight, *statistics = ctx.saved_tensors
        rest = *statistics, *ctx.options
        grad_needs, input_needs, weight_needs, *_ = ctx.needs_input_grad
        by_grad = by_input = by_weight = None
        if grad_needs or weight_needs:
            projected = _projected(grad_grad_input, input, rest)
        if grad_needs and weight is not None:
            by_grad = ChannelScale.call(projected, weight.to(rest[0].dtype), rest[-1])
        elif grad_needs:
            by_grad = projected
        if input_needs:
            by_input = _second_grad(grad_output, grad_grad_input, input, weight, rest)
        if weight_needs:
            by_weight = ChannelDot.call(grad_output, projected, rest[-1]).to(ctx.weight_dtype)
        return by_grad, by_input, by_weight, *(None,) * 6

    @staticmethod
    def tangent(inputs, output, tangents):
        grad_output, input, weight, *rest = inputs
        grad_tangent, input_tangent, weight_tangent, *_ = tangents
        by_grad = by_input = by_weight = None
        if grad_tangent is not None:
            by_grad = SyncInputGrad.call(grad_tangent, input, weight, *rest)[0]
        if input_tangent is not None:
            # x -> (input_grad) is the gradient of x -> sum(u xhat): its derivative is symmetric.
            by_input = _second_grad(grad_output, input_tangent, input, weight, rest)
        if weight_tangent is not None:
            by_weight = SyncInputGrad.call(grad_output, input, weight_tangent, *rest)[0]
        return sum_of_terms(by_grad, by_input, by_weight)


class SyncRstd(ManualFunction):
    """(rstd) as a function of the input."""

    @staticmethod
    def forward(input, mean, var, count, eps, group, backend):
        return (var + eps).rsqrt()

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, mean, var, count, *ctx.options = inputs
        ctx.save_for_backward(input, mean, var, count)

    @staticmethod
    def backward(ctx, grad_output):
        input, *statistics = ctx.saved_tensors
        rest = *statistics, *ctx.options
        _, _, count, _, group, backend = rest
        scale = -AllReduce.call(grad_output, group, backend) * SyncRstd.call(input, *rest).square() / count
        return SyncBatchNorm.call(input, scale, None, *rest)[0], *(None,) * 6

    @staticmethod
    def tangent(inputs, output, tangents):
        input, *rest = inputs
        _, _, count, _, group, backend = rest
        if tangents[0] is None:
            return None
        total = AllReduce.call(SyncSums.call(tangents[0], input, *rest)[1], group, backend)
        return -SyncRstd.call(*inputs).square() * total / count


def _projected(tensor, input, rest):
    """rstd * P tensor."""
    return SyncInputGrad.call(tensor, input, None, *rest)[0]


def _second_grad(grad_output, other, input, weight, rest):
    """(second_grad), h being `other`."""
    mean, _, count, _, group, backend = rest
    u = grad_output if weight is None else ChannelScale.call(grad_output, weight.to(mean.dtype), backend)
    products = ChannelDot.call(u, other, backend).unsqueeze(0)
    sums = torch.cat([SyncSums.call(u, input, *rest), SyncSums.call(other, input, *rest), products])  # (5, C)
    mean_u, a, mean_h, c, mean_uh = (AllReduce.call(sums, group, backend) / count).unbind()
    factor = -SyncRstd.call(input, *rest).square()
    along_xhat = factor * (mean_uh - mean_u * mean_h - 3 * a * c)
    constant = -factor * (c * mean_u + a * mean_h)
    by_xhat, *_ = SyncBatchNorm.call(input, along_xhat, constant, *rest)
    return by_xhat + ChannelScale.call(u, factor * c, backend) + ChannelScale.call(other, factor * a, backend)


def sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, process_group):
    """Batch normalisation in training, with the statistics of the inputs of all processes of a group.

    Args:
        input: (N, C, ...), this process's part of the batch; N may differ between processes, and be 0.
        running_mean: (C,) or None; updated in place, to the same numbers in every process that starts with the same.
        running_var: (C,) or None, likewise.
        weight: (C,) or None, a factor a channel.
        bias: (C,) or None, added after it.
        momentum: running = (1 - momentum) * running + momentum * batch (whose variance is the unbiased one).
        eps: added to the variance under the root.
        process_group: a `torch.distributed` process group; every process of it must make the call.

    Returns:
        The input's shape, dtype and memory format.

    Raises:
        As `manual_ops.functional.batch_norm`, but for one value a channel, which other processes may add to.

    Formula: `manual_ops.ops.sync_batch_norm`, (forward).
    """
    momentum, eps = _check("sync_batch_norm", input, running_mean, running_var, weight, bias, True, momentum, eps)
    output, mean, var, count = SyncBatchNorm.call(
        input, _flat(weight), _flat(bias), None, None, None, eps, process_group.group_name,
        modes.current_backend(),
    )  # fmt: skip
    if running_mean is not None:
        # An empty batch moves nothing.
        momentum = momentum * (count > 0).to(count.dtype)
        batch_norm_update.body(running_mean, running_var, mean.detach(), var.detach(), count.detach(), momentum)
    return output
