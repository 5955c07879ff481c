"""The worked examples of four texts on backpropagation in CNNs, run on manual_ops.

Where a text errs, its form is shown to fail or to be wrong, and the corrected one to be right.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import manual_ops
from manual_ops import functional as M
from manual_ops import nn
from support import assert_same, assert_same_as_torch, tensor

pytestmark = pytest.mark.cpu("compares with NumPy, by hand")

# --- The 2x2 network: a 2x2 filter on a 2x2 image, ReLU, a dense layer to 3 classes, softmax, one step of SGD.

IMAGE = [[1.0, 2.0], [3.0, 4.0]]
FILTER = [[0.1, 0.2], [0.3, 0.4]]
DENSE = [[0.1], [0.3], [0.5]]
DENSE_BIAS = [0.1, 0.2, 0.3]
RATE = 0.1


def _step_by_hand():
    """The example in NumPy: loss, then (filter, filter bias, dense, dense bias) after one step."""
    x, w1, b1 = np.array(IMAGE), np.array(FILTER), np.array([0.1])
    w2, b2, target = np.array(DENSE), np.array(DENSE_BIAS), np.array([1.0, 0.0, 0.0])
    z1 = (x * w1).sum() + b1  # (1,): one window
    a1 = np.maximum(z1, 0)
    z2 = w2 @ a1 + b2  # (3,)
    y = np.exp(z2 - z2.max()) / np.exp(z2 - z2.max()).sum()
    loss = -(target * np.log(y)).sum()
    delta2 = y - target
    delta1 = (w2.T @ delta2) * (z1 > 0)  # (1,)
    return loss, (w1 - RATE * delta1 * x, b1 - RATE * delta1, w2 - RATE * np.outer(delta2, a1), b2 - RATE * delta2)


def _parameters():
    values = [[[FILTER]], [0.1], DENSE, DENSE_BIAS]
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def _step(functions):
    w1, b1, w2, b2 = parameters = _parameters()
    x = torch.tensor([[IMAGE]], dtype=torch.float64)
    a1 = functions.relu(functions.conv2d(x, w1, b1)).flatten(1)  # (1, 1)
    loss = functions.cross_entropy(functions.linear(a1, w2, b2), torch.tensor([0]))
    loss.backward()
    with torch.no_grad():
        return loss, [parameter - RATE * parameter.grad for parameter in parameters]


def test_2x2_network_takes_the_step_worked_out_by_hand(backend):
    loss, updated = _step(M)
    expected_loss, expected = _step_by_hand()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-12)
    for got, want in zip(updated, expected, strict=True):
        np.testing.assert_allclose(got.numpy().reshape(want.shape), want, rtol=1e-12)
    torch_loss, torch_updated = _step(F)
    assert_same(loss, torch_loss)
    for got, want in zip(updated, torch_updated, strict=True):
        assert_same(got, want)


def test_2x2_network_as_modules(backend):
    model = nn.Sequential(nn.Conv2d(1, 1, 2), nn.ReLU(), nn.Flatten(), nn.Linear(1, 3)).double()
    for parameter, value in zip(model.parameters(), _parameters(), strict=True):
        parameter.data.copy_(value)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss = nn.CrossEntropyLoss()(model(torch.tensor([[IMAGE]], dtype=torch.float64)), torch.tensor([0]))
    loss.backward()
    optimizer.step()
    for got, want in zip(model.parameters(), _step_by_hand()[1], strict=True):
        np.testing.assert_allclose(got.detach().numpy().reshape(want.shape), want, rtol=1e-12)


def test_2x2_network_with_a_3x2_dense_weight_does_not_multiply():
    wrong = [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]]
    with pytest.raises(ValueError):
        np.array(wrong) @ np.array([3.1])
    with pytest.raises(RuntimeError):
        M.linear(torch.tensor([[3.1]]), torch.tensor(wrong))


def test_2x2_network_never_had_a_loss_of_1_5():
    assert _step_by_hand()[0] == pytest.approx(1.9844, abs=1e-4)


# --- Convolution in one and two dimensions, against numerical gradients.


def _numerical(function, x, eps=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[index] += eps
        minus[index] -= eps
        gradient[index] = (function(plus) - function(minus)) / (2 * eps)
    return gradient


def _correlate(x, w, stride=1, padding=0):
    """A correlation of two arrays of one rank, by its definition."""
    x = np.pad(x, padding)
    size = [(n - k) // stride + 1 for n, k in zip(x.shape, w.shape, strict=True)]
    y = np.zeros(size)
    for index in np.ndindex(*size):
        window = tuple(slice(i * stride, i * stride + k) for i, k in zip(index, w.shape, strict=True))
        y[index] = (x[window] * w).sum()
    return y


CONVOLUTIONS = [
    ((8,), (3,), 1, 0),
    ((9,), (4,), 2, 1),
    ((5, 6), (3, 3), 1, 0),
    ((6, 6), (3, 3), 2, 0),
    ((7, 7), (3, 3), 2, 1),
    ((7, 6), (2, 3), 3, 2),
]


@pytest.mark.parametrize(("size", "window", "stride", "padding"), CONVOLUTIONS)
def test_convolution_gradients_are_the_numerical_ones(backend, size, window, stride, padding):
    rng = np.random.default_rng(42)
    x, w = rng.standard_normal(size), rng.standard_normal(window)
    g = rng.standard_normal(_correlate(x, w, stride, padding).shape)
    input = torch.tensor(x)[None, None].requires_grad_()
    weight = torch.tensor(w)[None, None].requires_grad_()
    output = (M.conv1d if len(size) == 1 else M.conv2d)(input, weight, stride=stride, padding=padding)
    np.testing.assert_allclose(output[0, 0].detach().numpy(), _correlate(x, w, stride, padding), rtol=1e-12)
    output.backward(torch.tensor(g)[None, None])
    by_input = _numerical(lambda x: (_correlate(x, w, stride, padding) * g).sum(), x)
    by_weight = _numerical(lambda w: (_correlate(x, w, stride, padding) * g).sum(), w)
    np.testing.assert_allclose(input.grad[0, 0].numpy(), by_input, atol=1e-8)
    np.testing.assert_allclose(weight.grad[0, 0].numpy(), by_weight, atol=1e-8)


def test_1d_input_gradient_is_the_full_convolution_with_the_flipped_kernel(backend):
    w, g = tensor(3, requires_grad=False), tensor(6, requires_grad=False)
    x = tensor(8)
    M.conv1d(x[None, None], w[None, None]).backward(g[None, None])
    padded = F.pad(g, (2, 2))
    full = torch.stack([(padded[i : i + 3] * w.flip(0)).sum() for i in range(8)])
    assert_same(x.grad, full)


def _full_correlation_of_the_spread_gradient(g, w, input_size, stride):
    """The input gradient as one text computes it: spread by the stride, padded by k-1 on both sides, and read once for
    each input, as if the windows always tiled it."""
    k = w.shape[0]
    spread = np.zeros([(n - 1) * stride + 1 for n in g.shape])
    spread[::stride, ::stride] = g
    padded = np.pad(spread, k - 1)
    grad_input = np.zeros(input_size)
    for i, j in np.ndindex(*input_size):
        grad_input[i, j] = (padded[i : i + k, j : j + k] * np.rot90(w, 2)).sum()
    return grad_input


def test_full_correlation_breaks_where_the_windows_do_not_tile_the_input():
    g, w = np.ones((2, 2)), np.ones((3, 3))
    assert _full_correlation_of_the_spread_gradient(g, w, (5, 5), 2).shape == (5, 5)
    with pytest.raises(ValueError):
        _full_correlation_of_the_spread_gradient(g, w, (6, 6), 2)


def test_input_gradient_needs_the_input_size_at_stride_2(backend):
    x, w = tensor(1, 1, 6, 6), tensor(1, 1, 3, 3)
    assert_same_as_torch(M.conv2d, F.conv2d, x, w, stride=2)
    M.conv2d(x, w, stride=2).sum().backward()
    assert (x.grad[..., 5, :] == 0).all() and (x.grad[..., 5] == 0).all()  # no window reaches the last row and column


def test_input_gradient_is_a_transposed_convolution(backend):
    x, w = tensor(1, 3, 8, 8), tensor(16, 3, 3, 3)
    y = M.conv2d(x, w, padding=1)
    g = torch.randn_like(y)
    y.backward(g)
    assert_same(x.grad, M.conv_transpose2d(g, w, padding=1))
    assert_same(x.grad, F.conv_transpose2d(g, w, padding=1))


def test_multi_channel_gradients(backend):
    conv = nn.Conv2d(3, 16, 3, padding=1).double()
    x = tensor(2, 3, 8, 8)
    y = conv(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert x.grad.shape == (2, 3, 8, 8)
    assert conv.weight.grad.shape == (16, 3, 3, 3)
    assert_same(conv.bias.grad, g.sum((0, 2, 3)))
    padded = F.pad(x.detach(), (1, 1, 1, 1))
    for m, n in np.ndindex(3, 3):  # dL/dW[o, c, m, n] = sum over i, j of dL/dY[o, i, j] * X[c, i+m, j+n]
        expected = torch.einsum("boij,bcij->oc", g, padded[:, :, m : m + 8, n : n + 8])
        assert_same(conv.weight.grad[:, :, m, n], expected)


class _Conv2dManual(torch.autograd.Function):
    """A backward that is right at stride 1 only: the input gradient is not told the input's size, and the weight
    gradient forgets that the stride becomes its dilation."""

    @staticmethod
    def forward(ctx, input, weight, stride, padding):
        ctx.save_for_backward(input, weight)
        ctx.options = stride, padding
        return M.conv2d(input, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        stride, padding = ctx.options
        grad_input = M.conv_transpose2d(grad_output, weight, stride=stride, padding=padding)
        grad_weight = M.conv2d(input.transpose(0, 1), grad_output.transpose(0, 1), padding=padding).transpose(0, 1)
        return grad_input, grad_weight, None, None


def _manual_gradients(size, stride, padding):
    input, weight = tensor(2, 3, size, size), tensor(4, 3, 3, 3)
    output = _Conv2dManual.apply(input, weight, stride, padding)
    cotangent = torch.randn_like(output)
    right = torch.autograd.grad(M.conv2d(input, weight, None, stride, padding), (input, weight), cotangent)
    return torch.autograd.grad(output, (input, weight), cotangent), right


def test_conv2d_manual_is_right_at_stride_1(backend):
    for got, want in zip(*_manual_gradients(6, 1, 1), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("size", [6, 7])
def test_conv2d_manual_has_the_wrong_shapes_at_stride_2(backend, size):
    with pytest.raises(RuntimeError, match="shape"):
        _manual_gradients(size, 2, 0)


def _corrected_gradients(input, weight, grad_output, stride, padding):
    """The same two gradients with what they lacked: output_padding up to the input's size; dilation = stride."""
    reached = [(n - 1) * stride - 2 * padding + 3 for n in grad_output.shape[2:]]
    missing = [size - r for size, r in zip(input.shape[2:], reached, strict=True)]
    grad_input = M.conv_transpose2d(grad_output, weight, None, stride, padding, missing)
    correlation = M.conv2d(input.transpose(0, 1), grad_output.transpose(0, 1), None, 1, padding, stride)
    return grad_input, correlation.transpose(0, 1)[:, :, :3, :3]


