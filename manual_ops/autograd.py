"""ManualFunction, the base of every operation's autograd.Function.

A subclass writes, as static methods,

    forward(*args) -> output, or a tuple whose first entry alone is differentiable
    setup_context(ctx, inputs, output)            tensors go through ctx.save_for_backward
    backward(ctx, grad_output, *_) -> one gradient for each argument of forward, None where none is needed
    tangent(inputs, output, tangents) -> the tangent of the (first) output

and is used by `Subclass.call(*args)`. `tangent` is the forward-mode rule, the Jacobian times a vector; `tangents` has
one entry for each argument of forward, None where the argument has no tangent. Backward and tangent use Functions,
never kernels, so that they can be differentiated again.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _functorch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._functorch.autograd_function import CtxCustomSave, WrappedCtx
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._functorch.vmap import unwrap_batched
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

# A graph break under torch.func.vjp and its kin: torch's own functions too then have zero gradients in 2.11, not 2.13.
_BREAKS_GIVE_ZEROS = torch.__version__ < "2.13"


class ManualFunction(torch.autograd.Function):
    generate_vmap_rule = True

    with_jvp: Any  # the twin that forward mode uses: torch.compile refuses a Function that defines jvp

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "jvp" in cls.__dict__:
            return
        cls.setup_context = staticmethod(_without_zero_gradients(cls.__dict__["setup_context"].__func__))  # type: ignore
        cls.backward = staticmethod(_none_for_none(cls.__dict__["backward"].__func__))  # type: ignore
        twin = {
            "forward": staticmethod(_unboxing(cls.__dict__["forward"].__func__)),
            "setup_context": staticmethod(functools.partial(_setup_twin, cls)),
            "backward": staticmethod(functools.partial(_twin_backward, cls)),
            "jvp": staticmethod(functools.partial(_jvp, cls)),
        }
        cls.with_jvp = type(cls.__name__, (cls,), twin)

    @classmethod
    def call(cls, *args: Any) -> Any:
        """`apply`, by the shortest way that is right."""
        forward_mode = forward_ad._current_level >= 0
        transformed = torch._C._are_functorch_transforms_active()
        if forward_mode or transformed:
            # torch.compile would trace past the Function, to a kernel with zero derivatives, without a word.
            compiling = torch.compiler.is_compiling()
            after_a_break = not compiling and get_eval_frame_callback() is not None
            if compiling or (after_a_break and _BREAKS_GIVE_ZEROS):
                raise NotImplementedError(f"{cls.__name__}: torch.func inside torch.compile; compile inside instead")
            function = cls.with_jvp if forward_mode else cls
            return (_transformed_uncompiled if after_a_break else _transformed)(function, args)
        if torch.compiler.is_compiling():
            return cls.apply(*_distinct(args))
        if not (torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)):
            # Nothing to record and no transform to meet: under one, a kernel called directly would drop a tangent.
            return cls.forward(*args)
        # torch.autograd.Function.apply less its binding of default arguments, which costs more than a small kernel.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def transforms_active() -> bool:
    """Whether a transform of torch.func or a level of forward mode is open."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """The arguments, with a view for a tensor's second occurrence: torch.compile refuses a Function the same twice."""
    distinct: list[Any] = []
    for arg in args:
        again = isinstance(arg, torch.Tensor) and any(arg is earlier for earlier in distinct)
        distinct.append(arg.view_as(arg) if again else arg)
    return distinct


def _transformed(function: Any, args: tuple[Any, ...]) -> Any:
    if "jvp" not in function.__dict__:
        return function.apply(*args)
    boxed = (_Boxed(arg) if isinstance(arg, (list, tuple)) else arg for arg in args)
    with _Tape() as tape:
        return function.apply(*boxed, tape)


_transformed_uncompiled = torch._disable_dynamo(_transformed)


def _without_zero_gradients(setup_context: Callable[..., None]) -> Callable[..., None]:
    """An undefined gradient arrives in backward as None, not as a tensor of zeros that nobody reads."""

    @functools.wraps(setup_context)
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    return setup


