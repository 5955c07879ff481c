"""torch.func and forward mode over every operation of the registry: derivatives of any order, vmap, and both nested."""

import itertools
import random
from collections import Counter

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import models
from manual_ops import functional as F
from manual_ops import kernel
from manual_ops.convert import convert
from manual_ops.registry import OPERATIONS
from manual_ops.verify import LIMITS, scaled_error
from support import assert_same, tensor

operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=list(OPERATIONS))

# The 3d faces share their code with the 2d ones; Jacobians and nested transforms of their larger samples take long.
flat_operations = pytest.mark.parametrize(
    "operation", [row for name, row in OPERATIONS.items() if "3d" not in name], ids=lambda row: row.name
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of calls on tiny tensors: waking a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def of_tensors(function, sample, moves):
    """The call as a function of those of its tensors that `moves` chooses, and these tensors."""
    slots = list(enumerate(sample.args)) + list(sample.kwargs.items())
    chosen = [(slot, value.detach()) for slot, value in slots if isinstance(value, torch.Tensor) and moves(value)]

    def call(*tensors):
        moved = dict(zip((slot for slot, _ in chosen), tensors, strict=True))
        args = [moved.get(slot, value) for slot, value in enumerate(sample.args)]
        return function(*args, **{slot: moved.get(slot, value) for slot, value in sample.kwargs.items()})

    return call, [value for _, value in chosen]


def differentiable(value):
    return value.requires_grad


def everything(value):
    return True


def both(operation, sample, moves=differentiable):
    ours, tensors = of_tensors(operation.function, sample, moves)
    theirs, _ = of_tensors(operation.reference, sample, moves)
    return ours, theirs, tensors


def smallest(operation):
    """The sample with the fewest numbers in it."""
    return min(
        operation.samples(),
        key=lambda sample: sum(value.numel() for value in of_tensors(None, sample, differentiable)[1]),
    )


def scalar(function):
    """A loss of which every derivative is something else than zero."""
    return lambda *tensors: torch.sin(function(*tensors)).sum()


def like(tensors):
    return tuple(torch.randn_like(value) for value in tensors)


def assert_all_same(ours, theirs):
    assert len(ours) == len(theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_same(mine, expected)


def every(tensors):
    return tuple(range(len(tensors)))


# Forward mode.


@operations
def test_jvp_is_torchs(operation, backend):
    for sample in operation.samples():
        ours, theirs, tensors = both(operation, sample)
        tangents = like(tensors)
        assert_all_same(func.jvp(ours, tuple(tensors), tangents), func.jvp(theirs, tuple(tensors), tangents))


@operations
def test_dual_numbers_carry_the_tangent_of_any_subset_of_the_inputs(operation, backend):
    for sample in operation.samples():
        ours, theirs, tensors = both(operation, sample)
        for moves in itertools.product([False, True], repeat=len(tensors)):
            if not any(moves):
                continue
            tangents = like(tensors)

            def tangent_of(function, moves=moves, tensors=tensors, tangents=tangents):
                with forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(value, tangent) if moving else value
                        for value, tangent, moving in zip(tensors, tangents, moves, strict=True)
                    ]
                    return forward_ad.unpack_dual(function(*duals)).tangent

            assert_same(tangent_of(ours), tangent_of(theirs))


# Higher derivatives.


def hessian_vector_products(function, tensors, direction):
    """Three ways to differentiate twice; each returns one tensor for each input."""
    gradient = func.grad(scalar(function), every(tensors))

    def slope(*tensors):
        return func.jvp(scalar(function), tensors, direction)[1]

    def reverse_over_reverse(*tensors):
        return sum((one * by).sum() for one, by in zip(gradient(*tensors), direction, strict=True))

    return {
        "forward over reverse": lambda: func.jvp(gradient, tuple(tensors), direction)[1],
        "reverse over forward": lambda: func.grad(slope, every(tensors))(*tensors),
        "reverse over reverse": lambda: func.grad(reverse_over_reverse, every(tensors))(*tensors),
    }


def torchs_derivatives(function, tensors, direction, order):
    """Along a direction, by reverse mode alone, which torch has for everything."""
    leaves = [value.clone().requires_grad_() for value in tensors]
    result = scalar(function)(*leaves)
    for _ in range(order):
        gradients = torch.autograd.grad(result, leaves, create_graph=True, materialize_grads=True)
        result = sum((one * by).sum() for one, by in zip(gradients, direction, strict=True))
    return [gradient.detach() for gradient in gradients]


@operations
def test_hessian_vector_products_are_torchs(operation, backend):
    for sample in operation.samples():
        ours, theirs, tensors = both(operation, sample)
        direction = like(tensors)
        expected = torchs_derivatives(theirs, tensors, direction, order=2)
        for product in hessian_vector_products(ours, tensors, direction).values():
            assert_all_same(product(), expected)


def elementary_batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, residual=None
):
    others = [dim for dim in range(input.dim()) if dim != 1]
    shape = (1, -1, *(1,) * (input.dim() - 2))
    mean = input.mean(others) if training else running_mean
    var = (input - mean.reshape(shape)).square().mean(others) if training else running_var
    output = (input - mean.reshape(shape)) / (var + eps).sqrt().reshape(shape)
    output = output if weight is None else output * weight.reshape(shape)
    output = output if bias is None else output + bias.reshape(shape)
    return output if residual is None else output + residual


