"""Max pooling: values, winners and every derivative against torch's, on both backends."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from manual_ops.ops import max_pool as ops
from support import assert_same, assert_same_as_torch, assert_wrong_like_torch, gradchecks, kept_bytes, tensor

POOLS = {1: ops.max_pool1d, 2: ops.max_pool2d, 3: ops.max_pool3d}
ADAPTIVE = {1: ops.adaptive_max_pool1d, 2: ops.adaptive_max_pool2d, 3: ops.adaptive_max_pool3d}


def theirs(ours):
    return getattr(F, ours.__name__)


def assert_same_with_indices(ours, input, *args, **kwargs):
    """Values, gradient and indices."""
    assert_same_as_torch(ours, theirs(ours), input, *args, **kwargs)
    output, indices = ours(input, *args, return_indices=True, **kwargs)
    expected, expected_indices = theirs(ours)(input, *args, return_indices=True, **kwargs)
    assert torch.equal(output.nan_to_num(7), expected.nan_to_num(7))
    assert indices.dtype == torch.int64 and torch.equal(indices, expected_indices)


WINDOWS = [
    ((2, 3, 9), {"kernel_size": 2}),
    ((2, 3, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 10), {"kernel_size": 4, "stride": 3, "padding": 2, "dilation": 2, "ceil_mode": True}),
    ((1, 3, 1500), {"kernel_size": 5, "stride": 2}),
    ((2, 3, 9, 8), {"kernel_size": 2}),
    ((2, 17, 13, 11), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 12, 9), {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}),
    ((2, 2, 10, 10), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ((2, 2, 7, 6), {"kernel_size": 2, "stride": 5}),
    ((1, 2, 14, 15), {"kernel_size": (3, 2), "dilation": (2, 4), "padding": 1, "stride": 1}),
    ((1, 2, 30, 18), {"kernel_size": 17, "stride": 3, "padding": 8}),
    ((2, 3, 5, 6, 7), {"kernel_size": 2}),
    ((1, 5, 6, 7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 6, 5, 8), {"kernel_size": (2, 3, 1), "stride": (2, 1, 3), "padding": (1, 1, 0), "ceil_mode": True}),
    ((2, 3, 700), {"kernel_size": 40, "stride": 30, "padding": 20}),
    ((2, 2, 5, 300), {"kernel_size": (3, 41), "stride": (3, 30), "padding": (1, 20)}),
    ((1, 2, 30, 40), {"kernel_size": 5, "stride": 7, "padding": 2, "dilation": (1, 3)}),
]
PIECES = [
    ((2, 3, 10), 4),
    ((1, 2, 3), 7),
    ((2, 3, 9, 8), (3, 5)),
    ((2, 3, 17, 16), 1),
    ((1, 2, 5, 4), (7, None)),
    ((2, 20, 11, 12), 7),
    ((1, 2, 6, 5, 8), (2, 3, 5)),
    ((2, 3, 700), 3),
    ((2, 3, 9, 700), (3, 4)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "options"), WINDOWS)
def test_values_winners_and_gradients_are_those_of_torch(backend, device, shape, options, dtype):
    input = tensor(*shape, dtype=dtype, device=device)
    assert_same_with_indices(POOLS[len(shape) - 2], input, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "output_size"), PIECES)
def test_adaptive_pooling_is_that_of_torch(backend, device, shape, output_size, dtype):
    input = tensor(*shape, dtype=dtype, device=device)
    assert_same_with_indices(ADAPTIVE[len(shape) - 2], input, output_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "options"), WINDOWS[::3])
def test_16_bit_values_are_exact_and_gradients_are_rounded_once(backend, device, shape, options, dtype):
    input = tensor(*shape, dtype=dtype, device=device)
    wide = input.detach().double().requires_grad_()
    ours = POOLS[len(shape) - 2]
    output, expected = ours(input, **options), theirs(ours)(wide, **options)
    assert output.dtype == dtype and torch.equal(output.double(), expected)
    grad_output = torch.randn(output.shape, device=device).to(dtype)
    (gradient,) = torch.autograd.grad(output, input, grad_output)
    (expected_gradient,) = torch.autograd.grad(expected, wide, grad_output.double())
    assert_same(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize("channels", [1, 3, 16, 21, 70, 300])
@pytest.mark.parametrize(("shape", "options"), [(s, o) for s, o in WINDOWS if len(s) > 3 and s[2] < 20][::2])
def test_channels_last_stays_channels_last_forward_and_backward(backend, device, shape, options, channels):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    input = torch.randn(2, channels, *shape[2:], device=device).contiguous(memory_format=memory_format).requires_grad_()
    assert_same_with_indices(POOLS[len(shape) - 2], input, **options)
    output = POOLS[len(shape) - 2](input, **options)
    assert output.is_contiguous(memory_format=memory_format)
    assert torch.autograd.grad(output.sum(), input)[0].is_contiguous(memory_format=memory_format)


STRIDED = {
    "transposed": lambda: torch.randn(2, 3, 9, 8).transpose(2, 3),
    "sliced": lambda: torch.randn(2, 6, 9, 16)[:, ::2, :, ::2],
    "expanded": lambda: torch.randn(2, 1, 9, 8).expand(2, 3, 9, 8),
    "sliced channels_last": lambda: torch.randn(2, 3, 18, 8).contiguous(memory_format=torch.channels_last)[:, :, ::2],
    "batch innermost": lambda: torch.randn(3, 9, 8, 2).permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_inputs_of_any_strides(backend, device, make):
    assert_same_with_indices(ops.max_pool2d, make().to(device).requires_grad_(), 3, 2, 1)


def test_an_expanded_gradient(backend, device):
    input = tensor(2, 3, 9, 8, device=device)
    (gradient,) = torch.autograd.grad(ops.max_pool2d(input, 3, 2).sum(), input)
    assert_same(gradient, torch.autograd.grad(F.max_pool2d(input, 3, 2).sum(), input)[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_unbatched_and_empty_batch(backend, device, axes):
    assert_same_with_indices(POOLS[axes], tensor(3, *(7, 6, 5)[:axes], device=device), 2)
    assert_same_with_indices(ADAPTIVE[axes], tensor(3, *(7, 6, 5)[:axes], device=device), 2)
    assert_same_with_indices(POOLS[axes], tensor(0, 3, *(7, 6, 5)[:axes], device=device), 2)
    assert_same_with_indices(ADAPTIVE[axes], tensor(0, 3, *(7, 6, 5)[:axes], device=device), 2)
    assert ADAPTIVE[axes](tensor(2, 3, *(7, 6, 5)[:axes], device=device), 0).shape == (2, 3, *(0,) * axes)
    input = tensor(2, 3, *(7, 6, 5)[:axes], device=device)
    (gradient,) = torch.autograd.grad(ADAPTIVE[axes](input, 0).sum(), input)
    assert not gradient.any()


@pytest.mark.parametrize("shape", [(2, 3, 12), (2, 17, 9, 8), (1, 2, 5, 6, 7)])
@pytest.mark.parametrize("value", ["ties", "zeros", "minus infinity", "NaN", "both"])
def test_the_first_of_equals_and_the_last_nan_win(backend, device, shape, value):
    input = torch.randn(shape, device=device).round()
    if value == "zeros":
        input = torch.where(torch.rand(shape, device=device) < 0.5, -0.0, 0.0)
    if value in ("minus infinity", "both"):
        input[torch.rand(shape, device=device) < 0.7] = -torch.inf
    if value in ("NaN", "both"):
        input[torch.rand(shape, device=device) < 0.3] = torch.nan
    input.requires_grad_()
    axes = len(shape) - 2
    assert_same_with_indices(POOLS[axes], input, 3, 2, 1)
    assert_same_with_indices(ADAPTIVE[axes], input, 3)


def test_a_window_with_nothing_but_padding_is_minus_infinity_and_takes_no_gradient(backend, device):
    input = tensor(1, 1, 2, 4, device=device)
    output, indices = ops.max_pool2d(input, 2, 1, 1, 3, return_indices=True)
    expected, expected_indices = F.max_pool2d(input, 2, 1, 1, 3, return_indices=True)
    assert torch.equal(output, expected) and output.isneginf().any()
    assert torch.equal(indices[output > -torch.inf], expected_indices[output > -torch.inf])
    (gradient,) = torch.autograd.grad(output, input, torch.ones_like(output))
    assert gradient.sum() == (output > -torch.inf).sum()


@pytest.mark.cpu("torch has no max pooling of integers on CUDA")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_run_as_in_torch(backend, device, dtype):
    input = torch.randint(0, 9, (2, 3, 9, 8), device=device).to(dtype)
    for ours, theirs in zip(
        ops.max_pool2d(input, 3, 2, 1, return_indices=True),
        F.max_pool2d(input, 3, 2, 1, return_indices=True),
        strict=True,
    ):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def distinct(*shape):
    """No two values within a finite difference of each other."""
    numel = torch.Size(shape).numel()
    return (torch.randperm(numel).double() / 8).reshape(shape).requires_grad_()


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(ops.max_pool1d, kernel_size=3, stride=2, padding=1),
        functools.partial(ops.adaptive_max_pool1d, output_size=4),
    ],
)
def test_derivatives_in_1d(backend, function):
    gradchecks(function, distinct(2, 2, 7))


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(ops.max_pool2d, kernel_size=2, stride=1, dilation=2),
        functools.partial(ops.max_pool2d, kernel_size=3, stride=2, padding=1, ceil_mode=True),
        functools.partial(ops.adaptive_max_pool2d, output_size=(2, 3)),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_derivatives_in_2d(backend, function, layout):
    input = distinct(1, 2, 5, 4).detach()
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        input = input.transpose(2, 3)
    gradchecks(function, input.requires_grad_())


def test_derivatives_in_3d(backend):
    gradchecks(functools.partial(ops.max_pool3d, kernel_size=2, stride=1), distinct(1, 1, 3, 3, 2))
    gradchecks(functools.partial(ops.adaptive_max_pool3d, output_size=2), distinct(1, 1, 3, 3, 2))


def test_second_derivatives_are_those_of_torch(backend, device):
    input = tensor(2, 3, 9, 8, device=device)

    def second(pool):
        (gradient,) = torch.autograd.grad(pool(input, 3, 2).pow(3).sum(), input, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), input)[0]

    assert_same(second(ops.max_pool2d), second(F.max_pool2d))


@pytest.mark.parametrize("in_dim", [0, 1, 4])
def test_vmap_over_an_input_dimension(backend, device, in_dim):
    input = torch.randn(2, 3, 9, 8, device=device).unsqueeze(in_dim).repeat_interleave(4, in_dim).mul(2)
    input = input + torch.randn_like(input)
    ours, theirs = (
        torch.vmap(lambda x, pool=pool: pool(x, 3, 2, 1, return_indices=True), in_dims=in_dim)(input)
        for pool in (ops.max_pool2d, F.max_pool2d)
    )
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_per_sample_gradients_and_hessians(backend, device):
    input = torch.randn(4, 3, 9, 8, dtype=torch.float64, device=device)
    grads = [
        torch.vmap(torch.func.grad(lambda x, pool=pool: pool(x, 3, 2).pow(2).sum()))(input)
        for pool in (ops.max_pool2d, F.max_pool2d)
    ]
    assert_same(*grads)
    x = input[0, :1, :4, :4]
    hessians = [
        torch.func.hessian(lambda x, p=pool: p(x, 2).pow(3).sum())(x) for pool in (ops.max_pool2d, F.max_pool2d)
    ]
    assert_same(*hessians)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_pass_opcheck(adaptive, channels_last):
    input = torch.randn(2, 3, 7, 6)
    window = ([], [], [], []) if adaptive else ([3, 2], [2, 1], [1, 0], [1, 2])
    output_size = [3, 4]
    for which in ("native", "python"):
        forward = getattr(ops.max_pool_forward, which)
        torch.library.opcheck(forward, (input, output_size, *window, channels_last))
        output, winner = forward(input, output_size, *window, channels_last)
        torch.library.opcheck(getattr(ops.max_pool_scatter, which), (output, winner, [7, 6], *window, channels_last))
        torch.library.opcheck(getattr(ops.max_pool_pick, which), (input, winner, *window, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
def test_native_bits_do_not_depend_on_the_run_or_the_threads(channels_last):
    input = torch.randn(3, 37, 61, 43)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    input.requires_grad_()

    def run():
        output = ops.max_pool2d(input, 3, 1, 1)
        return output, *torch.autograd.grad(output, input, torch.cos(output.detach()))

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for first, second in itertools.pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_byte_an_output_is_kept_for_backward(backend):
    input = tensor(2, 3, 32, 32, dtype=torch.float32)
    assert kept_bytes(lambda: ops.max_pool2d(input, 3, 2, 1)) == 2 * 3 * 16 * 16
    assert kept_bytes(lambda: ops.max_pool2d(input, 16)) == 2 * 3 * 2 * 2
    assert kept_bytes(lambda: ops.max_pool2d(input, 17, 1)) == 4 * 2 * 3 * 16 * 16
    assert kept_bytes(lambda: ops.adaptive_max_pool2d(input, 2)) == 2 * 3 * 2 * 2


def x(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


WRONG = [
    (ops.max_pool1d, (x(2, 3, 9), 0), {}),
    (ops.max_pool1d, (x(2, 3, 9), 2, -1), {}),
    (ops.max_pool1d, (x(9), 2), {}),
    (ops.max_pool1d, (x(2, 3, 9), (2, 2)), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 0), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), -1), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 2, 0), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 3, 2, 2), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 3, 2, -1), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 3, 2, 1, 0), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 3, 2, 2, 2), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 10), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 2.0), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), "2"), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), True), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), (2, 2, 2)), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), ()), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 2), {"stride": (1, 1, 1)}),
    (ops.max_pool2d, (x(2, 3, 9, 9), 2), {"ceil_mode": 1}),
    (ops.max_pool2d, (x(9, 9), 2), {}),
    (ops.max_pool2d, (x(1, 2, 3, 9, 9), 2), {}),
    (ops.max_pool2d, (x(2, 0, 9, 9), 2), {}),
    (ops.max_pool2d, (x(2, 3, 0, 9), 2), {}),
    (ops.max_pool2d, (x(0, 9, 9), 2), {}),
    (ops.max_pool2d, ([[1.0]], 2), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9, dtype=torch.bool), 2), {}),
    (ops.max_pool2d, (x(2, 3, 9, 9, dtype=torch.complex64), 2), {}),
    (ops.max_pool3d, (x(2, 3, 4, 4, 4), 5), {}),
    (ops.max_pool3d, (x(2, 4, 4), 2), {}),
    (ops.adaptive_max_pool1d, (x(2, 3, 9), -1), {}),
    (ops.adaptive_max_pool1d, (x(2, 3, 9), (3, 3)), {}),
    (ops.adaptive_max_pool1d, (x(2, 3, 9), None), {}),
    (ops.adaptive_max_pool1d, (x(2, 3, 9), (None,)), {}),
    (ops.adaptive_max_pool1d, (x(9), (None,)), {}),
    (ops.adaptive_max_pool2d, (x(2, 3, 9, 9), (3,)), {}),
    (ops.adaptive_max_pool2d, (x(2, 3, 9, 9), 3.0), {}),
    (ops.adaptive_max_pool2d, (x(2, 3, 9, 9), (3.0, 3)), {}),
    (ops.adaptive_max_pool2d, (x(2, 3, 9, 9), (-1, 3)), {}),
    (ops.adaptive_max_pool2d, (x(2, 3, 0, 9), 3), {}),
    (ops.adaptive_max_pool2d, (x(2, 0, 9, 9), 3), {}),
    (ops.adaptive_max_pool3d, (x(2, 9, 9), 3), {}),
]


@pytest.mark.parametrize(("ours", "args", "kwargs"), WRONG)
def test_wrong_calls_raise_as_in_torch(ours, args, kwargs):
    assert_wrong_like_torch(ours, theirs(ours), *args, **kwargs)


def test_native_kernels_refuse_what_they_cannot_read():
    input, winner = torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    window = ([2, 2], [2, 2], [0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="winner"):
        ops.max_pool_pick.native(input, winner[:1], *window, False)
    with pytest.raises(RuntimeError, match="winner"):
        ops.max_pool_scatter.native(input, winner, [8, 8], *window, False)
    with pytest.raises(RuntimeError, match="winner"):
        ops.max_pool_scatter.native(winner.float(), winner.long(), [8, 8], *window, False)
    with pytest.raises(RuntimeError, match="one option an axis"):
        ops.max_pool_forward.native(input, [4, 4], [2], [2], [0], [1], False)
    assert not ops.max_pool_pick.native(input, winner + 200, *window, False).any()  # no such tap: nothing is read


@pytest.mark.parametrize(
    ("axes", "kernel_size", "padding", "dilation"),
    [(1, 3, 1, 3), (1, 3, 1, 100), (1, 9, 4, 50), (1, 3, 1, 700), (2, 3, 1, 3), (3, 3, 1, 2)],
)
def test_rows_too_wide_for_one_tile_under_dilation_and_padding(backend, axes, kernel_size, padding, dilation):
    """There the first inputs of neighbouring windows do not ascend."""
    lead = {1: (), 2: (7,), 3: (5, 5)}[axes]
    input = tensor(1, 3, *lead, 2000, dtype=torch.float32)
    dilation = [2 if axes > 1 else dilation] * (axes - 1) + [dilation]
    ours, theirs = getattr(ops, f"max_pool{axes}d"), getattr(F, f"max_pool{axes}d")
    assert_same_as_torch(ours, theirs, input, kernel_size, 1, padding, dilation)


def test_adaptive_windows_of_an_empty_axis_have_no_winner():
    empty, winner = torch.randn(1, 1, 0), torch.zeros(1, 1, 1, dtype=torch.uint8)
    assert ops.max_pool_pick.native(empty, winner, [], [], [], [], False).item() == 0


def test_windows_with_too_many_taps_are_refused(backend):
    with pytest.raises(NotImplementedError, match="taps"):
        ops.max_pool2d(torch.randn(1, 1, 4, 4), 70_000, padding=35_000)
