"""The fully connected layer: values and gradients of every order, shapes, what is kept."""

import pytest
import torch
import torch.nn.functional as F

from manual_ops.ops.linear import linear, linear_kernel
from support import assert_same, assert_same_as_torch, assert_wrong_like_torch, gradchecks, kept_bytes, tensor

# input, weight, bias
SHAPES = {
    "matrix": ((5, 3), (4, 3), (4,)),
    "no bias": ((5, 3), (4, 3), None),
    "vector": ((3,), (4, 3), (4,)),
    "vector, no bias": ((3,), (4, 3), None),
    "two leading dimensions": ((2, 5, 3), (4, 3), (4,)),
    "three leading dimensions": ((2, 3, 2, 3), (4, 3), (4,)),
    "one feature": ((5, 1), (1, 1), (1,)),
    "large": ((130, 70), (65, 70), (65,)),
    "no rows": ((0, 3), (4, 3), (4,)),
    "no rows inside": ((2, 0, 3), (4, 3), (4,)),
    "no input features": ((5, 0), (4, 0), (4,)),
    "no output features": ((5, 3), (0, 3), (0,)),
    "weight vector": ((5, 3), (3,), None),
    "weight vector, vector": ((3,), (3,), None),
    "weight vector, scalar bias": ((2, 5, 3), (3,), ()),
    "scalar bias": ((5, 3), (4, 3), ()),
    "bias of one": ((5, 3), (4, 3), (1,)),
    "bias of the output's shape": ((2, 5, 3), (4, 3), (2, 5, 4)),
    "bias a row": ((5, 3), (4, 3), (5, 1)),
}


def filled(*shape, **kwargs):
    return tensor(1, **kwargs).detach()[0].requires_grad_() if shape == () else tensor(*shape, **kwargs)


def operands(shapes, **kwargs):
    return [None if shape is None else filled(*shape, **kwargs) for shape in shapes]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_torch(shapes, dtype, backend, device):
    assert_same_as_torch(linear, F.linear, *operands(shapes, dtype=dtype, device=device))


