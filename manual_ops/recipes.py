"""Lean mode: an activation that a cheap recomputation gives back is not kept for the backward pass.

A convolution keeps its input for the gradient of its weight. Where that input is relu(batch_norm(x)), batch norm keeps
x anyway, so the convolution need not keep anything: its backward makes the input again. In the forward,

    made(output, function, *sources)   says how a tensor came to be, its recipe
    keep(output, index, tensor)        lets the node of `output` hold the recipe of what it saved in its place

A recipe is what the saved tensor is packed to (torch's saved tensor hooks are a function that packs and one that
unpacks), so it lives exactly as long, and the graph of higher derivatives is the one it would have been. Its sources
are tensors that some node keeps in any case, or recipes in their turn. What it makes has the bits of what was there:
the kernels are the forward's, on the same operands.

Lean mode stands aside where others pack saved tensors (hooks of the user's, non-reentrant checkpointing), under the
transforms of torch.func, and in torch.compile, which decides itself what to recompute.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from manual_ops import modes
from manual_ops.autograd import transforms_active

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums of residual blocks refer to the block before: so many recipes, each made from the next, and then a kept tensor.
LONGEST_CHAIN = 12


class Recipe:
    """How a tensor is made again: function(*sources), or in_place(source) where the source was made for it alone.

    Attributes:
        length: the longest chain of recipes from here down, this one included.
    """

    __slots__ = ("_function", "_in_place", "_made", "_sources", "_times_left", "_users", "_versions", "length")

    def __init__(
        self, function: Callable[..., Tensor], sources: list[Any], in_place: Callable[[Tensor], Tensor] | None = None
    ):
        self._function = function
        self._in_place = in_place
        self._sources = sources
        self._versions = [source._version if isinstance(source, Tensor) else None for source in sources]
        self._users = self._times_left = 0
        self._made: Tensor | None = None
        self.length: int = 1 + max((source.length for source in sources if isinstance(source, Recipe)), default=0)

    def add_user(self) -> None:
        self._users += 1

    def take(self) -> Tensor:
        """The tensor, for one of the users: made once, and let go when each has had it."""
        made = self.make()
        self._times_left -= 1
        if self._times_left <= 0:
            self._made = None
        return made

    def make(self) -> Tensor:
        if self._made is not None:
            return self._made
        for source, version in zip(self._sources, self._versions, strict=True):
            if version is not None and source._version != version:
                raise RuntimeError(
                    f"lean: a tensor of the shape {tuple(source.shape)}, from which an activation is to be made again, "
                    f"was changed in place after the forward: version {source._version} instead of {version}"
                )
        with torch.no_grad():
            sources = [source.make() if isinstance(source, Recipe) else source for source in self._sources]
            alone = isinstance(self._sources[0], Recipe) and not self._sources[0]._users
            function = self._function if self._in_place is None or not alone else self._in_place
            made = function(*sources)
        if self._users:
            self._made, self._times_left = made, self._users
        return made


def active() -> bool:
    """Whether recipes are noted: in lean mode, and nobody else has a say in what is saved."""
    return (
        modes.is_lean()
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


def recipe_of(tensor: Any) -> Recipe | None:
    """The recipe of a tensor as it is now, if it has one."""
    noted = getattr(tensor, "_manual_ops_recipe", None)
    return noted[0] if noted is not None and noted[1] == tensor._version else None


def copy_recipe(copy: Tensor, tensor: Tensor) -> None:
    """A copy is made as the original is."""
    recipe = recipe_of(tensor)
    if recipe is not None:
        copy._manual_ops_recipe = recipe, copy._version  # type: ignore[attr-defined]


def made(
    output: Tensor,
    function: Callable[..., Tensor],
    *sources: Any,
    in_place: Callable[[Tensor], Tensor] | None = None,
    shared: bool = False,
) -> None:
    """Note that `output` is function(*sources), unless to keep the sources takes more memory than to keep `output`.

    Args:
        output: a tensor that lean mode need not keep.
        function: from tensors to the tensor, in the bits of the forward; called without autograd.
        sources: tensors, recipes and Nones.
        in_place: what gives the same over the memory of the only source.
        shared: whether the sources are likely to have other recipes that keep them, as the parts of a concatenation.
    """
    price = sum(source.nbytes for source in sources if isinstance(source, Tensor) and not _is_kept(source))
    if price > output.nbytes or (price == output.nbytes and not shared):
        return
    recipe = Recipe(function, [_ingredient(source) for source in sources], in_place)
    if recipe.length > LONGEST_CHAIN:
        return
    for source in sources:
        if isinstance(source, Tensor):
            _mark_kept(source)
    output._manual_ops_recipe = recipe, output._version  # type: ignore[attr-defined]


def _ingredient(source: Any) -> Any:
    """A tensor's recipe, or its values without their history."""
    return (recipe_of(source) or source.detach()) if isinstance(source, Tensor) else source


