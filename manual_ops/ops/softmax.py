"""Softmax and log-softmax along one dimension, every derivative of both.

Along that dimension, with logits x and sums over all classes,

    lse        = log sum_k exp(x_k) = m + log sum_k exp(x_k - m)       any m; m = max(x) keeps exp below overflow
    s_c        = exp(x_c) / sum_k exp(x_k)                                                                 (softmax)
    l_c        = log s_c = x_c - lse                                                                   (log_softmax)

From dlse/dx_k = s_k follow dl_c/dx_k = [c = k] - s_k and ds_c/dx_k = s_c * dl_c/dx_k = s_c * ([c = k] - s_k). With the
gradient g of the output the chain rule sums over c:

    dL/dx_k = s_k * (g_k - sum_c g_c s_c)                                                       (softmax_input_grad)
    dL/dx_k = g_k - s_k * sum_c g_c,       s = exp(l)                                       (log_softmax_input_grad)

Both need the output alone, which is what is saved. For the second derivative these two are functions of (g, s) and of
(g, l); with v the gradient that comes in,

    softmax_input_grad       by g_k: s_k * (v_k - sum_c v_c s_c), itself again, for the Jacobian of softmax is symmetric
                             by s_k: v_k * (g_k - sum_c g_c s_c) - g_k * sum_c v_c s_c
    log_softmax_input_grad   by g_k: v_k - sum_c v_c exp(l_c)
                             by l_k: -v_k * exp(l_k) * sum_c g_c

and these are products and sums, whose derivatives are elementary.

In the code: x is `input`, s and l `output`, g `grad_output`, v `grad_grad_input`.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from manual_ops import autocast, geometry, modes
from manual_ops.autograd import ManualFunction, sum_of_terms
from manual_ops.kernel import in_front, kernel


def _like(first: Tensor, *_: Any) -> Tensor:
    return first.new_empty(first.shape)


@kernel("softmax_forward(Tensor input, int dim) -> Tensor", meta=_like)
def softmax_forward(input, dim):
    if input.numel() == 0:
        return input.new_empty(input.shape)
    x = geometry.widened(input)
    powers = torch.exp(x - x.amax(dim, keepdim=True))
    return (powers / powers.sum(dim, keepdim=True)).to(input.dtype).contiguous()


@kernel("softmax_input_grad(Tensor grad_output, Tensor output, int dim) -> Tensor", meta=_like)
def softmax_input_grad(grad_output, output, dim):
    g, s = map(geometry.widened, (grad_output, output))
    return (s * (g - (g * s).sum(dim, keepdim=True))).to(grad_output.dtype).contiguous()


@kernel("log_softmax_forward(Tensor input, int dim) -> Tensor", meta=_like)
def log_softmax_forward(input, dim):
    if input.numel() == 0:
        return input.new_empty(input.shape)
    x = geometry.widened(input)
    shifted = x - x.amax(dim, keepdim=True)
    return (shifted - torch.log(torch.exp(shifted).sum(dim, keepdim=True))).to(input.dtype).contiguous()


@kernel("log_softmax_input_grad(Tensor grad_output, Tensor output, int dim) -> Tensor", meta=_like)
def log_softmax_input_grad(grad_output, output, dim):
    g, l = map(geometry.widened, (grad_output, output))  # noqa: E741
    return (g - torch.exp(l) * g.sum(dim, keepdim=True)).to(grad_output.dtype).contiguous()


# Batch rules: the batch is one more dimension in front.


@softmax_forward.batch_rule
@log_softmax_forward.batch_rule
def _(op, batch_size, in_dims, input, dim):
    return op(in_front(input, in_dims[0], batch_size), dim + 1), 0


@softmax_input_grad.batch_rule
@log_softmax_input_grad.batch_rule
def _(op, batch_size, in_dims, grad_output, output, dim):
    return op(in_front(grad_output, in_dims[0], batch_size), in_front(output, in_dims[1], batch_size), dim + 1), 0


class Softmax(ManualFunction):
    @staticmethod
    def forward(input, dim, backend):
        return softmax_forward(input, dim, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.dim, ctx.backend = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return SoftmaxInputGrad.call(grad_output, output, ctx.dim, ctx.backend), None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        return SoftmaxInputGrad.call(tangents[0], output, *inputs[1:])


class SoftmaxInputGrad(ManualFunction):
    @staticmethod
    def forward(grad_output, output, dim, backend):
        return softmax_input_grad(grad_output, output, dim, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, grad_input):
        grad_output, output, ctx.dim, ctx.backend = inputs
        ctx.save_for_backward(grad_output if ctx.needs_input_grad[1] else None, output)

    @staticmethod
    def backward(ctx, grad_grad_input):
        grad_output, output = ctx.saved_tensors
        by_grad_output = by_output = None
        if ctx.needs_input_grad[0]:
            by_grad_output = SoftmaxInputGrad.call(grad_grad_input, output, ctx.dim, ctx.backend)
        if ctx.needs_input_grad[1]:
            v, g, s = map(geometry.widened, (grad_grad_input, grad_output, output))
            by_output = v * (g - (g * s).sum(ctx.dim, keepdim=True)) - g * (v * s).sum(ctx.dim, keepdim=True)
            by_output = by_output.to(output.dtype)
        return by_grad_output, by_output, None, None

    @staticmethod
    def tangent(inputs, grad_input, tangents):
        grad_output, output, dim, backend = inputs
        grad_tangent, output_tangent, *_ = tangents
        by_output = None
        if output_tangent is not None:
            t, g, s = map(geometry.widened, (output_tangent, grad_output, output))
            by_output = t * (g - (g * s).sum(dim, keepdim=True)) - s * (g * t).sum(dim, keepdim=True)
            by_output = by_output.to(output.dtype)
        return sum_of_terms(
            None if grad_tangent is None else SoftmaxInputGrad.call(grad_tangent, output, dim, backend), by_output
        )


class LogSoftmax(ManualFunction):
    @staticmethod
    def forward(input, dim, backend):
        return log_softmax_forward(input, dim, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.dim, ctx.backend = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad_output):
        (output,) = ctx.saved_tensors
        return LogSoftmaxInputGrad.call(grad_output, output, ctx.dim, ctx.backend), None, None

    @staticmethod
    def tangent(inputs, output, tangents):
        return _log_softmax_tangent(tangents[0], output, inputs[1])


def _log_softmax_tangent(tangent: Tensor, output: Tensor, dim: int) -> Tensor:
    """t_k - sum_c t_c exp(l_c): the Jacobian of log_softmax times t, and the transpose of log_softmax_input_grad."""
    t, l = map(geometry.widened, (tangent, output))  # noqa: E741
    return (t - (t * torch.exp(l)).sum(dim, keepdim=True)).to(tangent.dtype)


class LogSoftmaxInputGrad(ManualFunction):
    @staticmethod
    def forward(grad_output, output, dim, backend):
        return log_softmax_input_grad(grad_output, output, dim, backend=backend)

    @staticmethod
    def setup_context(ctx, inputs, grad_input):
        grad_output, output, ctx.dim, ctx.backend = inputs
        ctx.save_for_backward(grad_output if ctx.needs_input_grad[1] else None, output)

    @staticmethod
    def backward(ctx, grad_grad_input):
        grad_output, output = ctx.saved_tensors
        by_grad_output = by_output = None
        if ctx.needs_input_grad[0]:
            by_grad_output = _log_softmax_tangent(grad_grad_input, output, ctx.dim)
        if ctx.needs_input_grad[1]:
            by_output = _by_log(grad_grad_input, grad_output, output, ctx.dim)
        return by_grad_output, by_output, None, None

    @staticmethod
    def tangent(inputs, grad_input, tangents):
        grad_output, output, dim, backend = inputs
        grad_tangent, output_tangent, *_ = tangents
        return sum_of_terms(
            None if grad_tangent is None else LogSoftmaxInputGrad.call(grad_tangent, output, dim, backend),
            None if output_tangent is None else _by_log(output_tangent, grad_output, output, dim),
        )


def _by_log(direction: Tensor, grad_output: Tensor, output: Tensor, dim: int) -> Tensor:
    """-v_k * exp(l_k) * sum_c g_c: the derivative of log_softmax_input_grad by l, a diagonal matrix, times v."""
    v, g, l = map(geometry.widened, (direction, grad_output, output))  # noqa: E741
    return (-v * torch.exp(l) * g.sum(dim, keepdim=True)).to(direction.dtype)


def _softmax(op, function, input, dim, stacklevel, dtype):
    geometry.check_tensor(op, "input", input)
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {op} has been deprecated: pass dim, as in {op}(input, dim=-1).",
            stacklevel=stacklevel,
        )
        dim = 0 if input.dim() in (0, 1, 3) else 1
    dim = geometry.whole(op, "dim", dim)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}: dtype must be a torch.dtype, got {dtype!r}")
    dims = max(1, input.dim())  # a number counts as a vector of one
    if not -dims <= dim < dims:
        raise IndexError(f"{op}: dim must be in {-dims}..{dims - 1} for the shape {tuple(input.shape)}, got {dim}")
    (input,) = autocast.cast(op, input) if dtype is None else (input.to(dtype),)
    geometry.check_floating(op, "input", input)
    if input.dim() == 0:
        return function.call(input.reshape(1), 0, modes.current_backend()).reshape(())
    return function.call(input, dim % dims, modes.current_backend())


def softmax(input, dim=None, _stacklevel=3, dtype=None):
    """Exponentials along a dimension, scaled to sum to one: `torch.nn.functional.softmax`.

    Args:
        input: of any shape.
        dim: the dimension of the classes. Left out, it is 0 for 0, 1 and 3 dimensions and else 1, with a warning.
        dtype: what input is converted to first; its own dtype if left out.

    Returns:
        A contiguous tensor of input's shape. A slice whose maximum is infinite of either sign is NaN throughout.

    Raises:
        IndexError: for a dim that input does not have.
        NotImplementedError: for an input that is not floating.
        TypeError: for arguments of another type.

    Formula: `manual_ops.ops.softmax`, (softmax).
    """
    return _softmax("softmax", Softmax, input, dim, _stacklevel, dtype)


def log_softmax(input, dim=None, _stacklevel=3, dtype=None):
    """The logarithm of softmax, finite where softmax itself underflows: `torch.nn.functional.log_softmax`.

    Args, returns and errors are those of `softmax`. Formula: `manual_ops.ops.softmax`, (log_softmax).
    """
    return _softmax("log_softmax", LogSoftmax, input, dim, _stacklevel, dtype)
