"""The layers are torch.nn's own in all but forward."""

import copy
import inspect
import io
import pickle

import pytest
import torch

from manual_ops import functional, nn, registry
from support import assert_same, assert_same_as_torch, assert_wrong_like_torch, tensor

# name -> constructor arguments, input shape
LAYERS = {
    "Conv1d": [((4, 6, 3), {"stride": 2, "padding": 1}, (2, 4, 9)), ((4, 6, 3), {"padding": "same"}, (4, 9))],
    "Conv2d": [
        ((4, 6, (3, 2)), {"dilation": 2, "groups": 2, "bias": False}, (2, 4, 9, 8)),
        ((4, 6, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 4, 9, 8)),
        ((4, 6, 3), {"padding": (2, 1), "padding_mode": "circular"}, (2, 4, 9, 8)),
        ((4, 6, 4), {"padding": "same", "padding_mode": "replicate"}, (2, 4, 9, 8)),
        ((4, 6, 3), {"padding": "valid"}, (4, 9, 8)),
    ],
    "Conv3d": [((2, 4, 2), {"stride": (1, 2, 1), "padding": 1}, (2, 2, 4, 5, 3))],
    "ConvTranspose1d": [((4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 5))],
    "ConvTranspose2d": [((4, 6, 3), {"stride": 2, "padding": 1, "groups": 2}, (2, 4, 5, 4))],
    "ConvTranspose3d": [((2, 3, 2), {"dilation": 2}, (2, 2, 3, 3, 3))],
    "MaxPool1d": [((3,), {"stride": 2, "padding": 1}, (2, 4, 9)), ((2,), {"return_indices": True}, (2, 4, 9))],
    "MaxPool2d": [((3, 2), {"padding": 1, "ceil_mode": True}, (2, 4, 9, 8)), ((2,), {"dilation": 2}, (4, 9, 8))],
    "MaxPool3d": [((2,), {}, (2, 3, 4, 5, 6))],
    "AvgPool1d": [((3,), {"stride": 2, "padding": 1, "count_include_pad": False}, (2, 4, 9))],
    "AvgPool2d": [((3,), {"stride": 2, "ceil_mode": True}, (2, 4, 9, 8)), ((2,), {"divisor_override": 3}, (4, 9, 8))],
    "AvgPool3d": [((2,), {"padding": 1}, (2, 3, 4, 5, 6))],
    "AdaptiveAvgPool1d": [((4,), {}, (2, 4, 9))],
    "AdaptiveAvgPool2d": [(((3, None),), {}, (2, 4, 9, 8)), ((1,), {}, (4, 9, 8))],
    "AdaptiveAvgPool3d": [((2,), {}, (2, 3, 4, 5, 6))],
    "AdaptiveMaxPool1d": [((4,), {}, (2, 4, 9))],
    "AdaptiveMaxPool2d": [((3,), {"return_indices": True}, (2, 4, 9, 8))],
    "AdaptiveMaxPool3d": [((2,), {}, (2, 3, 4, 5, 6))],
    "BatchNorm1d": [((4,), {}, (6, 4)), ((4,), {"momentum": None}, (3, 4, 5))],
    "BatchNorm2d": [
        ((4,), {}, (2, 4, 5, 3)),
        ((4,), {"affine": False}, (2, 4, 5, 3)),
        ((4,), {"track_running_stats": False}, (2, 4, 5, 3)),
        ((4,), {"momentum": 0.3, "eps": 1e-2}, (2, 4, 5, 3)),
    ],
    "BatchNorm3d": [((4,), {}, (2, 4, 2, 3, 2))],
    # Alone, as here, it is plain batch norm; test_distributed.py has two processes.
    "SyncBatchNorm": [((4,), {}, (2, 4, 5, 3)), ((4,), {"momentum": None}, (6, 4))],
    "ReLU": [((), {}, (3, 4)), ((), {"inplace": True}, (3, 4))],
    "ReLU6": [((), {}, (3, 4)), ((), {"inplace": True}, (3, 4))],
    "LeakyReLU": [((0.2,), {}, (3, 4)), ((), {"inplace": True}, (3, 4))],
    "Sigmoid": [((), {}, (3, 4))],
    "Tanh": [((), {}, (3, 4))],
    "SiLU": [((), {}, (3, 4)), ((), {"inplace": True}, (3, 4))],
    "GELU": [((), {}, (3, 4)), ((), {"approximate": "tanh"}, (3, 4))],
    "Softmax": [((1,), {}, (3, 4)), ((-1,), {}, (2, 3, 4))],
    "LogSoftmax": [((1,), {}, (3, 4))],
    "Linear": [((5, 3), {}, (4, 5)), ((5, 3), {"bias": False}, (2, 4, 5)), ((5, 3), {}, (5,))],
}
CASES = [(name, *case) for name, cases in LAYERS.items() for case in cases]
LOSSES = {
    "CrossEntropyLoss": [
        ({}, "classes"),
        ({"label_smoothing": 0.1, "ignore_index": 1}, "classes"),
        ({}, "probabilities"),
    ],
    "NLLLoss": [({}, "classes"), ({"reduction": "none", "ignore_index": 2}, "classes")],
    "MSELoss": [({}, "values"), ({"reduction": "sum"}, "values")],
    "BCEWithLogitsLoss": [({}, "probabilities"), ({"reduction": "none"}, "probabilities")],
}


