"""Small calls of every kernel, with odd sizes: each native kernel must give what its readable Python body gives.

A call is a kernel's name and its arguments, in which a `Random` or a `Given` stands for a tensor. One module an
operation; `ALL` has them all. `expected_of` and `compare` are the two halves of the test.
"""

import importlib
import pkgutil
from dataclasses import dataclass, field

import torch

from manual_ops import kernel
from support import TOLERANCE, moved

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LAYOUTS = {
    "contiguous": lambda data: data.contiguous(),
    "channels_last": lambda data: data.contiguous(
        memory_format=torch.channels_last if data.dim() == 4 else torch.channels_last_3d
    ),
    "transposed": lambda data: data.transpose(0, -1).contiguous().transpose(0, -1),
    "stepped": lambda data: data.repeat_interleave(2, dim=-1)[..., ::2],
    # Starts where no access of 16 bytes may.
    "offset": lambda data: torch.cat([data.new_zeros(1), data.flatten()])[1:].view(data.shape),
}


@dataclass(frozen=True)
class Random:
    """Standard normal values in the dtype of the test; `positive`, their absolute values plus 0.1."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    positive: bool = False

    def make(self, generator, rounded, dtype):
        data = torch.randn(self.shape, dtype=torch.float64, generator=generator)
        return LAYOUTS[self.layout]((data.abs() + 0.1 if self.positive else data).to(rounded).to(dtype))


@dataclass(frozen=True)
class Given:
    """These values; in the dtype of the test if they are floating."""

    values: torch.Tensor = field(repr=False)
    layout: str = "contiguous"

    def make(self, generator, rounded, dtype):
        values = self.values.to(rounded).to(dtype) if self.values.is_floating_point() else self.values.clone()
        return LAYOUTS[self.layout](values)


@dataclass(frozen=True)
class Call:
    """kernel(*args); `tolerance` replaces that of the dtype, for the reason in `why`."""

    kernel: str
    args: tuple
    tolerance: dict[torch.dtype, float] = field(default_factory=dict)
    why: str = ""

    def make(self, rounded, dtype, seed=0):
        """The arguments, with tensors in the place of their descriptions: values of `rounded`, held in `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        return [arg.make(generator, rounded, dtype) if isinstance(arg, (Random, Given)) else arg for arg in self.args]

    def __str__(self):
        return f"{self.kernel}({', '.join(_short(arg) for arg in self.args)})"


def _short(arg):
    if isinstance(arg, Random):
        return "x".join(map(str, arg.shape)) + ("" if arg.layout == "contiguous" else f" {arg.layout}")
    if isinstance(arg, Given):
        return "x".join(map(str, arg.values.shape)) + " given"
    return str(arg)


def _all():
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return [call for module in modules for call in module.CALLS]


ALL = _all()


def _steps(tensor):
    """The strides that mean something: those of axes with more than one index."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _results(name, args, backend):
    """What the kernel returns, and what it leaves in the arguments it may change."""
    results = kernel.KERNELS[name](*args, backend=backend)
    results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
    declared_arguments = kernel.KERNELS[name].native._schema.arguments[: len(args)]  # the others have defaults
    return results + [
        arg
        for arg, declared in zip(args, declared_arguments, strict=True)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]


def expected_of(call, dtype):
    """What the Python body makes, in float64, of the values that the dtype can hold."""
    return _results(call.kernel, call.make(dtype, torch.float64), "python")


def compare(call, dtype, device, expected):
    """AssertionError unless the native kernel gives what is expected, in the dtype's precision and the same layout."""
    results = _results(call.kernel, [moved(arg, device) for arg in call.make(dtype, dtype)], "native")
    tolerance = dict.fromkeys(("rtol", "atol"), call.tolerance[dtype]) if dtype in call.tolerance else TOLERANCE[dtype]
    for result, wanted in zip(results, expected, strict=True):
        exact = {} if wanted.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(result.cpu(), wanted.to(result.dtype), equal_nan=True, **(exact or tolerance))
        assert _steps(result) == _steps(wanted) or result.numel() == 0
