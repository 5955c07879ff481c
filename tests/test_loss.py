"""Mean squared error and binary cross-entropy with logits: values, gradients of every order, reductions, stability."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from manual_ops.ops import loss
from manual_ops.ops.loss import binary_cross_entropy_with_logits, mse_loss
from support import (
    assert_same,
    assert_same_as_torch,
    assert_wrong_like_torch,
    gradchecks,
    kept_bytes,
    tensor,
)

NAN, INF = float("nan"), float("inf")
REDUCTIONS = ("none", "mean", "sum")
PAIRS = {
    "mse": (mse_loss, F.mse_loss),
    "bce": (binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
}
each_loss = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS.keys())
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def probabilities(*shape, requires_grad=True, **kwargs):
    return torch.sigmoid(tensor(*shape, requires_grad=False, **kwargs)).requires_grad_(requires_grad)


SHAPES = [(7,), (4, 5), (2, 3, 4, 5), (0,), (3, 0, 2), (9001,)]


@each_loss
@each_reduction
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_torch(ours, theirs, reduction, shape, dtype, backend, device):
    args = tensor(*shape, dtype=dtype, device=device), probabilities(*shape, dtype=dtype, device=device)
    assert_same_as_torch(ours, theirs, *args, reduction=reduction)


@each_loss
@each_reduction
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_computed_wide_and_rounded_once(ours, theirs, reduction, dtype, backend, device):
    args = tensor(40, 25, dtype=dtype, device=device), probabilities(40, 25, dtype=dtype, device=device)
    wide = [arg.detach().double().requires_grad_() for arg in args]
    output, expected = ours(*args, reduction=reduction), theirs(*wide, reduction=reduction)
    assert_same(output.detach(), expected.detach().to(dtype))
    gradient, expected_gradient = (torch.autograd.grad(o.sum(), a[0])[0] for o, a in ((output, args), (expected, wide)))
    assert_same(gradient, expected_gradient.to(dtype))


@each_reduction
@pytest.mark.parametrize("shape", [(5,), (4, 5), (1,), ()], ids=str)
def test_pos_weight(reduction, shape, backend):
    pos_weight = torch.rand(shape, dtype=torch.float64) + 0.5
    options = {"reduction": reduction, "pos_weight": pos_weight}
    assert_same_as_torch(*PAIRS["bce"], tensor(4, 5), probabilities(4, 5), **options)


@each_reduction
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 1), ()], ids=str)
def test_weight_of_the_cross_entropy(reduction, shape, backend):
    weight, pos_weight = torch.rand(shape, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    for options in ({}, {"pos_weight": pos_weight}):
        args = tensor(4, 5), probabilities(4, 5)
        assert_same_as_torch(*PAIRS["bce"], *args, weight, reduction=reduction, **options)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_weights_of_the_cross_entropy_that_require_a_gradient_are_refused(name, reduction, backend):
    args, options = (tensor(4, 5), probabilities(4, 5)), {name: torch.rand(5).requires_grad_(), "reduction": reduction}
    assert_wrong_like_torch(*PAIRS["bce"], *args, **options)
    with pytest.raises(RuntimeError, match=f"binary_cross_entropy_with_logits: {name} must not require a gradient"):
        binary_cross_entropy_with_logits(*args, **options)
    with torch.no_grad():
        assert_same(*(loss(*args, **options) for loss in PAIRS["bce"]))


@each_reduction
def test_transforms_differentiate_by_the_weights_of_the_cross_entropy(reduction, backend):
    args = [arg.detach() for arg in (tensor(2, 3), probabilities(2, 3), probabilities(3), probabilities(2, 3))]

    def of(function):
        def weighted(input, target, weight, pos_weight):
            return function(input, target, weight, reduction=reduction, pos_weight=pos_weight)

        def outer_gradient(input, target, *weights):
            losses = torch.func.vmap(weighted, in_dims=(0, 0, None, 0))(input, target, *weights)
            return torch.autograd.grad(losses.sum(), weights)

        return [
            torch.func.jacrev(weighted, (2, 3)),
            torch.func.jacfwd(weighted, (2, 3)),
            torch.func.hessian(lambda *args: weighted(*args).sum(), (0, 1, 2, 3)),
            lambda *args: torch.func.jvp(weighted, args, args),
            lambda *args: outer_gradient(*args[:2], *(weight.requires_grad_() for weight in args[2:])),
        ]

    for ours, theirs in zip(of(PAIRS["bce"][0]), of(PAIRS["bce"][1]), strict=True):
        found, expected = (tree_leaves(function(*(arg.clone() for arg in args))) for function in (ours, theirs))
        for our, their in zip(found, expected, strict=True):
            assert_same(our, their)


def weighted_squared_error(input, target, reduction, weight):
    """Written out, for torch 2.11 has no weight yet."""
    losses = weight * (input - target) ** 2
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.sum() / weight.sum()


@each_reduction
def test_weight_of_the_squared_error(reduction, backend):
    args = {"weight": torch.rand(4, 5, dtype=torch.float64).requires_grad_(), "reduction": reduction}
    assert_same_as_torch(mse_loss, weighted_squared_error, tensor(4, 5), tensor(4, 5), **args)
    args["weight"] = torch.arange(20).reshape(4, 5)
    assert_same_as_torch(mse_loss, weighted_squared_error, tensor(4, 5), tensor(4, 5), **args)


LAYOUTS = {
    "transposed": lambda: (tensor(5, 4).t(), probabilities(5, 4).t()),
    "of two layouts": lambda: (tensor(5, 4).t(), probabilities(4, 5)),
    "target transposed": lambda: (tensor(4, 5), probabilities(5, 4).t()),
    "channels_last": lambda: (tensor(2, 3, 4, 5).to(memory_format=torch.channels_last), probabilities(2, 3, 4, 5)),
    "strided": lambda: (tensor(4, 10)[:, ::2], probabilities(8, 5)[::2]),
    "expanded": lambda: (tensor(4, 1).expand(4, 5), probabilities(5).expand(4, 5)),
    "scalars": lambda: (tensor(1)[0], probabilities(1)[0]),
}


@each_loss
@each_reduction
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(ours, theirs, reduction, make, backend):
    args = [arg.detach().requires_grad_() for arg in make()]
    assert_same_as_torch(ours, theirs, *args, reduction=reduction)
    if reduction == "none" and args[0].stride() == args[1].stride():
        assert ours(*args, reduction="none").stride() == theirs(*args, reduction="none").stride()


@each_reduction
@pytest.mark.parametrize("shapes", [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (1, 4)), ((3, 4), ())], ids=str)
def test_broadcasting_warns_and_goes_on(reduction, shapes, backend):
    args = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    with pytest.warns(UserWarning, match="mse_loss: the target's shape"):
        mse_loss(*args)
    with pytest.warns(UserWarning, match="target"):
        assert_same_as_torch(mse_loss, F.mse_loss, *args, reduction=reduction)


@each_loss
@pytest.mark.parametrize(("size_average", "reduce"), itertools.product([None, True, False], repeat=2))
def test_the_deprecated_reductions(ours, theirs, size_average, reduce, backend):
    args, old = (tensor(3, 4), probabilities(3, 4)), {"size_average": size_average, "reduce": reduce}
    if size_average is None and reduce is None:
        assert_same_as_torch(ours, theirs, *args, **old)
        return
    with pytest.warns(UserWarning, match="deprecated"):
        ours(*args, **old)
    with pytest.warns(UserWarning, match="deprecated"):
        assert_same_as_torch(ours, theirs, *args, **old)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float64), (torch.float64, torch.float32)],
)
@each_loss
def test_mixed_dtypes(ours, theirs, dtypes, backend):
    args = [tensor(3, 4, dtype=dtype) for dtype in dtypes]
    output, expected = (f(*args).detach() for f in (ours, theirs))
    assert output.dtype == expected.dtype
    assert_same(output, expected, rtol=1e-5, atol=1e-5)


def test_an_integer_target_of_the_squared_error(backend):
    assert_same_as_torch(mse_loss, F.mse_loss, tensor(5), torch.arange(5))


@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("pos_weight", [None, 3.0])
def test_large_logits_infinities_and_nan(target, pos_weight, backend):
    for logit in (0.0, -0.0, 1e-30, 40.0, -40.0, 800.0, -800.0, 1e30, -1e30, INF, -INF, NAN):
        input = torch.tensor([logit], dtype=torch.float64, requires_grad=True)
        options = {} if pos_weight is None else {"pos_weight": torch.tensor([pos_weight], dtype=torch.float64)}
        targets = torch.tensor([target], dtype=torch.float64, requires_grad=pos_weight is None)
        assert_same_as_torch(*PAIRS["bce"], input, targets, **options)


@pytest.mark.parametrize("value", [INF, -INF, NAN])
def test_nan_and_infinity_in_the_squared_error(value, backend):
    for args in ((value, 1.0), (1.0, value), (value, value)):
        tensors = [torch.tensor([2.0, arg], requires_grad=True) for arg in args]
        for reduction in REDUCTIONS:
            assert_same_as_torch(mse_loss, F.mse_loss, *tensors, reduction=reduction)


def test_small_losses_keep_their_relative_accuracy(backend):
    input = torch.linspace(1, 80, 1000)
    found = binary_cross_entropy_with_logits(input, torch.ones_like(input), reduction="none").double()
    assert_same(found, torch.log1p(torch.exp(-input.double())), rtol=1e-6, atol=0)


@each_loss
def test_long_sums_are_accurate(ours, theirs, backend):
    args = tensor(300_001, dtype=torch.float32, requires_grad=False), torch.rand(300_001)
    expected = theirs(*(arg.double() for arg in args), reduction="sum")
    assert_same(ours(*args, reduction="sum").double(), expected, rtol=2e-7, atol=0)


@each_loss
@each_reduction
def test_every_kind_of_derivative(ours, theirs, reduction, backend):
    gradchecks(functools.partial(ours, reduction=reduction), tensor(2, 3), probabilities(2, 3))
    gradchecks(functools.partial(ours, reduction=reduction), tensor(3, 2).t(), probabilities(2, 6)[:, ::2])


@each_reduction
def test_every_kind_of_derivative_with_weights(reduction, backend):
    weight, pos_weight = (probabilities(*shape, requires_grad=False) for shape in ((3,), (2, 3)))
    options = {"weight": weight, "reduction": reduction, "pos_weight": pos_weight}
    gradchecks(functools.partial(binary_cross_entropy_with_logits, **options), tensor(2, 3), probabilities(2, 3))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@each_loss
def test_any_subset_of_gradients(ours, theirs, needs, backend):
    args = tensor(2, 3, requires_grad=needs[0]), probabilities(2, 3, requires_grad=needs[1])
    assert_same_as_torch(ours, theirs, *args)
    gradchecks(ours, *args)


@each_loss
@each_reduction
def test_third_order(ours, theirs, reduction, backend):
    args = tensor(6), probabilities(6)
    orders = []
    for function in (ours, theirs):
        derivative, taken = function(*args, reduction=reduction).sum() ** 2, []
        for _ in range(3):
            by_input, by_target = torch.autograd.grad(derivative, args, create_graph=True)
            derivative = (by_input * by_target).sum()
            taken += [by_input.detach(), by_target.detach()]
        orders.append(taken)
    for our, their in zip(*orders, strict=True):
        assert_same(our, their, rtol=1e-8, atol=1e-8)


@each_loss
@each_reduction
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 0), (0, None), (None, 1)])
def test_batches(ours, theirs, reduction, in_dims, backend):
    input, target = tensor(3, 3, 3, requires_grad=False), probabilities(3, 3, 3, requires_grad=False)
    args = [arg[0] if dim is None else arg for arg, dim in zip((input, target), in_dims, strict=True)]
    found = []
    for function in (ours, theirs):
        call = functools.partial(function, reduction=reduction)

        def gradients(x, t, call=call):
            return torch.func.grad(lambda x, t: (call(x, t) ** 2).sum(), argnums=(0, 1))(x, t)

        values = torch.func.vmap(call, in_dims=in_dims)(*args)
        found.append([values, *torch.func.vmap(gradients, in_dims=in_dims)(*args)])
    for our, their in zip(*found, strict=True):
        assert_same(our, their)


@each_loss
def test_transforms(ours, theirs, backend):
    args = tensor(3, 2, requires_grad=False), probabilities(3, 2, requires_grad=False)
    for argnums in (0, 1):
        assert_same(*[torch.func.hessian(lambda *a, f=f: f(*a) ** 2, argnums)(*args) for f in (ours, theirs)])
    for our, their in zip(*[torch.func.jvp(f, args, args) for f in (ours, theirs)], strict=True):
        assert_same(our, their)


@each_loss
def test_the_graph_compiles_whole(ours, theirs, backend):
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same_as_torch(compiled, theirs, tensor(3, 4), probabilities(3, 4))


@each_loss
@each_reduction
def test_the_inputs_are_kept(ours, theirs, reduction, backend):
    args = tensor(10, 10), probabilities(10, 10, requires_grad=False)
    assert kept_bytes(lambda: ours(*args, reduction=reduction)) == args[0].nbytes + args[1].nbytes


@each_reduction
def test_native_bits_do_not_depend_on_threads(reduction):
    input, target = torch.randn(200_001), torch.rand(200_001)
    pos_weight = torch.rand(200_001)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        grad = torch.tensor(0.7) if reduction != "none" else input
        results.append(
            [
                loss.mse_loss_kernel.native(input, target, reduction),
                loss.bce_with_logits.native(input, target, pos_weight, reduction),
                loss.bce_with_logits_backward.native(grad, input, target, pos_weight, reduction),
                loss.total.native(input, "mean" if reduction == "none" else reduction),
            ]
        )
    for result in results[1:]:
        assert all(itertools.starmap(torch.equal, zip(result, results[0], strict=True)))


@each_reduction
def test_opcheck(reduction, backend):
    layouts = (tensor(3, 4).detach(), tensor(3, 4).detach()), (tensor(4, 3).detach().t(), tensor(3, 8)[:, ::2].detach())
    for input, target in layouts:
        grad = torch.ones_like(input) if reduction == "none" else torch.ones((), dtype=torch.float64)
        for name, args in {
            "mse_loss_kernel": (input, target, reduction),
            "mse_loss_backward": (grad, input, target, reduction),
            "bce_with_logits": (input, target, None, reduction),
            "bce_with_logits_backward": (grad, input, target, target, reduction),
            "total": (input, "mean" if reduction == "none" else reduction),
        }.items():
            torch.library.opcheck(getattr(getattr(loss, name), backend), args)


def test_the_native_kernels_refuse_shapes_that_do_not_fit():
    one, two = torch.ones(3), torch.ones(4)
    for call in (
        lambda: loss.mse_loss_kernel.native(one, two, "sum"),
        lambda: loss.mse_loss_backward.native(two, one, one, "sum"),
        lambda: loss.bce_with_logits.native(one, one, two, "none"),
        lambda: loss.bce_with_logits_backward.native(two, one, one, None, "none"),
    ):
        with pytest.raises(RuntimeError, match="loss"):
            call()


@each_loss
def test_a_mean_in_float16_is_formed_before_it_is_rounded(ours, theirs, backend):
    """The sum of 4,000 losses of 40 is no float16; neither is 1/300000 one with any digits."""
    x, t = torch.full((4000,), 40.0).half(), torch.zeros(4000).half()
    assert_same(ours(x, t), theirs(x, t))
    _, tangent = torch.func.jvp(lambda x: ours(x, t), (x,), (torch.ones_like(x),))
    assert_same(
        tangent, torch.autograd.functional.jvp(lambda x: theirs(x.float(), t.float()), x, torch.ones_like(x))[1].half()
    )
    x, t = torch.randn(1, 300_000).half(), torch.rand(1, 300_000).half()
    plain = torch.func.grad(ours)(x[0], t[0])
    torch.testing.assert_close(torch.vmap(torch.func.grad(ours))(x, t)[0], plain, rtol=1e-3, atol=6e-8)


def test_a_weighted_mean_in_float16_does_not_overflow(backend):
    x, t, ones = torch.full((4000,), 40.0).half(), torch.zeros(4000).half(), torch.ones(4000).half()
    assert_same_as_torch(binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, x, t, ones)


def test_the_weighted_mean_of_nothing_is_nan(backend):
    args = tensor(0, 3), probabilities(0, 3), torch.rand(3, dtype=torch.float64)
    assert_same_as_torch(binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, *args)


@each_loss
def test_elementwise_mean_is_a_deprecated_name(ours, theirs):
    args = tensor(3), probabilities(3)
    with pytest.warns(UserWarning, match="elementwise_mean"):
        result = ours(*args, reduction="elementwise_mean")
    assert_same(result, theirs(*args))


Z = torch.zeros
MSE, BCE = PAIRS["mse"], PAIRS["bce"]
WRONG = {
    "mse, another reduction": (MSE, (Z(3), Z(3)), {"reduction": "average"}),
    "mse, no reduction": (MSE, (Z(3), Z(3)), {"reduction": None}),
    "mse, a number as reduction": (MSE, (Z(3), Z(3)), {"reduction": 1}),
    "mse, integers": (MSE, (Z(3).long(), Z(3).long()), {}),
    "mse, bools": (MSE, (Z(3).bool(), Z(3).bool()), {}),
    "mse, complex": (MSE, (Z(3) + 0j, Z(3) + 0j), {}),
    "mse, no target": (MSE, (Z(3),), {}),
    "mse, an unknown option": (MSE, (Z(3), Z(3)), {"pos_weight": Z(3)}),
    "mse, two devices": (MSE, (Z(3), Z(3, device="meta")), {}),
    "bce, target of another shape": (BCE, (Z(3, 4), Z(4)), {}),
    "bce, target of another size": (BCE, (Z(3), Z(4)), {}),
    "bce, another reduction": (BCE, (Z(3), Z(3)), {"reduction": "average"}),
    "bce, no reduction": (BCE, (Z(3), Z(3)), {"reduction": None}),
    "bce, weight that does not broadcast": (BCE, (Z(3, 4), Z(3, 4), Z(5)), {}),
    "bce, weight that broadcasts the loss": (BCE, (Z(3, 4), Z(3, 4), Z(2, 3, 4)), {}),
    "bce, weight a list": (BCE, (Z(3), Z(3), [1.0, 1.0, 1.0]), {}),
    "bce, pos_weight that does not broadcast": (BCE, (Z(3, 4), Z(3, 4)), {"pos_weight": Z(3)}),
    "bce, pos_weight that broadcasts the loss": (BCE, (Z(3, 4), Z(3, 4)), {"pos_weight": Z(2, 3, 4)}),
    "bce, pos_weight a number": (BCE, (Z(3), Z(3)), {"pos_weight": 2.0}),
    "bce, integer logits": (BCE, (Z(3).long(), Z(3)), {}),
    "bce, integer target": (BCE, (Z(3), Z(3).long()), {}),
    "bce, bool target": (BCE, (Z(3), Z(3).bool()), {}),
    "bce, complex": (BCE, (Z(3) + 0j, Z(3) + 0j), {}),
    "bce, two devices": (BCE, (Z(3), Z(3, device="meta")), {}),
    "bce, no target": (BCE, (Z(3),), {}),
}


@pytest.mark.parametrize(("pair", "args", "kwargs"), WRONG.values(), ids=WRONG.keys())
def test_wrong_calls_fail_as_in_torch(pair, args, kwargs, backend):
    assert_wrong_like_torch(*pair, *args, **kwargs)


def test_shapes_that_do_not_broadcast(backend):
    with pytest.warns(UserWarning, match="target"):
        assert_wrong_like_torch(*MSE, Z(3, 4), Z(5))


def test_a_weight_of_another_shape_is_refused(backend):
    with pytest.raises(ValueError, match="mse_loss: weight"):
        mse_loss(Z(3), Z(3), weight=Z(2))


@each_loss
def test_what_is_no_tensor_is_a_type_error_and_the_attribute_error_of_torch(ours, theirs, backend):
    for args in (([1.0], Z(1)), (Z(1), [1.0]), (None, Z(1)), (Z(1), None)):
        assert_wrong_like_torch(ours, theirs, *args)
        with pytest.raises(TypeError, match=ours.__name__):
            ours(*args)
