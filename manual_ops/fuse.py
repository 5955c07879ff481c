"""Puts `BatchNormReLU` layers where a ReLU follows a batch norm, or the sum of a batch norm and a residual; and max
pooling in front of the ReLU that it follows.

In a `torch.nn.Sequential` the two are neighbours: batch norm becomes a `BatchNormReLU`, and a `FusedReLU`, which does
nothing, takes the ReLU's place. In the forward of any other module torch.fx finds them:

    relu(bn(x))                     -> bn_relu(x)
    relu(bn(x) + residual)          -> bn_relu(x, residual)

and the module gets a forward of its own, a `FusedForward`. Layers keep their names, so that state dicts fit.

The largest of several numbers is the same before ReLU and after, so a ReLU and a max pooling behind it, neighbours in a
`Sequential`, change places. The ReLU then has a fraction of the elements, and none of the large tensor is kept: of a
convolution's output the pooling keeps one byte for each of its own outputs. The gradients are the same too: where the
largest is not positive there is none, and where it is, the same element wins. (A window that reads padding alone, which
takes dilation, would differ: it stays.)
"""

import itertools
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from manual_ops import functional, nn

FUSED = {
    getattr(nn, name): getattr(nn, name.replace("Norm", "NormReLU"))
    for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
}
UNFUSED = {fused: plain for plain, fused in FUSED.items()}

_RELUS = {F.relu, torch.relu, torch.relu_, F.relu_, functional.relu, functional.relu_}
_SUMS = {operator.add, operator.iadd, torch.add}


class FusedReLU(torch.nn.Identity):
    """Where a ReLU was: the batch norm in front of it applies it."""

    def __init__(self, relu: torch.nn.ReLU):
        super().__init__()
        self.inplace = relu.inplace


class LateReLU(nn.ReLU):
    """A ReLU in the place of the max pooling that it was in front of."""


def fuse(model: torch.nn.Module) -> None:
    """Fuse, in place, what can be fused in a model of manual_ops' layers; a warning names what cannot be traced."""
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Sequential) and type(module).forward is torch.nn.Sequential.forward:
            _fuse_sequential(module, places)
        elif any(type(child) in FUSED for child in module.children()):
            _fuse_forward(name, module, places)


def unfuse(model: torch.nn.Module) -> None:
    """Take back, in place, what `fuse` did."""
    for module in model.modules():
        for name, child in list(module._modules.items()):
            if isinstance(child, FusedReLU):
                module._modules[name] = nn.ReLU(child.inplace).train(child.training)
                before = list(module._modules.values())[list(module._modules).index(name) - 1]
                before.__class__ = UNFUSED[type(before)]  # type: ignore[index,assignment,union-attr]
            elif isinstance(child, LateReLU):
                names = list(module._modules)
                first = names[names.index(name) - 1]
                child.__class__ = nn.ReLU  # type: ignore[assignment]
                module._modules[first], module._modules[name] = child, module._modules[first]
        if isinstance(module.__dict__.get("forward"), FusedForward):
            for norm in module.__dict__.pop("forward").norms():
                norm.__class__ = UNFUSED[type(norm)]


def _fuse_sequential(module: torch.nn.Sequential, places: Counter[int]) -> None:
    names = list(module._modules)
    for name, following in itertools.pairwise(names):
        norm, relu = module._modules[name], module._modules[following]
        if type(norm) in FUSED and isinstance(relu, torch.nn.ReLU) and _is_plain(norm, places) and not _has_hooks(relu):
            norm.__class__ = FUSED[type(norm)]
            module._modules[following] = FusedReLU(relu).train(relu.training)
    for name, following in itertools.pairwise(names):
        relu, pool = module._modules[name], module._modules[following]
        if type(relu) is nn.ReLU and _is_plain(relu, places) and _commutes(pool) and _is_plain(pool, places):
            relu.__class__ = LateReLU
            module._modules[name], module._modules[following] = pool, relu


def _commutes(layer: torch.nn.Module | None) -> bool:
    """Whether the layer is a max pooling that gives the same before a ReLU as behind it."""
    if not isinstance(layer, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) or layer.return_indices:
        return False
    dilation = layer.dilation
    return dilation == 1 or (isinstance(dilation, tuple) and set(dilation) == {1})


def _is_plain(layer: torch.nn.Module | None, places: Counter[int]) -> bool:
    """Whether nobody else sees what the layer returns."""
    return layer is not None and places[id(layer)] == 1 and not _has_hooks(layer)


def _has_hooks(module: torch.nn.Module) -> bool:
    return any(getattr(module, f"_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre"))


