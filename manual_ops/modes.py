"""The settings that choose how an operation runs, per thread: the backend, the precision, and whether it is lean.

A mode is read once, in the forward, and travels to the backward with the saved tensors, because autograd runs backward
passes on threads of its own.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from manual_ops import kernel

Backend = Literal["python", "native"]
Precision = Literal["fast", "strict"]


class _Modes(threading.local):
    backend: Backend = "native"
    precision: Precision = "fast"
    lean: bool = False


_modes = _Modes()
if not kernel.native_library_loaded():
    _Modes.backend = "python"
    warnings.warn(f"manual_ops runs on its Python kernels: {kernel.native_library_problem()}")
if kernel.cuda_library_problem() and torch.cuda.is_available():
    warnings.warn(f"manual_ops runs on its Python kernels on this GPU: {kernel.cuda_library_problem()}")


def current_backend() -> Backend:
    """The backend of this thread: "native" (C++ kernels) or "python" (the readable reference)."""
    return _modes.backend


def set_backend(name: Backend) -> None:
    """Select the kernels that this thread's operations run on from now on.

    Args:
        name: "native" for the C++ kernels, "python" for the readable reference.

    Raises:
        ValueError: for any other name.
        RuntimeError: for "native" where the native library is not built.
    """
    if name not in get_args(Backend):
        raise ValueError(f"set_backend: name must be one of {get_args(Backend)}, got {name!r}")
    if name == "native" and not kernel.native_library_loaded():
        raise RuntimeError(f"set_backend: no native kernels: {kernel.native_library_problem()}")
    _modes.backend = name


def current_precision() -> Precision:
    """The precision of this thread: "fast" or "strict"; see `set_precision`."""
    return _modes.precision


def set_precision(name: Precision) -> None:
    """Select what the rounding errors of this thread's convolutions may be from now on.

    Args:
        name: "fast", the default, lets the CPU's native kernels multiply 3x3 windows at stride 1 by Winograd's F(4x4,
            3x3), in all three passes: a quarter of the products, and errors that are at most 4e-6 of the largest output
            in float32 (measured on normal values: 0.9e-6 with 16 channels, 2.1e-6 with 128 to 1024; directly 2e-7 to
            5e-7). A result that is not finite is made again directly, so infinities spread no further than they must.
            "strict" keeps every convolution's error within that of torch's plus rounding. In both, processors that
            multiply pairs of bfloat16 (AVX512_BF16) do so, and add the products in float32; values below the normal
            numbers count as zero there.

    Raises:
        ValueError: for any other name.
    """
    if name not in get_args(Precision):
        raise ValueError(f"set_precision: name must be one of {get_args(Precision)}, got {name!r}")
    _modes.precision = name


def is_lean() -> bool:
    """Whether this thread is inside a `manual_ops.lean()` block."""
    return _modes.lean


def set_lean(on: bool) -> None:
    """Enter or leave lean mode; `manual_ops.lean()` does it for a block."""
    _modes.lean = on


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """`with backend("python"):` runs the operations of the block on the named kernels; see `set_backend`."""
    before = current_backend()
    set_backend(name)
    try:
        yield
    finally:
        _modes.backend = before


@contextmanager
def precision(name: Precision) -> Iterator[None]:
    """`with precision("strict"):` runs the convolutions of the block without Winograd; see `set_precision`."""
    before = current_precision()
    set_precision(name)
    try:
        yield
    finally:
        _modes.precision = before
