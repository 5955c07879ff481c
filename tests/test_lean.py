"""Lean mode: the same bits from half the memory, and no interference with anything else that saves tensors."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import manual_ops
from manual_ops import modes, recipes
from manual_ops.compare import alive_bytes
from models import MODELS, DenseNet, MobileNet, ResNet
from support import device_type


def converted(make, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return manual_ops.convert(make().to(dtype))


def images(*size, dtype=torch.float32):
    return torch.randn(*(size or (4, 3, 32, 32)), dtype=dtype)


def gradients(model, x, **options):
    return torch.autograd.grad(model(x).square().sum(), list(model.parameters()), **options)


class Sums(nn.Module):
    """Residual blocks before and after batch norm, sums written in every way, a product, an activation of each kind."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(6))
        self.stem = nn.Conv2d(3, 6, 1)
        self.activations = nn.ModuleList(
            [nn.ReLU(), nn.ReLU6(inplace=True), nn.SiLU(), nn.SiLU(inplace=True), nn.Sigmoid(), nn.LeakyReLU(0.1)]
        )
        self.squeeze = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        for number, (conv, norm, activation) in enumerate(zip(self.convs, self.norms, self.activations, strict=True)):
            y = norm(conv(x))
            if number == 1:
                y += x
            y = activation(y)
            scale = torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(y, 1)))
            if number == 0:
                x = x + y * scale
            elif number == 1:
                x = y
            elif number == 2:
                x = torch.add(x, scale * y)
            elif number == 3:
                x = y.add_(x)
            elif number == 4:
                x = torch.cat([x, y, x.mul(2)], 1)[:, ::3]
            else:
                x = torch.cat([norm(x)[:, :3], y[:, 3:]], dim=1)
        return x.mean((2, 3))