def _twins(name, args, kwargs, dtype=torch.float64):
    """The layer of manual_ops and torch's, with the same parameters."""
    ours, theirs = getattr(nn, name)(*args, **kwargs, **_dtype(name, dtype)), None
    theirs = getattr(torch.nn, name)(*args, **kwargs, **_dtype(name, dtype))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _dtype(name, dtype):
    return {"dtype": dtype} if "dtype" in inspect.signature(getattr(torch.nn, name)).parameters else {}


def _outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CASES, ids=lambda value: str(value))
def test_forward_gradients_and_buffers_are_torchs(backend, name, args, kwargs, shape, training):
    ours, theirs = _twins(name, args, kwargs)
    ours.train(training), theirs.train(training)
    for _ in range(2):
        input = tensor(*shape)
        result, expected = _outputs(ours(input.clone())), _outputs(theirs(input.clone()))
        cotangent = torch.randn_like(expected[0])
        for got, want in zip(result, expected, strict=True):
            assert_same(got, want)
        gradients = torch.autograd.grad(result[0], [input, *ours.parameters()], cotangent)
        expected = torch.autograd.grad(expected[0], [input, *theirs.parameters()], cotangent)
        for got, want in zip(gradients, expected, strict=True):
            assert_same(got, want)
    for (key, got), (their_key, want) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert key == their_key
        assert_same(got, want)


@pytest.mark.parametrize(("name", "kwargs", "target"), [(n, *c) for n, cs in LOSSES.items() for c in cs], ids=str)
def test_losses_are_torchs(backend, name, kwargs, target):
    targets = {"classes": torch.tensor([0, 1, 2]), "values": tensor(3, 4), "probabilities": tensor(3, 4).softmax(1)}
    ours, theirs = getattr(nn, name)(**kwargs), getattr(torch.nn, name)(**kwargs)
    assert_same_as_torch(ours, theirs, tensor(3, 4), targets[target].detach())


def test_loss_weights_are_buffers_as_in_torch():
    loss = nn.CrossEntropyLoss(weight=torch.ones(4))
    assert list(dict(loss.named_buffers())) == ["weight"]
    assert list(dict(nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)).named_buffers())) == ["pos_weight"]


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CASES, ids=lambda value: str(value))
def test_layers_are_torchs_to_the_outside(name, args, kwargs, shape):
    ours, theirs = _twins(name, args, kwargs)
    if name != "SyncBatchNorm":  # DistributedDataParallel refuses every subclass of torch's on the CPU
        assert isinstance(ours, getattr(torch.nn, name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = getattr(nn, name)(*args, **kwargs)
        torch.manual_seed(1)
        expected = getattr(torch.nn, name)(*args, **kwargs)
    for got, want in zip(drawn.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(got, want)
    input = tensor(*shape, requires_grad=False)
    ours.eval()
    reference = _outputs(ours(input.clone()))[0]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert type(copied) is type(ours)
        assert torch.equal(_outputs(copied(input.clone()))[0], reference)


def test_to_moves_dtype():
    layer = nn.Conv2d(2, 3, 3).to(torch.bfloat16)
    assert layer(torch.randn(1, 2, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(9, 7), (10, 8), (2, 3, 9, 8)])
def test_transposed_convolution_takes_output_size(backend, size):
    ours, theirs = _twins("ConvTranspose2d", (4, 3, 3), {"stride": 2, "padding": 1})
    assert_same_as_torch(ours, theirs, tensor(2, 4, 5, 4), output_size=list(size))


@pytest.mark.parametrize("size", [(20, 20), (9,), (1, 2, 3, 4, 5)])
def test_impossible_output_size_is_refused_as_in_torch(size):
    ours, theirs = _twins("ConvTranspose2d", (4, 3, 3), {"stride": 2, "padding": 1})
    with pytest.raises(ValueError):
        theirs(tensor(2, 4, 5, 4), output_size=list(size))
    with pytest.raises(ValueError):
        ours(tensor(2, 4, 5, 4), output_size=list(size))


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "shape"),
    [
        ("BatchNorm1d", (4,), {}, (2, 4, 3, 3)),
        ("BatchNorm2d", (4,), {}, (2, 4, 3)),
        ("BatchNorm3d", (4,), {}, (2, 4, 3, 3)),
        ("BatchNorm2d", (4,), {}, (2, 5, 3, 3)),
        ("BatchNorm1d", (4,), {}, (1, 4)),
        ("Conv2d", (4, 6, 3), {}, (2, 3, 9, 9)),
        ("Linear", (4, 6), {}, (2, 3)),
        ("MaxPool2d", (20,), {}, (2, 3, 9, 9)),
    ],
)
def test_layers_refuse_what_torchs_refuse(name, args, kwargs, shape):
    ours, theirs = _twins(name, args, kwargs)
    with pytest.raises(Exception) as expected:
        theirs(tensor(*shape))
    with pytest.raises(expected.type):
        ours(tensor(*shape))


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("Conv2d", (4, 6, 3), {"groups": 3}),
        ("Conv2d", (4, 6, 3), {"padding_mode": "mirror"}),
        ("Conv2d", (4, 6, 3), {"padding": "full"}),
        ("Conv2d", (4, 6, 3), {"padding": "same", "stride": 2}),
        ("ConvTranspose2d", (4, 6, 3), {"padding_mode": "reflect"}),
        ("GELU", (), {"approximates": "tanh"}),
    ],
)
def test_constructors_refuse_what_torchs_refuse(name, args, kwargs):
    with pytest.raises(Exception) as expected:
        getattr(torch.nn, name)(*args, **kwargs)
    with pytest.raises(expected.type):
        getattr(nn, name)(*args, **kwargs)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("axes", "shape"), [(1, (3, 4, 5)), (2, (3, 4, 5, 2)), (3, (2, 4, 3, 2, 2))])
