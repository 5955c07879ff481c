"""Inside torch.autocast every operation computes in the dtype that torch's computes in, and so do its gradients."""

import copy
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F

import manual_ops
from manual_ops import autocast, functional, kernel
from manual_ops.registry import OPERATIONS
from models import DenseNet, Functional, ResNet
from support import TOLERANCE, assert_same, device_type, tensor

LOWER = [torch.bfloat16, torch.float16]


def _dtypes(low):
    """What the operands of a call may be, from the first on."""
    f32, f64 = torch.float32, torch.float64
    return {
        "float32": [f32],
        "lower": [low],
        "float32, then lower": [f32, *[low] * 9],
        "lower, then float32": [low, *[f32] * 9],
        "float64": [f64],
        "float64, then float32": [f64, *[f32] * 9],
        "float32, then float64": [f32, *[f64] * 9],
        "float64, then lower": [f64, *[low] * 9],
    }


def _called(function, sample, dtypes, low):
    """The output and the gradients of a call under autocast, or the type of the error."""
    dtypes = cycle(dtypes)

    def moved(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(next(dtypes), copy=True).requires_grad_(value.requires_grad)

    args = [moved(value) for value in sample.args]
    kwargs = {name: moved(value) for name, value in sample.kwargs.items()}
    inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and value.requires_grad]
    try:
        with torch.autocast(device_type(), dtype=low):
            output = function(*args, **kwargs)
    except Exception as error:
        return type(error)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output.dtype)
    return output.detach(), *torch.autograd.grad(output, inputs, cotangent)


def _tolerance(case, low):
    if case == "float64":
        return TOLERANCE[torch.float64]
    if "float64" in case and "lower" not in case:
        return TOLERANCE[torch.float32]
    # A float32 gradient of a 16-bit product has 16-bit accuracy; torch rounds partial sums to float16 where it
    # transposes a convolution.
    return TOLERANCE[low] if low == torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-2}


@pytest.mark.parametrize("low", LOWER)
@pytest.mark.parametrize("name", OPERATIONS)
def test_dtypes_and_values_are_torchs(backend, name, low):
    operation = OPERATIONS[name]
    for case, dtypes in _dtypes(low).items():
        for sample in operation.samples()[: None if backend == "native" else 1]:
            expected = _called(operation.reference, sample, dtypes, low)
            got = _called(operation.function, sample, dtypes, low)
            where = f"{name}, {sample.label}, {case}"
            if isinstance(expected, type):
                assert got is expected, where
                continue
            assert not isinstance(got, type), f"{where}: {got}"
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.dtype == theirs.dtype, where
                assert_same(ours, theirs, **_tolerance(case, low))


@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_switched_off_inside_changes_nothing(name):
    operation = OPERATIONS[name]
    sample = operation.samples()[0].to(torch.float32)
    with torch.autocast(device_type(), dtype=torch.bfloat16), torch.autocast(device_type(), enabled=False):
        inside = operation.function(*sample.args, **sample.kwargs)
    outside = operation.function(*sample.args, **sample.kwargs)
    assert_same(inside, outside, rtol=0, atol=0)


