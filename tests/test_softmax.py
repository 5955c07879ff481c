"""softmax and log_softmax against torch's."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F

from manual_ops import modes
from manual_ops.ops.softmax import (
    log_softmax,
    log_softmax_forward,
    log_softmax_input_grad,
    softmax,
    softmax_forward,
    softmax_input_grad,
)
from support import (
    TOLERANCE,
    assert_same,
    assert_same_as_torch,
    assert_wrong_like_torch,
    gradchecks,
    kept_bytes,
    tensor,
)

FUNCTIONS = [pytest.param(softmax, F.softmax, id="softmax"), pytest.param(log_softmax, F.log_softmax, id="log_softmax")]
both_functions = pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS)
KERNELS = [softmax_forward, log_softmax_forward]
GRAD_KERNELS = [softmax_input_grad, log_softmax_input_grad]

# Rows and strided slices; fewer classes than a vector, one more than a whole number of them, many.
SHAPES = [
    ((5,), 0),
    ((3, 1), 1),
    ((4, 3), 1),
    ((4, 3), 0),
    ((2, 65), -1),
    ((7, 150), 1),
    ((150, 70), 0),
    ((2, 5, 3), 1),
    ((2, 21, 9, 8), 1),
    ((2, 3, 4, 5), 2),
    ((2, 3, 2, 3, 2), -3),
]


def test_the_signatures_are_torchs():
    for ours, theirs in ((softmax, F.softmax), (log_softmax, F.log_softmax)):
        expected = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        assert [(p.name, p.default) for p in inspect.signature(ours).parameters.values()] == expected


@both_functions
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_and_gradient(ours, theirs, shape, dim, dtype, backend, device):
    assert_same_as_torch(ours, theirs, tensor(*shape, dtype=dtype, device=device), dim)


@both_functions
def test_a_number_is_a_vector_of_one(ours, theirs, backend):
    for dim in (0, -1):
        assert_same_as_torch(ours, theirs, torch.tensor(3.0, requires_grad=True), dim)


@both_functions
@pytest.mark.parametrize(("shape", "dim"), [((0, 3), 1), ((3, 0), 1), ((2, 0, 3), 2), ((0,), 0), ((2, 3, 0), 1)])
def test_nothing_in_nothing_out(ours, theirs, shape, dim, backend):
    assert_same_as_torch(ours, theirs, tensor(*shape), dim)


@both_functions
def test_any_strides_give_a_contiguous_result(ours, theirs, backend):
    base = tensor(2, 6, 5, 4)
    views = [
        base.transpose(1, 3),
        base[:, ::2],
        base.to(memory_format=torch.channels_last),
        base[:, :, :1].expand(-1, -1, 5, -1),
    ]
    for view in views:
        assert_same_as_torch(ours, theirs, view, 1)
        assert ours(view, 1).is_contiguous()


@both_functions
def test_an_expanded_gradient(ours, theirs, backend):
    for dim in (0, 1):
        x, cotangent = tensor(4, 5), torch.randn(4, 1, dtype=torch.float64).expand(4, 5)
        (gradient,) = torch.autograd.grad(ours(x, dim), x, cotangent)
        (expected,) = torch.autograd.grad(theirs(x, dim), x, cotangent)
        assert_same(gradient, expected)


@both_functions
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "row",
    [
        [1.0, float("inf"), 2.0],
        [float("inf"), float("inf"), 0.0],
        [float("-inf")] * 3,
        [1.0, float("-inf"), 2.0],
        [1.0, float("nan"), 2.0],
        [float("nan")] * 3,
        [float("inf"), float("-inf"), 0.0],
        [1e30, -1e30, 1e30],
        [3e38, -3e38, 0.0],
        [88.0, 89.0, -104.0],
        [10000.0, 10001.0, 9999.5],
    ],
)
@pytest.mark.parametrize("copies", [1, 40])
def test_special_values(ours, theirs, row, dim, copies, backend):
    x = torch.tensor([row * copies, [0.5, 1.5, -2.0] * copies, [0.0] * 3 * copies])
    assert_same_as_torch(ours, theirs, (x if dim == 1 else x.T.contiguous()).requires_grad_(), dim)


@both_functions
def test_the_implicit_dimension_and_its_warning(ours, theirs, backend):
    for shape in ((), (5,), (3, 4), (2, 3, 4), (2, 3, 4, 2), (2, 2, 2, 2, 2)):
        x = torch.randn(shape)
        with pytest.warns(UserWarning, match="Implicit dimension choice") as caught:
            output = ours(x)
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            expected = theirs(x)
        assert_same(output, expected)


@both_functions
def test_dtype_converts_the_input_first(ours, theirs, backend):
    cases = [(torch.float16, torch.float32), (torch.int64, torch.float32), (torch.float32, torch.float64)]
    for dtype, chosen in cases:
        x = torch.randn(3, 4).mul(4).to(dtype).requires_grad_(dtype.is_floating_point)
        assert_same_as_torch(ours, theirs, x, 1, dtype=chosen)
        assert ours(x, 1, dtype=chosen).dtype == chosen


@both_functions
@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives_of_every_order(ours, theirs, dim, backend):
    x = tensor(3, 4)
    gradchecks(lambda x: ours(x, dim), x)
    gradchecks(lambda x: ours(x, dim), tensor(4, 3).T)

    def gradient(x):
        return torch.autograd.grad(ours(x, dim).pow(3).sum(), x, create_graph=True)[0]

    torch.autograd.gradgradcheck(gradient, x)


@both_functions
def test_hessian_and_vmapped_gradients(ours, theirs, backend):
    x = tensor(2, 5, requires_grad=False)
    for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacrev(f))):
        assert_same(transform(lambda x: ours(x, 1).pow(2).sum())(x), transform(lambda x: theirs(x, 1).pow(2).sum())(x))


@both_functions
@pytest.mark.parametrize("in_dim", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap(ours, theirs, in_dim, dim, backend):
    x = tensor(3, 4, 2, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing batch rule falls back to a loop, with a warning
        assert_same(torch.vmap(lambda x: ours(x, dim), in_dim)(x), torch.vmap(lambda x: theirs(x, dim), in_dim)(x))
        nested = torch.vmap(torch.vmap(lambda x: ours(x, 0), 1), in_dim)(x)
        assert_same(nested, torch.vmap(torch.vmap(lambda x: theirs(x, 0), 1), in_dim)(x))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("which", ["native", "python"])
def test_opcheck_forward(kernel, which):
    for x, dim in ((torch.randn(3, 4), 1), (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), 1)):
        torch.library.opcheck(getattr(kernel, which), (x, dim))


@pytest.mark.parametrize("kernel", GRAD_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("which", ["native", "python"])
def test_opcheck_input_grad(kernel, which):
    for shape, dim in (((3, 4), 1), ((2, 3, 4, 5), 1)):
        x = torch.randn(shape).to(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)
        torch.library.opcheck(getattr(kernel, which), (x, x.softmax(dim), dim))


@pytest.mark.parametrize(("shape", "dim"), [((300, 257), 1), ((2, 30, 40, 41), 1)])
def test_the_bits_do_not_depend_on_the_threads(shape, dim):
    x, g = torch.randn(shape), torch.randn(shape)

    def results():
        outputs = [kernel.native(x, dim) for kernel in KERNELS]
        return outputs + [k.native(g, y, dim) for k, y in zip(GRAD_KERNELS, outputs, strict=True)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = results()
    finally:
        torch.set_num_threads(threads)
    for repeated in (results(), results()):
        for one, other in zip(once, repeated, strict=True):
            assert torch.equal(one, other)


@both_functions
def test_the_output_alone_is_kept(ours, theirs, backend):
    x = tensor(40, 50, dtype=torch.float32)
    assert kept_bytes(lambda: ours(x, 1)) == 40 * 50 * 4


@both_functions
@pytest.mark.parametrize("backend_name", ["python", "native"])
def test_float32_is_no_worse_than_torchs(ours, theirs, backend_name):
    """Against float64: sums of many classes, and logits that share a large offset."""
    for x in (torch.randn(16, 5000) * 4, torch.randn(64, 100) + 10000, torch.randn(2, 40, 64) - 3000):
        exact = theirs(x.double(), 1)
        with modes.backend(backend_name):
            error = (ours(x, 1) - exact).abs().max()
        rounding = 2 * exact.abs().max() * torch.finfo(torch.float32).eps
        assert error <= (theirs(x, 1) - exact).abs().max() + rounding


X = torch.ones(3, 4)
WRONG = [
    ((X, 2), {}),
    ((X, -3), {}),
    ((torch.ones(()), 1), {}),
    ((torch.ones(()), -2), {}),
    ((torch.ones(0), 1), {}),
    ((X, 1.0), {}),
    ((X, True), {}),
    ((X, "1"), {}),
    ((X, [1]), {}),
    ((X, (0, 1)), {}),
    ((X.long(), 1), {}),
    ((X.bool(), 1), {}),
    ((X.to(torch.complex64), 1), {}),
    ((X, 1), {"dtype": "float32"}),
    ((X, 1), {"dtype": 3}),
    ((X, 1), {"dtype": torch.int64}),
    ((X, 1), {"dtype": torch.bool}),
    ((X, 1), {"dtype": torch.complex64}),
]


@both_functions
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_calls(ours, theirs, case, backend):
    args, kwargs = WRONG[case]
    assert_wrong_like_torch(ours, theirs, *args, **kwargs)


@both_functions
@pytest.mark.parametrize("input", [[1.0, 2.0], None, 3.0])
def test_an_input_that_is_no_tensor(ours, theirs, input, backend):
    assert_wrong_like_torch(ours, theirs, input, 0)
    with pytest.raises(TypeError, match="softmax: input must be a Tensor"):
        ours(input, 0)
