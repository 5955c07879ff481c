"""Average pooling: values and every derivative against torch's, on both backends."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from manual_ops.ops import average_pool as ops
from support import assert_same, assert_same_as_torch, assert_wrong_like_torch, gradchecks, kept_bytes, tensor

POOLS = {1: ops.avg_pool1d, 2: ops.avg_pool2d, 3: ops.avg_pool3d}
ADAPTIVE = {1: ops.adaptive_avg_pool1d, 2: ops.adaptive_avg_pool2d, 3: ops.adaptive_avg_pool3d}


def theirs(ours):
    return getattr(F, ours.__name__)


WINDOWS = [
    ((2, 3, 9), {"kernel_size": 2}),
    ((2, 3, 11), {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
    ((1, 2, 10), {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True}),
    ((1, 3, 1500), {"kernel_size": 5, "stride": 2}),
    ((2, 3, 9, 8), {"kernel_size": 2}),
    ((2, 17, 13, 11), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((1, 2, 12, 9), {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "count_include_pad": False}),
    ((2, 2, 10, 10), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ((2, 2, 10, 10), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False}),
    ((2, 2, 10, 10), {"kernel_size": 4, "stride": 3, "padding": 2, "ceil_mode": True}),
    ((2, 2, 7, 6), {"kernel_size": 2, "stride": 5}),
    ((2, 2, 7, 6), {"kernel_size": 3, "stride": 2, "padding": 1, "divisor_override": 2}),
    ((2, 2, 7, 6), {"kernel_size": 3, "divisor_override": -5}),
    ((2, 3, 5, 6, 7), {"kernel_size": 2}),
    ((1, 5, 6, 7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 2, 6, 5, 8), {"kernel_size": (2, 3, 1), "stride": (2, 1, 3), "padding": (1, 1, 0), "ceil_mode": True}),
    ((1, 2, 6, 5, 8), {"kernel_size": 3, "padding": 1, "count_include_pad": False, "divisor_override": 7}),
    ((2, 3, 700), {"kernel_size": 101, "stride": 70, "padding": 40}),
    ((2, 2, 3, 300), {"kernel_size": (2, 90), "stride": (1, 70), "padding": (1, 40), "count_include_pad": False}),
    ((1, 2, 2, 3, 200), {"kernel_size": (1, 2, 65), "stride": (1, 1, 90), "divisor_override": 7}),
]
PIECES = [
    ((2, 3, 10), 4),
    ((1, 2, 3), 7),
    ((2, 3, 9, 8), (3, 5)),
    ((2, 3, 7, 7), 1),
    ((1, 2, 5, 4), (7, None)),
    ((2, 20, 11, 12), 7),
    ((1, 2, 6, 5, 8), (2, 3, 5)),
    ((1, 2, 6, 5, 8), 1),
    ((2, 3, 700), 3),
    ((2, 3, 4, 700), 3),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "options"), WINDOWS)
def test_values_and_gradients_are_those_of_torch(backend, device, shape, options, dtype):
    ours = POOLS[len(shape) - 2]
    assert_same_as_torch(ours, theirs(ours), tensor(*shape, dtype=dtype, device=device), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("shape", "output_size"), PIECES)
def test_adaptive_pooling_is_that_of_torch(backend, device, shape, output_size, dtype):
    ours = ADAPTIVE[len(shape) - 2]
    assert_same_as_torch(ours, theirs(ours), tensor(*shape, dtype=dtype, device=device), output_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "options"), WINDOWS[::3])
def test_16_bit_sums_are_rounded_once(backend, device, shape, options, dtype):
    ours = POOLS[len(shape) - 2]
    input = tensor(*shape, dtype=dtype, device=device)
    wide = input.detach().double().requires_grad_()
    output, expected = ours(input, **options), theirs(ours)(wide, **options)
    half_ulp = torch.finfo(dtype).eps * 0.51
    assert output.dtype == dtype
    assert_same(output.double(), expected, rtol=half_ulp, atol=1e-6)
    grad_output = torch.randn(output.shape, device=device).to(dtype)
    (gradient,) = torch.autograd.grad(output, input, grad_output)
    (expected_gradient,) = torch.autograd.grad(expected, wide, grad_output.double())
    assert_same(gradient.double(), expected_gradient, rtol=half_ulp, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 16, 21, 70, 300])
@pytest.mark.parametrize(("shape", "options"), [(s, o) for s, o in WINDOWS if len(s) > 3][::2])
def test_channels_last_stays_channels_last_forward_and_backward(backend, device, shape, options, channels):
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    input = torch.randn(2, channels, *shape[2:], device=device).contiguous(memory_format=memory_format).requires_grad_()
    ours = POOLS[len(shape) - 2]
    assert_same_as_torch(ours, theirs(ours), input, **options)
    output = ours(input, **options)
    if len(shape) == 5:
        memory_format = torch.contiguous_format  # torch's average pools of 3 dimensions return nothing else
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
    assert_same_as_torch(ops.avg_pool2d, F.avg_pool2d, make().to(device).requires_grad_(), 3, 2, 1)


def test_an_expanded_gradient(backend, device):
    input = tensor(2, 3, 9, 8, device=device)
    (gradient,) = torch.autograd.grad(ops.avg_pool2d(input, 3, 2).sum(), input)
    assert_same(gradient, torch.autograd.grad(F.avg_pool2d(input, 3, 2).sum(), input)[0])


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_unbatched_and_empty_batch(backend, device, axes):
    sizes = (7, 6, 5)[:axes]
    for batch in ((), (0,)):
        assert_same_as_torch(POOLS[axes], theirs(POOLS[axes]), tensor(*batch, 3, *sizes, device=device), 2)
        assert_same_as_torch(ADAPTIVE[axes], theirs(ADAPTIVE[axes]), tensor(*batch, 3, *sizes, device=device), 2)
    input = tensor(2, 3, *sizes, device=device)
    output = ADAPTIVE[axes](input, 0)
    assert output.shape == (2, 3, *(0,) * axes)
    assert not torch.autograd.grad(output.sum(), input)[0].any()


def test_adaptive_average_of_no_channels(backend, device):
    input = tensor(2, 0, 6, 5, device=device)
    output = ops.adaptive_avg_pool2d(input, 2)
    assert output.shape == F.adaptive_avg_pool2d(input, 2).shape
    (gradient,) = torch.autograd.grad(output.sum(), input)  # torch's own backward refuses
    assert gradient.shape == input.shape


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        (1, (2, 3, 0)),
        (2, (2, 3, 0, 4)),
        (2, (0, 4)),
        (2, (5, 4)),
        (2, (2, 3, 2, 5, 4)),
        (3, (6, 5, 4)),
        (3, (2, 0, 1, 2, 3)),
    ],
)
def test_one_adaptive_piece_is_the_mean_of_whatever_there_is(backend, device, axes, shape):
    assert_same_as_torch(ADAPTIVE[axes], theirs(ADAPTIVE[axes]), tensor(*shape, device=device), 1)


def test_nan_and_infinity_spread_as_in_torch(backend, device):
    input = torch.randn(2, 17, 12, 9, device=device)
    input[torch.rand_like(input) < 0.02] = torch.nan
    input[torch.rand_like(input) < 0.02] = torch.inf
    input[torch.rand_like(input) < 0.02] = -torch.inf
    assert_same_as_torch(ops.avg_pool2d, F.avg_pool2d, input.requires_grad_(), 3, 2, 1)


def test_each_position_gets_one_over_its_windows_divisor_not_one_over_the_kernel(backend, device):
    input = tensor(1, 1, 3, device=device)
    (gradient,) = torch.autograd.grad(ops.avg_pool1d(input, 2, 2, 1, count_include_pad=False).sum(), input)
    assert gradient.flatten().tolist() == [1, 0.5, 0.5]
    (gradient,) = torch.autograd.grad(ops.avg_pool1d(input, 2, 2, ceil_mode=True).sum(), input)
    assert gradient.flatten().tolist() == [0.5, 0.5, 1]


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        ((2, 2, 7), functools.partial(ops.avg_pool1d, kernel_size=3, stride=2, padding=1)),
        ((2, 2, 7), functools.partial(ops.adaptive_avg_pool1d, output_size=4)),
        ((1, 2, 5, 4), functools.partial(ops.avg_pool2d, kernel_size=3, stride=2, padding=1, ceil_mode=True)),
        ((1, 2, 5, 4), functools.partial(ops.avg_pool2d, kernel_size=2, padding=1, count_include_pad=False)),
        ((1, 2, 5, 4), functools.partial(ops.avg_pool2d, kernel_size=2, stride=1, divisor_override=3)),
        ((1, 2, 5, 4), functools.partial(ops.adaptive_avg_pool2d, output_size=(2, 3))),
        ((1, 1, 3, 3, 2), functools.partial(ops.avg_pool3d, kernel_size=2, stride=1)),
        ((1, 1, 3, 3, 2), functools.partial(ops.adaptive_avg_pool3d, output_size=2)),
    ],
)
def test_derivatives(backend, shape, function):
    gradchecks(function, tensor(*shape))


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_derivatives_of_inputs_that_are_not_contiguous(backend, layout):
    input = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    else:
        input = input.transpose(2, 3)
    gradchecks(functools.partial(ops.avg_pool2d, kernel_size=3, stride=2, padding=1), input.requires_grad_())


def test_second_derivatives_are_those_of_torch(backend, device):
    input = tensor(2, 3, 9, 8, device=device)

    def second(pool):
        (gradient,) = torch.autograd.grad(pool(input, 3, 2).pow(3).sum(), input, create_graph=True)
        return torch.autograd.grad(gradient.pow(2).sum(), input)[0]

    assert_same(second(ops.avg_pool2d), second(F.avg_pool2d))


@pytest.mark.parametrize("in_dim", [0, 1, 4])
def test_vmap_over_an_input_dimension(backend, device, in_dim):
    input = torch.randn(2, 3, 9, 8, device=device).unsqueeze(in_dim).repeat_interleave(4, in_dim)
    input = input + torch.randn_like(input)
    pools = ops.avg_pool2d, F.avg_pool2d
    assert_same(*(torch.vmap(lambda x, pool=pool: pool(x, 3, 2, 1), in_dims=in_dim)(input) for pool in pools))


def test_per_sample_gradients_and_hessians(backend, device):
    input = torch.randn(4, 3, 9, 8, dtype=torch.float64, device=device)
    pools = ops.adaptive_avg_pool2d, F.adaptive_avg_pool2d
    assert_same(*(torch.vmap(torch.func.grad(lambda x, p=p: p(x, (4, 3)).pow(2).sum()))(input) for p in pools))
    x = input[0, :1, :4, :4]
    assert_same(*(torch.func.hessian(lambda x, p=p: p(x, 3).pow(3).sum())(x) for p in pools))


@pytest.mark.parametrize("window", [([], [], []), ([3, 2], [2, 1], [1, 0])])
@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_pass_opcheck(window, channels_last):
    input, output = torch.randn(2, 3, 7, 6), torch.randn(2, 3, 4, 5)
    options = (*window, True, 0, channels_last)
    for which in ("native", "python"):
        torch.library.opcheck(getattr(ops.average_pool, which), (input, [4, 5], *options))
        torch.library.opcheck(getattr(ops.average_spread, which), (output, [7, 6], *options))


@pytest.mark.parametrize("channels_last", [False, True])
def test_native_bits_do_not_depend_on_the_run_or_the_threads(channels_last):
    input = torch.randn(3, 37, 61, 43)
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    input.requires_grad_()

    def run():
        results = []
        for output in (
            ops.avg_pool2d(input, 3, 1, 1),
            ops.adaptive_avg_pool2d(input, 7),
            ops.adaptive_avg_pool2d(input, 1),
        ):
            results += [output, *torch.autograd.grad(output, input, torch.cos(output.detach()))]
        return results

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


def test_nothing_is_kept_for_backward(backend):
    input = tensor(2, 3, 32, 32, dtype=torch.float32)
    assert kept_bytes(lambda: ops.avg_pool2d(input, 3, 2, 1)) == 0
    assert kept_bytes(lambda: ops.adaptive_avg_pool2d(input, 7)) == 0


def x(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


WRONG = [
    (ops.avg_pool1d, (x(2, 3, 9), 0), {}),
    (ops.avg_pool1d, (x(2, 3, 9), 2, -1), {}),
    (ops.avg_pool1d, (x(9), 2), {}),
    (ops.avg_pool1d, (x(2, 3, 9), (2, 2)), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 0), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), -1), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2, 0), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 3, 2, 2), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 3, 2, -1), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 10), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2.0), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), None), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), True), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), (2, 2, 2)), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2), {"padding": (1, 1, 1)}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2), {"ceil_mode": 1}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2), {"count_include_pad": 1}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2), {"divisor_override": 0}),
    (ops.avg_pool2d, (x(2, 3, 9, 9), 2), {"divisor_override": 1.5}),
    (ops.avg_pool2d, (x(9, 9), 2), {}),
    (ops.avg_pool2d, (x(1, 2, 3, 9, 9), 2), {}),
    (ops.avg_pool2d, (x(2, 0, 9, 9), 2), {}),
    (ops.avg_pool2d, (x(2, 3, 0, 9), 2), {}),
    (ops.avg_pool2d, (x(0, 9, 9), 2), {}),
    (ops.avg_pool2d, ([[1.0]], 2), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9, dtype=torch.int32), 2), {}),
    (ops.avg_pool2d, (x(2, 3, 9, 9, dtype=torch.complex64), 2), {}),
    (ops.avg_pool3d, (x(2, 3, 4, 4, 4), 5), {}),
    (ops.avg_pool3d, (x(2, 4, 4), 2), {}),
    (ops.adaptive_avg_pool1d, (x(2, 3, 9), -1), {}),
    (ops.adaptive_avg_pool1d, (x(2, 3, 9), (3, 3)), {}),
    (ops.adaptive_avg_pool1d, (x(2, 3, 9), (None,)), {}),
    (ops.adaptive_avg_pool1d, (x(2, 3, 9, 9), (None,)), {}),
    (ops.adaptive_avg_pool1d, (x(2, 3, 9, 9), 1), {}),
    (ops.adaptive_avg_pool2d, (x(9), 1), {}),
    (ops.adaptive_avg_pool2d, (x(2, 3, 9, 9), (3,)), {}),
    (ops.adaptive_avg_pool2d, (x(2, 3, 9, 9), 3.0), {}),
    (ops.adaptive_avg_pool2d, (x(2, 3, 9, 9), (-1, 3)), {}),
    (ops.adaptive_avg_pool2d, (x(2, 3, 0, 9), 3), {}),
    (ops.adaptive_avg_pool2d, (x(2, 3, 9, 9, dtype=torch.int64), 3), {}),
    (ops.adaptive_avg_pool3d, (x(2, 0, 4, 4, 4), 3), {}),
    (ops.adaptive_avg_pool3d, (x(2, 9, 9), 3), {}),
]


@pytest.mark.parametrize(("ours", "args", "kwargs"), WRONG)
def test_wrong_calls_raise_as_in_torch(ours, args, kwargs):
    assert_wrong_like_torch(ours, theirs(ours), *args, **kwargs)


def test_native_kernels_refuse_what_they_cannot_read():
    with pytest.raises(RuntimeError, match="one option an axis"):
        ops.average_pool.native(torch.randn(2, 3, 8, 8), [4, 4], [2], [2], [0], True, 0, False)
    with pytest.raises(RuntimeError, match="out of range"):
        ops.average_pool.native(torch.randn(2, 3, 8), [4], [2], [0], [0], True, 0, False)


@pytest.mark.parametrize(("width", "output_size"), [(1200, 2), (4096, 7), (1100, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_that_are_taken_in_several_pieces(width, output_size, channels_last, backend):
    """Neighbouring pieces of a row may begin in one window and reach different numbers of them."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 16, 2, width, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    output, expected = (pool(x, (2, output_size)) for pool in (ops.adaptive_avg_pool2d, F.adaptive_avg_pool2d))
    torch.testing.assert_close(output, expected)
    grad = torch.randn_like(output)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, grad)[0] for y in (output, expected)))
