"""Activations: values, gradients of every order, layouts, in-place forms, NaN and boundary rules."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from manual_ops import modes
from manual_ops.autograd import ManualFunction
from manual_ops.ops import activation
from manual_ops.ops.activation import ACTIVATIONS, BACKWARD, FORWARD, FORWARD_IN_PLACE, Activate
from support import assert_same, assert_same_as_torch, assert_wrong_like_torch, gradchecks, kept_bytes, tensor

NAN, INF = float("nan"), float("inf")

# A name for the test's id, ours, torch's.
CASES = {
    "relu": (activation.relu, F.relu),
    "relu6": (activation.relu6, F.relu6),
    "leaky_relu": (activation.leaky_relu, F.leaky_relu),
    "leaky_relu_steep": (
        functools.partial(activation.leaky_relu, negative_slope=1.5),
        functools.partial(F.leaky_relu, negative_slope=1.5),
    ),
    "leaky_relu_flat": (
        functools.partial(activation.leaky_relu, negative_slope=0.0),
        functools.partial(F.leaky_relu, negative_slope=0.0),
    ),
    "leaky_relu_falling": (
        functools.partial(activation.leaky_relu, negative_slope=-0.5),
        functools.partial(F.leaky_relu, negative_slope=-0.5),
    ),
    "sigmoid": (activation.sigmoid, torch.sigmoid),
    "tanh": (activation.tanh, torch.tanh),
    "silu": (activation.silu, F.silu),
    "gelu": (activation.gelu, F.gelu),
    "gelu_tanh": (
        functools.partial(activation.gelu, approximate="tanh"),
        functools.partial(F.gelu, approximate="tanh"),
    ),
}
SMOOTH = ["sigmoid", "tanh", "silu", "gelu", "gelu_tanh"]
every_case = pytest.mark.parametrize(("ours", "theirs"), CASES.values(), ids=CASES.keys())
smooth_case = pytest.mark.parametrize(("ours", "theirs"), [CASES[name] for name in SMOOTH], ids=SMOOTH)
IN_PLACE = [name for name in CASES if name not in ("sigmoid", "tanh", "gelu", "gelu_tanh")]
in_place_case = pytest.mark.parametrize(("ours", "theirs"), [CASES[name] for name in IN_PLACE], ids=IN_PLACE)


def assert_all_same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert_same(our, their)


def spread(*shape, dtype=torch.float64, **kwargs):
    """Values on both sides of every kink, none within 0.05 of one."""
    values = 4 * tensor(*shape, requires_grad=False)
    for kink in (0, 6):
        values = torch.where((values - kink).abs() < 0.05, values + 0.2, values)
    return values.to(dtype).requires_grad_()


LAYOUTS = {
    "contiguous": lambda: spread(3, 5, 4, 7),
    "scalar": lambda: spread(1)[0].detach().requires_grad_(),
    "one": lambda: spread(1),
    "long": lambda: spread(70_001),
    "empty": lambda: spread(0, 3),
    "channels_last": lambda: spread(3, 5, 4, 7).detach().to(memory_format=torch.channels_last).requires_grad_(),
    "permuted": lambda: spread(3, 5, 4).permute(2, 0, 1).detach().requires_grad_(),
    "strided": lambda: spread(3, 5, 8)[..., ::2].detach().requires_grad_(),
    "permuted and cut": lambda: spread(3, 5, 4).permute(2, 0, 1)[1:3].detach().requires_grad_(),
    "expanded": lambda: spread(3, 1, 4).expand(3, 5, 4).detach().requires_grad_(),
    "channels_last of one channel": lambda: (
        spread(3, 1, 4, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    ),
}


@every_case
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_values_gradients_and_strides_are_those_of_torch(ours, theirs, layout, backend):
    input = layout()
    assert_same_as_torch(ours, theirs, input)
    moving = [dim for dim, size in enumerate(input.shape) if size != 1]
    assert [ours(input).stride(dim) for dim in moving] == [theirs(input).stride(dim) for dim in moving]


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_dtypes(ours, theirs, dtype, backend, device):
    assert_same_as_torch(ours, theirs, spread(33, 70, dtype=dtype).detach().to(device).requires_grad_())


# The same functions without cancellation, which torch's gelu has below zero.
EXACT = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_a_few_last_places_over_the_whole_range(name, dtype, backend):
    input = torch.cat([torch.linspace(-12, 12, 20_011), torch.logspace(-30, 1, 999), -torch.logspace(-30, 1, 999)])
    input = input.to(dtype)
    expected = EXACT[name](input.double())
    info = torch.finfo(dtype)
    # The argument of an exponential carries its own rounding, a few times |log| of the result in last places.
    places = 8 + 4 * expected.abs().clamp(min=info.tiny).log().abs()
    error = (CASES[name][0](input).double() - expected).abs()
    assert (error <= places * info.eps * expected.abs() + 16 * info.eps * info.tiny).all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nan_infinity_and_the_kinks(ours, theirs, dtype, backend):
    # One value at a time: of torch's CPU kernels, vectorised gelu turns +inf into NaN and vectorised relu6 stops the
    # gradient at NaN, the scalar ones do not.
    for value in (NAN, INF, -INF, 0.0, -0.0, 6.0, 1e-300, -1e-300, 1e4, -1e4, 5.999, 6.001):
        input = torch.tensor([value], dtype=dtype, requires_grad=True)
        output, expected = ours(input), theirs(input)
        assert_same(output.detach(), expected.detach())
        assert torch.equal(torch.signbit(output[~output.isnan()]), torch.signbit(expected[~expected.isnan()]))
        for seed in (1.0, -2.0):
            cotangent = torch.full_like(input, seed)
            (gradient,) = torch.autograd.grad(ours(input), input, cotangent)
            assert_same(gradient, torch.autograd.grad(theirs(input), input, cotangent)[0])


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_a_nan_gradient_does_not_pass_a_flat_piece(name, backend):
    ours, theirs = CASES[name]
    input = torch.tensor([-1.0, 0.0, 1.0, 6.0, 7.0], requires_grad=True)
    cotangent = torch.full_like(input, NAN)
    (gradient,) = torch.autograd.grad(ours(input), input, cotangent)
    assert_same(gradient, torch.autograd.grad(theirs(input), input, cotangent)[0])


@every_case
def test_vectors_and_their_tails_agree(ours, theirs):
    input = torch.tensor([NAN, INF, -INF, 0.0, -3.0, 2.0, 88.8, -88.8, -103.0]).repeat(9)
    with modes.backend("native"):
        alone = torch.cat([ours(value[None]) for value in input])
        assert torch.equal(ours(input).nan_to_num(nan=123), alone.nan_to_num(nan=123))


@every_case
def test_every_kind_of_derivative(ours, theirs, backend):
    gradchecks(ours, spread(2, 3))
    gradchecks(ours, spread(3, 4)[:, ::2].detach().requires_grad_())


@every_case
def test_second_and_third_order_are_those_of_torch(ours, theirs, backend):
    input = spread(50)
    orders = []
    for function in (ours, theirs):
        derivative = function(input) * torch.linspace(-1, 1, 50)
        taken = []
        for _ in range(3):
            (derivative,) = torch.autograd.grad((derivative * derivative).sum(), input, create_graph=True)
            taken.append(derivative.detach())
        orders.append(taken)
    assert_all_same(*orders)


def test_third_order_gradcheck(backend):
    def gradient(function):
        def of(input):
            return torch.autograd.grad(function(input).sum(), input, create_graph=True)[0]

        return of

    for name in SMOOTH:
        torch.autograd.gradgradcheck(gradient(CASES[name][0]), spread(3))


@smooth_case
def test_second_order_in_bfloat16(ours, theirs, backend):
    input = spread(100, dtype=torch.bfloat16)
    wide = input.detach().double().requires_grad_()
    found = []
    for function, at in ((ours, input), (theirs, wide)):
        (gradient,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
        found.append(torch.autograd.grad(gradient.sum(), at)[0].double())
    assert_same(*found, rtol=3e-2, atol=3e-2)


@every_case
def test_transforms(ours, theirs, backend):
    input = spread(3, 4).detach()
    for transform in (torch.func.vmap, lambda f: torch.func.vmap(f, in_dims=1)):
        assert_same(transform(ours)(input), transform(theirs)(input))

    def loss(function):
        return lambda x: (function(x) * x).sum()

    per_sample = [torch.func.vmap(torch.func.grad(loss(f)))(input) for f in (ours, theirs)]
    assert_same(*per_sample)
    assert_same(*[torch.func.hessian(loss(f))(input) for f in (ours, theirs)])
    assert_same(*[torch.func.jacfwd(f)(input) for f in (ours, theirs)])
    assert_all_same(*[torch.func.jvp(f, (input,), (input + 1,)) for f in (ours, theirs)])


def test_the_graph_compiles_whole(backend):
    for name in ("relu", "leaky_relu", "silu"):
        ours, theirs = CASES[name]
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert_same_as_torch(compiled, theirs, spread(3, 4))


def test_in_place_compiles(backend):
    compiled = torch.compile(lambda x: activation.relu(x * 2, inplace=True) + 1, backend="aot_eager", fullgraph=True)
    assert_same_as_torch(compiled, lambda x: F.relu(x * 2) + 1, spread(3, 4))


@in_place_case
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided", "channels_last", "scalar", "empty"])
def test_in_place_overwrites_and_returns_the_input(ours, theirs, layout, backend):
    input = LAYOUTS[layout]().detach()
    expected = theirs(input.clone())
    version = input._version
    assert ours(input, inplace=True) is input
    assert_same(input, expected)
    assert input._version > version


@in_place_case
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "strided"])
def test_the_gradient_of_the_in_place_form(ours, theirs, layout, backend):
    if ours is CASES["leaky_relu_falling"][0]:
        return  # has none: test_the_in_place_gradient_of_a_negative_slope_is_refused
    leaf = LAYOUTS[layout]()

    def through(function):
        def of(leaf):
            hidden = leaf * 1
            output = function(hidden, inplace=True)
            assert output is hidden
            return hidden * 3

        return of

    assert_same_as_torch(through(ours), through(theirs), leaf)


def test_in_place_on_a_view_writes_the_base_and_its_gradient(backend):
    leaf = spread(4, 5)

    def through(function):
        def of(leaf):
            hidden = leaf * 2
            function(hidden[1:3], inplace=True)
            return hidden

        return of

    for name in ("relu", "silu"):
        assert_same_as_torch(*map(through, CASES[name]), leaf)


def test_second_order_of_the_in_place_form(backend):
    torch.autograd.gradgradcheck(lambda x: activation.relu(x * x * x, inplace=True), spread(3, 4))
    torch.autograd.gradgradcheck(lambda x: activation.silu(x * x, inplace=True), spread(3))


@in_place_case
def test_in_place_under_transforms(ours, theirs, backend):
    input = spread(3, 4).detach()

    def loss(function):
        return lambda x: (function(x * 1, inplace=True) * x).sum()

    if ours is not CASES["leaky_relu_falling"][0]:  # refused by torch
        assert_same(*[torch.func.vmap(torch.func.grad(loss(f)))(input) for f in (ours, theirs)])
    found = [torch.func.vmap(lambda x, f=f: f(x * 1, inplace=True))(input) for f in (ours, theirs)]
    assert_same(*found)
    if ours is not CASES["leaky_relu_falling"][0]:
        found = [torch.func.jvp(lambda x, f=f: f(x * 1, inplace=True), (input,), (input,)) for f in (ours, theirs)]
        assert_all_same(*found)


def test_what_an_in_place_form_overwrote_cannot_be_differentiated(backend):
    leaf = spread(4)
    hidden = leaf * 1
    product = hidden * hidden
    activation.relu_(hidden)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_what_a_later_operation_overwrote_cannot_be_differentiated(backend):
    output = activation.relu(spread(4))
    output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_in_place_gradient_of_a_negative_slope_is_refused(backend):
    for slope in (-0.5, NAN):
        for function in (activation.leaky_relu_, F.leaky_relu_):
            output = function(spread(4) * 1, slope)
            with pytest.raises(RuntimeError, match="negative"):
                output.sum().backward()


def test_in_place_under_no_grad_changes_a_leaf(backend):
    leaf = torch.tensor([-1.0, 2.0], requires_grad=True)
    with torch.no_grad():
        activation.relu_(leaf)
    assert leaf.tolist() == [0.0, 2.0]


def test_in_place_in_inference_mode(backend):
    with torch.inference_mode():
        assert activation.relu_(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


def test_a_refused_in_place_call_leaves_the_input_alone(backend):
    leaf = torch.tensor([-1.0, 2.0], requires_grad=True)
    for input in (leaf, leaf[:1]):
        with pytest.raises(RuntimeError, match="relu"):
            activation.relu(input, inplace=True)
    assert leaf.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
def test_relu_of_integers(dtype, backend):
    input = torch.tensor([-3, 0, 5, 9]).to(dtype)
    assert_same(activation.relu(input), F.relu(input))
    assert_same(activation.relu6(input.clamp(max=100)), F.relu6(input.clamp(max=100)))
    assert_same(activation.relu_(input.clone()), F.relu_(input.clone()))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *((name, "output") for name in ("relu", "relu6", "leaky_relu", "leaky_relu_flat", "sigmoid", "tanh")),
        *((name, "input") for name in ("leaky_relu_falling", "silu", "gelu", "gelu_tanh")),
    ],
)
def test_one_tensor_is_kept_for_backward(name, kept, backend):
    input = spread(10, 10)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        output = CASES[name][0](input)
    assert saved == [(output if kept == "output" else input).data_ptr()]
    assert kept_bytes(lambda: CASES[name][0](input)) == input.nbytes
    assert kept_bytes(lambda: CASES[name][0](input * 1)) == input.nbytes


def test_the_output_is_shared_with_the_layer_that_follows(backend):
    input = spread(10, 10)
    weight = spread(10, 10)
    assert kept_bytes(lambda: activation.relu(input) @ weight) == 2 * input.nbytes


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_native_bits_do_not_depend_on_threads_or_layout(name):
    options = (0.01,) if name == "leaky_relu" else ()
    input, grad = spread(37, 5001, dtype=torch.float32).detach(), spread(37, 5001, dtype=torch.float32).detach()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append((FORWARD[name].native(input, *options), BACKWARD[name].native(grad, input, *options)))
    turned = FORWARD[name].native(input.t(), *options).t(), BACKWARD[name].native(grad.t(), input.t(), *options).t()
    for result in (*results, turned):
        for value, expected in zip(result, results[0], strict=True):
            assert torch.equal(value.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_opcheck(name, backend):
    options = (0.01,) if name == "leaky_relu" else ()
    for input in (spread(3, 4).detach(), spread(3, 4, 2).detach()[:, ::2].transpose(0, 2)):
        torch.library.opcheck(getattr(FORWARD[name], backend), (input, *options))
        torch.library.opcheck(getattr(BACKWARD[name], backend), (torch.ones_like(input), input, *options))
        if name in FORWARD_IN_PLACE:
            torch.library.opcheck(getattr(FORWARD_IN_PLACE[name], backend), (input.clone(), *options))


def test_the_native_kernel_refuses_a_gradient_of_another_shape():
    with pytest.raises(RuntimeError, match="one shape"):
        BACKWARD["relu"].native(torch.ones(3), torch.ones(4))


def test_an_unused_output_needs_no_gradient(backend):
    input = spread(3)
    output = Activate.call(input, "relu", None, backend)
    assert issubclass(Activate, ManualFunction)
    assert torch.autograd.grad(input.sum() + 0 * output.detach().sum(), input)[0].tolist() == [1, 1, 1]


WRONG = {
    "relu of a list": (activation.relu, F.relu, ([1.0],), {}),
    "relu of None": (activation.relu, F.relu, (None,), {}),
    "relu of a bool tensor": (activation.relu, F.relu, (torch.ones(2, dtype=torch.bool),), {}),
    "relu of a complex tensor": (activation.relu, F.relu, (torch.ones(2, dtype=torch.complex64),), {}),
    "relu of nothing": (activation.relu, F.relu, (), {}),
    "relu in place of a leaf": (activation.relu, F.relu, (torch.ones(2, requires_grad=True), True), {}),
    "relu_ of a leaf": (activation.relu_, F.relu_, (torch.ones(2, requires_grad=True),), {}),
    "relu_ of an expanded tensor": (activation.relu_, F.relu_, (torch.ones(3).expand(4, 3),), {}),
    "relu6 of a bool tensor": (activation.relu6, F.relu6, (torch.ones(2, dtype=torch.bool),), {}),
    "relu6 of a number": (activation.relu6, F.relu6, (1.0,), {}),
    "relu6 in place of an expanded tensor": (activation.relu6, F.relu6, (torch.ones(1).expand(4), True), {}),
    "leaky_relu with a text slope": (activation.leaky_relu, F.leaky_relu, (torch.ones(2), "a"), {}),
    "leaky_relu with no slope": (activation.leaky_relu, F.leaky_relu, (torch.ones(2), None), {}),
    "leaky_relu with a tensor slope": (activation.leaky_relu, F.leaky_relu, (torch.ones(2), torch.ones(2)), {}),
    "leaky_relu with a complex slope": (activation.leaky_relu, F.leaky_relu, (torch.ones(2), 1 + 2j), {}),
    "leaky_relu with a slope that overflows": (activation.leaky_relu, F.leaky_relu, (torch.ones(2), 1e300), {}),
    "leaky_relu of integers": (activation.leaky_relu, F.leaky_relu, (torch.arange(3),), {}),
    "leaky_relu_ of a leaf": (activation.leaky_relu_, F.leaky_relu_, (torch.ones(2, requires_grad=True),), {}),
    "sigmoid of a list": (activation.sigmoid, torch.sigmoid, ([1.0],), {}),
    "tanh of None": (activation.tanh, torch.tanh, (None,), {}),
    "silu of integers": (activation.silu, F.silu, (torch.arange(3),), {}),
    "silu in place of a leaf": (activation.silu, F.silu, (torch.ones(2, requires_grad=True), True), {}),
    "gelu of bools": (activation.gelu, F.gelu, (torch.ones(2, dtype=torch.bool),), {}),
    "gelu of a complex tensor": (activation.gelu, F.gelu, (torch.ones(2, dtype=torch.complex64),), {}),
    "gelu with another approximation": (activation.gelu, F.gelu, (torch.ones(2),), {"approximate": "erf"}),
    "gelu with no approximation": (activation.gelu, F.gelu, (torch.ones(2),), {"approximate": None}),
    "gelu with a positional approximation": (activation.gelu, F.gelu, (torch.ones(2), "tanh"), {}),
}


@pytest.mark.parametrize(("ours", "theirs", "args", "kwargs"), WRONG.values(), ids=WRONG.keys())
def test_wrong_calls_fail_as_in_torch(ours, theirs, args, kwargs, backend):
    assert_wrong_like_torch(ours, theirs, *args, **kwargs)
