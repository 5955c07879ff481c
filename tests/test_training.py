"""What people do around a training step works with these layers as it does with torch's."""

import copy
import io
import os
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import manual_ops
from manual_ops import functional, nn
from manual_ops.registry import OPERATIONS
from models import MODELS, ResNet
from support import assert_same, device_type, kept_bytes, tensor


def _batch(seed=0, count=3):
    generator = torch.Generator("cpu").manual_seed(seed)
    images = torch.randn(count, 3, 16, 14, dtype=torch.float64, generator=generator, device="cpu")
    target = torch.randint(5, (count,), generator=generator, device="cpu")
    return images.to(torch.get_default_device()), target.to(torch.get_default_device())


class Net(torch.nn.Module):
    """Every family of layers once, with no in-place layer."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, 6, 3, padding=1),
            torch.nn.BatchNorm2d(6),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.ConvTranspose2d(6, 4, 2),
            torch.nn.GELU(),
            torch.nn.AvgPool2d(2),
        )
        self.head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5))

    def forward(self, x):
        return self.head(self.features(x))


def _pair(model_type=Net):
    """torch's model and the same one converted."""
    theirs = model_type().double()
    return theirs, manual_ops.convert(copy.deepcopy(theirs))


def _loss(model, batch):
    input, target = batch
    return functional.cross_entropy(model(input), target)


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _assert_same_gradients(ours, theirs):
    got, expected = _gradients(ours), _gradients(theirs)
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same(got[name], expected[name], rtol=1e-8, atol=1e-10)


# Recomputing and moving what is saved.


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(backend, use_reentrant):
    theirs, ours = _pair()
    input, target = _batch()
    for model in (theirs, ours):
        x = input.clone().requires_grad_()
        hidden = checkpoint(model.features, x, use_reentrant=use_reentrant)
        F.cross_entropy(model.head(hidden), target).backward()
        model.grad_of_input = x.grad
    _assert_same_gradients(ours, theirs)
    assert_same(ours.grad_of_input, theirs.grad_of_input, rtol=1e-8, atol=1e-10)


def test_checkpoint_of_a_resnet_with_layers_in_place(backend):
    theirs, ours = _pair(ResNet)
    input, target = _batch()
    F.cross_entropy(theirs(input), target).backward()
    F.cross_entropy(checkpoint(ours, input, use_reentrant=False), target).backward()
    _assert_same_gradients(ours, theirs)


def test_checkpoint_keeps_nothing_of_what_it_recomputes(backend):
    _, ours = _pair()
    input = _batch()[0].requires_grad_()
    plain = kept_bytes(lambda: ours.features(input))
    assert kept_bytes(lambda: checkpoint(ours.features, input, use_reentrant=False)) < plain / 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_may_recompute_on_another_backend(use_reentrant):
    """The choice of a backend is a block's, and the recomputation comes after it."""
    theirs, ours = _pair()
    input, target = _batch()
    for model in (theirs, ours):
        with manual_ops.backend("python"):
            hidden = checkpoint(model.features, input.clone().requires_grad_(), use_reentrant=use_reentrant)
            loss = F.cross_entropy(model.head(hidden), target)
        loss.backward()
    _assert_same_gradients(ours, theirs)


def test_a_checkpoint_recomputes_under_the_same_autocast(backend):
    ours = manual_ops.convert(Net())
    input, target = _batch()
    gradients = []
    for wrapped in (True, False):
        with torch.autocast(device_type(), dtype=torch.bfloat16):
            output = checkpoint(ours, input.float(), use_reentrant=False) if wrapped else ours(input.float())
            loss = F.cross_entropy(output, target)
        gradients.append(torch.autograd.grad(loss, list(ours.parameters())))
    for recomputed, plain in zip(*gradients, strict=True):
        assert_same(recomputed, plain, rtol=0, atol=0)


def test_save_on_cpu(backend):
    theirs, ours = _pair()
    batch = _batch()
    _loss(theirs, batch).backward()
    with torch.autograd.graph.save_on_cpu():
        loss = _loss(ours, batch)
    loss.backward()
    _assert_same_gradients(ours, theirs)