@pytest.mark.parametrize(("size", "padding"), [(6, 0), (7, 0), (6, 1), (7, 1)])
def test_conv2d_manual_corrected(backend, size, padding):
    input, weight = tensor(2, 3, size, size), tensor(4, 3, 3, 3)
    output = M.conv2d(input, weight, None, 2, padding)
    cotangent = torch.randn_like(output)
    right = torch.autograd.grad(output, (input, weight), cotangent)
    for got, want in zip(_corrected_gradients(input, weight, cotangent, 2, padding), right, strict=True):
        assert_same(got, want)


def test_the_two_convolution_gradients_are_not_to_be_swapped(backend):
    """One text says: output_grad * filter updates the weights, output_grad * input is sent back. It is the reverse."""
    x, w = tensor(1, 1, 6, 6), tensor(1, 1, 3, 3)
    y = M.conv2d(x, w)
    g = torch.randn_like(y)
    y.backward(g)
    assert_same(w.grad, M.conv2d(x, g))
    assert_same(x.grad, M.conv2d(g, w.flip(2, 3), padding=2))
    swapped_for_weight = M.conv2d(g, w.flip(2, 3), padding=2)
    assert swapped_for_weight.shape != w.shape
    assert M.conv2d(x, g).shape != x.shape


# --- Pooling.