def cropped_conv_transpose(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
):  # all options are single numbers here
    function = getattr(torch.nn.functional, f"conv_transpose{input.dim() - 2}d")
    whole = function(input, weight, bias, stride, 0, 0, groups, dilation)
    return torch.nn.functional.pad(whole, [-padding, output_padding - padding] * (input.dim() - 2))


# torch takes the statistics for constants in the second derivative of its batch norm, so its third is wrong; and it
# refuses the third derivative of a transposed convolution with output_padding.
THIRD_REFERENCES = {
    "batch_norm": elementary_batch_norm,
    "batch_norm_relu": lambda *args, **kwargs: torch.relu(elementary_batch_norm(*args, **kwargs)),
    **dict.fromkeys([f"conv_transpose{axes}d" for axes in (1, 2, 3)], cropped_conv_transpose),
}


def test_torchs_third_derivative_of_batch_norm_is_wrong():
    x, direction = tensor(5, 2, requires_grad=False), (tensor(5, 2, requires_grad=False),)

    def third(function):
        return torchs_derivatives(lambda x: function(x, None, None, training=True), [x], direction, order=3)[0]

    expected = third(elementary_batch_norm)
    assert_same(third(F.batch_norm), expected)
    assert not torch.allclose(third(torch.nn.functional.batch_norm), expected, rtol=0.1, atol=0.1)


@operations
def test_third_derivatives_are_torchs(operation, backend):
    reference = THIRD_REFERENCES.get(operation.name, operation.reference)
    for sample in operation.samples():
        ours, _, tensors = both(operation, sample)
        theirs, _ = of_tensors(reference, sample, differentiable)
        direction = like(tensors)
        expected = torchs_derivatives(theirs, tensors, direction, order=3)
        assert_all_same(torchs_derivatives(ours, tensors, direction, order=3), expected)

        def slope(*tensors, ours=ours, direction=direction):
            return func.jvp(scalar(ours), tensors, direction)[1]

        def bend(*tensors, slope=slope, direction=direction):
            return func.jvp(slope, tensors, direction)[1]

        assert_all_same(func.grad(bend, every(tensors))(*tensors), expected)
        forwards = func.jvp(bend, tuple(tensors), direction)[1]
        assert_same(forwards, sum((one * by).sum() for one, by in zip(expected, direction, strict=True)))


THIRD_ORDER = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), (1, 2, 4), (2, 2, 2), (2,)),
    "conv2d": (lambda x, w: F.conv2d(x, w, groups=2), (1, 2, 3, 2), (2, 1, 2, 2)),
    "conv3d": (lambda x, w: F.conv3d(x, w, dilation=(1, 2, 1)), (1, 1, 2, 3, 1), (1, 1, 2, 2, 1)),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, None, 2, 1, 1), (1, 2, 3), (2, 1, 3)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2, 1), (1, 1, 3, 3)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 2), (1, 2, 3)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2, 1, 1), (1, 1, 3, 2)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 2), (1, 2, 3)),
    "relu": (F.relu, (5,)),
    "sigmoid": (F.sigmoid, (5,)),
    "softmax": (lambda x: F.softmax(x, 1), (2, 3)),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), (3, 2), (2,), (2,)),
}