def _is_kept(tensor: Tensor) -> bool:
    """Whether the tensor costs nothing: a node keeps it, or the caller does, or it is made again itself."""
    return tensor.is_leaf or hasattr(tensor, "_manual_ops_kept") or recipe_of(tensor) is not None


def _mark_kept(tensor: Tensor) -> None:
    if not tensor.is_leaf:
        tensor._manual_ops_kept = True  # type: ignore[attr-defined]


def keep(output: Tensor, index: int, tensor: Tensor) -> None:
    """Let the node that made `output` hold, in the place of `tensor`, its saved tensor number `index`, its recipe."""
    node = output.grad_fn
    if node is None:
        return
    recipe = recipe_of(tensor)
    if recipe is None:
        _mark_kept(tensor)
        return
    pack(node._raw_saved_tensors[index], recipe)  # type: ignore[attr-defined]


def pack(saved: Any, recipe: Recipe) -> None:
    """Replace what a node saved by the recipe."""
    recipe.add_user()
    saved.register_hooks(lambda _: recipe, Recipe.take)


@contextmanager
def lean() -> Iterator[None]:
    """Inside the block, activations that are cheap to make again are not kept for the backward pass.

    The inputs of convolutions and linear layers, and what activations keep, are made again in the backward from what
    batch norm keeps: after batch norm, activations, sums of residual blocks (`+`, `+=`, `torch.add`), products with
    what is kept (`*`), concatenations (`torch.cat`). Gradients, of every order, have the same bits as without.

    Where another user of saved tensors is active (`torch.autograd.graph.saved_tensors_hooks`, non-reentrant
    checkpointing), under a transform of torch.func or in torch.compile, it changes nothing.

    Raises:
        RuntimeError: in the backward, if a tensor that an activation is made again from was changed in place.
    """
    before = modes.is_lean()
    modes.set_lean(True)
    try:
        with _Recorder():
            yield
    finally:
        modes.set_lean(before)


class _Recorder(TorchFunctionMode):
    """Notes the recipes of what torch computes between our layers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        note = _NOTED.get(func)
        if note is None or kwargs.keys() - {"dim"} or not active():
            return func(*args, **kwargs)
        operands = [_Operand(arg) if isinstance(arg, Tensor) else arg for arg in args]
        output = func(*args, **kwargs)
        note(output, *operands, **kwargs)
        return output


def unrecorded(function: Function) -> Function:
    """An operation of ours, which notes its recipes itself: inside it the recorder, which is asked at every attribute
    of a tensor, would cost more than the operation."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if not modes.is_lean() or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return called  # type: ignore[return-value]


class _Operand:
    """A tensor as it was before a function that may have changed it."""

    def __init__(self, tensor: Tensor):
        self.tensor, self._recipe, self._version = tensor, recipe_of(tensor), tensor._version

    def source(self) -> Tensor | Recipe | None:
        """What gives these values: the tensor or, where it was changed, its recipe from before, if it had one."""
        return self.tensor if self.tensor._version == self._version else self._recipe


def _note_sum(output: Tensor, *operands: Any) -> None:
    _note(output, torch.add, operands)


def _note_product(output: Tensor, *operands: Any) -> None:
    """torch's node keeps each factor whose fellow needs a gradient."""
    node = output.grad_fn
    if node is None or not all(isinstance(operand, _Operand) for operand in operands):
        return
    first, second = (operand.tensor for operand in operands)
    for factor, fellow, name in ((first, second, "_raw_saved_self"), (second, first, "_raw_saved_other")):
        if fellow.requires_grad and (recipe := recipe_of(factor)) is not None:
            pack(getattr(node, name), recipe)
        elif fellow.requires_grad:
            _mark_kept(factor)
    _note(output, torch.mul, operands)


def _note(output: Tensor, function: Callable[..., Tensor], operands: tuple[Any, ...]) -> None:
    sources = [operand.source() if isinstance(operand, _Operand) else None for operand in operands]
    same_dtype = all(isinstance(operand, _Operand) and operand.tensor.dtype == output.dtype for operand in operands)
    if same_dtype and None not in sources:
        made(output, function, *sources)


def _note_concatenation(output: Tensor, tensors: Any, dim: int = 0) -> None:
    if all(tensor.dtype == output.dtype for tensor in tensors):
        made(output, functools.partial(_concatenate, dim=dim), *tensors, shared=True)


def _concatenate(*tensors: Tensor, dim: int) -> Tensor:
    return torch.cat(tensors, dim)


_SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_PRODUCTS = ("mul", "__mul__", "__rmul__")
_NOTED: dict[Any, Callable[..., None]] = {
    torch.add: _note_sum,
    torch.mul: _note_product,
    torch.cat: _note_concatenation,
    torch.concat: _note_concatenation,
    **{getattr(Tensor, name): _note_sum for name in _SUMS},
    **{getattr(Tensor, name): _note_product for name in _PRODUCTS},
}