@pytest.mark.cpu("needs tensors on another device than the one autocast is for")
def test_a_device_without_autocast_is_left_alone():
    x, w = tensor(2, 3, 5, dtype=torch.float32), tensor(4, 3, 2, dtype=torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        assert functional.conv1d(x, w).dtype == torch.float32


def test_softmax_with_a_dtype_keeps_it():
    x = tensor(2, 3, dtype=torch.bfloat16)
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        assert functional.softmax(x, 1).dtype == F.softmax(x, 1).dtype == torch.bfloat16
        assert functional.softmax(x, 1, dtype=torch.float32).dtype == torch.float32


@pytest.mark.cpu("torch has no max pooling of integers on CUDA")
def test_pooling_of_integers_is_left_alone():
    x = torch.arange(64).reshape(1, 1, 4, 4, 4)
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        assert functional.max_pool3d(x, 2).dtype == F.max_pool3d(x, 2).dtype == torch.int64


def test_cuda_policies_are_the_documented_ones():
    """https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast ..."; all others are left alone."""
    policies = autocast.POLICIES["cuda"]
    lower = {f"{kind}{axes}d" for kind in ("conv", "conv_transpose") for axes in (1, 2, 3)} | {"linear"}
    float32 = {"softmax", "log_softmax", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits"}
    assert {name for name, policy in policies.items() if policy is autocast._lower} == lower
    # cross_entropy is log_softmax and nll_loss.
    assert {name for name, policy in policies.items() if policy is autocast._float32} == float32 | {"cross_entropy"}
    assert set(policies) - lower - float32 == {"cross_entropy", "batch_norm_relu"}


@pytest.mark.parametrize("device_type", autocast.POLICIES)
def test_every_policy_is_of_an_operation(device_type):
    assert set(autocast.POLICIES[device_type]) <= set(OPERATIONS)


@pytest.mark.parametrize("name", ["linear", "conv2d", "batch_norm", "cross_entropy"])
def test_a_backward_inside_autocast_is_the_backward_outside(backend, name):
    operation = OPERATIONS[name]
    sample = operation.samples()[0].to(torch.float32)
    inputs = [value for value in sample.args if isinstance(value, torch.Tensor) and value.requires_grad]
    output = operation.function(*sample.args, **sample.kwargs)
    cotangent = torch.randn_like(output)
    expected = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        got = torch.autograd.grad(output, inputs, cotangent)
    for ours, theirs in zip(got, expected, strict=True):
        assert_same(ours, theirs, rtol=0, atol=0)


def test_kernels_compute_in_the_dtype_they_are_given():
    """Autocast would turn the matrix product of a Python body to bfloat16."""
    x, w = tensor(3, 4, dtype=torch.float32, requires_grad=False), tensor(2, 4, dtype=torch.float32)
    linear = kernel.KERNELS["linear"]
    outside = linear(x, w, None, backend="python")
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        assert_same(linear(x, w, None, backend="python"), outside, rtol=0, atol=0)


@pytest.mark.parametrize("level", ["grad", "vmap", "jvp"])
def test_transforms_under_autocast(backend, level):
    x, w = tensor(2, 3, requires_grad=False).float(), tensor(4, 3, requires_grad=False).float()

    def loss(functions):
        return lambda w: functions.mse_loss(functions.linear(x, w), torch.ones(2, 4))

    def run(functions):
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            if level == "grad":
                return torch.func.grad(loss(functions))(w)
            if level == "vmap":
                return torch.func.vmap(torch.func.grad(loss(functions)))(torch.stack([w, 2 * w]))
            return torch.func.jvp(loss(functions), (w,), (torch.ones_like(w),))[1]

    assert_same(run(functional), run(F), **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_without_a_graph_break(compiler):
    x, w = tensor(2, 3, 8, 8, dtype=torch.float32), tensor(4, 3, 3, 3, dtype=torch.float32)

    def model(x, w):
        return functional.max_pool2d(functional.conv2d(x, w), 2)

    device = device_type()

    def inside(x, w):
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(x, w)

    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert compiled(x, w).dtype == torch.float32
    with torch.autocast(device, dtype=torch.bfloat16):
        around = compiled(x, w)
    for output in (around, torch.compile(inside, fullgraph=True, backend=compiler)(x, w)):
        expected = inside(x, w)
        assert_same(output, expected, rtol=0, atol=0)
        cotangent = torch.randn_like(output)
        gradients = torch.autograd.grad(output, (x, w), cotangent)
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, (x, w), cotangent), strict=True):
            assert_same(ours, theirs, rtol=0, atol=0)


def _scaled_steps(model, batches, low, scale=1024.0):
    """SGD as GradScaler has it: the loss is scaled, the gradients are unscaled, a step with an overflow is left out."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for input, target in batches:
        optimizer.zero_grad()
        with torch.autocast(device_type(), dtype=low):
            loss = F.cross_entropy(model(input), target)
        (loss * scale).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient.dtype == torch.float32 for gradient in gradients)
        for gradient in gradients:
            gradient.div_(scale)
        assert all(gradient.isfinite().all() for gradient in gradients)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), [gradient.clone() for gradient in gradients]


@pytest.mark.parametrize("low", LOWER)
@pytest.mark.parametrize("model_type", [ResNet, DenseNet])
def test_a_converted_model_trains_under_autocast(backend, model_type, low):
    theirs = model_type()
    ours = manual_ops.convert(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    input, target = torch.randn(4, 3, 16, 14), torch.arange(4)
    _, gradients = _scaled_steps(ours, [(input, target)], low)
    _, expected = _scaled_steps(theirs, [(input, target)], low)
    F.cross_entropy(exact(input.double()), target).backward()
    # Roundings of 16 bits differ by the order of sums; what counts is how far each is from the exact gradient.
    references = [parameter.grad for parameter in exact.parameters()]
    errors, torch_errors = _relative_error(gradients, references), _relative_error(expected, references)
    assert errors <= 1.25 * torch_errors + torch.finfo(low).eps, (errors, torch_errors)
    losses, _ = _scaled_steps(ours, [(input, target)] * 2, low)
    assert losses[-1] < losses[0]


def _relative_error(gradients, references):
    difference = sum(float((g.double() - r).square().sum()) for g, r in zip(gradients, references, strict=True))
    return (difference / sum(float(r.square().sum()) for r in references)) ** 0.5


def test_grad_scaler(backend):
    model = manual_ops.convert(ResNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device_type(), init_scale=256.0)
    input, target = torch.randn(4, 3, 16, 14), torch.arange(4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device_type(), dtype=torch.float16):
            loss = F.cross_entropy(model(input), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("low", LOWER)
def test_intercepted_calls_follow_the_policy(backend, low):
    model = Functional()
    input = torch.randn(2, 3, 16, 16)
    with torch.autocast(device_type(), dtype=low):
        expected = model(input)
        with manual_ops.intercept():
            output = model(input)
    assert_same(output.detach(), expected.detach(), **TOLERANCE[low])
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_a_residual_of_another_dtype_is_promoted(backend):
    """Torch's `+` promotes a bfloat16 sum with a float32 shortcut; the fused layer does as much, under autocast."""
    x, residual = tensor(4, 3, 5, dtype=torch.bfloat16), tensor(4, 3, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="residual must have the dtype of input"):
        functional.batch_norm_relu(x, None, None, training=True, residual=residual)
    with torch.autocast(device_type(), dtype=torch.bfloat16):
        output = functional.batch_norm_relu(x, None, None, training=True, residual=residual)
    assert output.dtype == torch.float32
    assert [gradient.dtype for gradient in torch.autograd.grad(output.sum(), (x, residual))] == [x.dtype, torch.float32]
