"""One kernel = a schema, a meta function and a Python body; native libraries override it.

    @kernel("double(Tensor input) -> Tensor", meta=lambda input: torch.empty_like(input))
    def double(input):
        return 2 * input

defines two operators with the one schema. `manual_ops_python::double` is the body under the decorator, the readable
reference, on every device. `manual_ops::double` is what a native library registers for its device (`_C` for "CPU",
`_C_cuda` for "CUDA"), and the same body wherever none is registered: PyTorch's dispatcher chooses. Both run below
autograd: a backward pass that forgets its Function is cut off from the graph, and caught by a test, instead of being
differentiated by torch. Bodies run below autocast too: the operands come in the dtype to compute in.

`double(x, backend="python")` calls the first, `double(x, backend="native")` the second.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

NAMESPACES = {"native": "manual_ops", "python": "manual_ops_python"}
_LIBRARIES = {backend: torch.library.Library(name, "DEF") for backend, name in NAMESPACES.items()}


def _load(path: Path) -> str | None:
    """Load a library of kernels; the reason why not, or None when it is loaded."""
    if not path.exists():
        return f"{path.name} is not built; build it with `pip install -e . --no-build-isolation` in the source tree"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load ({error}); rebuild it against this torch ({torch.__version__})"
    return None


def _load_cuda_library() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return _load(Path(__file__).with_name("_C_cuda.so"))


# MANUAL_OPS_LIBRARY names another build of the CPU's kernels: with sanitizers, or the CUDA kernels under emulation.
_native_problem = _load(Path(os.environ.get("MANUAL_OPS_LIBRARY") or Path(__file__).with_name("_C.so")))
_cuda_problem = _load_cuda_library()


def native_library_loaded() -> bool:
    """Whether the C++ kernels are there."""
    return _native_problem is None


def native_library_problem() -> str | None:
    """Why the C++ kernels are not there, and what to do; None when they are."""
    return _native_problem


def cuda_library_problem() -> str | None:
    """Why the CUDA kernels are not there, and what to do; None when they are."""
    return _cuda_problem


class Kernel:
    """A pair of operators with one schema: `native` and `python`.

    Attributes:
        name: the operator's name in both namespaces.
        body: the Python function, as it was written.
    """

    def __init__(self, schema: str, meta: Callable[..., Any], body: Callable[..., Any]):
        self.name = schema.partition("(")[0]
        self.body = body
        functools.update_wrapper(self, body)
        self._operators = {}
        for backend, library in _LIBRARIES.items():
            library.define(schema)
            library.impl(self.name, _below_autograd(body), "CompositeExplicitAutograd")
            library.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
            qualified = f"{NAMESPACES[backend]}::{self.name}"
            torch.library.register_fake(qualified, meta, lib=library)
            self._operators[backend] = getattr(getattr(torch.ops, NAMESPACES[backend]), self.name).default
        self.native = self._operators["native"]
        self.python = self._operators["python"]

    def __call__(self, *args: Any, backend: str) -> Any:
        return self._operators[backend](*args)

    def batch_rule(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register the vmap rule: `rule(op, batch_size, in_dims, *args) -> (outputs, out_dims)`.

        `op` is the operator of the backend in use, one level down; `in_dims` has None for what is not batched. The rule
        folds the batch into a dimension the operator already has: it may not loop over it.
        """
        for backend, library in _LIBRARIES.items():

            def batched(info: Any, in_dims: Any, *args: Any, op: Any = self._operators[backend]) -> Any:
                if info.batch_size == 0:
                    return _no_samples(rule, op, in_dims, args)
                return rule(op, info.batch_size, in_dims, *args)

            torch.library.register_vmap(f"{NAMESPACES[backend]}::{self.name}", batched, lib=library)
        return rule


def _no_samples(rule: Callable[..., Any], op: Any, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """What one sample of zeros gives, less that sample: sizes that hold an empty batch cannot be taken apart again."""
    one = [
        arg.new_zeros([*arg.shape[:dim], 1, *arg.shape[dim + 1 :]])
        if isinstance(arg, torch.Tensor) and dim is not None
        else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    outputs, out_dims = rule(op, 1, in_dims, *one)
    if isinstance(outputs, torch.Tensor):
        return outputs.narrow(out_dims, 0, 0), out_dims
    if outputs is None:
        return outputs, out_dims
    return tuple(output.narrow(dim, 0, 0) for output, dim in zip(outputs, out_dims, strict=True)), out_dims


def _below_autograd(body: Callable[..., Any]) -> Callable[..., Any]:
    """`body` below autograd, below its tracking of views (a result that is one could not be changed in place), and
    below autocast."""

    @functools.wraps(body)
    def guarded(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView(), torch._C._DisableAutocast():
            return body(*args)

    return guarded


def backend_of(op: Any) -> str:
    """The backend of an operator: what a batch rule passes to another kernel."""
    return next(backend for backend, name in NAMESPACES.items() if name == op.namespace)


# What batch rules are put together from: a batch on its way into a dimension that the operator already has, and back.


def in_front(tensor: Any, dim: int | None, batch_size: int) -> Any:
    """The tensor with its batch, at `dim`, in front; repeated along one where it has none. None is passed on."""
    if tensor is None or dim is not None:
        return tensor if tensor is None else tensor.movedim(dim, 0)
    return tensor.expand(batch_size, *tensor.shape)


def fold(tensor: torch.Tensor, dim: int | None, batch_size: int, into: int = 0, groups: int = 1) -> torch.Tensor:
    """The batch in dimension `into`, counted without it, behind the groups: (groups * rest) -> (groups * B * rest)."""
    tensor = in_front(tensor, dim, batch_size).movedim(0, into)
    if groups == 1:
        return tensor.flatten(into, into + 1)
    grouped = tensor.unflatten(into + 1, (groups, tensor.shape[into + 1] // groups))
    return grouped.movedim(into + 1, into).flatten(into, into + 2)


def unfold(tensor: torch.Tensor, batch_size: int, dim: int = 0, groups: int = 1) -> torch.Tensor:
    """The inverse of `fold`, with the batch in front."""
    split = tensor.unflatten(dim, (groups, batch_size, tensor.shape[dim] // (groups * batch_size)))
    return split.movedim(dim + 1, 0).flatten(dim + 1, dim + 2)


KERNELS: dict[str, Kernel] = {}


def kernel(schema: str, *, meta: Callable[..., Any]) -> Callable[[Callable[..., Any]], Kernel]:
    """Define a kernel from its schema ("name(Tensor input, ...) -> Tensor"), its meta function and its Python body."""

    def define(body: Callable[..., Any]) -> Kernel:
        defined = Kernel(schema, meta, body)
        KERNELS[defined.name] = defined
        return defined

    return define