@pytest.mark.parametrize("name", ["matrix", "no bias", "two leading dimensions", "large"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_accumulated_wide_and_rounded_once(name, dtype, backend, device):
    args = operands(SHAPES[name], dtype=dtype, device=device)
    wide = [None if arg is None else arg.detach().double().requires_grad_() for arg in args]
    output, expected = linear(*args), F.linear(*wide)
    assert_same(output.detach(), expected.detach().to(dtype))
    cotangent = torch.randn_like(expected).to(dtype)
    inputs = [[arg for arg in side if arg is not None] for side in (args, wide)]
    gradients = torch.autograd.grad(output, inputs[0], cotangent)
    expected = torch.autograd.grad(expected, inputs[1], cotangent.double())
    for gradient, expected_gradient in zip(gradients, expected, strict=True):
        assert_same(gradient, expected_gradient.to(dtype))


LONG = {  # operands that the native kernel cuts: rows, panels of output features, stretches of input features
    "rows": ((600, 5), (3, 5), (3,)),
    "output features": ((3, 5), (130, 5), (130,)),
    "input features": ((20, 2500), (40, 2500), (40,)),
    "all, uneven": ((257, 1025), (33, 1025), (33,)),
}


@pytest.mark.parametrize("shapes", LONG.values(), ids=LONG.keys())
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operands_that_are_cut(shapes, turned, dtype):
    input, weight, bias = operands(shapes, dtype=dtype)
    with torch.no_grad():
        input, weight = (
            matrix.t().contiguous().t() if turn else matrix
            for matrix, turn in zip((input, weight), turned, strict=True)
        )
        expected = F.linear(input.double(), weight.double(), bias.double()).to(dtype)
        assert_same(linear_kernel.native(input, weight, bias), expected)


LAYOUTS = {
    "transposed input": lambda: (tensor(3, 5).t(), tensor(4, 3), tensor(4)),
    "permuted input": lambda: (tensor(5, 3, 2).permute(2, 0, 1), tensor(4, 3), tensor(4)),
    "strided input": lambda: (tensor(5, 6)[:, ::2], tensor(4, 3), tensor(4)),
    "expanded input": lambda: (tensor(1, 3).expand(5, 3), tensor(4, 3), tensor(4)),
    "transposed weight": lambda: (tensor(5, 3), tensor(3, 4).t(), tensor(4)),
    "strided weight and bias": lambda: (tensor(5, 3), tensor(8, 6)[::2, ::2], tensor(8)[::2]),
    "expanded weight": lambda: (tensor(5, 3), tensor(4, 1).expand(4, 3), tensor(1).expand(4)),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(make, backend):
    args = [arg.detach().requires_grad_() for arg in make()]
    assert_same_as_torch(linear, F.linear, *args)
    assert linear(*args).is_contiguous()


def test_an_expanded_gradient(backend):
    args = operands(SHAPES["two leading dimensions"])
    gradients = torch.autograd.grad(linear(*args).sum(), args)
    for gradient, expected in zip(gradients, torch.autograd.grad(F.linear(*args).sum(), args), strict=True):
        assert_same(gradient, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_spread_as_in_torch(value, backend):
    input, weight, bias = operands(SHAPES["matrix"])
    with torch.no_grad():
        input[2, 1] = value
    assert_same_as_torch(linear, F.linear, input, weight, bias)


@pytest.mark.parametrize(
    "name", ["matrix", "no bias", "vector", "two leading dimensions", "weight vector", "scalar bias"]
)
def test_every_kind_of_derivative(name, backend):
    args = [arg for arg in operands(SHAPES[name]) if arg is not None]
    gradchecks(linear, *args)


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a or b or c])
def test_any_subset_of_gradients(needs, backend):
    args = [tensor(*shape, requires_grad=bool(need)) for shape, need in zip(SHAPES["matrix"], needs, strict=True)]
    assert_same_as_torch(linear, F.linear, *args)
    if sum(needs[:2]) > 0:
        torch.autograd.gradgradcheck(linear, args)


def test_non_contiguous_derivatives(backend):
    gradchecks(linear, tensor(3, 4).t(), tensor(6, 3)[::2], tensor(3))


@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None),
        (1, None, None),
        (None, 0, None),
        (None, 1, 0),
        (0, 0, None),
        (0, 2, 1),
        (None, None, 0),
        (0, None, 0),
    ],
)
def test_batches_of_each_operand(in_dims, backend):
    args = []
    for shape, dim in zip(SHAPES["matrix"], in_dims, strict=True):
        args.append(tensor(*(shape if dim is None else (*shape[:dim], 3, *shape[dim:])), requires_grad=False))
    ours, theirs = (torch.func.vmap(function, in_dims=in_dims)(*args) for function in (linear, F.linear))
    assert_same(ours, theirs)

    def gradients(function):
        def of(*args):
            return torch.func.grad(lambda *a: (function(*a) ** 2).sum(), argnums=(0, 1, 2))(*args)

        return torch.func.vmap(of, in_dims=in_dims)(*args)

    for gradient, expected in zip(gradients(linear), gradients(F.linear), strict=True):
        assert_same(gradient, expected)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_batches_of_both_operands_of_size_zero(sizes, bias, backend):
    rows, ins, outs = sizes
    args = [tensor(2, rows, ins, requires_grad=False), tensor(2, outs, ins, requires_grad=False)]
    args += [tensor(2, outs, requires_grad=False)] if bias else []
    assert_same(*(torch.func.vmap(function)(*args) for function in (linear, F.linear)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batches_of_both_operands_are_accumulated_wide(dtype, backend):
    args = [tensor(3, *shape, dtype=dtype, requires_grad=False) for shape in ((5, 70), (4, 70), (4,))]
    expected = torch.func.vmap(F.linear)(*(arg.double() for arg in args))
    assert_same(torch.func.vmap(linear)(*args), expected.to(dtype))


def test_transforms(backend):
    args = operands(SHAPES["matrix"])
    args = [arg.detach() for arg in args]
    for transform in (torch.func.hessian, torch.func.jacrev):
        for argnums in (0, 1):
            found = [transform(lambda *a, f=f: (f(*a) ** 2).sum(), argnums)(*args) for f in (linear, F.linear)]
            assert_same(*found)
    for ours, theirs in zip(*[torch.func.jvp(f, tuple(args), tuple(args)) for f in (linear, F.linear)], strict=True):
        assert_same(ours, theirs)


def test_the_graph_compiles_whole(backend):
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert_same_as_torch(compiled, F.linear, *operands(SHAPES["two leading dimensions"]))


KEPT = {  # which need a gradient: input, weight, bias -> what is kept
    "all": ((True, True, True), ("input", "weight")),
    "input": ((True, False, False), ("weight",)),
    "weight and bias": ((False, True, True), ("input",)),
    "bias": ((False, False, True), ()),
}


@pytest.mark.parametrize(("needs", "kept"), KEPT.values(), ids=KEPT.keys())
def test_only_what_the_gradients_use_is_kept(needs, kept, backend):
    named = dict(zip(("input", "weight", "bias"), [(7, 5, 3), (4, 3), (4,)], strict=True))
    args = {name: tensor(*shape, requires_grad=need) for (name, shape), need in zip(named.items(), needs, strict=True)}
    assert kept_bytes(lambda: linear(*args.values())) == sum(args[name].nbytes for name in kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_native_result_is_the_same_on_every_run(dtype):
    input, weight, bias = (tensor(*s, dtype=dtype, requires_grad=False) for s in ((130, 70), (65, 70), (65,)))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(linear_kernel.native(input, weight, bias))
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias, backend):
    args = (tensor(5, 3), tensor(4, 3), tensor(4) if bias else None)
    torch.library.opcheck(getattr(linear_kernel, backend), args)
    turned = (tensor(3, 5, requires_grad=False).t(), tensor(8, 3, requires_grad=False)[::2], None)
    torch.library.opcheck(getattr(linear_kernel, backend), turned)


def test_a_kernel_records_nothing_for_autograd(backend):
    assert not linear_kernel(tensor(5, 3), tensor(4, 3), tensor(4), backend=backend).requires_grad


@pytest.mark.parametrize("shapes", [((5, 3), (4, 2), None), ((5,), (4, 5), None), ((5, 3), (4, 3), (5,))])
def test_the_native_kernel_refuses_shapes_that_do_not_fit(shapes):
    args = [None if shape is None else torch.ones(shape) for shape in shapes]
    with pytest.raises(RuntimeError, match="linear"):
        linear_kernel.native(*args)


Z = torch.zeros
WRONG = {
    "input of another width": (Z(4, 3), Z(2, 5)),
    "input of another width, 3 dimensions": (Z(4, 4, 3), Z(2, 5)),
    "input of another width, vector": (Z(3), Z(2, 5)),
    "weight vector of another width": (Z(4, 3), Z(5)),
    "scalar input": (torch.tensor(1.0), Z(2, 3)),
    "scalar weight": (Z(4, 3), torch.tensor(1.0)),
    "weight of three dimensions": (Z(4, 3), Z(2, 2, 3)),
    "bias of another size": (Z(4, 3), Z(2, 3), Z(3)),
    "bias larger than the output": (Z(4, 3), Z(2, 3), Z(3, 4, 2)),
    "weight of another dtype": (Z(4, 3), Z(2, 3).double()),
    "bias of another dtype": (Z(4, 3), Z(2, 3), Z(2).double()),
    "bool": (Z(4, 3).bool(), Z(2, 3).bool()),
    "input a list": ([1.0], Z(2, 3)),
    "input None": (None, Z(2, 3)),
    "weight None": (Z(4, 3), None),
    "weight missing": (Z(4, 3),),
    "weight a number": (Z(4, 3), 2.0),
    "bias a list": (Z(4, 3), Z(2, 3), [1.0, 2.0]),
    "bias a number": (Z(4, 3), Z(2, 3), 1.0),
    "too many arguments": (Z(4, 3), Z(2, 3), None, None),
}


@pytest.mark.parametrize("args", WRONG.values(), ids=WRONG.keys())
def test_wrong_calls_fail_as_in_torch(args, backend):
    assert_wrong_like_torch(linear, F.linear, *args)


def test_other_devices_are_refused(backend):
    with pytest.raises(RuntimeError, match="linear: weight"):
        linear(Z(4, 3), Z(2, 3, device="meta"))


def test_integers_are_refused_by_name(backend):
    with pytest.raises(NotImplementedError, match="linear: input"):
        linear(Z(4, 3).long(), Z(2, 3).long())