def _none_for_none(backward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def backward_or_none(ctx: Any, grad_output: Any, *others: Any) -> Any:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, grad_output, *others)

    return backward_or_none


class _Boxed:
    """A list or tuple on its way through vmap over forward mode, which takes each entry of one for an argument."""

    def __init__(self, value: Any):
        self.value = value


def _unboxed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.value if isinstance(arg, _Boxed) else arg for arg in args)


class _Tape:
    """What jvp needs, from setup_context, which torch calls right before it, at every level of torch.func alike.

    It is not saved by torch: under vmap functorch has one list of batch dimensions for what is saved for backward and
    for jvp, and an output or input saved here, but of no use to backward, could not be overwritten by its owner.
    """

    def __enter__(self) -> "_Tape":
        return self

    def __exit__(self, *_: Any) -> None:
        self.__dict__.clear()  # outputs know their ctx, and that knows the tape

    def record(self, inputs: tuple[Any, ...], output: Any) -> None:
        self.inputs, self.output = inputs, output


class _TwinCtx(WrappedCtx):
    """The ctx of a twin, as the setup_context and backward of its class see it."""

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        return self._pt_inner_ctx.needs_input_grad[:-1]  # the last is the tape's

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self._pt_inner_ctx.save_for_backward(*tensors)
        self._pt_inner_ctx.save_for_forward(*tensors)  # the list that functorch's batch dimensions belong to

    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None:
        """Under vmap autograd knows the outputs by what the batched ones wrap."""
        ctx = self._pt_inner_ctx
        while isinstance(ctx, WrappedCtx):
            if isinstance(ctx, CtxCustomSave):
                outputs, _ = unwrap_batched(outputs, ctx._pt_current_level)
            ctx = ctx._pt_inner_ctx
        ctx.mark_non_differentiable(*outputs)


def _unboxing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward_unboxed(*args: Any) -> Any:
        return forward(*_unboxed(args[:-1]))

    return forward_unboxed


def _setup_twin(cls: Any, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *boxed, ctx.tape = inputs
    inputs = _unboxed(tuple(boxed))
    cls.setup_context(_TwinCtx(ctx), inputs, output)
    ctx.tape.record(inputs, output)


def _twin_backward(cls: Any, ctx: Any, *grad_outputs: Any) -> Any:
    return *cls.backward(_TwinCtx(ctx), *grad_outputs), None


def _jvp(cls: Any, ctx: Any, *tangents: Any) -> Any:
    inputs, output = ctx.tape.inputs, ctx.tape.output
    levels = [
        interpreter.level()
        for interpreter in retrieve_all_functorch_interpreters()
        if interpreter.key() == _functorch.TransformType.Jvp
    ]
    # torch turns forward mode off here, for all levels, lest this one compute tangents of tangents. The outer ones need
    # theirs: with this level's taken away from the operands it can be on.
    with forward_ad._set_fwd_grad_enabled(len(levels) > 1):
        if len(levels) > 1:
            inputs, output = pytree.tree_map_only(
                torch.Tensor, functools.partial(_primal, level=levels[-1]), (inputs, output)
            )
        tangent = cls.tangent(inputs, output, tangents[:-1])
    first, *others = output if isinstance(output, tuple) else (output,)
    tangent = torch.zeros_like(first) if tangent is None else tangent
    return (tangent, *(None for _ in others)) if isinstance(output, tuple) else tangent


def _primal(tensor: torch.Tensor, level: int) -> torch.Tensor:
    """The tensor without its tangent of the given level of torch.func, under any vmaps inside of it."""
    own_level = _functorch.maybe_get_level(tensor)
    if own_level == level:
        return forward_ad.unpack_dual(tensor).primal
    if _functorch.is_batchedtensor(tensor) and own_level > level:
        primal = _primal(_functorch.get_unwrapped(tensor), level)
        return _functorch._add_batch_dim(primal, _functorch.maybe_get_bdim(tensor), own_level)
    return tensor


def sum_of_terms(*terms: torch.Tensor | None) -> torch.Tensor | None:
    """The sum of the terms that are there: what a product rule leaves when some factors do not move."""
    present = [term for term in terms if term is not None]
    return functools.reduce(torch.add, present) if present else None
