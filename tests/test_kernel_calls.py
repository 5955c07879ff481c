"""Every native kernel gives what its Python body gives in float64, in each dtype."""

import pytest
import torch

from kernel_calls import ALL, FLOATING, compare, expected_of
from manual_ops import kernel


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("call", ALL, ids=str)
def test_native_is_the_python_body(call, dtype, device):
    compare(call, dtype, device, expected_of(call, dtype))


def test_every_kernel_is_called():
    assert {call.kernel for call in ALL} == set(kernel.KERNELS)


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_every_kernel_has_a_native_version(name, device):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"manual_ops::{name}", device.upper())
