"""Convolution and transposed convolution: every derivative against torch's, what they keep, what they refuse."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from manual_ops import modes
from manual_ops.ops import convolution
from manual_ops.ops.channel_sum import ChannelSum
from manual_ops.ops.convolution import conv_forward, conv_input_grad, conv_weight_grad
from support import (
    TOLERANCE,
    assert_same,
    assert_same_as_torch,
    assert_wrong_like_torch,
    gradchecks,
    kept_bytes,
    tensor,
)

NAMES = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


def both(name):
    return getattr(convolution, name), getattr(F, name)


# name, input shape, weight shape, options
CONVOLUTIONS = [
    ("conv1d", (2, 3, 9), (4, 3, 3), {}),
    ("conv1d", (1, 4, 11), (6, 2, 4), {"stride": 3, "padding": 2, "dilation": 2, "groups": 2}),
    ("conv1d", (3, 7), (2, 3, 2), {"padding": 1}),
    ("conv2d", (2, 3, 8, 7), (5, 3, 3, 3), {"padding": 1}),
    ("conv2d", (2, 4, 9, 8), (6, 4, 1, 1), {}),
    ("conv2d", (2, 4, 9, 8), (6, 4, 1, 1), {"stride": 2}),
    ("conv2d", (2, 4, 6, 5), (6, 4, 1, 1), {"padding": 2}),
    ("conv2d", (1, 3, 12, 11), (8, 3, 7, 7), {"stride": 2, "padding": 3}),
    ("conv2d", (2, 6, 7, 8), (9, 2, 3, 2), {"stride": (2, 3), "padding": (1, 0), "dilation": (1, 2), "groups": 3}),
    ("conv2d", (2, 3, 10, 11), (4, 3, 2, 3), {"stride": 4}),
    ("conv2d", (1, 2, 5, 6), (3, 2, 3, 3), {"padding": 5}),
    ("conv2d", (1, 2, 7, 9), (3, 2, 3, 3), {"dilation": 3, "padding": (3, 4)}),
    ("conv2d", (3, 6, 5), (4, 3, 3, 3), {"padding": "valid"}),
    ("conv2d", (2, 3, 6, 7), (4, 3, 4, 2), {"padding": "same"}),
    ("conv2d", (2, 3, 9, 8), (4, 3, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    ("conv2d", (2, 4, 7, 6), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
    ("conv2d", (2, 4, 9, 8), (4, 1, 3, 5), {"padding": 2, "stride": 2, "groups": 4}),
    ("conv2d", (1, 3, 7, 8), (6, 1, 2, 3), {"padding": 1, "stride": (1, 2), "dilation": (2, 1), "groups": 3}),
    ("conv2d", (2, 40, 6, 17), (35, 40, 3, 3), {"padding": 1}),
    ("conv2d", (1, 16, 5, 30), (32, 16, 3, 3), {"padding": 1, "stride": 2}),
    ("conv2d", (2, 48, 5, 4), (48, 1, 3, 3), {"padding": 1, "groups": 48}),
    ("conv2d", (2, 34, 5, 4), (34, 17, 3, 3), {"padding": 1, "groups": 2}),
    ("conv3d", (2, 3, 5, 6, 4), (4, 3, 3, 2, 3), {"padding": 1}),
    ("conv3d", (1, 4, 6, 5, 7), (4, 2, 2, 3, 1), {"stride": (2, 1, 3), "padding": (1, 2, 0), "groups": 2}),
    ("conv3d", (1, 2, 7, 6, 5), (2, 1, 3, 2, 3), {"dilation": (2, 1, 2), "padding": (2, 0, 1), "groups": 2}),
    ("conv3d", (2, 4, 5, 4), (3, 2, 2, 2, 2), {"padding": "same"}),
    ("conv_transpose1d", (2, 3, 5), (3, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ("conv_transpose1d", (4, 6), (4, 2, 4), {"groups": 2, "dilation": 3, "padding": 2}),
    ("conv_transpose2d", (2, 3, 5, 4), (3, 4, 3, 3), {}),
    ("conv_transpose2d", (2, 3, 5, 4), (3, 4, 4, 4), {"stride": 2, "padding": 1}),
    ("conv_transpose2d", (2, 4, 4, 5), (4, 3, 2, 3), {"stride": (2, 3), "output_padding": (1, 2), "groups": 2}),
    ("conv_transpose2d", (1, 2, 4, 5), (2, 3, 3, 2), {"stride": 1, "dilation": 3, "output_padding": 2}),
    ("conv_transpose2d", (2, 3, 4, 4), (3, 2, 2, 2), {"stride": 4}),
    ("conv_transpose2d", (2, 3, 4, 4), (3, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 3}),
    ("conv_transpose2d", (1, 35, 4, 15), (35, 40, 3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    ("conv_transpose3d", (1, 2, 3, 4, 3), (2, 3, 3, 2, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0, 1)}),
    ("conv_transpose3d", (2, 3, 2, 4), (2, 1, 2, 3, 2), {"groups": 2}),
]
IDS = [f"{index}-{case[0]}" for index, case in enumerate(CONVOLUTIONS)]


def operands(name, input, weight, options, dtype=torch.float64, device=None, bias=True):
    channels = weight[1] * options.get("groups", 1) if "transpose" in name else weight[0]
    scale = max(1, weight[1] * torch.Size(weight[2:]).numel()) ** -0.5
    tensors = tensor(*input, dtype=dtype, device=device), tensor(*weight, dtype=dtype, device=device)
    with torch.no_grad():
        tensors[1].mul_(scale)
    return *tensors, tensor(channels, dtype=dtype, device=device) if bias else None


def channels_last(input):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return input.detach().contiguous(memory_format=formats[input.dim()]).requires_grad_()


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchs(name):
    ours, theirs = both(name)
    documented = theirs.__doc__.split("\n")[1] if theirs.__doc__.startswith("\n") else theirs.__doc__.split("\n")[0]
    parameters = inspect.signature(ours).parameters.values()
    assert ours.__name__ == name
    listed = documented.partition("(")[2].partition(")")[0].split(", ")
    assert [part.partition("=")[0] for part in listed] == [parameter.name for parameter in parameters]
    for part, parameter in zip(listed, parameters, strict=True):
        default = part.partition("=")[2]
        assert default == ("" if parameter.default is inspect.Parameter.empty else str(parameter.default))


@pytest.mark.parametrize(("name", "input", "weight", "options"), CONVOLUTIONS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_values_and_gradients_are_torchs(backend, device, dtype, name, input, weight, options):
    with modes.precision("strict"):  # test_precision.py has the errors of the other
        assert_same_as_torch(*both(name), *operands(name, input, weight, options, dtype, device), **options)


# What the native kernels cut into blocks: long rows, many rows, channels that do not fit the cache, large weights,
# results and sources larger than a cache.
LARGE = [
    ("conv1d", (1, 24, 3000), (20, 24, 5), {"stride": 2, "padding": 2}),
    ("conv1d", (2, 20, 3001), (20, 1, 4), {"stride": 3, "padding": 2, "groups": 20}),
    ("conv2d", (1, 320, 5, 60), (40, 320, 3, 3), {"dilation": 2, "padding": 2}),
    ("conv2d", (2, 33, 40, 41), (70, 33, 3, 3), {"padding": 1, "stride": 2}),
    ("conv2d", (1, 160, 20, 9), (160, 160, 1, 1), {}),
    ("conv2d", (1, 3, 230, 231), (3, 1, 5, 5), {"padding": 2, "groups": 3}),
    ("conv2d", (2, 40, 12, 61), (40, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 40}),
    ("conv2d", (1, 6, 9, 40), (6, 1, 2, 3), {"stride": (9, 11), "padding": 1, "groups": 6}),
    ("conv2d", (4, 200, 8, 9), (180, 200, 3, 3), {"padding": 1, "stride": 2}),
    ("conv2d", (1, 16, 256, 257), (64, 16, 1, 1), {}),
    ("conv2d", (1, 64, 256, 257), (64, 4, 3, 3), {"padding": 1, "groups": 16}),
    ("conv3d", (1, 18, 6, 20, 21), (34, 18, 3, 3, 3), {"padding": 1}),
    ("conv_transpose2d", (1, 128, 15, 16), (128, 40, 4, 4), {"stride": 2, "padding": 1}),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
@pytest.mark.parametrize(("name", "input", "weight", "options"), LARGE, ids=[f"{c[0]}-{c[1]}" for c in LARGE])
def test_large_sizes_are_as_accurate_as_torchs(device, dtype, layout, name, input, weight, options):
    """In strict precision; test_precision.py has the errors of the other."""
    input, weight, _ = operands(name, input, weight, options, dtype, device, bias=False)
    if layout == "channels_last" and input.dim() > 3:
        input = channels_last(input)
    ours, theirs = both(name)
    exact = [arg.detach().double().requires_grad_() for arg in (input, weight)]
    cotangent = torch.randn_like(theirs(input, weight, **options))

    def results(function, args):
        output = function(*args, **options)
        return output.detach(), *torch.autograd.grad(output, args, cotangent.to(output.dtype))

    with modes.precision("strict"):
        found = results(ours, (input, weight))
    expected, reference = results(theirs, (input, weight)), results(theirs, exact)
    # The reference in float64 is torch's own, and rounded too.
    slack = (64 if dtype is torch.float64 else 4) * torch.finfo(dtype).eps
    for mine, torchs, true in zip(found, expected, reference, strict=True):
        error, torchs_error = ((value.double() - true).abs().max() / true.abs().max() for value in (mine, torchs))
        assert mine.dtype is dtype
        assert error <= torchs_error + slack


@pytest.mark.parametrize(("name", "input", "weight", "options"), CONVOLUTIONS[3::4], ids=IDS[3::4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_accumulates_in_float32_and_rounds_once(backend, device, dtype, name, input, weight, options):
    ours, theirs = both(name)
    args = operands(name, input, weight, options, dtype, device)
    wide = [arg.detach().float().requires_grad_() for arg in args]
    output, expected = ours(*args, **options), theirs(*wide, **options)
    # One rounding to the 16-bit type; a sum that lies next to the middle of two neighbours may fall on either.
    once = {"rtol": 2 * torch.finfo(dtype).eps / 2, "atol": 1e-5}
    assert_same(output.detach(), expected.detach().to(dtype), **once)
    cotangent = torch.randn(expected.shape, device=device).to(dtype)
    gradients = torch.autograd.grad(output, args, cotangent)
    for gradient, exact in zip(gradients, torch.autograd.grad(expected, wide, cotangent.float()), strict=True):
        assert_same(gradient, exact.to(dtype), **once)


@pytest.mark.parametrize("which", ["input", "weight", "both"])
@pytest.mark.parametrize(
    ("name", "input", "weight", "options"),
    [case for case in CONVOLUTIONS if len(case[1]) == len(case[2]) and len(case[2]) > 3][::2],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_channels_last_in_is_channels_last_out(backend, device, dtype, which, name, input, weight, options):
    ours, theirs = both(name)
    input, weight, bias = operands(name, input, weight, options, dtype, device)
    if which != "weight":
        input = channels_last(input)
    if which != "input":
        weight = channels_last(weight)
    with modes.precision("strict"):  # test_precision.py has the errors of the other
        assert_same_as_torch(ours, theirs, input, weight, bias, **options)
    output, expected = ours(input, weight, bias, **options), theirs(input, weight, bias, **options)
    memory_format = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    wanted = any(
        tensor.is_contiguous(memory_format=memory_format) and not tensor.is_contiguous() for tensor in (input, weight)
    )
    assert output.is_contiguous(memory_format=memory_format if wanted else torch.contiguous_format)
    assert output.shape == expected.shape


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_any_strides_are_read(backend, device, name):
    input = tensor(2, 7, 4, 12, device=device).detach().transpose(1, 2)[..., ::2].requires_grad_()
    weight = tensor(3, 5, 4, 4, device=device).detach().permute(3, 2, 0, 1).requires_grad_()
    bias = tensor(8, device=device).detach()[::2].requires_grad_()
    assert_same_as_torch(*both(name), input, weight, bias, stride=2, padding=1)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv_transpose2d"])
def test_an_expanded_gradient_is_read(backend, device, name):
    ours, theirs = both(name)
    input, weight = (4, 9), (4, 4, 3)
    if name != "conv1d":
        input, weight = (2, 4, 9, 8), (4, 4, 3, 3)
    args = operands(name, input, weight, {}, device=device)
    for gradient, expected in zip(
        torch.autograd.grad(ours(*args).sum(), args), torch.autograd.grad(theirs(*args).sum(), args), strict=True
    ):
        assert_same(gradient, expected)


@pytest.mark.parametrize(
    ("name", "input", "weight", "options"),
    [
        ("conv1d", (0, 3, 9), (4, 3, 3), {}),
        ("conv2d", (0, 3, 9, 8), (4, 3, 3, 3), {"padding": 1}),
        ("conv2d", (0, 4, 9, 8), (4, 1, 3, 3), {"padding": 1, "groups": 4}),
        ("conv3d", (0, 3, 4, 5, 6), (4, 3, 3, 3, 3), {"stride": 2}),
        ("conv_transpose2d", (0, 3, 9, 8), (3, 4, 3, 3), {"stride": 2}),
    ],
)
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(backend, device, name, input, weight, options):
    assert_same_as_torch(*both(name), *operands(name, input, weight, options, device=device), **options)


def test_no_input_channels_leave_the_bias(backend, device):
    # torch gives an output without channels here, whatever the weight's shape says.
    input, weight, bias = operands("conv2d", (2, 0, 5, 4), (3, 0, 3, 3), {}, device=device)
    output = convolution.conv2d(input, weight, bias)
    assert_same(output.detach(), bias.detach().view(1, 3, 1, 1).expand(2, 3, 3, 2))
    gradients = torch.autograd.grad(output.sum(), (input, weight, bias))
    assert [gradient.shape for gradient in gradients] == [input.shape, weight.shape, bias.shape]


def test_nan_and_infinity_reach_exactly_the_windows_that_cover_them(backend, device):
    input = torch.ones(1, 2, 7, 8, device=device)
    input[0, 0, 2, 3], input[0, 1, 5, 6] = torch.nan, torch.inf
    weight = torch.ones(3, 2, 3, 3, device=device)
    assert_same(convolution.conv2d(input, weight, padding=1), F.conv2d(input, weight, padding=1))


def test_input_gradient_needs_the_input_size_at_stride_2(backend, device):
    for size in (7, 8):  # both have 3 windows
        args = operands("conv2d", (1, 2, size, size), (3, 2, 3, 3), {}, device=device)
        assert_same_as_torch(*both("conv2d"), *args, stride=2)


def test_same_padding_with_an_even_window_pads_one_more_behind(backend, device):
    input = torch.arange(1.0, 6.0, device=device).view(1, 1, 5)
    weight = torch.tensor([[[1.0, 10.0]]], device=device)
    assert convolution.conv1d(input, weight, padding="same").flatten().tolist() == [21, 32, 43, 54, 5]


@pytest.mark.parametrize("subset", range(1, 8))
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_any_subset_of_inputs_needs_gradients(backend, device, name, subset):
    args = operands(name, (2, 4, 5, 6), (4, 2, 3, 2), {"groups": 2}, device=device)
    for position, arg in enumerate(args):
        arg.requires_grad_(bool(subset >> position & 1))
    assert_same_as_torch(*both(name), *args, groups=2, stride=2)


GRADCHECKS = [
    ("conv1d", (1, 2, 5), (2, 1, 2), {"groups": 2, "stride": 2, "padding": 1}),
    ("conv2d", (1, 2, 4, 3), (2, 2, 2, 2), {"stride": (2, 1), "dilation": (1, 2), "padding": 1}),
    ("conv3d", (1, 1, 3, 2, 3), (2, 1, 2, 2, 2), {"padding": (0, 1, 0)}),
    ("conv_transpose1d", (1, 2, 3), (2, 1, 2), {"stride": 2, "groups": 2, "output_padding": 1}),
    ("conv_transpose2d", (1, 2, 2, 2), (2, 2, 2, 2), {"stride": 2, "padding": 1}),
    ("conv_transpose3d", (1, 1, 2, 1, 2), (1, 2, 2, 1, 2), {}),
]


@pytest.mark.parametrize(("name", "input", "weight", "options"), GRADCHECKS, ids=[case[0] for case in GRADCHECKS])
def test_gradcheck_in_every_mode_and_second_order(backend, device, name, input, weight, options):
    ours, _ = both(name)
    gradchecks(lambda *args: ours(*args, **options), *operands(name, input, weight, options, device=device))


@pytest.mark.parametrize("subset", [1, 2, 3, 6])
def test_gradcheck_of_a_subset_and_of_strided_inputs(backend, device, subset):
    input = tensor(1, 3, 2, 4, device=device).detach().transpose(1, 2)[..., ::2]
    weight = tensor(2, 2, 2, 2, device=device).detach().permute(1, 0, 3, 2)
    args = [input, weight, tensor(2, device=device).detach()]
    args = [arg.requires_grad_(bool(subset >> position & 1)) for position, arg in enumerate(args)]
    gradchecks(lambda *args: convolution.conv2d(*args, padding=1, stride=2), *args)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_second_order_is_torchs(backend, device, name):
    ours, theirs = both(name)
    args = operands(name, (2, 3, 6, 5), (3, 3, 3, 3), {}, device=device)
    found = []
    for function in (ours, theirs):
        gradients = torch.autograd.grad(function(*args, stride=2, padding=1).pow(3).sum(), args, create_graph=True)
        found.append(torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in gradients), args))
    for gradient, expected in zip(*found, strict=True):
        assert_same(gradient, expected)


def test_third_order_is_torchs(backend, device):
    args = operands("conv2d", (1, 2, 5, 4), (2, 2, 3, 3), {}, device=device)
    found = []
    for function in both("conv2d"):
        value = function(*args, padding=1).pow(4).sum()
        for _ in range(2):
            value = sum(gradient.pow(2).sum() for gradient in torch.autograd.grad(value, args, create_graph=True))
        found.append(torch.autograd.grad(value, args))
    for gradient, expected in zip(*found, strict=True):
        assert_same(gradient, expected)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 1, None), (1, 0, None), (0, 2, 0), (None, None, 0)])
@pytest.mark.parametrize(
    ("name", "options"),
    [("conv2d", {}), ("conv2d", {"groups": 2, "stride": 2}), ("conv_transpose2d", {"groups": 2, "stride": 2})],
)
def test_vmap_is_torchs(backend, device, name, options, in_dims):
    groups = options.get("groups", 1)
    shapes = [[2, 4, 5, 6], [4, 4 // groups, 3, 2], [4]]
    if name == "conv_transpose2d":
        shapes[1:] = [4, 3, 3, 2], [6]
    for shape, dim in zip(shapes, in_dims, strict=True):
        if dim is not None:
            shape.insert(dim, 3)
    args = [tensor(*shape, device=device) for shape in shapes]
    ours, theirs = (torch.vmap(lambda *args, f=f: f(*args, **options), in_dims) for f in both(name))
    assert_same_as_torch(ours, theirs, *args)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_per_sample_gradients_are_torchs(backend, device, name):
    ours, theirs = both(name)
    input, weight, bias = operands(name, (4, 2, 5, 5), (2, 2, 3, 3), {}, device=device)

    def per_sample(function):
        def loss(weight, bias, image):
            return function(image.unsqueeze(0), weight, bias, stride=2).pow(2).sum()

        return torch.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, None, 0))(weight, bias, input)

    for gradient, expected in zip(per_sample(ours), per_sample(theirs), strict=True):
        assert_same(gradient, expected)


OPTIONS = [2, 1], [1, 2], [1, 1], 2  # stride, padding, dilation, groups


@pytest.mark.parametrize("operator", ["native", "python"])
@pytest.mark.parametrize("kernel", [conv_forward, conv_input_grad, conv_weight_grad], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_operator_passes_opcheck(device, operator, kernel, layout):
    input, weight, bias = operands("conv2d", (2, 4, 5, 6), (6, 2, 3, 3), {}, device=device)
    grad_output = tensor(2, 6, 3, 8, device=device)
    if layout == "channels_last":
        input, grad_output = channels_last(input), channels_last(grad_output)
    args = {
        "conv_forward": (input, weight, bias, [3, 8]),
        "conv_input_grad": (grad_output, weight, None, [5, 6]),
        "conv_weight_grad": (grad_output, input, [3, 3]),
    }[kernel.name]
    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
    torch.library.opcheck(getattr(kernel, operator), (*args, *OPTIONS))


@pytest.mark.parametrize(("name", "input", "weight", "options"), CONVOLUTIONS[1::3], ids=IDS[1::3])
def test_native_bits_do_not_depend_on_threads_or_runs(name, input, weight, options):
    args = operands(name, input, weight, options, torch.float32)
    ours, _ = both(name)

    def run(threads):
        torch.set_num_threads(threads)
        output = ours(*args, **options)
        return output, *torch.autograd.grad(output.square().sum(), args)

    before = torch.get_num_threads()
    try:
        with modes.backend("native"):
            first, again, single = run(2), run(2), run(1)
    finally:
        torch.set_num_threads(before)
    for results in zip(first, again, single, strict=True):
        assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_native_bits_do_not_depend_on_threads_at_a_size_that_is_split(groups, layout):
    input, weight, _ = operands("conv2d", (5, 16, 40, 37), (16, 16 // groups, 3, 3), {}, torch.float32)
    if layout == "channels_last":
        input = channels_last(input)
    before, results = torch.get_num_threads(), []
    try:
        with modes.backend("native"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                output = convolution.conv2d(input, weight, padding=1, groups=groups)
                results.append((output, *torch.autograd.grad(output.square().sum(), (input, weight))))
    finally:
        torch.set_num_threads(before)
    for single, *others in zip(*results, strict=True):
        assert all(torch.equal(single, other) for other in others)


@pytest.mark.parametrize("name", ["conv2d", "conv_transpose2d"])
def test_only_what_the_needed_gradients_use_is_kept(backend, device, name):
    ours, _ = both(name)
    input, weight, bias = operands(name, (2, 4, 16, 15), (4, 4, 3, 3), {}, device=device)

    def kept(*needed):
        for arg in (input, weight, bias):
            arg.requires_grad_(any(arg is other for other in needed))
        return kept_bytes(lambda: ours(input, weight, bias))

    assert kept(input, weight, bias) == input.nbytes + weight.nbytes
    assert kept(input) == weight.nbytes  # a frozen weight keeps no input
    assert kept(weight, bias) == input.nbytes  # an input without gradient keeps no weight
    assert kept(bias) == 0


X, W, B = (2, 4, 6, 7), (6, 4, 3, 3), (6,)


def like(axes, shape):
    """A 2-d case's shape, for 1 and 3 axes."""
    return (*shape[:2], *((*shape[2:], 5) if axes == 3 else shape[2:])[-axes:]) if len(shape) == 4 else shape


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b, n: ((x[0, 0], w, b), {}),
        lambda x, w, b, n: ((x[None], w, b), {}),
        lambda x, w, b, n: ((x, w[0], b), {}),
        lambda x, w, b, n: ((x, w[None], b), {}),
        lambda x, w, b, n: ((x[:, :3], w, b), {}),
        lambda x, w, b, n: ((x, w, b), {"groups": 2}),
        lambda x, w, b, n: ((x, w[:, :1], b), {"groups": 4}),
        lambda x, w, b, n: ((x, w, b), {"groups": 0}),
        lambda x, w, b, n: ((x, w, b), {"groups": -1}),
        lambda x, w, b, n: ((x, w, b), {"groups": 1.0}),
        lambda x, w, b, n: ((x, w, b), {"groups": (1,)}),
        lambda x, w, b, n: ((x, w, b), {"dilation": 8}),
        lambda x, w, b, n: ((x[..., :2], w, b), {}),
        lambda x, w, b, n: ((x[..., :0], w, b), {}),
        lambda x, w, b, n: ((x[..., :0], w, b), {"padding": 2}),
        lambda x, w, b, n: ((x, w[..., :0], b), {"padding": 1}),
        lambda x, w, b, n: ((x, w, b), {"padding": -1}),
        lambda x, w, b, n: ((x, w, b), {"stride": 0}),
        lambda x, w, b, n: ((x, w, b), {"stride": -1}),
        lambda x, w, b, n: ((x, w, b), {"dilation": 0}),
        lambda x, w, b, n: ((x, w, b), {"stride": 1.5}),
        lambda x, w, b, n: ((x, w, b), {"padding": 0.5}),
        lambda x, w, b, n: ((x, w, b), {"dilation": 1.0}),
        lambda x, w, b, n: ((x, w, b), {"stride": "2"}),
        lambda x, w, b, n: ((x, w, b), {"stride": None}),
        lambda x, w, b, n: ((x, w, b), {"stride": (1,) * (n + 1)}),
        lambda x, w, b, n: ((x, w, b), {"padding": (1,) * (n + 1)}),
        lambda x, w, b, n: ((x, w, b), {"dilation": (1,) * (n + 1)}),
        lambda x, w, b, n: ((x, w, b), {"stride": ()}),
        lambda x, w, b, n: ((x, w, b), {"stride": (1.5,) * n}),
        lambda x, w, b, n: ((x, w, b), {"padding": "full"}),
        lambda x, w, b, n: ((x, w, b), {"padding": "same", "stride": 2}),
        lambda x, w, b, n: ((x, w, b[:5]), {}),
        lambda x, w, b, n: ((x, w, b[None]), {}),
        lambda x, w, b, n: ((x, w, b[0]), {}),
        lambda x, w, b, n: ((x.double(), w, b), {}),
        lambda x, w, b, n: ((x, w.half(), b), {}),
        lambda x, w, b, n: ((x, w, b.bfloat16()), {}),
        lambda x, w, b, n: ((x.tolist(), w, b), {}),
        lambda x, w, b, n: ((x, 3, b), {}),
        lambda x, w, b, n: ((x, w, 0.0), {}),
        lambda x, w, b, n: ((None, w, b), {}),
    ],
)
def test_wrong_convolutions_are_refused_like_torchs(axes, call):
    args, options = call(ones(*like(axes, X)), ones(*like(axes, W)), ones(*B), axes)
    assert_wrong_like_torch(*both(f"conv{axes}d"), *args, **options)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b, n: ((x[0, 0], w, b), {}),
        lambda x, w, b, n: ((x[None], w, b), {}),
        lambda x, w, b, n: ((x, w[0], b), {}),
        lambda x, w, b, n: ((x[:, :3], w, b), {}),
        lambda x, w, b, n: ((x, w, b), {"groups": 2}),
        lambda x, w, b, n: ((x, w, b), {"groups": 3}),
        lambda x, w, b, n: ((x, w, b), {"groups": 0}),
        lambda x, w, b, n: ((x, w, b), {"groups": 2.0}),
        lambda x, w, b, n: ((x, w, b), {"output_padding": 1}),
        lambda x, w, b, n: ((x, w, b), {"output_padding": 2, "stride": 2}),
        lambda x, w, b, n: ((x, w, b), {"output_padding": -1, "stride": 2}),
        lambda x, w, b, n: ((x, w, b), {"output_padding": (0,) * (n + 1)}),
        lambda x, w, b, n: ((x[..., :0], w, b), {}),
        lambda x, w, b, n: ((x, w, b), {"padding": 5}),
        lambda x, w, b, n: ((x, w, b), {"padding": -1}),
        lambda x, w, b, n: ((x, w, b), {"padding": "same"}),
        lambda x, w, b, n: ((x, w, b), {"stride": 0}),
        lambda x, w, b, n: ((x, w, b), {"dilation": 0}),
        lambda x, w, b, n: ((x, w, b), {"stride": 1.5}),
        lambda x, w, b, n: ((x, w, b), {"stride": (1,) * (n + 1)}),
        lambda x, w, b, n: ((x, w, b), {"dilation": (1,) * (n + 1)}),
        lambda x, w, b, n: ((x, w, b[:3]), {}),
        lambda x, w, b, n: ((x.double(), w, b), {}),
        lambda x, w, b, n: ((x, w, b.half()), {}),
        lambda x, w, b, n: ((x, w.tolist(), b), {}),
    ],
)
def test_wrong_transposed_convolutions_are_refused_like_torchs(axes, call):
    weight = ones(*like(axes, W)).transpose(0, 1)
    args, options = call(ones(*like(axes, X)), weight, ones(*B), axes)
    assert_wrong_like_torch(*both(f"conv_transpose{axes}d"), *args, **options)


