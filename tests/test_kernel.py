"""Kernels are two operators with one schema, chosen by name, opaque to autograd."""

import os
import re
import subprocess
import sys

import pytest
import torch

from manual_ops import functional, kernel, registry

pytestmark = pytest.mark.cpu("how operators are registered and built; test_kernel_calls.py runs each kernel on the GPU")


def _recorded_calls():
    """Every kernel's calls while the registry's samples run forward, backward and backward's backward."""
    calls = {}
    original = kernel.Kernel.__call__

    def recording(this, *args, backend):
        calls.setdefault(this.name, []).append([_copy(arg) for arg in args])
        return original(this, *args, backend=backend)

    kernel.Kernel.__call__ = recording
    try:
        for operation in registry.OPERATIONS.values():
            for sample in operation.samples():
                _differentiate_twice(operation.function, sample.args, sample.kwargs)
        for in_place in (functional.relu6, functional.silu):
            in_place(torch.randn(3, 4), inplace=True)
        functional.batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), training=True)
    finally:
        kernel.Kernel.__call__ = original
    return calls


def _differentiate_twice(function, args, kwargs):
    inputs = [value for value in (*args, *kwargs.values()) if getattr(value, "requires_grad", False)]
    output = function(*args, **kwargs)
    cotangent = torch.ones_like(output, requires_grad=True)
    gradients = torch.autograd.grad(output, inputs, cotangent, create_graph=True)
    total = sum((gradient**2).sum() for gradient in gradients)
    torch.autograd.grad(total, [*inputs, cotangent], allow_unused=True)


def _copy(arg):
    return arg.detach().clone() if isinstance(arg, torch.Tensor) else arg


def _copies(args):
    return [_copy(arg) for arg in args]


def _results(operator, args):
    """What the operator returns, or for one that returns nothing the arguments that it wrote to."""
    args = _copies(args)
    result = operator(*args)
    if result is None:
        return [arg for arg in args if isinstance(arg, torch.Tensor)]
    return _outputs(result)


def _outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


CALLS = _recorded_calls()
IN_PLACE = {name for name, this in kernel.KERNELS.items() if this.native._schema.is_mutable}


def test_every_kernel_is_reached_from_the_registry():
    assert set(CALLS) == set(kernel.KERNELS)


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_opcheck(name):
    this = kernel.KERNELS[name]
    for operator in (this.native, this.python):
        torch.library.opcheck(operator, tuple(_copies(CALLS[name][0])))
        torch.library.opcheck(operator, tuple(_copies(CALLS[name][-1])), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_native_and_python_agree(name):
    this = kernel.KERNELS[name]
    for args in CALLS[name][:4]:
        for native, python in zip(_results(this.native, args), _results(this.python, args), strict=True):
            torch.testing.assert_close(native, python, equal_nan=True)


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_there_is_a_cpp_kernel(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"manual_ops::{name}", "CPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"manual_ops_python::{name}", "CPU")


# torch's own versions of the operations, and what would compute one in another's name.
FORBIDDEN = re.compile(
    r"convolution|conv\d|slow_conv|thnn_conv|mkldnn|im2col|col2im|unfold_backward|max_pool|avg_pool|batch_norm|softmax"
    r"|nll_loss|cross_entropy|relu|threshold|hardtanh|sigmoid|tanh|silu|gelu|mse_loss|binary_cross_entropy|linear"
)


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_no_kernel_hands_its_work_back_to_torch(name):
    this = kernel.KERNELS[name]
    for operator in (this.native, this.python):
        args = _copies(CALLS[name][0])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            operator(*args)
        called = {event.name for event in profile.events() if event.name.startswith("aten::")}
        assert [aten for aten in called if FORBIDDEN.search(aten)] == []


@pytest.mark.parametrize("name", [name for name in kernel.KERNELS if name not in IN_PLACE])
def test_a_kernel_called_without_its_function_is_cut_off_from_the_graph(name):
    this = kernel.KERNELS[name]
    args = [
        arg.clone().requires_grad_() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in CALLS[name][0]
    ]
    for operator in (this.native, this.python):
        assert not any(output.requires_grad for output in _outputs(operator(*args)))


@pytest.mark.parametrize("name", kernel.KERNELS)
def test_native_results_do_not_depend_on_the_number_of_threads(name):
    this = kernel.KERNELS[name]
    threads = torch.get_num_threads()
    for args in CALLS[name][:3]:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(_results(this.native, args))
        torch.set_num_threads(threads)
        for other in results[1:]:
            for got, want in zip(other, results[0], strict=True):
                assert torch.equal(torch.nan_to_num(got.double()), torch.nan_to_num(want.double()))


PROBE = """
import torch
from manual_ops import functional as F
assert torch.ops.manual_ops.cpu_isa() == "{isa}", torch.ops.manual_ops.cpu_isa()
x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
w = torch.randn(8, 8, 3, 3, dtype=torch.float64, requires_grad=True)
y = F.batch_norm_relu(F.conv2d(x, w, padding=1), None, None, training=True)
loss = F.cross_entropy(F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).flatten(1), torch.tensor([0, 1]))
T = torch.nn.functional
y = T.relu(T.batch_norm(T.conv2d(x, w, padding=1), None, None, training=True))
expected = T.cross_entropy(T.adaptive_avg_pool2d(T.max_pool2d(y, 2), 1).flatten(1), torch.tensor([0, 1]))
for a, b in zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(expected, (x, w))):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
"""


def _run(source, **environment):
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=_environment(environment))


def _environment(extra):
    return {**os.environ, **extra}


def test_each_instruction_set_computes_the_same():
    best = torch.ops.manual_ops.cpu_isa()
    names = ["plain", "avx2", "avx512"]
    for isa in names[: names.index(best) + 1]:
        result = _run(PROBE.format(isa=isa), MANUAL_OPS_ISA=isa)
        assert result.returncode == 0, result.stderr


def test_an_unknown_instruction_set_is_refused():
    result = _run("import torch, manual_ops; torch.ops.manual_ops.cpu_isa()", MANUAL_OPS_ISA="sse9")
    assert "avx512, avx2 or plain" in result.stderr