def _fuse_forward(name: str, module: torch.nn.Module, places: Counter[int]) -> None:
    fusable = {child for child in module.children() if type(child) in FUSED and _is_plain(child, places)}
    try:
        matches = _same_matches_in_both_modes(module, fusable)
    except Exception as error:  # whatever a forward does when it is traced
        reason = str(error).strip().splitlines()[:1]
        warnings.warn(f"convert: {name or 'the model'} ({type(module).__name__}) is not fused: {' '.join(reason)}")
        return
    if not matches:
        return
    for target in matches:
        norm = module.get_submodule(target)
        norm.__class__ = FUSED[type(norm)]
    forward = FusedForward(module, matches)
    forward.compile()
    module.forward = forward


def _same_matches_in_both_modes(module: torch.nn.Module, norms: set[torch.nn.Module]) -> list[str]:
    """The names of the batch norms to fuse, if the traced forward does not depend on the mode."""
    traces = []
    training = module.training
    for mode in (True, False):
        module.training = mode
        try:
            graph = _Tracer().trace(module)
        finally:
            module.training = training
        traces.append((graph.python_code("self").src, [match.norm.target for match in _matches(module, graph, norms)]))
    if traces[0] != traces[1]:
        raise ValueError("its forward depends on the mode, training or evaluation")
    return [str(target) for target in traces[0][1]]


class _Tracer(fx.Tracer):
    """Traces one module's own forward; its children are leaves."""

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True


class _Match:
    """relu(norm(input) + residual) in a graph."""

    def __init__(self, norm: fx.Node, total: fx.Node | None, relu: fx.Node):
        self.norm, self.total, self.relu = norm, total, relu

    def rewrite(self) -> None:
        args = self.norm.args
        if self.total is not None:
            args = (*args, next(arg for arg in self.total.args if arg is not self.norm))
        with self.relu.graph.inserting_before(self.relu):
            fused = self.relu.graph.call_module(str(self.norm.target), args)
        self.relu.replace_all_uses_with(fused)
        for node in (self.relu, self.total, self.norm):
            if node is not None:
                self.relu.graph.erase_node(node)


def _matches(module: torch.nn.Module, graph: fx.Graph, norms: set[torch.nn.Module]) -> Iterator[_Match]:
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    taken: set[fx.Node] = set()
    for relu in graph.nodes:
        if not _is_relu(module, relu):
            continue
        before: Any = relu.args[0]
        total = before if _is_sum(before) and len(before.users) == 1 else None
        for norm in before.args if total is not None else [before]:
            if norm in taken or not _calls(norm, norms, module) or called[norm.target] > 1 or len(norm.users) > 1:
                continue
            if total is not None and len(norm.args[0].users) > 1:
                continue  # what the norm reads could be changed before the sum
            taken.add(norm)
            yield _Match(norm, total, relu)
            break


def _calls(node: fx.Node, layers: set[torch.nn.Module], module: torch.nn.Module) -> bool:
    """Whether the node is a call of one of the layers, with an input alone."""
    return (
        node.op == "call_module"
        and module.get_submodule(str(node.target)) in layers
        and len(node.args) == 1
        and not node.kwargs
    )


def _is_relu(module: torch.nn.Module, node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        return isinstance(layer, torch.nn.ReLU) and not _has_hooks(layer)
    return (node.op == "call_function" and node.target in _RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _is_sum(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and ((node.op == "call_function" and node.target in _SUMS) or (node.target in ("add", "add_")))
        and len(node.args) == 2
        and all(isinstance(arg, fx.Node) for arg in node.args)
        and node.args[0] is not node.args[1]
        and not node.kwargs
    )


class FusedForward:
    """The forward of a module with its batch norms and ReLUs fused. Traced again by a copy, or in another process."""

    def __init__(self, module: torch.nn.Module, targets: list[str]):
        self._module, self._targets = module, targets
        self._function: Callable[..., Any] | None = None

    def norms(self) -> list[torch.nn.Module]:
        return [self._module.get_submodule(target) for target in self._targets]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._function is None:
            self.compile()
        assert self._function is not None
        return self._function(self._module, *args, **kwargs)

    def compile(self) -> None:
        own = self._module.__dict__.pop("forward", None)  # the tracer looks at the class's
        try:
            graph = _Tracer().trace(self._module)
        finally:
            if own is not None:
                self._module.__dict__["forward"] = own
        for match in list(_matches(self._module, graph, set(self.norms()))):
            match.rewrite()
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)  # as torch.fx does for its own modules
        self._function = names["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}
