"""Native kernels give the same bits on every run and with any number of threads, and no operation is refused."""

import pytest
import torch

from manual_ops import functional as F
from manual_ops.registry import OPERATIONS


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _grads(function, args, kwargs):
    """The output and the gradients, as the first and second backward give them."""
    inputs = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and value.requires_grad]
    output = function(*args, **kwargs)
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape).to(output.dtype)
    return output, torch.autograd.grad(output, inputs, cotangent, create_graph=True), inputs


@pytest.mark.parametrize("name", OPERATIONS)
def test_deterministic_algorithms_accept_every_operation(backend, deterministic, name):
    for sample in OPERATIONS[name].samples():
        _, gradients, inputs = _grads(OPERATIONS[name].function, sample.args, sample.kwargs)
        bent = [gradient.sum() for gradient in gradients if gradient.requires_grad]
        if bent:
            torch.autograd.grad(sum(bent), inputs, allow_unused=True)


def test_deterministic_algorithms_accept_indices_of_max_pooling(backend, deterministic):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    F.max_pool2d(x, 3, 2, 1, return_indices=True)[0].sum().backward()
    F.adaptive_max_pool2d(x, 3, return_indices=True)[0].sum().backward()


def _x(*shape, channels_last=False):
    values = torch.randn(*shape)
    if channels_last:
        values = values.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    return values.requires_grad_()


def _classes(count, *shape):
    return torch.randint(count, shape)


IMAGE, ROWS, VOLUME, SIGNAL = (6, 24, 40, 36), (2000, 37), (3, 8, 14, 16, 18), (6, 24, 1500)