def test_what_is_saved_passes_through_hooks(backend):
    """A hook that stores floats at half their width: the gradients are as exact as what it kept."""
    theirs, ours = _pair()
    batch = _batch()
    packed = []

    def pack(saved):
        packed.append(saved.dtype)
        return saved.float() if saved.is_floating_point() else saved

    def unpack(stored):
        return stored.double() if stored.is_floating_point() else stored

    _loss(theirs, batch).backward()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = _loss(ours, batch)
    loss.backward()
    assert len(packed) > 8
    differ = []
    for name, expected in _gradients(theirs).items():
        got = _gradients(ours)[name]
        # A bias in front of a batch norm has the gradient 0.
        assert_same(got, expected, rtol=1e-4, atol=1e-6)
        differ.append(not torch.equal(got, expected))
    assert any(differ)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_saved_tensor_of_every_operation_is_freed_by_backward(backend, name):
    """A tensor that hides outside save_for_backward is neither seen by hooks nor freed."""
    operation = OPERATIONS[name]
    for sample in operation.samples():
        copies = []

        def unpack(saved, copies=copies):
            copies.append(weakref.ref(fresh := saved.clone()))
            return fresh

        inputs = [v for v in [*sample.args, *sample.kwargs.values()] if isinstance(v, torch.Tensor) and v.requires_grad]
        expected = torch.autograd.grad(operation.function(*sample.args, **sample.kwargs).sum(), inputs)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach().clone(), unpack):
            output = operation.function(*sample.args, **sample.kwargs).sum()
        for got, gradient in zip(torch.autograd.grad(output, inputs), expected, strict=True):
            assert_same(got, gradient, rtol=0, atol=0)
        assert not any(reference() is not None for reference in copies)


# Which gradients there are.


def test_backward_again_after_retain_graph(backend):
    _, ours = _pair()
    loss = _loss(ours, _batch())
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in _gradients(ours).items()}
    loss.backward()
    for name, gradient in _gradients(ours).items():
        assert_same(gradient, 2 * once[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "avg_pool" not in name])
def test_backward_twice_without_retain_graph_is_an_error(name):
    operation = OPERATIONS[name]
    sample = operation.samples()[0]
    output = operation.function(*sample.args, **sample.kwargs).sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_average_pooling_keeps_nothing_that_backward_frees(backend):
    """Torch keeps the input, and refuses a second backward without retain_graph; here there is no reason to."""
    x = tensor(1, 2, 4, 4)
    output = functional.avg_pool2d(x, 2)
    assert kept_bytes(lambda: functional.avg_pool2d(x, 2)) == 0
    for _ in range(2):
        output.backward(torch.ones_like(output))
    assert_same(x.grad, torch.full_like(x, 0.5))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(backend, mode):
    theirs, ours = _pair()
    input, _ = _batch()
    for training in (True, False):
        with mode():
            output = ours.train(training)(input)
        assert output.grad_fn is None
        assert output.is_inference() == (mode is torch.inference_mode)
        assert_same(output, theirs.train(training)(input).detach())
    for name, buffer in ours.named_buffers():
        assert_same(buffer, dict(theirs.named_buffers())[name])
    _loss(ours.train(), _batch()).backward()


def test_parameters_made_in_inference_mode_are_refused_in_training_as_torchs_are(backend):
    with torch.inference_mode():
        weight = torch.randn(4, 3, 3, dtype=torch.float64)
    x = tensor(2, 3, 7)
    for function in (F.conv1d, functional.conv1d):
        with pytest.raises(RuntimeError, match="nference tensors"):
            function(x, weight).sum().backward()


@pytest.mark.parametrize("frozen", ["features.0", "features.1", "features.4", "head.2", "features", "weight", "bias"])
def test_frozen_parameters(backend, frozen):
    theirs, ours = _pair()
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if name.startswith(frozen) or name.endswith(frozen):
                parameter.requires_grad_(False)
        _loss(model, _batch()).backward()
    _assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 5, 3, bias=False), (2, 3, 9, 9)),
        (nn.ConvTranspose2d(3, 5, 3, bias=False), (2, 3, 9, 9)),
        (nn.Linear(30, 4, bias=False), (64, 30)),
    ],
    ids=["conv", "conv_transpose", "linear"],
)
def test_a_frozen_weight_keeps_no_input(backend, layer, shape):
    layer = copy.deepcopy(layer).to(torch.get_default_device())
    x = torch.randn(shape, requires_grad=True)
    both = kept_bytes(lambda: layer(x))
    assert both == 4 * (x.numel() + layer.weight.numel())
    layer.weight.requires_grad_(False)
    assert kept_bytes(lambda: layer(x)) == 4 * layer.weight.numel()
    layer.weight.requires_grad_(True)
    assert kept_bytes(lambda: layer(x.detach())) == 4 * x.numel()