def _max_pool_by_hand(x, size, stride):
    """Values and the positions of the winners."""
    shape = [(n - size) // stride + 1 for n in x.shape]
    y, winners = np.zeros(shape), np.zeros((*shape, 2), dtype=int)
    for i, j in np.ndindex(*shape):
        window = x[i * stride : i * stride + size, j * stride : j * stride + size]
        m, n = np.unravel_index(window.argmax(), window.shape)
        y[i, j], winners[i, j] = window[m, n], (i * stride + m, j * stride + n)
    return y, winners


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_max_pooling_routes_the_gradient_to_the_winner(backend, size, stride):
    x = tensor(7, 7)
    y, indices = M.max_pool2d(x[None, None], size, stride, return_indices=True)
    values, winners = _max_pool_by_hand(x.detach().numpy(), size, stride)
    np.testing.assert_array_equal(y[0, 0].detach().numpy(), values)
    np.testing.assert_array_equal(indices[0, 0].numpy(), winners[..., 0] * 7 + winners[..., 1])
    g = torch.randn_like(y)
    y.backward(g)
    expected = np.zeros((7, 7))
    for i, j in np.ndindex(*values.shape):
        expected[tuple(winners[i, j])] += g[0, 0, i, j].item()
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-12)


def test_max_pooling_has_one_nonzero_gradient_per_output(backend):
    x = tensor(1, 1, 4, 4)
    y, _ = nn.MaxPool2d(2, return_indices=True)(x)
    y.sum().backward()
    assert (x.grad != 0).sum().item() == y.numel()