@pytest.mark.parametrize("name", THIRD_ORDER)
def test_third_order_by_finite_differences(name, backend):
    function, *shapes = THIRD_ORDER[name]
    inputs = [tensor(*shape) for shape in shapes]

    def gradient(*inputs):
        # Cubed, so that a piecewise linear operation has third derivatives as well.
        return torch.autograd.grad((function(*inputs) ** 3).sum(), inputs, create_graph=True)

    torch.autograd.gradgradcheck(gradient, inputs)


NESTED = {
    "hessian": func.hessian,
    "jacrev of jacfwd": lambda f, argnums: func.jacrev(func.jacfwd(f, argnums), argnums),
    "jacfwd of jacrev": lambda f, argnums: func.jacfwd(func.jacrev(f, argnums), argnums),
    "jacrev of jacrev": lambda f, argnums: func.jacrev(func.jacrev(f, argnums), argnums),
    "jacfwd of jacfwd": lambda f, argnums: func.jacfwd(func.jacfwd(f, argnums), argnums),
}


@flat_operations
def test_jacobians_and_hessians_are_torchs(operation, backend):
    ours, theirs, tensors = both(operation, smallest(operation))
    expected = torch.autograd.functional.jacobian(theirs, tuple(tensors))
    for jacobian in (func.jacrev, func.jacfwd):
        assert_all_same(jacobian(ours, every(tensors))(*tensors), expected)
    # By one input, the last: a bias, a weight, or the only input.
    last = len(tensors) - 1
    expected = torch.autograd.functional.hessian(lambda one: scalar(theirs)(*tensors[:last], one), tensors[last])
    for nested in NESTED.values():
        assert_same(nested(scalar(ours), last)(*tensors), expected)


NESTED_CASES = {
    "conv2d": (lambda f, x, w, b: f.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2), (1, 2, 3, 4), (2, 1, 2, 2), (2,)),
    "conv_transpose2d": (lambda f, x, w: f.conv_transpose2d(x, w, None, (2, 1), (1, 0)), (1, 2, 2, 2), (2, 1, 2, 2)),
    "max_pool2d": (lambda f, x: f.max_pool2d(x, (2, 1), (1, 2), (1, 0)), (1, 2, 3, 4)),
    "adaptive_avg_pool2d": (lambda f, x: f.adaptive_avg_pool2d(x, (2, 3)), (1, 2, 3, 4)),
    "batch_norm": (lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True), (4, 2), (2,), (2,)),
}


@pytest.mark.parametrize("name", NESTED_CASES)
def test_blocks_of_a_hessian_between_all_inputs(name, backend):
    function, *shapes = NESTED_CASES[name]
    tensors = tuple(tensor(*shape, requires_grad=False) for shape in shapes)
    expected = torch.autograd.functional.hessian(
        scalar(lambda *tensors: function(torch.nn.functional, *tensors)), tensors
    )
    for nested in NESTED.values():
        blocks = nested(scalar(lambda *tensors: function(F, *tensors)), every(tensors))(*tensors)
        for row, expected_row in zip(blocks, expected, strict=True):
            assert_all_same(row, expected_row)


# vmap. Its meaning is a loop, which is what the results are compared with: torch's vmap has no rule for some of these.


def batched(tensors, batch_size, chosen, dims):
    """Each chosen tensor with a batch at its dimension, of values of its own; in_dims for all."""
    out, in_dims = [], []
    for value, is_chosen, dim in zip(tensors, chosen, dims, strict=True):
        if not is_chosen:
            out.append(value)
            in_dims.append(None)
            continue
        if value.is_floating_point():
            # Positive stays positive (variances, weights), and a distribution stays a distribution.
            copies = [value * (1 + at / (2 * batch_size)) for at in range(batch_size)]
        else:
            copies = [value.roll(at) if value.dim() else value for at in range(batch_size)]
        dim = dim % (value.dim() + 1)
        out.append(torch.stack(copies, dim))
        in_dims.append(dim - (value.dim() + 1) if at_random() else dim)
    return out, tuple(in_dims)


