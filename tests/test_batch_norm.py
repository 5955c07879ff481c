"""Batch norm and its fusion with ReLU and a residual: torch's values and gradients, of every order."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

from manual_ops import modes
from manual_ops.geometry import accumulation_dtype
from manual_ops.ops import batch_norm as module
from manual_ops.ops.batch_norm import batch_norm, batch_norm_relu
from support import (
    TOLERANCE,
    assert_same,
    assert_same_as_torch,
    assert_wrong_like_torch,
    gradchecks,
    kept_bytes,
    tensor,
)

SHAPES = {
    "matrix": (7, 3),
    "one channel": (9, 1),
    "1d": (4, 3, 5),
    "2d": (3, 5, 4, 7),
    "2d, one position": (4, 3, 1, 1),
    "2d, one image": (1, 4, 3, 3),
    "2d, whole vectors": (2, 3, 16, 16),
    "2d, many rows": (3, 17, 13, 11),
    "3d": (2, 3, 3, 2, 5),
    "6 dimensions": (2, 3, 2, 1, 2, 3),
}


def torch_batch_norm_relu(*args, residual=None, **kwargs):
    output = F.batch_norm(*args, **kwargs)
    return F.relu(output if residual is None else output + residual)


def operands(shape, dtype=torch.float64, device=None):
    """input, running_mean, running_var, weight, bias"""
    channels = shape[1]
    running_mean = tensor(channels, dtype=dtype, device=device, requires_grad=False)
    running_var = tensor(channels, dtype=dtype, device=device, requires_grad=False).abs() + 0.5
    return (
        tensor(*shape, dtype=dtype, device=device),
        running_mean,
        running_var,
        tensor(channels, dtype=dtype, device=device),
        tensor(channels, dtype=dtype, device=device),
    )


def with_own_statistics(function):
    """Running statistics of its own in each call, so that one function's update is not the other's input."""

    def call(input, running_mean, running_var, *args, **kwargs):
        return function(input, running_mean.clone(), running_var.clone(), *args, **kwargs)

    return call


def assert_pair_same_as_torch(*args, residual=None, **kwargs):
    """Both batch_norm and batch_norm_relu."""
    assert_same_as_torch(with_own_statistics(batch_norm), with_own_statistics(F.batch_norm), *args, **kwargs)
    ours, theirs = with_own_statistics(batch_norm_relu), with_own_statistics(torch_batch_norm_relu)
    assert_same_as_torch(ours, theirs, *args, residual=residual, **kwargs)


def test_signature_is_torchs():
    ours, theirs = inspect.signature(batch_norm).parameters, inspect.signature(F.batch_norm).parameters
    assert {name: p.default for name, p in ours.items()} == {name: p.default for name, p in theirs.items()}
    assert list(ours) == list(theirs)
    assert list(inspect.signature(batch_norm_relu).parameters) == [*theirs, "residual"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(backend, device, dtype, shape, training):
    residual = tensor(*shape, dtype=dtype, device=device)
    for each in (None, residual):
        assert_pair_same_as_torch(*operands(shape, dtype, device), training=training, eps=1e-3, residual=each)


@pytest.mark.parametrize("shape", [(130, 70, 3, 3), (700, 24, 8, 8)], ids=["two sums a pixel", "past the caches"])
def test_small_planes_of_more_channels_than_are_taken_together(shape):
    residual = tensor(*shape)
    with modes.backend("native"):
        for each in (None, residual):
            assert_pair_same_as_torch(*operands(shape), training=True, residual=each)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["of the input's dtype", "float32"])
def test_sixteen_bits(backend, device, dtype, parameters, training):
    input, *others = operands((4, 3, 5, 5), dtype, device)
    if parameters == "float32":
        others = [other.detach().float().requires_grad_(other.requires_grad) for other in others]
    assert_same_as_torch(
        with_own_statistics(batch_norm), with_own_statistics(F.batch_norm), input, *others, training=training
    )
    # torch rounds between the three operations and gates by the rounded sum: compare with float32, away from the gate.
    residual = torch.where(torch.rand(input.shape) < 0.5, 8.0, -8.0).to(input).requires_grad_()
    wide = [other.detach().float().requires_grad_(other.requires_grad) for other in (input, *others, residual)]
    narrow = [input, *others, residual]
    outputs = [
        function(*args[:-1], training=training, residual=args[-1])
        for function, args in ((batch_norm_relu, narrow), (torch_batch_norm_relu, wide))
    ]
    cotangent = torch.randn(input.shape).to(input)
    gradients = [
        torch.autograd.grad(output, [arg for arg in args if arg.requires_grad], cotangent.to(output.dtype))
        for output, args in zip(outputs, (narrow, wide), strict=True)
    ]
    for ours, theirs in zip([outputs[0], *gradients[0]], [outputs[1], *gradients[1]], strict=True):
        torch.testing.assert_close(ours.float(), theirs, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"weight": None, "bias": None},
        {"bias": None},
        {"weight": None},
        {"running_mean": None, "running_var": None, "training": True},
        {"momentum": 0.7, "training": True},
        {"momentum": 0.0, "training": True},
        {"momentum": 1, "training": True},
        {"eps": 0.5, "training": True},
        {"eps": 0.5},
        {"eps": 0.0},
    ],
    ids=str,
)
def test_options(backend, device, options):
    names = ("input", "running_mean", "running_var", "weight", "bias")
    ours = dict(zip(names, operands((5, 3, 4)), strict=True)) | options
    theirs = {
        name: value.detach().clone().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for name, value in ours.items()
    }
    for function, twin in ((batch_norm, F.batch_norm), (batch_norm_relu, torch_batch_norm_relu)):
        output, expected = function(**ours), twin(**theirs)
        assert_same(output, expected)
        inputs = [
            [arg for arg in args.values() if torch.is_tensor(arg) and arg.requires_grad] for args in (ours, theirs)
        ]
        cotangent = torch.randn_like(output)
        for gradient, other in zip(
            torch.autograd.grad(output, inputs[0], cotangent),
            torch.autograd.grad(expected, inputs[1], cotangent),
            strict=True,
        ):
            assert_same(gradient, other)
        if ours["running_mean"] is not None:
            assert_same(ours["running_mean"], theirs["running_mean"])
            assert_same(ours["running_var"], theirs["running_var"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics_move_as_torchs(backend, dtype):
    input, mean, var, *_ = operands((6, 3, 5, 5), dtype)
    expected_mean, expected_var = mean.clone(), var.clone()
    for momentum in (0.1, 0.3):
        batch_norm(input, mean, var, training=True, momentum=momentum)
        F.batch_norm(input, expected_mean, expected_var, training=True, momentum=momentum)
    assert_same(mean, expected_mean)
    assert_same(var, expected_var)
    batch_norm(input, mean, var)
    assert_same(mean, expected_mean)


def test_running_statistics_of_any_strides_are_updated(backend):
    input = tensor(6, 3, 5)
    mean, var = torch.zeros(3, 2, dtype=torch.float64)[:, 0], torch.ones(3, 2, dtype=torch.float64)[:, 1]
    expected_mean, expected_var = mean.clone(), var.clone()
    batch_norm(input, mean, var, training=True)
    F.batch_norm(input, expected_mean, expected_var, training=True)
    assert_same(mean, expected_mean)
    assert_same(var, expected_var)


def test_backward_of_evaluation_uses_the_statistics_of_its_forward(backend):
    input, mean, var, weight, bias = operands((6, 3, 5))
    expected = torch.autograd.grad(batch_norm(input, mean, var, weight, bias).square().sum(), (input, weight))
    output = batch_norm(input, mean, var, weight, bias)
    batch_norm(input, mean, var, weight, bias, training=True)
    for pair in zip(torch.autograd.grad(output.square().sum(), (input, weight)), expected, strict=True):
        assert_same(*pair)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(backend, layout, training):
    input, *others = operands((3, 5, 4, 6))
    input = LAYOUTS[layout](input.detach()).requires_grad_()
    residual = LAYOUTS[layout](torch.randn(3, 5, 4, 6, dtype=torch.float64)).requires_grad_()
    for each in (None, residual, residual.detach().contiguous().requires_grad_()):
        assert_pair_same_as_torch(input, *others, training=training, residual=each)
    output = batch_norm(input, *others, training=training)
    expected = F.batch_norm(input, *others, training=training)
    assert output.stride() == expected.stride()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        cotangent = torch.randn_like(output).contiguous(memory_format=memory_format)
        (gradient,) = torch.autograd.grad(output, input, cotangent, retain_graph=True)
        (other,) = torch.autograd.grad(expected, input, cotangent, retain_graph=True)
        assert_same(gradient, other)


@pytest.mark.parametrize("function", [batch_norm, batch_norm_relu])
def test_channels_last_stays_channels_last_in_both_directions(backend, function):
    for shape, memory_format in (((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 2), torch.channels_last_3d)):
        for training in (True, False):
            input, *others = operands(shape)
            input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
            output = function(input, *others, training=training)
            assert output.is_contiguous(memory_format=memory_format)
            (gradient,) = torch.autograd.grad(output, input, torch.randn(shape, dtype=torch.float64))
            # In evaluation the gradient is the incoming one, scaled, and keeps its format.
            assert gradient.is_contiguous(memory_format=memory_format) or not training


def test_expanded_gradient(backend):
    for training in (True, False):
        args = operands((3, 4, 5, 5))
        ours = batch_norm(*args, training=training).sum()
        theirs = F.batch_norm(*args, training=training).sum()
        inputs = [arg for arg in args if arg.requires_grad]
        for pair in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
            assert_same(*pair)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 3, 0), (0, 3), (4, 0, 5)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_inputs(backend, shape, training):
    input, mean, var, weight, bias = operands(shape)
    expected_mean, expected_var = mean.clone(), var.clone()
    residual = tensor(*shape)
    for each in (None, residual):
        output = batch_norm_relu(input, mean, var, weight, bias, training, residual=each)
        assert output.shape == shape
        for gradient in torch.autograd.grad(output.sum(), (input, weight, bias)):
            assert gradient.count_nonzero() == 0
    if shape[1] > 0:  # torch takes no channels only where nothing needs a gradient
        assert_same_as_torch(batch_norm, F.batch_norm, input, mean, var, weight, bias, training)
    assert_same(mean, expected_mean)
    assert_same(var, expected_var)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_nonfinite_values_spread_as_in_torch(backend, memory_format, value, training):
    input, mean, var, weight, bias = operands((3, 4, 5, 5))
    input = input.detach().contiguous(memory_format=memory_format)
    input[1, 2, 3, 4] = value
    input[0, 1, 0, 0] = value
    args = input.requires_grad_(), mean, var, weight, bias
    assert_pair_same_as_torch(*args, training=training)
    assert_pair_same_as_torch(*args, training=training, residual=tensor(3, 4, 5, 5))
    ours, theirs = ([torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)] for _ in range(2))
    batch_norm(input, *ours, training=True)
    F.batch_norm(input, *theirs, training=True)
    for pair in zip(ours, theirs, strict=True):
        assert_same(*pair)


def test_relu_gradient_is_zero_at_zero(backend):
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for bias, expected in ((-0.0, 0.0), (0.0, 0.0), (1.0, 1.0)):
        for residual in (None, torch.zeros(4, 3, 5, dtype=torch.float64)):
            shift = torch.full((3,), bias, dtype=torch.float64, requires_grad=True)
            output = batch_norm_relu(tensor(4, 3, 5), None, None, weight, shift, True, residual=residual)
            (gradient,) = torch.autograd.grad(output.sum(), shift)
            assert torch.equal(gradient, torch.full((3,), 20 * expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_recomputed_relu_mask_is_the_forwards_in_every_element(backend, memory_format, dtype):
    input, mean, var, *_ = operands((4, 6, 23, 23), dtype)
    input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
    for training in (True, False):
        xhat = batch_norm(input, mean.clone(), var.clone(), training=training).detach()
        bias = (
            -xhat[0, :, 0, 0].clone().requires_grad_()
        )  # an output that cancels exactly, or nearly so, in each channel
        output = batch_norm_relu(input, mean.clone(), var.clone(), None, bias, training=training)
        if training:
            used_mean, used_var = module.batch_norm_forward(input, *[None] * 5, 1e-5, False, backend=backend)[1:3]
        else:
            used_mean, used_var = (each.to(accumulation_dtype(dtype)) for each in (mean, var))
        mask = module.batch_norm_relu_mask(input, used_mean, used_var, None, bias, 1e-5, backend=backend)
        ones = torch.ones_like(output)
        passed = module.batch_norm_masked_grad(ones, mask, backend=backend)
        assert torch.equal(passed != 0, output > 0)
        (grad_bias,) = torch.autograd.grad(output, bias, ones, retain_graph=True)
        assert torch.equal(grad_bias.float(), (output > 0).sum((0, 2, 3)).to(dtype).float())
        _, grad_bias = torch.autograd.grad(output, (input, bias), ones)
        assert torch.equal(grad_bias.float(), (output > 0).sum((0, 2, 3)).to(dtype).float())


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_float32_is_no_less_accurate_than_torch(backend, memory_format, offset):
    input = (torch.randn(32, 4, 31, 31) + offset).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    cotangent = torch.randn(input.shape)
    wide = [arg.detach().double().requires_grad_() for arg in (input, weight, bias)]
    results = []
    for function, args in (
        (batch_norm, (input, weight, bias)),
        (F.batch_norm, (input, weight, bias)),
        (F.batch_norm, wide),
    ):
        output = function(args[0], None, None, *args[1:], training=True)
        results.append([output, *torch.autograd.grad(output, args, cotangent.to(output.dtype))])
    # The mean is kept in float32: what it is off by shifts the output and, times sum g, the weight's gradient.
    of_mean = offset * 2**-23 * max(1.0, cotangent.sum((0, 2, 3)).abs().max().item())
    for ours, theirs, exact in zip(*results, strict=True):
        error, torch_error = ((result - exact).abs().max() for result in (ours, theirs))
        assert error <= 1.5 * torch_error + 2e-6 * exact.abs().max() + of_mean


SUBSETS = [needs for needs in itertools.product([True, False], repeat=3) if any(needs)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_gradcheck_with_any_inputs_needing_gradients(backend, training, needs):
    input, mean, var, weight, bias = operands((3, 2, 2))
    for arg, need in zip((input, weight, bias), needs, strict=True):
        arg.requires_grad_(need)
    statistics = (None, None) if training else (mean, var)
    if needs == (False, False, True):  # linear: the gradient itself needs none
        function = lambda b: batch_norm(input, *statistics, weight, b, training)  # noqa: E731
        torch.autograd.gradcheck(function, bias, check_forward_ad=True, check_batched_grad=True)
    else:
        gradchecks(lambda x, w, b: batch_norm(x, *statistics, w, b, training), input, weight, bias)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_frozen_inputs_beside_bfloat16(backend, training, needs):
    input, mean, var, weight, bias = operands((4, 3, 5, 5), torch.float32)
    input = input.detach().bfloat16()
    for arg, need in zip((input, weight, bias), needs, strict=True):
        arg.requires_grad_(need)
    ours, theirs = with_own_statistics(batch_norm), with_own_statistics(F.batch_norm)
    assert_same_as_torch(ours, theirs, input, mean, var, weight, bias, training)
    output, expected = (each(input, mean, var, weight, bias, training) for each in (ours, theirs))
    inputs = [arg for arg in (weight, bias) if arg.requires_grad]
    for pair in zip(
        torch.autograd.grad(output.float().sin().sum(), inputs, allow_unused=True) if inputs else (),
        torch.autograd.grad(expected.float().sin().sum(), inputs, allow_unused=True) if inputs else (),
        strict=True,
    ):
        assert_same(*pair, rtol=2e-2, atol=2e-2)  # float32 sums of bfloat16 terms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5, 2), (3, 2, 2), (2, 2, 2, 2)])
def test_gradcheck_without_weight_in_any_layout(backend, training, shape):
    _, mean, var, *_ = operands(shape)
    statistics = (None, None) if training else (mean, var)
    inputs = [tensor(*shape), tensor(*reversed(shape)).detach().permute(*reversed(range(len(shape)))).requires_grad_()]
    if len(shape) == 4:
        inputs.append(tensor(*shape).detach().contiguous(memory_format=torch.channels_last).requires_grad_())
    for input in inputs:
        gradchecks(lambda x: batch_norm(x, *statistics, training=training), input)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "needs",
    [
        (True, True, True, True),
        (True, False, False, False),
        (False, True, False, False),
        (False, False, True, True),
        (True, True, False, True),
    ],
    ids=str,
)
def test_gradcheck_of_the_fused_form(backend, training, needs):
    input, mean, var, weight, bias = operands((2, 2, 3))
    residual = tensor(2, 2, 3)
    for arg, need in zip((input, residual, weight, bias), needs, strict=True):
        arg.requires_grad_(need)
    statistics = (None, None) if training else (mean, var)

    def function(x, r, w, b):
        return batch_norm_relu(x, *statistics, w, b, training, residual=r)

    if needs == (False, True, False, False):  # piecewise linear: the gradient itself needs none
        torch.autograd.gradcheck(lambda r: function(input, r, weight, bias), residual, check_forward_ad=True)
        return
    gradchecks(function, input, residual, weight, bias)
    gradchecks(function, input, None, weight, bias)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_the_fused_form_channels_last(backend, training):
    input, mean, var, weight, bias = operands((2, 2, 2, 2))
    statistics = (None, None) if training else (mean, var)
    channels_last = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for residual in (None, tensor(2, 2, 2, 2)):
        gradchecks(
            lambda x, r, w, b: batch_norm_relu(x, *statistics, w, b, training, residual=r),
            channels_last,
            residual,
            weight,
            bias,
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_residual", [True, False])
def test_second_order_is_torchs(backend, dtype, training, with_residual):
    input, mean, var, weight, bias = operands((5, 3, 4, 4), dtype)
    residual = tensor(5, 3, 4, 4, dtype=dtype) if with_residual else None
    cotangent = torch.randn_like(input).requires_grad_()
    inputs = [input, weight, bias, *([residual] if with_residual else [])]
    second = [torch.randn_like(each) for each in inputs]

    def orders(function, **options):
        output = function(input, mean.clone(), var.clone(), weight, bias, training, **options)
        first = torch.autograd.grad(output, inputs, cotangent, create_graph=True)
        differentiated = [each for each in first if each.requires_grad]
        by = [cotangent, input, weight]
        cotangents = [s for s, each in zip(second, first, strict=True) if each.requires_grad]
        return [*first, *torch.autograd.grad(differentiated, by, cotangents, allow_unused=True, materialize_grads=True)]

    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    pairs = [
        (orders(batch_norm_relu, residual=residual), orders(torch_batch_norm_relu, residual=residual)),
    ]
    if not with_residual:
        pairs.append((orders(batch_norm), orders(F.batch_norm)))
    for ours, theirs in pairs:
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair, **tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_third_order(backend, training):
    input, mean, var, weight, bias = operands((3, 2, 2))
    statistics = (None, None) if training else (mean, var)

    def penalty(x, w, b):
        output = batch_norm(x, *statistics, w, b, training)
        gradients = torch.autograd.grad(output.pow(3).sum(), (x, w), create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)

    torch.autograd.gradgradcheck(penalty, (input, weight, bias))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_vmap_is_torchs(backend, memory_format, training):
    batch, shape = 4, (3, 2, 3, 5)
    input = torch.randn(batch, *shape, dtype=torch.float64)
    input = torch.stack([each.contiguous(memory_format=memory_format) for each in input])
    residual, cotangent = torch.randn_like(input), torch.randn(shape, dtype=torch.float64)
    mean, weight, bias = torch.randn(3, batch, 2, dtype=torch.float64)
    var = torch.rand(batch, 2, dtype=torch.float64) + 0.5

    def gradients(function):
        def loss(x, m, v, w, b, r):
            options = {} if r is None else {"residual": r}
            return (function(x, m, v, w, b, training, **options) * cotangent).sum()

        return torch.func.grad(loss, argnums=(0, 3, 4))

    cases = [(0, 0, 0, 0, 0, 0), (0, 0, 0, None, None, 0)] + ([] if training else [(0, None, None, 0, None, None)])
    for in_dims in cases:
        args = [
            arg if dim == 0 else arg[0]
            for arg, dim in zip((input, mean, var, weight, bias, residual), in_dims, strict=True)
        ]
        for ours, theirs in ((batch_norm, F.batch_norm), (batch_norm_relu, torch_batch_norm_relu)):
            here, there = [[arg.clone() for arg in args] for _ in range(2)]
            if ours is batch_norm:
                here[5] = there[5] = None
            dims = in_dims if here[5] is not None else (*in_dims[:5], None)
            for pair in zip(
                torch.func.vmap(gradients(ours), dims)(*here),
                torch.func.vmap(gradients(theirs), dims)(*there),
                strict=True,
            ):
                assert_same(*pair)
            assert_same(here[1], there[1])
            assert_same(here[2], there[2])


def test_vmap_over_inputs_alone_refuses_to_update_shared_statistics(backend):
    input, mean, var = torch.randn(4, 3, 2, 5), torch.zeros(2), torch.ones(2)
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(RuntimeError):
            torch.func.vmap(lambda x, f=function: f(x, mean, var, training=True))(input)


@pytest.mark.parametrize("training", [True, False])
def test_func_grad_moves_the_running_statistics_and_hessian_is_torchs(backend, training):
    input, mean, var, weight, bias = (arg.detach() for arg in operands((3, 2, 2)))
    for function, other in ((batch_norm, F.batch_norm), (batch_norm_relu, torch_batch_norm_relu)):
        results = []
        for each in (function, other):
            statistics = mean.clone(), var.clone()

            def loss(x, w, each=each, statistics=statistics):
                return each(x, *statistics, w, bias, training).pow(3).sum()

            gradient = torch.func.grad(loss)(input, weight)
            results.append((gradient, *statistics))
        for pair in zip(*results, strict=True):
            assert_same(*pair)

        def without_update(x, w, each):
            statistics = (None, None) if training else (mean, var)
            return each(x, *statistics, w, bias, training).pow(3).sum()

        ours = torch.func.hessian(lambda x, w: without_update(x, w, function), argnums=(0, 1))(input, weight)  # noqa: B023
        theirs = torch.autograd.functional.hessian(lambda x, w: without_update(x, w, other), (input, weight))  # noqa: B023
        for row, expected in zip(ours, theirs, strict=True):
            for pair in zip(row, expected, strict=True):
                assert_same(*pair)


KERNEL_CASES = [
    (shape, memory_format)
    for shape, memory_format in (
        ((4, 3), torch.contiguous_format),
        ((2, 3, 5), torch.contiguous_format),
        ((2, 3, 2, 4), torch.channels_last),
    )
]


@pytest.mark.parametrize("namespace", ["native", "python"])
@pytest.mark.parametrize(("shape", "memory_format"), KERNEL_CASES, ids=str)
def test_opcheck(namespace, shape, memory_format):
    input, mean, var, weight, bias = (arg.detach().float() for arg in operands(shape))
    input = input.contiguous(memory_format=memory_format)
    residual = torch.randn_like(input)
    *_, mask = module.batch_norm_forward(input, residual, None, None, None, None, 1e-5, True, backend=namespace)
    calls = {
        module.batch_norm_forward: [
            (input, None, None, None, weight, bias, 1e-5, False),
            (input, residual, mean, var, None, bias, 1e-5, True),
        ],
        module.batch_norm_relu_mask: [(input, mean, var, weight, None, 1e-5)],
        module.batch_norm_masked_grad: [(residual.contiguous(), mask)],
        module.batch_norm_sums: [(residual, input, mean, var, 1e-5), (residual, input, None, None, 0.0)],
        module.batch_norm_backward: [(residual, input, mean, var, weight, bias, 1e-5, True)],
        module.channel_scale: [(input, weight)],
        module.batch_norm_update: [(mean.clone(), var.clone(), mean, var, 4, 0.1)],
    }
    for kernel, cases in calls.items():
        for args in cases:
            utils = ("test_schema", "test_faketensor", "test_autograd_registration")
            torch.library.opcheck(getattr(kernel, namespace), args, test_utils=utils)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(8, 24, 33, 31), (130, 70, 5, 5)], ids=["planes", "small planes"])
def test_native_bits_do_not_depend_on_threads_or_runs(shape, memory_format, dtype):
    input, mean, var, weight, bias = operands(shape, dtype)
    input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
    residual = tensor(*input.shape, dtype=dtype).detach().contiguous(memory_format=memory_format).requires_grad_()
    cotangent = torch.randn_like(input)
    threads = torch.get_num_threads()

    def run(count, training, with_residual):
        torch.set_num_threads(count)
        try:
            statistics = mean.clone(), var.clone()
            options = {"residual": residual} if with_residual else {}
            output = batch_norm_relu(input, *statistics, weight, bias, training, **options)
            inputs = [input, weight, bias, *options.values()]
            return [output, *statistics, *torch.autograd.grad(output, inputs, cotangent)]
        finally:
            torch.set_num_threads(threads)

    with modes.backend("native"):
        for training, with_residual in itertools.product([True, False], repeat=2):
            first = run(1, training, with_residual)
            for count in (1, 2):
                for pair in zip(first, run(count, training, with_residual), strict=True):
                    assert torch.equal(*pair)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_kept_bytes(backend, memory_format):
    input, mean, var, weight, bias = operands((4, 6, 16, 16), torch.float32)
    input = input.detach().contiguous(memory_format=memory_format).requires_grad_()
    residual = (
        tensor(*input.shape, dtype=torch.float32).detach().contiguous(memory_format=memory_format).requires_grad_()
    )
    element, image = 4, 4 * input.numel()
    channel = 6 * element
    frozen = input.detach(), weight.detach(), bias.detach()

    def kept(x, w, b, training, function=batch_norm, **options):
        return kept_bytes(lambda: function(x, mean, var, w, b, training, **options))

    for training in (True, False):
        assert kept(input, weight, bias, training) == image + 3 * channel
        assert kept(frozen[0], weight, bias, training) == image + 2 * channel
        assert kept(frozen[0], frozen[1], bias, training) == 2 * channel
        assert kept(input, weight, bias, training, batch_norm_relu) == image + 4 * channel
        fused = kept(input, weight, bias, training, batch_norm_relu, residual=residual)
        assert fused == image + input.numel() // 8 + 3 * channel
        only_residual = kept(*frozen, training, batch_norm_relu, residual=residual)
        assert only_residual == input.numel() // 8 + 2 * channel
    assert kept(input, *frozen[1:], training=False) == 3 * channel
    composed = kept(input, weight, bias, True, torch_batch_norm_relu, residual=residual)
    assert composed > 2 * image


def test_frozen_parameters_cost_no_sums(backend):
    input, mean, var, weight, bias = operands((4, 3, 5))
    output = batch_norm(input, mean, var, weight.detach(), bias.detach())
    with torch.profiler.profile() as profile:
        output.sum().backward()
    assert not any("batch_norm_sums" in event.key for event in profile.key_averages())
    assert input.grad is not None


WRONG = {
    "running_mean of another size": ((tensor(4, 3, 5), torch.zeros(4).double(), torch.ones(3).double()), {}),
    "running_var of another size": ((tensor(4, 3, 5), torch.zeros(3).double(), torch.ones(4).double()), {}),
    "running_mean of two dimensions": ((tensor(4, 3, 5), torch.zeros(3, 1).double(), torch.ones(3).double()), {}),
    "weight of another size": ((tensor(4, 3, 5), *torch.ones(2, 3).double(), torch.ones(4).double()), {}),
    "bias of another size": ((tensor(4, 3, 5), *torch.ones(2, 3).double(), None, torch.ones(4).double()), {}),
    "one value per channel": ((tensor(1, 3, 1), None, None), {"training": True}),
    "one value per channel, a matrix": ((tensor(1, 3), None, None), {"training": True}),
    "one value per channel before anything else": ((tensor(1, 3), 1.0, None), {"training": 1, "eps": "a"}),
    "eps before the other options": ((tensor(4, 3), None, None), {"training": 1, "eps": -1.0, "momentum": "a"}),
    "one dimension and nothing else": ((tensor(3), None, None), {"training": True}),
    "one dimension and a weight": ((tensor(3), None, None, torch.ones(3).double()), {"training": True}),
    "one dimension": ((tensor(3), *torch.ones(2, 3).double()), {}),
    "one dimension in training": ((tensor(3), *torch.ones(2, 3).double()), {"training": True}),
    "no statistics in evaluation": ((tensor(4, 3, 5), None, None), {}),
    "no running_var in evaluation": ((tensor(4, 3, 5), torch.ones(3).double(), None), {}),
    "no running_mean in training": ((tensor(4, 3, 5), None, torch.ones(3).double()), {"training": True}),
    "no running_var in training": ((tensor(4, 3, 5), torch.ones(3).double(), None), {"training": True}),
    "weight on another device": (
        (tensor(4, 3, 5), *torch.ones(2, 3).double(), torch.ones(3, dtype=torch.float64, device="meta")),
        {},
    ),
    "integers": ((torch.ones(4, 3, 5, dtype=torch.int64), None, None), {"training": True}),
    "booleans": ((torch.ones(4, 3, 5, dtype=torch.bool), *torch.ones(2, 3)), {}),
    "complex": ((torch.ones(4, 3, 5, dtype=torch.complex64), *torch.ones(2, 3)), {}),
    "a list": (([1.0, 2.0], *torch.ones(2, 3)), {}),
    "a list for running_mean": ((tensor(4, 3, 5), [0.0] * 3, torch.ones(3).double()), {}),
    "a number for weight": ((tensor(4, 3, 5), *torch.ones(2, 3).double(), 2.0), {}),
    "float64 weight for float32": ((torch.ones(4, 3, 5), *torch.ones(2, 3), torch.ones(3).double()), {}),
    "float32 statistics for float64": ((tensor(4, 3, 5), *torch.ones(2, 3)), {}),
    "bfloat16 weight for float32": ((torch.ones(4, 3, 5), *torch.ones(2, 3), torch.ones(3).bfloat16()), {}),
    "weight and statistics of two dtypes": (
        (torch.ones(4, 3, 5).bfloat16(), *torch.ones(2, 3), torch.ones(3).bfloat16()),
        {},
    ),
    "weight and bias of two dtypes": (
        (torch.ones(4, 3, 5).bfloat16(), None, None, torch.ones(3).bfloat16(), torch.ones(3)),
        {"training": True},
    ),
    "running_mean that requires a gradient": ((tensor(4, 3, 5), tensor(3), torch.ones(3).double()), {}),
    "negative eps": ((tensor(4, 3, 5), *torch.ones(2, 3).double()), {"eps": -1e-5}),
    "zero eps in training": ((tensor(4, 3, 5), *torch.ones(2, 3).double()), {"training": True, "eps": 0.0}),
    "eps that is no number": ((tensor(4, 3, 5), *torch.ones(2, 3).double()), {"eps": "small"}),
    "momentum None": ((tensor(4, 3, 5), *torch.ones(2, 3).double()), {"momentum": None, "training": True}),
    "momentum that is no number": ((tensor(4, 3, 5), *torch.ones(2, 3).double()), {"momentum": "fast"}),
    "training that is no bool": ((tensor(4, 3, 5), *torch.ones(2, 3).double()), {"training": 1}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls_raise_as_in_torch(case):
    args, kwargs = WRONG[case]
    assert_wrong_like_torch(batch_norm, F.batch_norm, *args, **kwargs)
    with pytest.raises(Exception, match="batch_norm_relu"):
        batch_norm_relu(*args, **kwargs)


@pytest.mark.parametrize(
    ("residual", "error"),
    [
        (torch.ones(4, 3, 4).double(), RuntimeError),
        (torch.ones(3, 5).double(), RuntimeError),
        (torch.ones(4, 3, 5), RuntimeError),
        (torch.ones(4, 3, 5, dtype=torch.float64, device="meta"), RuntimeError),
        (1.0, TypeError),
    ],
    ids=["shape", "broadcast", "dtype", "device", "no tensor"],
)
def test_wrong_residuals(residual, error):
    with pytest.raises(error, match="batch_norm_relu: residual"):
        batch_norm_relu(tensor(4, 3, 5), None, None, training=True, residual=residual)


def test_weight_of_any_shape_with_a_value_a_channel_is_taken_as_in_torch(backend):
    input, mean, var, weight, bias = (arg.detach() for arg in operands((4, 3, 5)))
    weight, bias = weight.reshape(3, 1), bias.reshape(1, 3)
    assert_same_as_torch(batch_norm, F.batch_norm, input, mean, var, weight, bias)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(batch_norm(input, mean, var, weight, bias).sum(), weight)
    assert gradient.shape == (3, 1)


def test_a_black_border_does_not_cost_the_variance_its_digits():
    """The shift of the sums is a mean of values from all over the channel, not of the first ones."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input = 1000 + torch.randn(8, 2, 32, 32)
        input[0].flatten(1)[:, :64] = 0
        input = input.to(memory_format=memory_format)
        running_mean, running_var = torch.zeros(2), torch.ones(2)
        batch_norm(input, running_mean, running_var, training=True, momentum=1.0)
        exact = input.double().var((0, 2, 3))
        torch.testing.assert_close(running_var.double(), exact, rtol=1e-6, atol=0)