# Hooks.


def test_hooks_see_and_change_the_gradients_that_torchs_do(backend):
    theirs, ours = _pair()
    seen = {}
    for which, model in (("theirs", theirs), ("ours", ours)):
        calls = seen[which] = []
        for name, module in model.named_modules():
            if any(module.children()):
                continue
            module.register_full_backward_pre_hook(
                lambda m, grads, name=name, calls=calls: calls.append((name, "pre", *grads))
            )
            module.register_full_backward_hook(
                lambda m, inputs, outputs, name=name, calls=calls: (
                    calls.append((name, "post", *inputs)) or tuple(None if g is None else 2 * g for g in inputs)
                )
            )
            module.register_forward_hook(lambda m, args, output: output * 1.5)
            module.register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))
        model.features[0].weight.register_hook(lambda gradient: 3 * gradient)
        model.features[0].bias.register_post_accumulate_grad_hook(lambda p, calls=calls: calls.append(("bias", "done")))
        _loss(model, _batch()).backward()
    assert [call[:2] for call in seen["ours"]] == [call[:2] for call in seen["theirs"]]
    for got, expected in zip(seen["ours"], seen["theirs"], strict=True):
        for ours_value, theirs_value in zip(got[2:], expected[2:], strict=True):
            if theirs_value is None:
                assert ours_value is None
            else:
                assert_same(ours_value, theirs_value, rtol=1e-8, atol=1e-10)
    _assert_same_gradients(ours, theirs)


def test_tensor_hooks_and_retained_gradients_between_layers(backend):
    theirs, ours = _pair()
    results = []
    for model in (theirs, ours):
        input, target = _batch()
        hidden = model.features(input)
        hidden.retain_grad()
        hidden.register_hook(lambda gradient: 2 * gradient)
        F.cross_entropy(model.head(hidden), target).backward()
        results.append(hidden.grad)
    assert_same(results[1], results[0])
    _assert_same_gradients(ours, theirs)


def test_anomaly_detection_accepts_every_layer(backend):
    _, ours = _pair()
    with torch.autograd.detect_anomaly(check_nan=True):
        _loss(ours, _batch()).backward()


# Changed parameters.

REPARAMETRISED = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "old weight norm": lambda layer: torch.nn.utils.weight_norm(layer),
    "pruned by magnitude": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
    "pruned channels": lambda layer: prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("change", REPARAMETRISED)
@pytest.mark.parametrize("before", [True, False], ids=["then converted", "of the converted"])
def test_reparametrised_layers_train(backend, change, before):
    theirs = Net().double()
    ours = copy.deepcopy(theirs)
    ours = ours if before else manual_ops.convert(ours)
    for model in (theirs, ours):
        for layer in (model.features[0], model.features[4], model.head[2]):
            torch.manual_seed(1)
            REPARAMETRISED[change](layer)
    ours = manual_ops.convert(ours)
    assert isinstance(ours.features[0], nn.Conv2d)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            _loss(model, _batch(step)).backward()
            optimizer.step()
    _assert_same_gradients(ours, theirs)


def test_shared_weights(backend):
    def tie(model):
        model.second = type(model.features[0])(3, 6, 3, padding=1).double()
        model.second.weight = model.features[0].weight
        model.second.bias = model.features[0].bias
        return model

    theirs, ours = (tie(model) for model in _pair())
    input, target = _batch()
    for model in (theirs, ours):
        loss = F.cross_entropy(model(input), target) + model.second(input).square().mean()
        (loss + F.cross_entropy(model(input.flip(2)), target)).backward()
    _assert_same_gradients(ours, theirs)


# Copies.