class Fused(nn.Module):
    """The fused layers, with a residual and without."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6, 6))
        self.norms = nn.ModuleList(manual_ops.nn.BatchNormReLU2d(6) for _ in range(4))

    def forward(self, x):
        residual = None
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = residual = norm(conv(x), residual)
        return x.mean((2, 3))


class Linears(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 32 * 32, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 20), nn.GELU()
        )

    def forward(self, x):
        return F.linear(self.layers(x), self.layers[4].weight)


EVERY_MODEL = [*MODELS, Sums, Fused, Linears]


@pytest.mark.parametrize("make", EVERY_MODEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_have_the_same_bits(make, dtype, training, backend):
    x = images(dtype=dtype)
    model = converted(make, dtype).train(training)
    expected = gradients(copy.deepcopy(model), x)
    with manual_ops.lean():
        result = gradients(model, x)
    assert all(map(torch.equal, result, expected))


@pytest.mark.parametrize(
    ("make", "most"), [(ResNet, 0.62), (MobileNet, 0.62), (DenseNet, 1.0), (Sums, 0.8), (Fused, 0.75)]
)
def test_less_is_kept(make, most):
    x = images()
    model = converted(make)
    _, kept = alive_bytes(lambda: model(x))
    with manual_ops.lean():
        _, kept_lean = alive_bytes(lambda: model(x))
    assert kept_lean <= most * kept


def test_nothing_stays_behind():
    x, model = images(), converted(ResNet)

    def step():
        with manual_ops.lean():
            loss = model(x).square().sum()
        torch.autograd.grad(loss, list(model.parameters()))
        return loss.detach()

    assert alive_bytes(step)[1] <= 4096  # the loss, and the running statistics' counts


def test_a_graph_that_is_walked_twice():
    x, model = images(), converted(ResNet)
    expected = gradients(copy.deepcopy(model), x)
    with manual_ops.lean():
        loss = model(x).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    some = torch.autograd.grad(loss, [model.fc.weight, model.layer2[1].conv2.weight], retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()))
    assert all(map(torch.equal, first, expected)) and all(map(torch.equal, second, expected))
    assert torch.equal(some[0], expected[-2])


@pytest.mark.parametrize("make", [ResNet, Sums, Fused])
def test_second_derivatives(make, backend):
    x, model = images(2, 3, 16, 16, dtype=torch.float64), converted(make, torch.float64)
    parameters = list(model.parameters())

    def second(model):
        first = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.sum() for gradient in first), parameters, allow_unused=True)

    expected = second(model)
    with manual_ops.lean():
        result = second(model)
    for ours, theirs in zip(result, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def block(conv, norm, x):
    return F.conv2d(manual_ops.functional.relu(norm(x)), conv)


def test_a_source_that_was_changed_in_place_is_noticed():
    norm = manual_ops.nn.BatchNorm2d(3)
    conv, x = torch.randn(4, 3, 3, 3, requires_grad=True), images().requires_grad_() * 1
    with manual_ops.lean():
        y = manual_ops.functional.conv2d(norm(x), conv)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match=r"lean: .* changed in place"):
        torch.autograd.grad(y.sum(), conv)


def test_an_activation_that_is_changed_afterwards_is_kept_as_it_is():
    norm, conv, x = manual_ops.nn.BatchNorm2d(3), torch.randn(4, 3, 3, 3, requires_grad=True), images()

    def run():
        y = norm(x.clone().requires_grad_() * 1)
        y.mul_(3)  # what is in place and unknown ends the recipe
        return torch.autograd.grad(manual_ops.functional.conv2d(y, conv).sum(), conv)[0]

    expected = run()
    with manual_ops.lean():
        assert torch.equal(run(), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside(reentrant):
    model = converted(ResNet)
    start = images()

    def run(model):
        x = start.clone().requires_grad_()
        h = checkpoint(model.layer1, model.stem(x), use_reentrant=reentrant)
        model.layer2(h).square().sum().backward()
        return x.grad

    expected = run(copy.deepcopy(model))
    with manual_ops.lean():
        assert torch.equal(run(model), expected)


def test_it_stands_aside_for_other_hooks():
    x, model = images(), converted(ResNet)
    packed = []
    expected = gradients(copy.deepcopy(model), x)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)
    with manual_ops.lean(), hooks:
        result = gradients(model, x)
    assert packed and all(map(torch.equal, result, expected))


def test_it_stands_aside_for_transforms_and_compilation():
    x, model = images(2, 3, 16, 16), converted(ResNet).eval()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    with manual_ops.lean():
        result = torch.func.grad(loss)(parameters)
        assert all(torch.equal(result[name], expected[name]) for name in expected)
        torch.compile(model, backend="aot_eager")(x).sum().backward()


def test_autocast_keeps_the_copies_by_recipe_too():
    x, model = images(), converted(ResNet)

    def run(model):
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            return model(x)

    expected, kept = alive_bytes(lambda: run(copy.deepcopy(model)))
    with manual_ops.lean():
        output, kept_lean = alive_bytes(lambda: run(model))
    # The casts of the weights, which are as large as the activations in so small a model, are kept either way.
    assert torch.equal(output, expected) and kept_lean < 0.75 * kept


def test_frozen_weights_need_no_recipe():
    x, model = images(), converted(ResNet)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("fc" in name or "layer2.1" in name)

    def run(model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(model(x).sum(), trained)

    expected = run(copy.deepcopy(model))
    with manual_ops.lean():
        assert all(map(torch.equal, run(model), expected))


def test_two_threads_train_two_models():
    x = images()
    expected = [gradients(converted(ResNet, seed=seed), x) for seed in (1, 2)]
    results, models = {}, [converted(ResNet, seed=seed) for seed in (1, 2)]

    def train(number):
        with manual_ops.lean():
            results[number] = gradients(models[number], x)

    threads = [threading.Thread(target=train, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert all(map(torch.equal, results[number], expected[number]))


def test_the_mode_ends_with_its_block():
    with manual_ops.lean():
        assert modes.is_lean() and recipes.active()
        with torch.no_grad():
            assert not recipes.active()
    assert not modes.is_lean()
    with pytest.raises(ZeroDivisionError), manual_ops.lean():
        1 / 0  # noqa: B018
    assert not modes.is_lean()


class TestConvert:
    def test_a_lean_model_is_lean_when_it_is_called(self):
        x, model = images(), converted(ResNet)
        expected, kept = alive_bytes(lambda: model(x))
        lean = manual_ops.convert(converted(ResNet), lean=True)
        output, kept_lean = alive_bytes(lambda: lean(x))
        assert torch.equal(output, expected) and kept_lean < 0.62 * kept
        assert not modes.is_lean()

    def test_it_can_be_copied_pickled_and_taken_back(self):
        x, lean = images(), manual_ops.convert(ResNet(), lean=True)
        for model in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
            kept = alive_bytes(lambda model=model: model(x))[1]
            manual_ops.convert(model, lean=False)
            assert kept < 0.62 * alive_bytes(lambda model=model: model(x))[1]
            manual_ops.convert(model, lean=True)
            manual_ops.convert(model, to="torch")
            assert not model._forward_pre_hooks and not model._forward_hooks

    def test_twice_is_once(self):
        model = manual_ops.convert(manual_ops.convert(ResNet(), lean=True), lean=True)
        assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1

    def test_the_mode_ends_when_the_model_raises(self):
        model = manual_ops.convert(ResNet(), lean=True)
        before = torch.overrides._get_current_function_mode_stack()
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 5, 32, 32))
        assert not modes.is_lean()
        assert torch.overrides._get_current_function_mode_stack() == before

    def test_its_state_is_a_standard_checkpoint(self):
        model = manual_ops.convert(ResNet(), lean=True)
        ResNet().load_state_dict(model.state_dict())
