"""convert swaps layers in place and back; intercept reroutes calls."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

import manual_ops
from manual_ops import kernel
from models import MODELS, Functional
from support import assert_same


def _training_step(model, input, target):
    model.zero_grad()
    loss = F.cross_entropy(model(input), target)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _batch():
    return torch.randn(4, 3, 20, 18, dtype=torch.float64), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("model_type", MODELS)
def test_a_converted_model_trains_as_before(backend, model_type):
    theirs = model_type().double()
    ours = manual_ops.convert(copy.deepcopy(theirs))
    for _ in range(2):
        batch = _batch()
        loss, gradients = _training_step(ours, *batch)
        expected_loss, expected_gradients = _training_step(theirs, *batch)
        assert_same(loss, expected_loss)
        for name, expected in expected_gradients.items():
            assert_same(gradients[name], expected, rtol=1e-7, atol=1e-9)
    ours.eval(), theirs.eval()
    assert_same(ours(batch[0]), theirs(batch[0]))
    for (name, got), want in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_same(got, want), name


@pytest.mark.parametrize("model_type", MODELS)
def test_convert_keeps_the_model_and_goes_back(model_type):
    model = model_type()
    parameters, names = list(model.parameters()), list(model.state_dict())
    modules = dict(model.named_modules())
    text = repr(model)
    model.eval()
    assert manual_ops.convert(model) is model
    assert not model.training
    assert dict(model.named_modules()) == modules  # the same objects
    assert all(before is after for before, after in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == names
    assert repr(model) == text
    report = manual_ops.converted_layers(model)
    assert report.swapped and not any(name.startswith("Conv") for name in report.left.values())
    manual_ops.convert(model, to="torch")
    assert not manual_ops.converted_layers(model).swapped
    assert all(type(module).__module__.startswith(("torch.nn", "models")) for module in model.modules())


def test_report_names_what_was_left():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Dropout(), torch.nn.GroupNorm(1, 2))
    report = manual_ops.converted_layers(manual_ops.convert(model))
    assert report.swapped == {"0": "Conv2d"}
    assert report.left == {"1": "Dropout", "2": "GroupNorm"}


def test_a_single_layer_is_converted():
    layer = torch.nn.ReLU()
    assert type(manual_ops.convert(layer)) is manual_ops.nn.ReLU


def test_subclasses_are_left():
    class MyConv(torch.nn.Conv2d):
        pass

    layer = MyConv(1, 1, 1)
    assert type(manual_ops.convert(layer)) is MyConv


def test_a_layer_used_twice_stays_one_layer():
    shared = torch.nn.Linear(3, 3)
    model = manual_ops.convert(torch.nn.Sequential(shared, torch.nn.ReLU(), shared))
    assert model[0] is model[2] is shared


def test_hooks_survive():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    manual_ops.convert(model)(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert seen == ["forward", "backward"]


@pytest.mark.parametrize("parametrization", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_layers_are_converted_by_their_base(parametrization):
    theirs = parametrization(torch.nn.Conv2d(2, 3, 3)).eval()
    ours = manual_ops.convert(copy.deepcopy(theirs))
    assert isinstance(ours, manual_ops.nn.Conv2d)
    assert parametrize.is_parametrized(ours, "weight")
    assert manual_ops.converted_layers(ours).swapped == {"": "Conv2d"}
    input = torch.randn(1, 2, 5, 5)
    assert_same(ours(input), theirs(input))
    back = manual_ops.convert(ours, to="torch")
    assert not isinstance(back, manual_ops.nn.Conv2d)
    assert_same(back(input), theirs(input))
    parametrize.remove_parametrizations(manual_ops.convert(back), "weight")
    assert type(back) is manual_ops.nn.Conv2d
    assert_same(back(input), theirs(input))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(("model",), TypeError), ((torch.nn.ReLU(), "jax"), ValueError), ((None,), TypeError)],
)
def test_convert_refuses(arguments, error):
    with pytest.raises(error, match="convert"):
        manual_ops.convert(*arguments)


class _Calls:
    """Counts the kernels that run inside the block."""

    def __enter__(self):
        self.names = []
        self.originals = dict.fromkeys(("__call__",), kernel.Kernel.__call__)

        def counted(this, *args, backend):
            self.names.append(this.name)
            return self.originals["__call__"](this, *args, backend=backend)

        kernel.Kernel.__call__ = counted
        return self

    def __exit__(self, *_):
        kernel.Kernel.__call__ = self.originals["__call__"]


@pytest.mark.parametrize("model_type", [*MODELS, Functional])
def test_intercept_reroutes_a_model_that_calls_torch(backend, model_type):
    model = model_type().double()
    reference = copy.deepcopy(model)
    batch = _batch()
    expected_loss, expected = _training_step(reference, *batch)
    with manual_ops.intercept(), _Calls() as calls:
        loss, gradients = _training_step(model, *batch)
    assert calls.names
    assert_same(loss, expected_loss)
    for name, gradient in expected.items():
        assert_same(gradients[name], gradient, rtol=1e-7, atol=1e-9)


Z = torch.randn(3, 4, dtype=torch.float64)
X = torch.randn(2, 4, 8, 8, dtype=torch.float64)
TARGET = torch.tensor([0, 1, 3])
CALLS = {
    "F.relu": lambda: F.relu(Z),
    "F.relu inplace": lambda: F.relu(Z.clone(), inplace=True),
    "F.relu_": lambda: F.relu_(Z.clone()),
    "torch.relu": lambda: torch.relu(Z),
    "torch.relu_": lambda: torch.relu_(Z.clone()),
    "Tensor.relu": lambda: Z.relu(),
    "Tensor.relu_": lambda: Z.clone().relu_(),
    "F.relu6": lambda: F.relu6(Z),
    "nn.ReLU6": lambda: torch.nn.ReLU6()(Z),
    "F.leaky_relu": lambda: F.leaky_relu(Z, 0.3),
    "F.leaky_relu_": lambda: F.leaky_relu_(Z.clone(), 0.3),
    "F.sigmoid": lambda: F.sigmoid(Z),
    "torch.sigmoid": lambda: torch.sigmoid(Z),
    "Tensor.sigmoid_": lambda: Z.clone().sigmoid_(),
    "torch.special.expit": lambda: torch.special.expit(Z),
    "Tensor.tanh": lambda: Z.tanh(),
    "torch.tanh_": lambda: torch.tanh_(Z.clone()),
    "F.silu": lambda: F.silu(Z),
    "F.gelu": lambda: F.gelu(Z, approximate="tanh"),
    "F.softmax": lambda: F.softmax(Z, 1),
    "torch.softmax": lambda: torch.softmax(Z, dim=0),
    "Tensor.softmax": lambda: Z.softmax(-1),
    "Tensor.log_softmax": lambda: Z.log_softmax(1),
    "torch.special.log_softmax": lambda: torch.special.log_softmax(Z, 1),
    "F.linear": lambda: F.linear(Z, Z),
    "F.cross_entropy": lambda: F.cross_entropy(Z, TARGET, label_smoothing=0.1),
    "F.nll_loss": lambda: F.nll_loss(Z, TARGET),
    "F.mse_loss": lambda: F.mse_loss(Z, Z + 1),
    "F.binary_cross_entropy_with_logits": lambda: F.binary_cross_entropy_with_logits(Z, Z.abs()),
    "torch.binary_cross_entropy_with_logits": lambda: torch.binary_cross_entropy_with_logits(Z, Z.abs(), reduction=2),
    "F.conv2d": lambda: F.conv2d(X, X[:, :, :3, :3], padding="same"),
    "torch.conv1d": lambda: torch.conv1d(X[0], X[0, :, :, :3].mT[:, :, :4].movedim(1, 2)[:4, :8, :3].repeat(1, 2, 1)),
    "F.conv_transpose2d": lambda: F.conv_transpose2d(X, X[0, :, None, :3, :3], stride=2),
    "F.max_pool2d": lambda: F.max_pool2d(X, 2),
    "F.max_pool2d indices": lambda: F.max_pool2d(X, 2, return_indices=True)[1],
    "F.max_pool2d_with_indices": lambda: F.max_pool2d_with_indices(X, 2)[1],
    "torch.max_pool2d": lambda: torch.max_pool2d(X, 2),
    "torch.max_pool1d_with_indices": lambda: torch.max_pool1d_with_indices(X[0], 2)[1],
    "torch.adaptive_max_pool1d": lambda: torch.adaptive_max_pool1d(X[0], 2)[1],
    "F.adaptive_max_pool2d": lambda: F.adaptive_max_pool2d(X, 2),
    "F.avg_pool2d": lambda: F.avg_pool2d(X, 2),
    "torch.avg_pool1d": lambda: torch.avg_pool1d(X[0], 2),
    "F.adaptive_avg_pool2d": lambda: F.adaptive_avg_pool2d(X, 2),
    "torch.adaptive_avg_pool1d": lambda: torch.adaptive_avg_pool1d(X[0], 2),
    "F.batch_norm": lambda: F.batch_norm(X, None, None, training=True),
    "torch.batch_norm": lambda: torch.batch_norm(X, None, None, None, None, True, 0.1, 1e-5, False),
}


@pytest.mark.cpu("names of functions, on tensors made when the file is read")
@pytest.mark.parametrize("name", CALLS)
def test_intercept_reroutes(name):
    expected = CALLS[name]()
    with manual_ops.intercept(), _Calls() as calls:
        result = CALLS[name]()
    assert len(calls.names) >= 1
    assert_same(result, expected)
    with _Calls() as calls:
        CALLS[name]()
    assert not calls.names


def test_intercept_leaves_what_manual_ops_does_not_compute():
    with manual_ops.intercept(), _Calls() as calls:
        torch.relu(torch.tensor([-1, 2]))
        torch.sigmoid(Z, out=torch.empty_like(Z))
        torch.sigmoid(torch.tensor([1 + 1j]))
        F.dropout(Z, 0.5)
    assert not calls.names


def test_every_twin_is_a_subclass():
    twins = dict(importlib.import_module("manual_ops.convert").TWINS)
    # DistributedDataParallel refuses every subclass of torch.nn.SyncBatchNorm on the CPU.
    assert issubclass(twins.pop(torch.nn.SyncBatchNorm), torch.nn.modules.batchnorm._BatchNorm)
    assert all(issubclass(ours, theirs) for theirs, ours in twins.items())