def _through(model, optimizer, how):
    if how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if how == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    fresh = manual_ops.convert(type(model)().double())
    fresh.load_state_dict(state["model"])
    fresh_optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    fresh_optimizer.load_state_dict(state["optimizer"])
    return fresh, fresh_optimizer


def _steps(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        _loss(model, _batch(step)).backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint file"])
def test_a_copy_in_the_middle_of_training_goes_on_alike(backend, how):
    _, model = _pair()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    _steps(model, optimizer, [0, 1])
    other, other_optimizer = _through(model, optimizer, how)
    _steps(model, optimizer, [2, 3])
    _steps(other, other_optimizer, [2, 3])
    for name, value in model.state_dict().items():
        assert_same(other.state_dict()[name], value, rtol=0, atol=0)


# Optimisers.

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd, fused": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adam, foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True, eps=1e-4),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_the_steps_they_take_with_torch(backend, name):
    theirs, ours = _pair()
    for model in (theirs, ours):
        # A convolution's bias in front of a batch norm has the gradient 0, of which Adam magnifies the rounding.
        model.features[0].bias.requires_grad_(False)
        optimizer = OPTIMIZERS[name](model.parameters())

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = _loss(model, _batch())
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    for name, value in theirs.state_dict().items():
        assert_same(ours.state_dict()[name], value, rtol=1e-6, atol=1e-8)


def test_gradients_accumulate_and_are_clipped(backend):
    theirs, ours = _pair()
    norms = []
    for model in (theirs, ours):
        for part in range(3):
            (_loss(model, _batch(part)) / 3).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    assert_same(norms[1], norms[0])
    _assert_same_gradients(ours, theirs)


# Tensors changed between forward and backward.

# Where the two differ, because each keeps something else for backward.
DIFFERENT = {
    "input": {
        # Torch keeps the input; here the winners do, shapes alone, nothing, or the output.
        *((name, "free") for name in OPERATIONS if "_pool" in name),
        ("nll_loss", "free"),
        ("relu6", "free"),
        ("leaky_relu", "free"),
        ("batch_norm", "free"),  # in evaluation, without a weight
        # Torch keeps the log-softmax, a tensor of the input's size; here the input, which the caller has anyway.
        ("cross_entropy", "refused"),
        # Torch convolves a padded copy where 'same' is uneven.
        ("conv2d", "refused"),
        ("conv3d", "refused"),
    },
    "output": {
        # The layer that follows keeps it anyway.
        ("relu6", "refused"),
        ("leaky_relu", "refused"),
        # One layer here, where torch keeps the ReLU's output; the rest is recomputed.
        ("batch_norm_relu", "free"),
    },
}


def _refuses_a_change(function, sample, what):
    input = sample.args[0].clone()
    output = function(input, *sample.args[1:], **sample.kwargs)
    with torch.no_grad():
        (input if what == "input" else output).mul_(2)
    try:
        output.sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return True
    return False


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_tensor_changed_before_backward_is_an_error_where_it_is_with_torch(backend, name, what):
    operation = OPERATIONS[name]
    for sample in operation.samples():
        ours = _refuses_a_change(operation.function, sample, what)
        theirs = _refuses_a_change(operation.reference, sample, what)
        if ours != theirs:
            assert (name, "refused" if ours else "free") in DIFFERENT[what], sample.label


def test_a_layer_in_place_counts_as_a_change(backend):
    for functions in (F, functional):
        kept = functions.sigmoid(tensor(4, 3))
        output = functions.relu(kept, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def _changed_sum(f, x, w):
    y = f.conv2d(x, w)
    y.add_(1).mul_(2)
    return (y * y).sum()


def _changed_after_each(f, x, w):
    y = f.max_pool2d(f.conv2d(x, w), 2)
    y += 1
    y = f.avg_pool2d(y, 2)
    y += 1
    return f.softmax(y.flatten(1), 1).square().sum()


def _layers_in_place_on_slices(f, x, w):
    y = f.conv2d(x[None], w)
    f.silu(y[:, :2], inplace=True)
    f.leaky_relu_(y[:, 2:])
    return y.square().sum()


@pytest.mark.parametrize("model", [_changed_sum, _changed_after_each, _layers_in_place_on_slices])
def test_results_may_be_changed_in_place(backend, model):
    """Unbatched, too, where the result is a view; a Function's output that is one could not be changed."""
    x, w = tensor(3, 8, 8, requires_grad=False), tensor(4, 3, 3, 3)
    assert_same(torch.autograd.grad(model(functional, x, w), w)[0], torch.autograd.grad(model(F, x, w), w)[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_result_of_every_operation_may_be_changed_in_place(backend, name):
    operation = OPERATIONS[name]
    for sample in operation.samples():
        inputs = [v for v in [*sample.args, *sample.kwargs.values()] if isinstance(v, torch.Tensor) and v.requires_grad]
        output = operation.function(*sample.args, **sample.kwargs)
        output.add_(torch.ones_like(output))  # an addition needs nothing of its operands
        if name in ("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "sigmoid", "tanh") or "softmax" in name:
            continue  # their backward reads the output
        output.sum().backward(inputs=inputs)


def test_a_weight_stepped_before_backward_is_an_error(backend):
    for model in _pair():
        loss = _loss(model, _batch())
        with torch.no_grad():
            model.head[2].weight.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_max_pooling_keeps_cannot_be_changed(backend):
    """Torch keeps the input and refuses; here the winners are kept, so the input is free to be reused."""
    x = tensor(1, 1, 4, 4).clone()
    expected = torch.autograd.grad(F.max_pool2d(x, 2).sum(), x)[0]
    output = functional.max_pool2d(x, 2)
    with torch.no_grad():
        x.neg_()
    assert_same(torch.autograd.grad(output.sum(), x)[0], expected)


# Threads and processes.


@pytest.mark.parametrize("model_type", MODELS)
def test_two_threads_train_two_models_as_one_after_the_other(backend, model_type):
    models = [manual_ops.convert(model_type()) for _ in range(2)]
    alone = copy.deepcopy(models)
    device = torch.get_default_device()
    failures = []

    def train(model, seed):
        try:
            # Backends and default devices are a thread's own.
            with manual_ops.backend(backend), torch.device(device):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                for step in range(2):
                    input, target = _batch(10 * seed + step)
                    optimizer.zero_grad()
                    F.cross_entropy(model(input.float()), target).backward()
                    optimizer.step()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(model, seed)) for seed, model in enumerate(models)]
    for thread in threads:
        thread.start()
    for seed, model in enumerate(alone):
        train(model, seed)
    for thread in threads:
        thread.join()
    assert not failures
    for model, reference in zip(models, alone, strict=True):
        for name, value in reference.state_dict().items():
            assert_same(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_two_threads_on_two_backends():
    found = {}
    barrier = threading.Barrier(2)

    def run(backend):
        with manual_ops.backend(backend):
            barrier.wait()
            found[backend] = manual_ops.current_backend()

    threads = [threading.Thread(target=run, args=(backend,)) for backend in ("python", "native")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"python": "python", "native": "native"}


class _Features(Dataset):
    """Workers that run the operations themselves."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return functional.max_pool2d(functional.conv2d(_image(index), torch.ones(2, 3, 3, 3)), 2)


def _image(index):
    return torch.arange(3 * 8 * 8, dtype=torch.float32).reshape(1, 3, 8, 8) * (index + 1)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.mark.cpu("a process that was forked after CUDA had started cannot use it")
@needs_fork
def test_data_loader_workers_run_operations_after_the_parent_did(backend):
    expected = torch.stack([_Features()[index] for index in range(4)])
    functional.conv2d(torch.randn(4, 8, 32, 32), torch.randn(8, 8, 3, 3))  # wakes the threads that a fork loses
    loader = DataLoader(_Features(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert_same(torch.cat(list(loader)), expected)


@pytest.mark.cpu("a process that was forked after CUDA had started cannot use it")
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_trains(backend):
    """On one thread: a pool of threads, once started, does not survive a fork, nor does it with torch's layers."""
    _, model = _pair()
    batch = _batch()
    _loss(model, batch).backward()
    expected = {name: gradient.clone() for name, gradient in _gradients(model).items()}
    model.zero_grad()
    torch.set_num_threads(1)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _loss(model, batch).backward()
            status = 0 if all(torch.allclose(g, expected[name]) for name, g in _gradients(model).items()) else 2
        finally:
            os._exit(status)
    torch.set_num_threads(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