def at_random():
    return random.random() < 0.5


def looped(function, tensors, in_dims, batch_size):
    outputs = [
        function(
            *(value if dim is None else value.select(dim, at) for value, dim in zip(tensors, in_dims, strict=True))
        )
        for at in range(batch_size)
    ]
    if isinstance(outputs[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return torch.stack(outputs)


def subsets(tensors):
    return [chosen for chosen in itertools.product([False, True], repeat=len(tensors)) if any(chosen)]


@operations
def test_vmap_over_any_subset_of_the_tensors_and_any_dimension(operation, backend):
    random.seed(0)
    for sample in operation.samples():
        ours, theirs, tensors = both(operation, sample, everything)
        for chosen in subsets(tensors):
            dims = [random.randrange(value.dim() + 1) for value in tensors]
            stacked, in_dims = batched(tensors, 3, chosen, dims)
            assert_same(func.vmap(ours, in_dims)(*stacked), looped(theirs, stacked, in_dims, 3))


@flat_operations
def test_nested_vmap(operation, backend):
    random.seed(1)
    for sample in operation.samples()[:3]:
        ours, theirs, tensors = both(operation, sample, everything)
        outer = [random.randrange(3) > 0 for _ in tensors]
        inner = [not out or at_random() for out in outer[:-1]] + [True]
        once, inner_dims = batched(tensors, 2, inner, [0 for _ in tensors])
        twice, outer_dims = batched(once, 3, [True, *outer[1:]], [random.randrange(value.dim() + 1) for value in once])
        # The inner dimensions are counted without the outer one.
        result = func.vmap(func.vmap(ours, inner_dims), outer_dims, out_dims=1)(*twice)
        expected = looped(lambda *once, f=theirs, d=inner_dims: looped(f, once, d, 2), twice, outer_dims, 3)
        assert_same(result.movedim(1, 0), expected)


@operations
def test_vmap_of_grad_with_shared_and_with_own_parameters(operation, backend):
    random.seed(2)
    for sample in operation.samples():
        ours, theirs, tensors = both(operation, sample)
        alone = [True] + [False] * (len(tensors) - 1)
        for chosen in {tuple(alone), tuple(not first for first in alone), (True,) * len(tensors)}:
            if not any(chosen):
                continue
            stacked, in_dims = batched(tensors, 3, chosen, [random.randrange(value.dim() + 1) for value in tensors])
            gradient = func.grad(scalar(ours), every(tensors))
            expected = looped(func.grad(scalar(theirs), every(tensors)), stacked, in_dims, 3)
            assert_all_same(func.vmap(gradient, in_dims)(*stacked), expected)


@flat_operations
def test_vmap_of_jvp_and_of_hessian_vector_products(operation, backend):
    ours, theirs, tensors = both(operation, smallest(operation))
    stacked, in_dims = batched([*tensors, *like(tensors)], 2, [True] * 2 * len(tensors), [0] * 2 * len(tensors))
    count = len(tensors)

    def slope(function):
        return lambda *args: func.jvp(function, args[:count], args[count:])[1]

    def second(*args):
        return tuple(torchs_derivatives(theirs, args[:count], args[count:], order=2))

    assert_same(func.vmap(slope(ours))(*stacked), looped(slope(theirs), stacked, in_dims, 2))
    expected = looped(second, stacked, in_dims, 2)
    for way in ("forward over reverse", "reverse over forward", "reverse over reverse"):
        product = lambda *args, way=way: hessian_vector_products(ours, args[:count], args[count:])[way]()  # noqa: E731
        assert_all_same(func.vmap(product)(*stacked), expected)


@pytest.mark.parametrize("name", ["relu_", "leaky_relu_"])
def test_in_place_under_vmap_an_own_tangent_cannot_be_written_into_a_shared_one(name, backend):
    x, shared = tensor(3, 4, requires_grad=False), tensor(4, requires_grad=False)
    for function in (getattr(F, name), getattr(torch.nn.functional, name)):
        with pytest.raises(RuntimeError, match="not possible because there exists a Tensor"):
            func.vmap(lambda x, f=function: func.jvp(lambda x: f(x.clone()), (x,), (shared,)))(x)


@operations
def test_vmap_over_no_samples(operation, backend):
    for sample in operation.samples():
        ours, theirs, tensors = both(operation, sample)
        for chosen in ((True,) + (False,) * (len(tensors) - 1), (True,) * len(tensors)):
            empty = [
                value.new_empty(0, *value.shape) if is_chosen else value
                for value, is_chosen in zip(tensors, chosen, strict=True)
            ]
            in_dims = tuple(0 if is_chosen else None for is_chosen in chosen)
            assert func.vmap(ours, in_dims)(*empty).shape == (0, *theirs(*tensors).shape)
            gradients = func.vmap(func.grad(scalar(ours), every(tensors)), in_dims)(*empty)
            assert [gradient.shape for gradient in gradients] == [(0, *value.shape) for value in tensors]


def test_a_tangent_of_the_weights_of_index_targets_raises(backend):
    """torch, which has no gradient by them either, gives the tangent 0."""
    x, weight, target = tensor(2, 3, requires_grad=False), torch.ones(3, dtype=torch.float64), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match="the weight of index targets is not differentiable"):
        func.jvp(lambda weight: F.cross_entropy(x, target, weight), (weight,), (weight,))
    theirs = torch.nn.functional.cross_entropy
    assert func.jvp(lambda weight: theirs(x, target, weight), (weight,), (weight,))[1] == 0


# No loops: what runs does not depend on the size of the batch.


class Calls(TorchDispatchMode):
    """Counts the operators that run, below all transforms."""

    def __init__(self):
        super().__init__()
        self.kernels, self.all = Counter(), Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.all[str(operator)] += 1
        if operator.namespace in kernel.NAMESPACES.values():
            # In place is a kernel of its own, for which the other stands in under a transform.
            self.kernels[operator._schema.name.rstrip("_")] += 1
        return operator(*args, **(kwargs or {}))


def calls(function, *args):
    with Calls() as counted:
        function(*args)
    return counted


@flat_operations
def test_the_batch_is_one_call_of_each_kernel(operation, backend):
    for sample in operation.samples():
        ours, _, tensors = both(operation, sample)
        count = len(tensors)
        gradient = func.grad(scalar(ours), every(tensors))

        def second(*args, gradient=gradient, count=count):
            return func.jvp(gradient, args[:count], args[count:])

        first_alone, all_of_them = (True,) + (False,) * (count - 1), (True,) * count
        for function, args, chosen in [
            (ours, tensors, first_alone),
            (ours, tensors, all_of_them),
            (gradient, tensors, first_alone),
            (gradient, tensors, all_of_them),
            (second, [*tensors, *like(tensors)], all_of_them * 2),
        ]:
            counts = {}
            for batch_size in (1, 6, 7):
                stacked, in_dims = batched(args, batch_size, chosen, [0] * len(args))
                counts[batch_size] = calls(func.vmap(function, in_dims), *stacked)
            assert counts[1].kernels == counts[7].kernels
            assert counts[6].all == counts[7].all
            assert_as_one_sample(operation, counts[7].kernels, calls(function, *args).kernels)


def assert_as_one_sample(operation, kernels, one):
    if operation.family == "dense and losses":
        # A product of two batches is a convolution in groups, and channel_sum adds up the losses of each sample.
        kernels, one = (_with_stand_ins(counts) for counts in (kernels, one))
        assert kernels.pop("channel_sum", 0) >= one.pop("channel_sum", 0)
    assert kernels == one


def _with_stand_ins(counts):
    renamed = Counter()
    for name, count in counts.items():
        name = name.partition("::")[2]
        renamed[{"linear": "conv_forward", "total": "channel_sum"}.get(name, name)] += count
    return renamed


# Models.


def per_sample_gradients(model, x, y, in_dims=(None, None, 0, 0)):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    parameters = {name: value.detach() for name, value in parameters.items()}

    def loss(parameters, buffers, x, y):
        return F.cross_entropy(func.functional_call(model, (parameters, buffers), (x[None],)), y[None])

    return func.vmap(func.grad(loss), in_dims)(parameters, buffers, x, y)


def looped_gradients(model, x, y):
    gradients = []
    for image, label in zip(x, y, strict=True):
        loss = torch.nn.functional.cross_entropy(model(image[None]), label[None])
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    return [torch.stack(parts) for parts in zip(*gradients, strict=True)]


@pytest.mark.parametrize("make", models.MODELS, ids=lambda model: model.__name__)
def test_per_sample_gradients_of_a_model_in_evaluation(make, backend):
    reference = make().double().eval()
    for name, value in reference.named_buffers():
        if name.endswith("running_var"):
            value.copy_(torch.rand_like(value) + 0.5)
    x, y = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 1])
    expected = looped_gradients(reference, x, y)
    model = convert(reference)
    gradients = per_sample_gradients(model, x, y)
    assert_all_same([gradients[name] for name, _ in model.named_parameters()], expected)


