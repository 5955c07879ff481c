"""Elementwise activations y = f(x): relu, relu6, leaky_relu, sigmoid, tanh, silu, gelu; every derivative of each.

Backward is one product, dL/dx = g * f'(x) with g = dL/dy. What differs is whether f' is cheaper to write with the
output y or with the input x; that one tensor is saved, s in the table:

    f            y                        f', as a function of s                  its derivative by s
    relu         max(x, 0)                s = y   [not y <= 0]                    0
    relu6        min(max(x, 0), 6)        s = y   [not (y <= 0 or y >= 6)]        0
    leaky_relu   x if x > 0 else a*x      s = y   1 if y > 0 else a               0
    sigmoid      1 / (1 + exp(-x))        s = y   y (1 - y)                       1 - 2y
    tanh         (e^2x - 1)/(e^2x + 1)    s = y   1 - y^2                         -2y
    silu         x S(x)                   s = x   S + x S(1-S)                    S(1-S) (2 + x (1-2S))
    gelu         x Phi(x)                 s = x   Phi + x phi                     phi (2 - x^2)
    gelu, tanh   x S(u)                   s = x   S + x S(1-S) u'                 S(1-S) (2u' + x (u'^2 (1-2S) + u''))

S is the logistic sigmoid (with S' = S (1-S)), Phi the normal distribution function, phi = Phi' its density (with
phi' = -x phi), and u = 2 sqrt(2/pi) (x + 0.044715 x^3): tanh gelu is written x (1 + tanh(u/2)) / 2, and
1 + tanh(u/2) = 2 S(u). Since y > 0 exactly where x > 0, leaky_relu may save y as long as a >= 0; for a negative slope
y is positive on both sides, and x is saved.

At a kink torch takes the derivative of one side: relu at 0 has 0, relu6 at 0 and 6 has 0, leaky_relu at 0 has a. Where
relu and relu6 are NaN they pass the gradient on.

The backward product is a Function again. It is linear in g, where its derivative is itself; its derivative by s is the
table's last column times g, plain differentiable arithmetic, so that third and higher orders follow.

In the code: `saved` is s; `slope` is a for leaky_relu and None for the others.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_ops import geometry, modes, recipes
from manual_ops.autograd import ManualFunction, sum_of_terms, transforms_active
from manual_ops.kernel import Kernel, in_front, kernel


class Activation(NamedTuple):
    """One row of the table, on tensors in the accumulation dtype.

    Attributes:
        value: y from x and the options.
        backward: g * f' from g, s and the options.
        curvature: the derivative of f' by s from s and the backend; None where it is zero.
        saves_output: whether s is y.
    """

    value: Callable[..., Tensor]
    backward: Callable[..., Tensor]
    curvature: Callable[[Tensor, str], Tensor] | None
    saves_output: bool


def _sigmoid(x: Tensor) -> Tensor:
    z = torch.exp(-x.abs())
    return torch.where(x < 0, z, 1) / (1 + z)


def _tanh(x: Tensor) -> Tensor:
    decay = torch.expm1(-2 * x.abs())  # in (-1, 0]
    return torch.copysign(decay / (2 + decay), x)


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = _sigmoid(x)
    return g * (s + x * s * (1 - s))


def _silu_curvature(x: Tensor, backend: str) -> Tensor:
    s = Activate.call(x, "sigmoid", None, backend)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _normal_cumulative(x: Tensor) -> Tensor:
    return torch.erfc(-x / math.sqrt(2)) / 2


_CUBIC = 0.044715


def _tanh_argument(x: Tensor) -> Tensor:
    return math.sqrt(8 / math.pi) * (x + _CUBIC * x * x * x)


def _tanh_argument_slope(x: Tensor) -> Tensor:
    return math.sqrt(8 / math.pi) * (1 + 3 * _CUBIC * x * x)


def _gelu_tanh_backward(g: Tensor, x: Tensor) -> Tensor:
    s = _sigmoid(_tanh_argument(x))
    return g * (s + x * s * (1 - s) * _tanh_argument_slope(x))


def _gelu_tanh_curvature(x: Tensor, backend: str) -> Tensor:
    s = Activate.call(_tanh_argument(x), "sigmoid", None, backend)
    slope = _tanh_argument_slope(x)
    bend = math.sqrt(8 / math.pi) * 6 * _CUBIC * x
    return s * (1 - s) * (2 * slope + x * (slope * slope * (1 - 2 * s) + bend))


ACTIVATIONS = {
    "relu": Activation(
        value=lambda x: torch.where(x < 0, 0, x),
        backward=lambda g, y: torch.where(y <= 0, 0, g),
        curvature=None,
        saves_output=True,
    ),
    "relu6": Activation(
        value=lambda x: torch.where(x < 0, 0, torch.where(x > 6, 6, x)),
        backward=lambda g, y: torch.where((y <= 0) | (y >= 6), 0, g),
        curvature=None,
        saves_output=True,
    ),
    "leaky_relu": Activation(
        value=lambda x, slope: torch.where(x > 0, x, x * slope),
        backward=lambda g, y, slope: torch.where(y > 0, g, g * slope),
        curvature=None,
        saves_output=True,
    ),
    "sigmoid": Activation(
        value=_sigmoid,
        backward=lambda g, y: g * (1 - y) * y,
        curvature=lambda y, _: 1 - 2 * y,
        saves_output=True,
    ),
    "tanh": Activation(
        value=_tanh,
        backward=lambda g, y: g * (1 - y * y),
        curvature=lambda y, _: -2 * y,
        saves_output=True,
    ),
    "silu": Activation(
        value=lambda x: x * _sigmoid(x),
        backward=_silu_backward,
        curvature=_silu_curvature,
        saves_output=False,
    ),
    "gelu": Activation(
        value=lambda x: x * _normal_cumulative(x),
        backward=lambda g, x: g * (_normal_cumulative(x) + x * _normal_density(x)),
        curvature=lambda x, _: _normal_density(x) * (2 - x * x),
        saves_output=False,
    ),
    "gelu_tanh": Activation(
        value=lambda x: x * _sigmoid(_tanh_argument(x)),
        backward=_gelu_tanh_backward,
        curvature=_gelu_tanh_curvature,
        saves_output=False,
    ),
}
IN_PLACE = ("relu", "relu6", "leaky_relu", "silu")


# The kernels, made from the table: relu, relu_ (in place), relu_backward, and so on.


def _empty(like: Tensor) -> Tensor:
    """Uninitialised, in the layout of an elementwise result: the operand's order of dimensions."""
    layout = torch.contiguous_format if like.is_contiguous() else torch.preserve_format
    return torch.empty_like(like, memory_format=layout)


