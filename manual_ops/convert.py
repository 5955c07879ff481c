"""Swaps the layers of an existing model for manual_ops' and back, and reroutes direct calls of torch's functions."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from manual_ops import functional, nn, recipes
from manual_ops.fuse import fuse as fuse_layers
from manual_ops.fuse import unfuse
from manual_ops.geometry import FLOATING_DTYPES
from manual_ops.registry import OPERATIONS

Model = TypeVar("Model", bound=torch.nn.Module)

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name)
    for operation in OPERATIONS.values()
    for name in operation.modules
    if hasattr(torch.nn, name)
}


def convert(
    model: Model,
    to: Literal["manual_ops", "torch"] = "manual_ops",
    *,
    fuse: bool = False,
    lean: bool | None = None,
) -> Model:
    """Swap, in place, every layer of `model` whose exact type has a twin.

    A layer stays the same object: its parameters, buffers, hooks, names and training mode, and every reference to it
    (from an optimizer, from a second place in the model), are untouched; only its class changes. A parametrised layer
    (`torch.nn.utils.parametrize`) is swapped by the class it had before.

    Args:
        model: any module; a single layer too.
        to: "manual_ops", or "torch" to take it back, what `fuse` and `lean` did included. Fused layers of the model's
            own (`BatchNormReLU2d`, ...) have no twin in torch and stay.
        fuse: put a `BatchNormReLU` layer where a ReLU follows a batch norm, or the sum of a batch norm and a residual,
            in a `torch.nn.Sequential` or in the forward of a module that torch.fx can trace; a warning names a module
            that it cannot. A ReLU and a max pooling behind it in a `Sequential` change places, which changes nothing
            but the memory kept. Layers that have hooks or are used in several places stay as they are. State dicts fit.
        lean: True lets `model` run in lean mode (see `manual_ops.lean`) whenever it is called, by two hooks on it;
            False takes them away; None leaves this as it is. Going back to torch takes them away too.

    Returns:
        `model` itself.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: for any other `to`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if to not in ("manual_ops", "torch"):
        raise ValueError(f"convert: to must be 'manual_ops' or 'torch', got {to!r}")
    if to == "torch":
        unfuse(model)
    twins = TWINS if to == "manual_ops" else {ours: theirs for theirs, ours in TWINS.items()}
    for module in model.modules():
        layer_type = parametrize.type_before_parametrizations(module)
        if layer_type in twins:
            module.__class__ = _with_parametrizations_of(module, twins[layer_type])
    if fuse and to == "manual_ops":
        fuse_layers(model)
    if lean is not None or to == "torch":
        _set_lean(model, bool(lean) and to == "manual_ops")
    return model


def _set_lean(model: torch.nn.Module, on: bool) -> None:
    for hooks, ours in ((model._forward_pre_hooks, _enter_lean), (model._forward_hooks, _leave_lean)):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            model._forward_hooks_always_called.pop(number, None)
    if on:
        model.register_forward_pre_hook(_enter_lean, prepend=True)
        model.register_forward_hook(_leave_lean, always_call=True)


def _enter_lean(model: torch.nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        block = recipes.lean()
        block.__enter__()
        _blocks.open.append(block)


def _leave_lean(model: torch.nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling() and _blocks.open:
        _blocks.open.pop().__exit__(None, None, None)


class _Blocks(threading.local):
    """The blocks of lean mode that models of this thread are in, the innermost last."""

    def __init__(self) -> None:
        self.open: list[Any] = []


_blocks = _Blocks()


def _with_parametrizations_of(module: torch.nn.Module, twin: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """`twin`, or for a parametrised layer a subclass of it with the properties that compute its parameters."""
    if not parametrize.is_parametrized(module):
        return twin
    members = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(type(module).__name__, (twin,), members)


@dataclass(frozen=True)
class ConvertedLayers:
    """The layers of a model by qualified name: `swapped` run on manual_ops, `left` (all other leaves) on torch."""

    swapped: dict[str, str]
    left: dict[str, str]


def converted_layers(model: torch.nn.Module) -> ConvertedLayers:
    """Which layers of `model` run on manual_ops, and which leaves (and holders of parameters) do not, by type."""
    ours = {getattr(nn, name) for name in nn.__all__}
    swapped: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        layer_type = parametrize.type_before_parametrizations(module)
        if layer_type in ours:
            swapped[name] = layer_type.__name__
        elif not any(module.children()) or any(True for _ in module.parameters(recurse=False)):
            left[name] = layer_type.__name__
    return ConvertedLayers(swapped, left)


class intercept(TorchFunctionMode):
    """`with manual_ops.intercept():` reroutes calls of torch's functions to manual_ops inside the block.

    Caught are the functions of `torch.nn.functional` that manual_ops has, and the tensor methods and torch functions
    of the same operations (`x.relu()`, `torch.softmax(x, 1)`, `torch.batch_norm(...)`), so that a model that calls them
    directly needs no change. A call on anything but strided tensors of the four floating dtypes, or with `out=`, stays
    with torch.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = _REROUTES.get(func)
        if ours is None or "out" in kwargs or not _computes(args, kwargs):
            return func(*args, **kwargs)
        return ours(*args, **kwargs)


def _computes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    input = args[0] if args else kwargs.get("input", kwargs.get("self"))
    return isinstance(input, torch.Tensor) and input.dtype in FLOATING_DTYPES and input.layout == torch.strided


def _reroutes() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What is called -> what runs."""
    routes: dict[Callable[..., Any], Callable[..., Any]] = {}
    for name in (*functional.__all__, *functional.ALIASES):
        ours = getattr(functional, name)
        for theirs in (getattr(F, name, None), getattr(torch, name, None)):
            if theirs is not None:
                routes[theirs] = ours
    routes[torch.adaptive_max_pool1d] = functional.adaptive_max_pool1d_with_indices
    routes[torch.batch_norm] = _torch_batch_norm
    routes[torch.binary_cross_entropy_with_logits] = _torch_bce_with_logits
    for namespace in (torch, torch.Tensor, torch.special):
        for name, ours in (("softmax", functional.softmax), ("log_softmax", functional.log_softmax)):
            if hasattr(namespace, name):
                routes[getattr(namespace, name)] = _torch_softmax(ours)
    routes[torch.special.expit] = functional.sigmoid
    for name in ("relu", "sigmoid", "tanh"):
        ours = getattr(functional, name)
        for namespace in (torch, torch.Tensor):
            routes[getattr(namespace, name)] = ours
            routes[getattr(namespace, f"{name}_")] = functional.relu_ if name == "relu" else _in_place(ours)
    return routes


def _torch_batch_norm(
    input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: Any, eps: Any,
    cudnn_enabled: Any,
) -> Any:  # fmt: skip
    return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_bce_with_logits(
    input: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Any:
    name = ("none", "mean", "sum")[reduction]
    return functional.binary_cross_entropy_with_logits(input, target, weight, reduction=name, pos_weight=pos_weight)


def _torch_softmax(ours: Callable[..., Any]) -> Callable[..., Any]:
    def softmax(input: Any, dim: Any, dtype: Any = None) -> Any:
        return ours(input, dim, dtype=dtype)

    return softmax


def _in_place(ours: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(input: Any) -> Any:
        return input.copy_(ours(input))

    return in_place


_REROUTES = _reroutes()