@pytest.mark.parametrize("make", models.MODELS, ids=lambda model: model.__name__)
def test_per_sample_gradients_of_a_model_in_training(make, backend):
    """Each sample is normalised by its own statistics, as torch.func's guide to batch norm does it."""
    reference = func.replace_all_batch_norm_modules_(make().double().train())
    x, y = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 1])
    expected = looped_gradients(reference, x, y)
    model = convert(reference)
    gradients = per_sample_gradients(model, x, y)
    assert_all_same([gradients[name] for name, _ in model.named_parameters()], expected)


# Running statistics.


def test_batched_running_statistics_move_sample_by_sample(backend):
    x = tensor(3, 4, 2, 5, requires_grad=False)
    ours = torch.zeros(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)
    theirs = tuple(value.clone() for value in ours)

    def normalise(function):
        return lambda x, mean, var: function(x, mean, var, None, None, True, 0.3)

    assert_same(
        func.vmap(normalise(F.batch_norm))(x, *ours), func.vmap(normalise(torch.nn.functional.batch_norm))(x, *theirs)
    )
    assert_all_same(ours, theirs)
    assert (ours[0] != 0).all()


@pytest.mark.parametrize("which", [(False, False), (True, False), (False, True)])
def test_shared_running_statistics_cannot_be_updated_under_vmap(which, backend):
    x = tensor(3, 4, 2, 5, requires_grad=False)
    statistics = [torch.ones(*(3,) * own, 2, dtype=torch.float64) for own in which]
    in_dims = (0, *(0 if own else None for own in which))
    for function in (F.batch_norm, torch.nn.functional.batch_norm):
        with pytest.raises((RuntimeError, ValueError), match=r"(?i)batch.norm"):
            func.vmap(lambda x, m, v, f=function: f(x, m, v, None, None, True), in_dims)(x, *statistics)


# Another dtype.


@operations
def test_transforms_in_float32(operation, backend):
    sample = operation.samples()[0].to(torch.float32)
    ours, _, tensors = both(operation, sample)
    exact, _ = of_tensors(operation.reference, sample.to(torch.float64), differentiable)
    stacked, in_dims = batched([*tensors, *like(tensors)], 2, [True] * 2 * len(tensors), [0] * 2 * len(tensors))
    count = len(tensors)

    def slope(function):
        return lambda *args: func.jvp(function, args[:count], args[count:])

    def gradient(function):
        return lambda *args: func.grad(scalar(function), every(tensors))(*args[:count])

    doubled = [value.double() for value in stacked]
    for transform in (slope, gradient):
        results = func.vmap(transform(ours), in_dims)(*stacked)
        for mine, expected in zip(results, looped(transform(exact), doubled, in_dims, 2), strict=True):
            assert mine.dtype is torch.float32
            assert scaled_error(mine, expected) <= LIMITS[torch.float32]