def test_batch_norm_relu_is_batch_norm_then_relu(backend, axes, shape, training, residual):
    fused = getattr(nn, f"BatchNormReLU{axes}d")(4, dtype=torch.float64)
    plain = getattr(torch.nn, f"BatchNorm{axes}d")(4, dtype=torch.float64)
    torch.nn.init.normal_(fused.weight)
    plain.load_state_dict(fused.state_dict())
    fused.train(training), plain.train(training)
    extra = [tensor(*shape)] if residual else []
    assert_same_as_torch(
        fused, lambda input, *residual: torch.relu(sum(residual, plain(input))), tensor(*shape), *extra
    )
    assert_same(fused.running_var, plain.running_var)
    assert int(fused.num_batches_tracked) == int(plain.num_batches_tracked)


def test_names_that_are_not_replaced_are_torchs():
    assert nn.Sequential is torch.nn.Sequential
    assert functional.dropout is torch.nn.functional.dropout
    with pytest.raises(AttributeError):
        _ = nn.NoSuchLayer


@pytest.mark.parametrize(
    ("adaptive", "axes"), [(adaptive, axes) for adaptive in ("", "adaptive_") for axes in (1, 2, 3)]
)
def test_pools_with_indices_return_them_always(adaptive, axes, backend):
    x, name = tensor(2, 3, *(5,) * axes), f"{adaptive}max_pool{axes}d_with_indices"
    ours, theirs = getattr(functional, name), getattr(torch.nn.functional, name)
    for options in ({}, {"return_indices": False}, {"return_indices": True}):
        (values, indices), (expected, expected_indices) = ours(x, 2, **options), theirs(x, 2, **options)
        assert torch.equal(indices, expected_indices)
        assert_same(values.detach(), expected.detach())
    assert_same(*(torch.autograd.grad(function(x, 3)[0].square().sum(), x)[0] for function in (ours, theirs)))
    assert_wrong_like_torch(ours, theirs, x, None)


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, 1.0), (0, 6)])
def test_hardtanh_between_0_and_6_is_ours(bounds, backend):
    x = tensor(40, requires_grad=False) * 5
    x.requires_grad_()
    output = functional.hardtanh(x, *bounds)
    assert_same_as_torch(functional.hardtanh, torch.nn.functional.hardtanh, x, *bounds)
    assert ("Activate" in type(output.grad_fn).__name__) == (tuple(bounds) == (0, 6))


def test_every_function_has_a_row_and_every_layer_is_tested():
    assert set(functional.__all__) == set(registry.OPERATIONS)
    modules = {name for operation in registry.OPERATIONS.values() for name in operation.modules}
    assert modules == set(nn.__all__)
    fused = {f"BatchNormReLU{axes}d" for axes in (1, 2, 3)} | {"SyncBatchNormReLU"}
    assert modules == set(LAYERS) | set(LOSSES) | fused


NAMES = [name for name in (*functional.__all__, *functional.ALIASES) if hasattr(torch.nn.functional, name)]


@pytest.mark.parametrize("name", NAMES)
def test_functions_have_torchs_signature(name):
    try:
        theirs = inspect.signature(getattr(torch.nn.functional, name))
    except ValueError:
        return  # a builtin has none; the tables of calls below and in test_<op>.py stand for it
    ours = inspect.signature(getattr(functional, name))
    if list(theirs.parameters) == ["args", "kwargs"]:
        return  # a dispatcher over return_indices
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("operation", registry.OPERATIONS.values(), ids=lambda operation: operation.name)
def test_samples_agree_with_torch(backend, operation):
    for sample in operation.samples():
        assert_same_as_torch(operation.function, operation.reference, *sample.args, **sample.kwargs)


def test_wrong_calls_of_layers_name_the_operation():
    assert_wrong_like_torch(functional.conv2d, torch.nn.functional.conv2d, tensor(2, 3, 5, 5), tensor(4, 2, 3, 3))