def test_ties_go_to_the_first_and_not_to_every_maximum(backend):
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    M.max_pool2d(x, 2).sum().backward()
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[::2, ::2] = 1
    assert torch.equal(x.grad[0, 0], expected)
    every_maximum = torch.ones(4, 4, dtype=torch.float64)
    assert not torch.equal(x.grad[0, 0], every_maximum)


def test_average_pooling_spreads_the_gradient_evenly(backend):
    x = tensor(1, 1, 4, 4)
    nn.AvgPool2d(2)(x).sum().backward()
    assert x.grad.unique().tolist() == [0.25]


@pytest.mark.parametrize(
    "options",
    [{"padding": 1, "count_include_pad": False}, {"ceil_mode": True}],
    ids=["padding not counted", "ceil_mode"],
)
def test_one_over_k_squared_is_wrong_at_the_border(backend, options):
    x = tensor(1, 1, 5, 5)
    assert_same_as_torch(M.avg_pool2d, F.avg_pool2d, x, 2, **options)
    M.avg_pool2d(x, 2, **options).sum().backward()
    assert x.grad.max().item() == 1.0  # a window with a single element inside passes its gradient on undivided
    assert x.grad.min().item() == 0.25


def test_global_average_pooling_divides_by_the_area_and_does_not_reshape(backend):
    x = tensor(2, 3, 4, 5)
    y = M.adaptive_avg_pool2d(x, 1)
    g = torch.randn_like(y)
    y.backward(g)
    assert_same(x.grad, (g / 20).expand(2, 3, 4, 5))
    with pytest.raises(RuntimeError):
        g.reshape(x.shape)


# --- Whole networks.


class _SimpleCNN(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.conv1, self.conv2 = layers.Conv2d(1, 16, 3, padding=1), layers.Conv2d(16, 32, 3, padding=1)
        self.relu, self.pool = layers.ReLU(), layers.MaxPool2d(2, 2)
        self.fc = layers.Linear(32 * 7 * 7, 10)

    def forward(self, x):
        x = self.pool(self.relu(self.conv1(x)))
        x = self.pool(self.relu(self.conv2(x)))
        return self.fc(x.flatten(1))


def _gradient_magnitudes(model, x, target, loss):
    magnitudes = {}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None:
            module.weight.register_hook(lambda grad, name=name: magnitudes.update({name: grad.abs().mean().item()}))
    loss(model(x), target).backward()
    return magnitudes


def test_simple_cnn_has_torchs_gradient_magnitudes(backend):
    ours, theirs = _SimpleCNN(nn).double(), _SimpleCNN(torch.nn).double()
    theirs.load_state_dict(ours.state_dict())
    x, target = torch.randn(4, 1, 28, 28, dtype=torch.float64), torch.randint(0, 10, (4,))
    magnitudes = _gradient_magnitudes(ours, x, target, nn.CrossEntropyLoss())
    assert set(magnitudes) == {"conv1", "conv2", "fc"}
    assert magnitudes == pytest.approx(_gradient_magnitudes(theirs, x, target, torch.nn.CrossEntropyLoss()), rel=1e-9)


def _largest_difference_from_numerical(layer, x, eps):
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    largest = 0.0
    for i in range(min(100, x.numel())):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = eps
        step = step.view_as(x)
        with torch.no_grad():
            numerical = (layer(x + step).sum() - layer(x - step).sum()) / (2 * eps)
        largest = max(largest, abs(numerical.item() - x.grad.flatten()[i].item()))
    return largest


def test_gradient_check_passes_in_float64_and_measures_rounding_in_float32(backend):
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 6, 6)
    assert _largest_difference_from_numerical(layer.double(), x.double(), 1e-5) < 1e-8
    assert _largest_difference_from_numerical(layer.float(), x, 1e-5) > 1e-4


