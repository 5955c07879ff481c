"""Every native kernel gives what its Python body gives in float64, in each dtype."""

import pytest
import torch

from kernel_calls import ALL
from manual_ops import kernel
from support import TOLERANCE, moved

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _steps(tensor):
    """The strides that mean something: those of axes with more than one index."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _results(name, args, backend):
    """What the kernel returns, and what it leaves in the arguments it may change."""
    results = kernel.KERNELS[name](*args, backend=backend)
    results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
    schema = kernel.KERNELS[name].native._schema
    return results + [
        arg
        for arg, declared in zip(args, schema.arguments, strict=True)
        if declared.alias_info is not None and declared.alias_info.is_write
    ]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("call", ALL, ids=str)
def test_native_is_the_python_body(call, dtype, device):
    expected = _results(call.kernel, call.make(dtype, torch.float64), "python")
    results = _results(call.kernel, [moved(arg, device) for arg in call.make(dtype, dtype)], "native")
    tolerance = dict.fromkeys(("rtol", "atol"), call.tolerance[dtype]) if dtype in call.tolerance else TOLERANCE[dtype]
    for result, wanted in zip(results, expected, strict=True):
        exact = {} if wanted.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(result.cpu(), wanted.to(result.dtype), equal_nan=True, **(exact or tolerance))
        assert _steps(result) == _steps(wanted) or result.numel() == 0


def test_every_kernel_is_called():
    assert {call.kernel for call in ALL} == set(kernel.KERNELS)


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_every_kernel_has_a_native_version(name, device):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"manual_ops::{name}", device.upper())