# Large enough that every kernel splits its work.
CALLS = {
    "conv1d": lambda: (F.conv1d, _x(*SIGNAL), _x(32, 24, 5), _x(32), 1, 2),
    "conv2d": lambda: (F.conv2d, _x(*IMAGE), _x(32, 24, 3, 3), _x(32), 1, 1),
    "conv2d, stride 2": lambda: (F.conv2d, _x(*IMAGE), _x(32, 24, 3, 3), _x(32), 2, 1),
    "conv2d, channels last": lambda: (F.conv2d, _x(*IMAGE, channels_last=True), _x(32, 24, 3, 3), _x(32), 1, 1),
    "conv2d, depthwise": lambda: (F.conv2d, _x(*IMAGE), _x(24, 1, 3, 3), _x(24), 1, 1, 1, 24),
    "conv2d, groups": lambda: (F.conv2d, _x(*IMAGE), _x(32, 6, 3, 3), None, 1, 1, 1, 4),
    "conv2d, 1x1": lambda: (F.conv2d, _x(*IMAGE), _x(64, 24, 1, 1), None),
    "conv2d, one image": lambda: (F.conv2d, _x(1, 24, 64, 64), _x(32, 24, 3, 3), _x(32)),
    "conv3d": lambda: (F.conv3d, _x(*VOLUME), _x(16, 8, 3, 3, 3), _x(16), 1, 1),
    "conv_transpose1d": lambda: (F.conv_transpose1d, _x(*SIGNAL), _x(24, 16, 4), _x(16), 2, 1),
    "conv_transpose2d": lambda: (F.conv_transpose2d, _x(*IMAGE), _x(24, 16, 4, 4), _x(16), 2, 1),
    "conv_transpose3d": lambda: (F.conv_transpose3d, _x(*VOLUME), _x(8, 8, 2, 2, 2), _x(8), 2),
    "max_pool1d": lambda: (F.max_pool1d, _x(*SIGNAL), 3, 2, 1),
    "max_pool2d": lambda: (F.max_pool2d, _x(*IMAGE), 3, 2, 1),
    "max_pool2d, channels last": lambda: (F.max_pool2d, _x(*IMAGE, channels_last=True), 3, 2, 1),
    "max_pool3d": lambda: (F.max_pool3d, _x(*VOLUME), 2, 2),
    "avg_pool1d": lambda: (F.avg_pool1d, _x(*SIGNAL), 3, 2, 1),
    "avg_pool2d": lambda: (F.avg_pool2d, _x(*IMAGE), 3, 2, 1),
    "avg_pool2d, channels last": lambda: (F.avg_pool2d, _x(*IMAGE, channels_last=True), 3, 1, 1),
    "avg_pool3d": lambda: (F.avg_pool3d, _x(*VOLUME), 2, 2),
    "adaptive_max_pool1d": lambda: (F.adaptive_max_pool1d, _x(*SIGNAL), 7),
    "adaptive_max_pool2d": lambda: (F.adaptive_max_pool2d, _x(*IMAGE), (7, 5)),
    "adaptive_max_pool3d": lambda: (F.adaptive_max_pool3d, _x(*VOLUME), 5),
    "adaptive_avg_pool1d": lambda: (F.adaptive_avg_pool1d, _x(*SIGNAL), 7),
    "adaptive_avg_pool2d": lambda: (F.adaptive_avg_pool2d, _x(*IMAGE), 1),
    "adaptive_avg_pool2d, channels last": lambda: (F.adaptive_avg_pool2d, _x(*IMAGE, channels_last=True), (7, 5)),
    "adaptive_avg_pool3d": lambda: (F.adaptive_avg_pool3d, _x(*VOLUME), 5),
    "batch_norm": lambda: (F.batch_norm, _x(*IMAGE), None, None, _x(24), _x(24), True),
    "batch_norm, channels last": lambda: (
        F.batch_norm, _x(*IMAGE, channels_last=True), None, None, _x(24), _x(24), True
    ),
    "batch_norm, rows": lambda: (F.batch_norm, _x(*ROWS), None, None, _x(37), _x(37), True),
    "batch_norm, few channels": lambda: (F.batch_norm, _x(64, 1, 40, 40), None, None, _x(1), _x(1), True),
    "batch_norm, evaluation": lambda: (F.batch_norm, _x(*IMAGE), torch.randn(24), torch.ones(24), _x(24), _x(24)),
    "batch_norm_relu": lambda: (F.batch_norm_relu, _x(*IMAGE), None, None, _x(24), _x(24), True),
    "batch_norm_relu, residual": lambda: (
        F.batch_norm_relu, _x(*IMAGE), None, None, _x(24), _x(24), True, 0.1, 1e-5, _x(*IMAGE)
    ),
    "cross_entropy": lambda: (F.cross_entropy, _x(*ROWS), _classes(37, ROWS[0])),
    "cross_entropy, pixels": lambda: (F.cross_entropy, _x(*IMAGE), _classes(24, 6, 40, 36), torch.rand(24)),
    "cross_entropy, long rows": lambda: (F.cross_entropy, _x(8, 50000), _classes(50000, 8)),
    "cross_entropy, probabilities": lambda: (F.cross_entropy, _x(*ROWS), _x(*ROWS)),
    "nll_loss": lambda: (F.nll_loss, _x(*ROWS), _classes(37, ROWS[0])),
    "softmax": lambda: (F.softmax, _x(*ROWS), 1),
    "softmax, channels": lambda: (F.softmax, _x(*IMAGE), 1),
    "log_softmax": lambda: (F.log_softmax, _x(*ROWS), 1),
    **{
        name: lambda name=name: (getattr(F, name), _x(*IMAGE))
        for name in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu")
    },
    **{
        name: lambda name=name: (lambda x: getattr(F, name)(x.clone()), _x(*IMAGE))
        for name in ("relu_", "leaky_relu_")
    },
    "linear": lambda: (F.linear, _x(*ROWS), _x(64, 37), _x(64)),
    "linear, many features": lambda: (F.linear, _x(40, 3000), _x(300, 3000), _x(300)),
    "mse_loss": lambda: (F.mse_loss, _x(*IMAGE), _x(*IMAGE)),
    "binary_cross_entropy_with_logits": lambda: (
        F.binary_cross_entropy_with_logits, _x(*IMAGE), torch.rand(*IMAGE)
    ),
}  # fmt: skip


def test_every_operation_is_among_the_calls():
    assert {name.partition(",")[0] for name in CALLS} == set(OPERATIONS)


@pytest.fixture
def restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_on_every_run_and_any_number_of_threads(restored_threads, name):
    function, *args = CALLS[name]()
    results = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        output, gradients, _ = _grads(function, args, {})
        results.append([output.detach(), *(gradient.detach() for gradient in gradients)])
    for threads, repeated in zip((2, 3, 2), results[1:], strict=True):
        for index, (first, again) in enumerate(zip(results[0], repeated, strict=True)):
            assert torch.equal(first, again), (threads, "output" if index == 0 else f"gradient {index - 1}")