def test_downsampling_and_upsampling_pair(backend):
    down = nn.Conv2d(64, 32, 3, stride=2, padding=1)
    up = nn.ConvTranspose2d(32, 64, 3, stride=2, padding=1, output_padding=1)
    x = torch.randn(1, 64, 32, 32)
    y = down(x)
    z = up(y)
    assert y.shape == (1, 32, 16, 16)
    assert z.shape == x.shape
    torch_up = torch.nn.ConvTranspose2d(32, 64, 3, stride=2, padding=1, output_padding=1)
    torch_up.load_state_dict(up.state_dict())
    assert_same(z, torch_up(y))


def _keras_style(layers):
    return torch.nn.Sequential(
        layers.Conv2d(1, 32, 3), layers.ReLU(), layers.MaxPool2d(2), torch.nn.Flatten(), layers.Linear(32 * 13 * 13, 10)
    ).double()


def test_keras_style_cnn_trains_by_adam_as_torchs(backend):
    """Conv2D(32, 3x3, ReLU), MaxPooling2D(2), Flatten, Dense(10, softmax), categorical cross-entropy, Adam."""
    ours, theirs = _keras_style(nn), _keras_style(torch.nn)
    theirs.load_state_dict(ours.state_dict())
    classes = torch.arange(20) % 10
    images = 0.1 * torch.randn(20, 1, 28, 28, dtype=torch.float64)
    for image, label in zip(images, classes, strict=True):
        image[0, 2 * label : 2 * label + 4] += 1  # the class is the height of a bar
    one_hot = F.one_hot(classes, 10).double()
    curves = []
    for model, functions in ((ours, M), (theirs, F)):
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = functions.cross_entropy(model(images), one_hot)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
        assert losses[-1] < 0.2 * losses[0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    with torch.no_grad():
        assert (M.softmax(ours(images), 1).argmax(1) == classes).all()


def test_6x6_network_has_15_parameters_and_torchs_gradients(backend):
    def build(layers):
        return torch.nn.Sequential(
            layers.Conv2d(1, 1, 3), layers.ReLU(), layers.MaxPool2d(2), torch.nn.Flatten(), layers.Linear(4, 1)
        ).double()

    ours, theirs = build(nn), build(torch.nn)
    theirs.load_state_dict(ours.state_dict())
    assert sum(parameter.numel() for parameter in ours.parameters()) == 15
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    shapes, value = [], x
    for layer in ours:
        value = layer(value)
        shapes.append(tuple(value.shape[1:]))
    assert shapes == [(1, 4, 4), (1, 4, 4), (1, 2, 2), (4,), (1,)]
    target = torch.ones(1, 1, dtype=torch.float64)
    M.mse_loss(ours(x), target).backward()
    F.mse_loss(theirs(x), target).backward()
    for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(got.grad, want.grad)


def test_softmax_head_gradient_is_prediction_minus_truth(backend):
    z, target = tensor(4, 3), torch.tensor([0, 2, 1, 1])
    M.cross_entropy(z, target, reduction="sum").backward()
    assert_same(z.grad, M.softmax(z.detach(), 1) - F.one_hot(target, 3))


def test_sigmoid_head_gradient_is_prediction_minus_truth(backend):
    z, target = tensor(4, 3), torch.randint(0, 2, (4, 3)).double()
    M.binary_cross_entropy_with_logits(z, target, reduction="sum").backward()
    assert_same(z.grad, M.sigmoid(z.detach()) - target)


def test_mse_gradient_is_twice_the_mean_error(backend):
    y, target = tensor(4, 3), tensor(4, 3, requires_grad=False)
    M.mse_loss(y, target).backward()
    assert_same(y.grad, 2 * (y.detach() - target) / 12)


def test_pooling_has_no_parameters_and_dense_and_convolution_have():
    assert not list(manual_ops.nn.MaxPool2d(2).parameters())
    assert len(list(manual_ops.nn.Conv2d(1, 1, 1).parameters())) == 2