def _forward_kernel(name: str, options: str) -> Kernel:
    @kernel(f"{name}(Tensor input{options}) -> Tensor", meta=lambda input, *options: _empty(input))
    def forward(input: Tensor, *options: Any) -> Tensor:
        return _empty(input).copy_(ACTIVATIONS[name].value(geometry.widened(input), *options))

    @forward.batch_rule
    def _(op: Any, batch_size: int, in_dims: Any, input: Tensor, *options: Any) -> tuple[Tensor, int]:
        return op(input, *options), in_dims[0]

    return forward


def _in_place_kernel(name: str, options: str) -> Kernel:
    @kernel(f"{name}_(Tensor(a!) input{options}) -> ()", meta=lambda input, *options: None)
    def in_place(input: Tensor, *options: Any) -> None:
        input.copy_(ACTIVATIONS[name].value(geometry.widened(input), *options))

    return in_place


def _backward_kernel(name: str, options: str) -> Kernel:
    @kernel(
        f"{name}_backward(Tensor grad_output, Tensor saved{options}) -> Tensor",
        meta=lambda grad_output, saved, *options: _empty(saved),
    )
    def backward(grad_output: Tensor, saved: Tensor, *options: Any) -> Tensor:
        return _empty(saved).copy_(
            ACTIVATIONS[name].backward(geometry.widened(grad_output), geometry.widened(saved), *options)
        )

    @backward.batch_rule
    def _(op: Any, batch_size: int, in_dims: Any, grad_output: Tensor, saved: Tensor, *options: Any) -> Any:
        operands = in_front(grad_output, in_dims[0], batch_size), in_front(saved, in_dims[1], batch_size)
        return op(*operands, *options), 0

    return backward


