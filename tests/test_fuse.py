"""convert(model, fuse=True): the same model, with batch norm, residual and ReLU in one layer wherever it can be."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import manual_ops
from manual_ops.compare import alive_bytes
from manual_ops.fuse import FusedForward, FusedReLU
from models import MODELS, MobileNet, ResNet


def pair(make, dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    plain = manual_ops.convert(make().to(dtype))
    return plain, manual_ops.convert(copy.deepcopy(plain), fuse=True)


def fused_norms(model):
    return sum(isinstance(layer, manual_ops.nn.BatchNormReLU2d) for layer in model.modules())


def assert_same_training(plain, fused, x):
    for training in (True, False):
        output, expected = fused.train(training)(x), plain.train(training)(x)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        gradients = torch.autograd.grad(output.square().sum(), list(fused.parameters()))
        wanted = torch.autograd.grad(expected.square().sum(), list(plain.parameters()))
        for gradient, expected_gradient in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    for (name, value), (expected_name, wanted) in zip(
        fused.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == expected_name
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


# How many batch norms are followed by a ReLU: in a ResNet all but those of the downsampling, in DenseNet the layers'
# F.relu too; MobileNet has ReLU6.
@pytest.mark.parametrize(("make", "count"), list(zip(MODELS, (9, 0, 6), strict=True)))
def test_models_train_as_before(make, count, backend):
    plain, fused = pair(make)
    assert fused_norms(fused) == count
    assert_same_training(plain, fused, torch.randn(4, 3, 16, 16, dtype=torch.float64))


def stack(**options):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, **options)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    )


def kinds(model):
    return [type(layer).__name__ for layer in model]


def test_max_pooling_comes_before_the_relu_that_it_followed(backend):
    plain, fused = pair(stack)
    assert kinds(fused) == ["Conv2d", "MaxPool2d", "LateReLU"] * 2
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    x[0, 0, :4], x[0, 1, 4:8] = 0, -1
    assert_same_training(plain, fused, x)
    back = manual_ops.convert(fused, to="torch")
    assert kinds(back) == ["Conv2d", "ReLU", "MaxPool2d"] * 2
    assert all(type(layer).__module__.startswith("torch.nn") for layer in back)


def test_ties_and_nan_are_the_same_before_a_relu_and_behind_it():
    values = torch.tensor([torch.nan, -torch.inf, -1.0, -0.0, 0.0, 2.0, torch.inf], dtype=torch.float64)
    windows = torch.cartesian_prod(values, values, values)[:, None, :].requires_grad_()
    plain, fused = pair(lambda: nn.Sequential(nn.ReLU(), nn.MaxPool1d(3)))
    outputs = plain(windows), fused(windows)
    torch.testing.assert_close(*outputs, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(*(torch.autograd.grad(output.sum(), windows)[0] for output in outputs), rtol=0, atol=0)


def test_a_stack_of_convolution_relu_and_max_pooling_keeps_a_fraction():
    torch_model = stack().float()
    models = {"torch": torch_model, "ours": manual_ops.convert(copy.deepcopy(torch_model))}
    models["fused"] = manual_ops.convert(copy.deepcopy(torch_model), fuse=True)
    x = torch.randn(4, 3, 32, 32)
    kept = {name: alive_bytes(functools.partial(model, x))[1] for name, model in models.items()}
    assert kept["ours"] < 0.8 * kept["torch"]
    assert kept["fused"] < 0.25 * kept["torch"]


@pytest.mark.parametrize("options", [{"return_indices": True}, {"dilation": 2}, {"dilation": (1, 2)}])
def test_a_relu_stays_in_front_of_a_max_pooling_that_would_differ(options):
    model = manual_ops.convert(stack(**options), fuse=True)
    assert kinds(model)[:3] == ["Conv2d", "ReLU", "MaxPool2d"]


def test_a_relu_that_others_see_stays_where_it_is():
    relu = nn.ReLU()
    shared = manual_ops.convert(nn.Sequential(relu, nn.MaxPool2d(2), relu, nn.MaxPool2d(2)), fuse=True)
    hooked = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    hooked[0].register_forward_hook(lambda *_: None)
    assert kinds(shared) == ["ReLU", "MaxPool2d"] * 2
    assert kinds(manual_ops.convert(hooked, fuse=True)) == ["ReLU", "MaxPool2d"]


class Written(nn.Module):
    """A forward in the ways that people write one."""

    def __init__(self, write):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.write = write

    def forward(self, x):
        return self.write(self, x)


FUSED = {
    "layer": lambda m, x: m.relu(m.norm(m.conv(x))),
    "function": lambda m, x: F.relu(m.norm(m.conv(x)), inplace=True),
    "method": lambda m, x: m.norm(m.conv(x)).relu_(),
    "torch": lambda m, x: torch.relu(m.norm(m.conv(x))),
    "sum": lambda m, x: m.relu(m.norm(m.conv(x)) + x),
    "sum the other way": lambda m, x: torch.relu(x + m.norm(m.conv(x))),
    "sum of two norms": lambda m, x: m.relu(m.norm(m.conv(x)) + m.other(m.conv(x))),
    "torch.add": lambda m, x: m.relu(torch.add(m.norm(m.conv(x)), x)),
    "method add_": lambda m, x: m.relu(m.norm(m.conv(x)).add_(x)),
    "two in a row": lambda m, x: m.relu(m.other(m.conv(m.relu(m.norm(m.conv(x)))))),
}
LEFT = {
    "the norm's output is used again": lambda m, x: (y := m.norm(m.conv(x))) + m.relu(y),
    "the sum is used again": lambda m, x: (y := m.norm(m.conv(x)) + x) * m.relu(y),
    "the norm is called twice": lambda m, x: m.relu(m.norm(m.conv(m.norm(x)))),
    "twice itself": lambda m, x: m.relu((y := m.norm(m.conv(x))) + y),
    "a weighted sum": lambda m, x: m.relu(torch.add(m.norm(m.conv(x)), x, alpha=2)),
    "plus a number": lambda m, x: m.relu(m.norm(m.conv(x)) + 1.0),
    "what the norm reads is used again": lambda m, x: m.relu(m.norm(y := m.conv(x)) + y.mul_(2)),
    "no relu": lambda m, x: torch.sigmoid(m.norm(m.conv(x))),
}


@pytest.mark.parametrize("way", FUSED)
def test_every_way_of_writing_it_is_found(way):
    plain, fused = pair(lambda: Written(FUSED[way]))
    assert fused_norms(fused) == (2 if way == "two in a row" else 1)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", LEFT)
def test_what_would_change_the_result_is_left(way):
    plain, fused = pair(lambda: Written(LEFT[way]))
    assert fused_norms(fused) == 0
    assert "forward" not in vars(fused)
    with torch.no_grad():
        x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=0)


def test_layers_with_hooks_or_in_two_places_are_left():
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model[1].register_forward_hook(lambda *_: seen.append(1))
    assert fused_norms(manual_ops.convert(model, fuse=True)) == 0
    shared = nn.BatchNorm2d(3)
    assert fused_norms(manual_ops.convert(nn.Sequential(shared, nn.ReLU(), shared), fuse=True)) == 0


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda m, x: m.relu(m.norm(m.conv(x))) if x.sum() > 0 else x, "traced variables"),
        (lambda m, x: m.relu(m.norm(m.conv(x))) if m.training else m.norm(x), "depends on the mode"),
    ],
)
def test_a_forward_that_cannot_be_traced_is_named_and_left(write, reason):
    model = nn.Sequential(Written(write))
    with pytest.warns(UserWarning, match=rf"convert: 0 \(Written\) is not fused: .*{reason}"):
        manual_ops.convert(model, fuse=True)
    assert fused_norms(model) == 0


def test_a_fused_model_is_copied_pickled_and_keeps_up_with_its_layers():
    plain, fused = pair(ResNet)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for model in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert isinstance(model.layer1[0].forward, FusedForward)
        torch.testing.assert_close(model(x), copy.deepcopy(plain)(x))
        model.layer1[0].conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False).double()
        torch.nn.init.zeros_(model.layer1[0].conv1.weight)
        assert not torch.allclose(model(x), copy.deepcopy(plain)(x))


def test_it_can_be_taken_back():
    plain, fused = pair(ResNet)
    back = manual_ops.convert(fused, to="torch")
    assert not any(isinstance(layer, FusedReLU) or "forward" in vars(layer) for layer in back.modules())
    assert all(type(layer).__module__.startswith(("torch.", "models")) for layer in back.modules())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(back(x), plain(x))


def test_twice_is_once():
    _, fused = pair(ResNet)
    count = fused_norms(fused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused_norms(manual_ops.convert(fused, fuse=True)) == count


def test_it_compiles():
    _, fused = pair(ResNet, torch.float32)
    x = torch.randn(2, 3, 16, 16)
    expected = copy.deepcopy(fused)(x)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


def test_fused_and_lean():
    plain, fused = pair(MobileNet)
    lean = manual_ops.convert(copy.deepcopy(fused), lean=True)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
    assert all(map(torch.equal, torch.autograd.grad(lean(x).sum(), list(lean.parameters())), expected))
