"""precision("fast") may use Winograd's F(4x4, 3x3): how large its errors are, and what it leaves as it is."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import manual_ops
from kernel_calls import LAYOUTS
from manual_ops import functional as F
from manual_ops import modes
from manual_ops.ops.convolution import conv_forward, conv_input_grad, conv_weight_grad

# (input, weight): whole patches, patches that end outside, tails of channels, a volume, many images, few; few patches
# under a large weight, and of one plane that meets one of the window's three.
SHAPES = [
    ((4, 64, 24, 24), (64, 64, 3, 3)),
    ((3, 19, 23, 30), (37, 19, 3, 3)),
    ((32, 128, 7, 7), (96, 128, 3, 3)),
    ((2, 512, 14, 14), (512, 512, 3, 3)),
    ((1, 16, 9, 700), (16, 16, 3, 3)),
    ((2, 17, 5, 12, 11), (20, 17, 3, 3, 3)),
    ((1, 70, 9, 10), (100, 70, 3, 3)),
    ((2, 40, 1, 12, 11), (120, 40, 3, 3, 3)),
]
IDS = ["x".join(map(str, shape)) for shape, _ in SHAPES]


def _passes(input, weight, fast, padding=1, dtype=None, groups=1, cotangent=None):
    """The three passes, each with the same values, in `dtype`."""
    axes = input.dim() - 2
    x, w = (tensor.to(dtype or tensor.dtype) for tensor in (input, weight))
    options = [1] * axes, [padding] * axes, [1] * axes, groups, fast
    size = [n + 2 * padding - 2 for n in input.shape[2:]]
    if cotangent is None:
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(input.shape[0], weight.shape[0], *size, generator=generator, dtype=torch.float64)
    g = cotangent.to(x)
    return {
        "output": conv_forward.native(x, w, None, size, *options),
        "input_grad": conv_input_grad.native(g, w, None, list(input.shape[2:]), *options),
        "weight_grad": conv_weight_grad.native(g, x, list(weight.shape[2:]), *options),
    }


def _operands(input, weight, layout="contiguous", dtype=torch.float32):
    return LAYOUTS[layout](torch.randn(input, dtype=dtype)), torch.randn(weight, dtype=dtype)


def _error(found, true):
    return ((found.double() - true).abs().max() / true.abs().max()).item()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("input", "weight"), SHAPES, ids=IDS)
def test_fast_errors_are_within_4e_6_of_the_largest_output(input, weight, layout):
    operands = _operands(input, weight, layout)
    exact = _passes(*operands, fast=False, dtype=torch.float64)
    for name, found in _passes(*operands, fast=True).items():
        assert _error(found, exact[name]) <= 4e-6, name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("input", "weight"), SHAPES, ids=IDS)
def test_fast_errors_of_float64(input, weight, layout):
    operands = _operands(input, weight, layout, torch.float64)
    exact = _passes(*operands, fast=False)
    for name, found in _passes(*operands, fast=True).items():
        assert _error(found, exact[name]) <= 1e-14, name


@pytest.mark.cpu("the CPU's kernels alone have a fast way")
def test_fast_and_strict_are_two_ways():
    """Else the tests above would say nothing."""
    operands = _operands(*SHAPES[0])
    fast, strict = _passes(*operands, fast=True), _passes(*operands, fast=False)
    assert all(not torch.equal(fast[name], strict[name]) for name in fast)


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_padding_groups_and_dtypes(dtype, groups, padding):
    input, weight = _operands((9, 20 * groups, 10, 13), (18 * groups, 20, 3, 3), dtype=torch.float64)
    input, weight = input.to(dtype), weight.to(dtype)
    strict = _passes(input, weight, False, padding, torch.float64, groups)
    cotangent = torch.randn_like(strict["output"]).to(dtype)
    strict = _passes(input, weight, False, padding, torch.float64, groups, cotangent)
    tolerance = 1e-14 if dtype is torch.float64 else torch.finfo(dtype).eps
    for name, found in _passes(input, weight, True, padding, None, groups, cotangent).items():
        assert found.dtype is dtype
        assert _error(found, strict[name]) <= tolerance, name


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38], ids=str)
@pytest.mark.parametrize("where", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("channels", [(16, 16), (64, 96)], ids=["many patches", "few under a large weight"])
def test_what_is_not_finite_spreads_no_further_than_directly(channels, where, value, layout):
    """3e38 times the numbers at the points is infinite on the way, and the result is not."""
    sources, outputs = channels
    input, weight = _operands((4, sources, 13, 18), (outputs, sources, 3, 3), layout)
    cotangent = torch.randn(4, outputs, 13, 18)
    if value == 3e38:
        input, weight, cotangent = input.sign(), weight.sign(), cotangent.sign()
        spot = {"input": input, "weight": weight, "grad_output": cotangent}[where]
        spot[2, 3, 0, 1] = value if where != "weight" else 1.0
        spot[1, 3, 0, 1] = -value
    else:
        {"input": input, "weight": weight, "grad_output": cotangent}[where][2, 3, 0, 1] = value
    strict = _passes(input, weight, False, cotangent=cotangent)
    for name, found in _passes(input, weight, True, cotangent=cotangent).items():
        assert torch.equal(found.isnan(), strict[name].isnan()), name
        assert torch.equal(found.isinf(), strict[name].isinf()), name
        finite = strict[name].isfinite()
        scale = strict[name][finite].abs().max()
        assert (found[finite] - strict[name][finite]).abs().max() <= 4e-6 * scale, name


@pytest.mark.parametrize("precision", ["fast", "strict"])
def test_the_same_bits_with_any_number_of_threads(precision):
    before = torch.get_num_threads()
    grouped = (2, 64, 14, 14), (64, 16, 3, 3)
    pixels = (2, 16, 5, 6), (40, 16, 3, 3)
    cases = zip((*SHAPES, grouped, pixels), ("contiguous", "channels_last") * 5, strict=True)
    try:
        for (input, weight), layout in cases:
            operands = _operands(input, weight, layout)

            def passes(threads, operands=operands, groups=input[1] // weight[1]):
                torch.set_num_threads(threads)
                return _passes(*operands, fast=precision == "fast", groups=groups)

            alone = passes(1)
            for threads in (2, 3):
                together = passes(threads)
                assert all(torch.equal(alone[name], together[name]) for name in alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fast", "strict"])
def test_gradcheck(precision):
    with manual_ops.precision(precision):
        x, w = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((24, 16, 3, 3), (16, 16, 3, 3)))
        torch.autograd.gradcheck(lambda x, w: F.conv2d(x, w, padding=1), (x, w), fast_mode=True)
        torch.autograd.gradgradcheck(lambda x, w: F.conv2d(x, w, padding=1), (x, w), fast_mode=True)


def test_the_backward_has_the_precision_of_its_forward():
    x, w = (tensor.requires_grad_() for tensor in _operands(*SHAPES[0]))
    gradients = {}
    for inside in ("fast", "strict"):
        with manual_ops.precision(inside):
            output = F.conv2d(x, w, padding=1)
        with manual_ops.precision("strict" if inside == "fast" else "fast"):
            gradients[inside] = torch.autograd.grad(output, (x, w), torch.ones_like(output))
        options = [1, 1], [1, 1], [1, 1], 1, inside == "fast"
        grad = torch.ones_like(output)
        assert torch.equal(gradients[inside][0], conv_input_grad.native(grad, w.detach(), None, [24, 24], *options))
        assert torch.equal(gradients[inside][1], conv_weight_grad.native(grad, x.detach(), [3, 3], *options))


@pytest.mark.cpu("a thread-local setting, without a tensor of its own")
def test_the_mode_is_the_threads_own_and_is_restored():
    assert manual_ops.current_precision() == "fast"
    with manual_ops.precision("strict"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(manual_ops.current_precision()))
        thread.start()
        thread.join()
        assert (seen, manual_ops.current_precision()) == (["fast"], "strict")
    assert manual_ops.current_precision() == "fast"
    with pytest.raises(ValueError, match="set_precision"):
        modes.set_precision("exact")


@pytest.mark.cpu("instruction sets of the CPU")
@pytest.mark.parametrize("isa", ["avx2", "plain"])
def test_every_instruction_set(isa):
    """The errors and the infinities once more, in a process that the capability is capped for."""
    if os.environ.get("MANUAL_OPS_ISA"):
        pytest.skip("already capped")
    chosen = f"{__file__}::test_fast_errors_are_within_4e_6_of_the_largest_output"
    other = f"{__file__}::test_what_is_not_finite_spreads_no_further_than_directly"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", chosen, other]
    run = subprocess.run(command, env={**os.environ, "MANUAL_OPS_ISA": isa}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