_OPTIONS = {"leaky_relu": ", float negative_slope"}
FORWARD = {name: _forward_kernel(name, _OPTIONS.get(name, "")) for name in ACTIVATIONS}
BACKWARD = {name: _backward_kernel(name, _OPTIONS.get(name, "")) for name in ACTIVATIONS}
FORWARD_IN_PLACE = {name: _in_place_kernel(name, _OPTIONS.get(name, "")) for name in IN_PLACE}


def _options(slope: float | None) -> tuple[float, ...]:
    """What a kernel takes behind its tensors. (A tuple as a Function's argument makes functorch's hessian fail.)"""
    return () if slope is None else (slope,)


def _saves_output(name: str, slope: float | None) -> bool:
    return ACTIVATIONS[name].saves_output and not _ambiguous(slope)


def _ambiguous(slope: float | None) -> bool:
    """Whether leaky_relu's output does not tell the sides apart: the slope is negative or NaN."""
    return slope is not None and not slope >= 0


class Activate(ManualFunction):
    @staticmethod
    def forward(input: Tensor, name: str, slope: float | None, backend: str) -> Tensor:
        return FORWARD[name](input, *_options(slope), backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, ctx.name, ctx.slope, ctx.backend = inputs
        ctx.save_for_backward(output if _saves_output(ctx.name, ctx.slope) else input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        (saved,) = ctx.saved_tensors
        return ActivateBackward.call(grad_output, saved, ctx.name, ctx.slope, ctx.backend), None, None, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor:
        input, name, slope, backend = inputs
        saved = output if _saves_output(name, slope) else input
        return ActivateBackward.call(tangents[0], saved, name, slope, backend)


class ActivateBackward(ManualFunction):
    @staticmethod
    def forward(grad_output: Tensor, saved: Tensor, name: str, slope: float | None, backend: str) -> Tensor:
        return BACKWARD[name](grad_output, saved, *_options(slope), backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        grad_output, saved, ctx.name, ctx.slope, ctx.backend = inputs
        bends = ctx.needs_input_grad[1] and ACTIVATIONS[ctx.name].curvature is not None
        ctx.save_for_backward(grad_output if bends else None, saved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        grad_output, saved = ctx.saved_tensors
        by_grad_output = by_saved = None
        if ctx.needs_input_grad[0]:
            by_grad_output = ActivateBackward.call(grad, saved, ctx.name, ctx.slope, ctx.backend)
        if grad_output is not None:
            by_saved = _bent(grad, grad_output, saved, ctx.name, ctx.backend)
        return by_grad_output, by_saved, None, None, None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor:
        grad_output, saved, name, slope, backend = inputs
        grad_tangent, saved_tangent, *_ = tangents
        bends = saved_tangent is not None and ACTIVATIONS[name].curvature is not None
        tangent = sum_of_terms(
            None if grad_tangent is None else ActivateBackward.call(grad_tangent, saved, name, slope, backend),
            _bent(saved_tangent, grad_output, saved, name, backend) if bends else None,
        )
        return torch.zeros_like(output) if tangent is None else tangent


def _bent(factor: Tensor, grad_output: Tensor, saved: Tensor, name: str, backend: str) -> Tensor:
    """factor * grad_output * (the derivative of f' by what is saved)."""
    curvature = ACTIVATIONS[name].curvature
    assert curvature is not None
    return (geometry.widened(factor) * geometry.widened(grad_output) * curvature(geometry.widened(saved), backend)).to(
        saved.dtype
    )


class ActivateInPlace(ManualFunction):
    """Only where the output is what backward needs, and never under a transform."""

    @staticmethod
    def forward(input: Tensor, name: str, slope: float | None, backend: str) -> Tensor:
        FORWARD_IN_PLACE[name](input, *_options(slope), backend=backend)
        if not input.is_inference():
            torch.autograd.graph.increment_version(input)
        return input

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, ctx.name, ctx.slope, ctx.backend = inputs
        ctx.mark_dirty(input)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        if _ambiguous(ctx.slope):
            raise RuntimeError(
                f"{ctx.name}: the gradient of the in-place form needs negative_slope >= 0, got {ctx.slope}: "
                "the output alone does not tell which inputs were positive"
            )
        return Activate.backward(ctx, grad_output)


@recipes.unrecorded
def _activation(op: str, name: str, input: Tensor, slope: float | None = None, inplace: bool = False) -> Tensor:
    geometry.check_tensor(op, "input", input)
    backend: str = modes.current_backend()
    if name in ("relu", "relu6") and not input.is_floating_point() and not input.is_complex():
        if input.dtype is torch.bool:
            raise RuntimeError(f"{op}: input must be a floating or integer tensor, got torch.bool")
        backend = "python"
    else:
        geometry.check_floating(op, "input", input)
    lean = recipes.active() and input.requires_grad
    if not inplace:
        output = Activate.call(input, name, slope, backend)
        return _noted(output, input, name, slope, backend) if lean else output
    if not (torch.compiler.is_compiling() or transforms_active()):
        _check_writable(op, input)
        records = torch.is_grad_enabled() and input.requires_grad
        if not records or ACTIVATIONS[name].saves_output:
            recipe = recipes.recipe_of(input) if lean else None
            output = ActivateInPlace.call(input, name, slope, backend)
            return output if recipe is None else _noted(output, recipe, name, slope, backend)
    source = input if _saves_output(name, slope) else input.clone()
    if lean:
        recipes.copy_recipe(source, input)
    output = Activate.call(source, name, slope, backend)
    if lean:
        _noted(output, source, name, slope, backend)
    result = input.copy_(output)
    if lean:
        recipes.copy_recipe(result, output)
    return result


def _noted(output: Tensor, source: Any, name: str, slope: float | None, backend: str) -> Tensor:
    """The output, for lean mode with the recipe that makes it of its source, a tensor or a recipe."""
    again = functools.partial(_again, name=name, slope=slope, backend=backend)
    if _saves_output(name, slope):
        over = functools.partial(_again_in_place, name=name, slope=slope, backend=backend)
        recipes.made(output, again, source, in_place=over if name in FORWARD_IN_PLACE else None)
        recipes.keep(output, 0, output)
    else:
        recipes.keep(output, 0, source)
        recipes.made(output, again, source)
    return output


def _again(input: Tensor, *, name: str, slope: float | None, backend: str) -> Tensor:
    return FORWARD[name](input, *_options(slope), backend=backend)


def _again_in_place(input: Tensor, *, name: str, slope: float | None, backend: str) -> Tensor:
    FORWARD_IN_PLACE[name](input, *_options(slope), backend=backend)
    return input


def _check_writable(op: str, input: Tensor) -> None:
    if torch.is_grad_enabled() and input.requires_grad:
        base = input if input._base is None else input._base
        if base.is_leaf and base.requires_grad:
            raise RuntimeError(f"{op}: input is a leaf (or a view of one) that requires grad; in-place would lose it")
    if torch._debug_has_internal_overlap(input) == 1:
        raise RuntimeError(
            f"{op}: input must not be expanded in an in-place operation, got strides {input.stride()} for the shape "
            f"{tuple(input.shape)}"
        )


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0): `torch.nn.functional.relu`.

    Args:
        input: any shape, floating or integer.
        inplace: overwrite the input and return it.

    Returns:
        The input's shape, dtype and layout.

    Raises:
        RuntimeError: for a bool tensor, or in place for a leaf that requires grad or an expanded tensor.
        NotImplementedError: for a complex tensor.
        TypeError: for anything but a tensor.

    Formula: `manual_ops.ops.activation`.
    """
    return _activation("relu", "relu", input, None, inplace)


def relu_(input: Tensor) -> Tensor:
    """`relu` in place: `torch.nn.functional.relu_`."""
    return _activation("relu_", "relu", input, None, True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x, 0), 6): `torch.nn.functional.relu6`.

    Args, returns and errors are those of `relu`.
    """
    return _activation("relu6", "relu6", input, None, inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """min(max(x, min_val), max_val): `torch.nn.functional.hardtanh`.

    Between 0 and 6, as `torch.nn.ReLU6` calls it, it is `relu6`; between other bounds it is torch's own.
    """
    if (min_val, max_val) == (0.0, 6.0):
        return relu6(input, inplace)
    return F.hardtanh(input, min_val, max_val, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x if x > 0 else negative_slope * x: `torch.nn.functional.leaky_relu`.

    Args:
        input: any shape, floating.
        negative_slope: the derivative for x <= 0; the in-place form has a gradient only if it is not negative.
        inplace: overwrite the input and return it.

    Returns:
        The input's shape, dtype and layout.

    Raises:
        RuntimeError: in place for a leaf that requires grad or an expanded tensor; for a slope that is not real or
            overflows.
        NotImplementedError: for dtypes that are not floating.
        TypeError: for an input that is no tensor or a slope that is no number.

    Formula: `manual_ops.ops.activation`.
    """
    return _leaky_relu("leaky_relu", input, negative_slope, inplace)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """`leaky_relu` in place: `torch.nn.functional.leaky_relu_`."""
    return _leaky_relu("leaky_relu_", input, negative_slope, True)


def _leaky_relu(op: str, input: Tensor, negative_slope: Any, inplace: bool) -> Tensor:
    if isinstance(negative_slope, complex):
        if negative_slope.imag != 0:
            raise RuntimeError(f"{op}: negative_slope must be real, got {negative_slope}")
        negative_slope = negative_slope.real
    slope = geometry.real(op, "negative_slope", negative_slope)
    geometry.check_tensor(op, "input", input)
    geometry.check_floating(op, "input", input)
    if torch.finfo(geometry.accumulation_dtype(input.dtype)).max < abs(slope) < math.inf:
        raise RuntimeError(f"{op}: negative_slope must be a number that {input.dtype} is computed in, got {slope}")
    return _activation(op, "leaky_relu", input, slope, inplace)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-x)): `torch.nn.functional.sigmoid`.

    Args:
        input: any shape, floating.

    Returns:
        The input's shape, dtype and layout.

    Raises:
        NotImplementedError: for dtypes that are not floating.
        TypeError: for anything but a tensor.

    Formula: `manual_ops.ops.activation`.
    """
    return _activation("sigmoid", "sigmoid", input)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent: `torch.nn.functional.tanh`.

    Args, returns and errors are those of `sigmoid`.
    """
    return _activation("tanh", "tanh", input)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x * sigmoid(x), also called swish: `torch.nn.functional.silu`.

    Args:
        input: any shape, floating.
        inplace: overwrite the input and return it; a gradient then keeps a copy of the input.

    Returns:
        The input's shape, dtype and layout.

    Raises:
        RuntimeError: in place for a leaf that requires grad or an expanded tensor.
        NotImplementedError: for dtypes that are not floating.
        TypeError: for anything but a tensor.

    Formula: `manual_ops.ops.activation`.
    """
    return _activation("silu", "silu", input, None, inplace)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """x * Phi(x), Phi the normal distribution function: `torch.nn.functional.gelu`.

    Args:
        input: any shape, floating.
        approximate: "none", or "tanh" for x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).

    Returns:
        The input's shape, dtype and layout.

    Raises:
        RuntimeError: for another `approximate`.
        NotImplementedError: for dtypes that are not floating.
        TypeError: for an input that is no tensor or an `approximate` that is no string.

    Formula: `manual_ops.ops.activation`.
    """
    if not isinstance(approximate, str):
        raise TypeError(f"gelu: approximate must be a str, got {approximate!r}")
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _activation("gelu", "gelu" if approximate == "none" else "gelu_tanh", input)