@pytest.mark.parametrize("name", NAMES)
def test_integers_are_not_computed(backend, device, name):
    axes = int(name[-2])
    input, weight = (ones(*like(axes, shape), dtype=torch.int64) for shape in ((2, 4, 6, 7), (4, 4, 3, 3)))
    with pytest.raises(NotImplementedError, match=name):
        getattr(convolution, name)(input, weight)


def test_tolerance_of_float64_sees_a_missing_tap():
    input, weight, _ = operands("conv2d", (1, 2, 5, 5), (2, 2, 3, 3), {}, bias=False)
    with torch.no_grad():
        missing = weight.clone()
        missing[0, 0, 0, 0] = 0
    difference = (F.conv2d(input, weight) - F.conv2d(input, missing)).abs().max()
    assert difference > 100 * TOLERANCE[torch.float64]["atol"]


def test_the_bias_gradient_of_many_positions_is_as_exact_as_torchs():
    for shape in [(1_000_000, 1, 1), (500_000, 1, 2), (1, 1, 1 << 22), (200_000, 4)]:
        grad_output = torch.rand(shape)
        exact = grad_output.double().sum([dim for dim in range(len(shape)) if dim != 1])
        ours = ChannelSum.call(grad_output, "native")
        torch.testing.assert_close(ours.double(), exact, rtol=2e-7, atol=0)


def test_the_weight_gradient_of_no_outputs_is_zero():
    grad_weight = conv_weight_grad.native(torch.empty(1, 2, 0), torch.randn(1, 3, 5), [3], [1], [0], [1], 1)
    assert torch.equal(grad_weight, torch.zeros(2, 3, 3))


@pytest.mark.parametrize("option", [0, 1, 2])
def test_the_native_kernel_refuses_options_that_overflow(option):
    options = [[1, 1], [0, 0], [1, 1]]
    options[option] = [1, 2**60]
    with pytest.raises(RuntimeError, match="conv_forward"):
        conv_forward.native(torch.randn(1, 3, 1, 4), torch.randn(2, 3, 1, 2), None, [1, 3], *options, 1)


def test_native_kernels_refuse_an_operand_of_another_dtype():
    input, weight = torch.randn(1, 3, 5), torch.randn(2, 3, 2).double()
    with pytest.raises(RuntimeError, match="dtype"):
        conv_forward.native(input, weight, None, [4], [1], [0], [1], 1)
