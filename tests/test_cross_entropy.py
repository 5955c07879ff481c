"""cross_entropy and nll_loss against torch's."""

import inspect
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from manual_ops import modes
from manual_ops.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_forward,
    cross_entropy_input_grad,
    nll_loss,
    nll_loss_forward,
    nll_loss_input_grad,
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

REDUCTIONS = ["none", "sum", "mean"]
# Rows and pixels, fewer classes than a vector and more.
SHAPES = [(3,), (1,), (5, 4), (6, 1), (3, 70), (40, 150), (2, 3, 5), (2, 4, 1), (2, 21, 9, 8), (2, 3, 2, 3, 2)]
both_functions = pytest.mark.parametrize(
    ("ours", "theirs"),
    [pytest.param(cross_entropy, F.cross_entropy, id="cross_entropy"), pytest.param(nll_loss, F.nll_loss, id="nll")],
)


def indices(shape, ignore_index=-100):
    """Classes for logits of `shape`, every fourth row ignored."""
    if len(shape) == 1:
        return torch.randint(shape[0], ())
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1::4] = ignore_index
    return target


def distributions(shape, dtype=torch.float64, requires_grad=True):
    target = torch.randn(shape, dtype=torch.float64).softmax(min(1, len(shape) - 1))
    return target.to(dtype).requires_grad_(requires_grad)


def class_weights(shape, dtype=torch.float64, requires_grad=False):
    classes = shape[min(1, len(shape) - 1)]
    return torch.rand(classes, dtype=torch.float64).add(0.5).to(dtype).requires_grad_(requires_grad)


def test_the_signatures_are_torchs():
    for ours, theirs in ((cross_entropy, F.cross_entropy), (nll_loss, F.nll_loss)):
        expected = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        assert [(p.name, p.default) for p in inspect.signature(ours).parameters.values()] == expected


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_gradients(shape, reduction, dtype, backend, device):
    x = tensor(*shape, dtype=dtype, device=device)
    target = indices(shape).to(device)
    probabilities = distributions(shape, dtype).detach().to(device).requires_grad_()
    for weight, label_smoothing in itertools.product((None, class_weights(shape, dtype).to(device)), (0.0, 0.2)):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        assert_same_as_torch(cross_entropy, F.cross_entropy, x, target, weight, **options)
        weight = None if weight is None else weight.detach().requires_grad_()
        assert_same_as_torch(cross_entropy, F.cross_entropy, x, probabilities, weight, **options)
        if label_smoothing == 0:
            weight = None if weight is None else weight.detach()
            assert_same_as_torch(nll_loss, F.nll_loss, x, target, weight, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 4), (9, 100), (2, 7, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(shape, reduction, dtype, backend, device):
    """Within rounding of the loss in float32; torch's own rounds the log-softmax to 16 bits in between."""
    x, weight = tensor(*shape, dtype=dtype, device=device), class_weights(shape, dtype).to(device)
    kinds = [(indices(shape).to(device), 0.0), (indices(shape).to(device), 0.1)]
    kinds.append((distributions(shape, dtype, False).to(device), 0.0))
    for target, label_smoothing in kinds:
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        output = cross_entropy(x, target, weight, **options)
        wide = x.detach().float().requires_grad_()
        wide_target = target.float() if target.is_floating_point() else target
        expected = F.cross_entropy(wide, wide_target, weight.float(), **options)
        assert output.dtype == dtype
        assert_same(output.float(), expected, **TOLERANCE[dtype])
        cotangent = torch.rand(expected.shape).to(output)
        (gradient,) = torch.autograd.grad(output, x, cotangent)
        (expected_gradient,) = torch.autograd.grad(expected, wide, cotangent.float())
        assert gradient.dtype == dtype
        assert_same(gradient.float(), expected_gradient, **TOLERANCE[dtype])
    target = indices(shape).to(device)
    assert_same_as_torch(nll_loss, F.nll_loss, x, target, weight, reduction="sum" if shape == (5, 4) else "none")


def test_mixed_dtypes_of_logits_probabilities_and_weight_are_promoted(backend):
    shape = (4, 5)
    for dtypes in itertools.product((torch.float32, torch.float64), repeat=3):
        x, target = tensor(*shape, dtype=dtypes[0]), distributions(shape, dtypes[1])
        weight = class_weights(shape, dtypes[2], True)
        output, expected = cross_entropy(x, target, weight), F.cross_entropy(x, target, weight)
        assert_same(output, expected, rtol=1e-6, atol=1e-6)
        pairs = zip(
            torch.autograd.grad(output, (x, target, weight)),
            torch.autograd.grad(expected, (x, target, weight)),
            strict=True,
        )
        for gradient, expected_gradient in pairs:
            assert_same(gradient, expected_gradient, rtol=1e-6, atol=1e-6)


@both_functions
def test_one_row_without_a_batch(ours, theirs, backend):
    x = tensor(5)
    for reduction in REDUCTIONS:
        assert_same_as_torch(ours, theirs, x, torch.tensor(3), reduction=reduction)
        # torch's backward refuses the target of shape (1,) that its forward takes.
        output, expected = (ours(x, target, reduction=reduction) for target in (torch.tensor([3]), torch.tensor(3)))
        assert_same(output, expected)
        assert_same(torch.autograd.grad(output, x)[0], torch.autograd.grad(expected, x)[0])


@both_functions
def test_uint8_indices(ours, theirs, backend):
    x, target = tensor(4, 5), torch.tensor([0, 4, 2, 255], dtype=torch.uint8)
    assert_same_as_torch(ours, theirs, x, target, ignore_index=255)


@both_functions
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 9])
def test_ignore_index_inside_and_outside_the_classes(ours, theirs, ignore_index, backend):
    for shape in ((8, 4), (2, 4, 3, 5)):
        for reduction in REDUCTIONS:
            target, weight = indices(shape, ignore_index), class_weights(shape)
            assert_same_as_torch(
                ours, theirs, tensor(*shape), target, weight, ignore_index=ignore_index, reduction=reduction
            )


@both_functions
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 2)])
def test_every_row_ignored(ours, theirs, reduction, shape, backend):
    """The mean of nothing is NaN, its gradient zero."""
    target = torch.full((shape[0], *shape[2:]), -100)
    assert_same_as_torch(ours, theirs, tensor(*shape), target, reduction=reduction)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_weights_that_sum_to_zero(label_smoothing, backend):
    assert_same_as_torch(
        cross_entropy,
        F.cross_entropy,
        tensor(4, 5),
        torch.tensor([0, 1, 2, 3]),
        torch.zeros(5, dtype=torch.float64),
        label_smoothing=label_smoothing,
    )


@both_functions
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 3), (2, 5, 0, 3), (0, 0)])
def test_no_rows(ours, theirs, reduction, shape, backend):
    assert_same_as_torch(ours, theirs, tensor(*shape), indices((shape[0], 5, *shape[2:])), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (2, 5, 0)])
def test_no_rows_or_classes_of_probabilities(reduction, shape, backend):
    x, target = tensor(*shape), torch.zeros(shape, dtype=torch.float64)
    assert_same_as_torch(cross_entropy, F.cross_entropy, x, target, reduction=reduction)


@both_functions
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_classes_but_every_row_ignored(ours, theirs, reduction, backend):
    target = torch.full((3,), -100)
    assert_same(ours(tensor(3, 0), target, reduction=reduction), theirs(tensor(3, 0), target, reduction=reduction))


@pytest.mark.parametrize("shape", [(6, 5), (2, 5, 3, 4), (2, 70, 3, 4), (2, 5, 3, 2, 2)])
def test_any_strides(shape, backend):
    """The input's gradient is channels_last where the input is."""
    wide = tensor(shape[0], 2 * shape[1], *shape[2:])
    views = [wide[:, ::2], wide[:, : shape[1]].transpose(0, -1).contiguous().transpose(0, -1)]
    if len(shape) > 3:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        views.append(wide[:, : shape[1]].contiguous(memory_format=memory_format))
    target = indices((*shape, 2))[..., 0]
    probabilities = distributions((shape[0], *shape[2:], shape[1])).movedim(-1, 1)
    for view, reduction in itertools.product(views, ("none", "mean")):
        for kind, smoothing in ((target, 0.0), (probabilities, 0.1)):
            assert_same_as_torch(
                cross_entropy, F.cross_entropy, view, kind, reduction=reduction, label_smoothing=smoothing
            )
        if view.is_contiguous(memory_format=torch.contiguous_format) or len(shape) != 4:
            assert_same_as_torch(nll_loss, F.nll_loss, view, target, reduction=reduction)
    if len(shape) == 4:
        leaf = views[-1].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
        assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_nll_loss_takes_the_channels_last_input_whose_gradient_torch_refuses(backend):
    x = tensor(2, 5, 3, 4).detach().to(memory_format=torch.channels_last).requires_grad_()
    target = indices(x.shape)
    (gradient,) = torch.autograd.grad(nll_loss(x, target), x)
    y = x.detach().contiguous().requires_grad_()
    assert_same(gradient, torch.autograd.grad(F.nll_loss(y, target), y)[0])


def test_an_expanded_gradient(backend):
    x, target = tensor(4, 5, 3), indices((4, 5, 3))
    cotangent = torch.randn(1, 3, dtype=torch.float64).expand(4, 3)
    for ours, theirs in ((cross_entropy, F.cross_entropy), (nll_loss, F.nll_loss)):
        (gradient,) = torch.autograd.grad(ours(x, target, reduction="none"), x, cotangent)
        assert_same(gradient, torch.autograd.grad(theirs(x, target, reduction="none"), x, cotangent)[0])


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("copies", [1, 30])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "row",
    [
        [1.0, INF, 2.0],
        [INF, INF, 0.0],
        [-INF] * 3,
        [1.0, -INF, 2.0],
        [-INF, 1.0, 2.0],
        [1.0, NAN, 2.0],
        [NAN] * 3,
        [INF, -INF, 0.0],
        [1e30, -1e30, 1e30],
        [3e38, -3e38, 0.0],
        [10000.0, 10001.0, 9999.5],
    ],
)
def test_special_values(row, copies, label_smoothing, backend):
    x = torch.tensor([row * copies, [0.5, 1.5, -2.0] * copies, row * copies])
    pixels = x.T.reshape(1, -1, 3, 1).contiguous()
    for target in (torch.tensor([0, 1, -100]), torch.tensor([1, 0, 2])):
        for reduction in REDUCTIONS:
            options = {"reduction": reduction, "label_smoothing": label_smoothing}
            assert_same_as_torch(cross_entropy, F.cross_entropy, x.clone().requires_grad_(), target, **options)
            target_of_pixels = target.reshape(1, 3, 1)
            assert_same_as_torch(
                cross_entropy, F.cross_entropy, pixels.clone().requires_grad_(), target_of_pixels, **options
            )
    probabilities = torch.tensor([0.0, 1.0, 0.0] * copies).expand(3, -1).clone().requires_grad_()
    assert_same_as_torch(
        cross_entropy, F.cross_entropy, x.clone().requires_grad_(), probabilities, label_smoothing=label_smoothing
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 3), (2, 2, 2)])
def test_derivatives_of_every_order_for_indices(shape, reduction, backend):
    x, target, weight = tensor(*shape), indices(shape), class_weights(shape)
    for label_smoothing in (0.0, 0.2):
        gradchecks(lambda x, s=label_smoothing: cross_entropy(x, target, weight, None, -100, None, reduction, s), x)
    gradchecks(lambda x: nll_loss(x, target, weight, reduction=reduction), x)

    def gradient(x):
        loss = cross_entropy(x, target, weight, reduction=reduction)
        return torch.autograd.grad(loss.pow(2).sum(), x, create_graph=True)[0]

    torch.autograd.gradgradcheck(gradient, x)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("subset", [s for s in itertools.product((False, True), repeat=3) if any(s)])
def test_derivatives_of_any_subset_of_logits_probabilities_and_weight(subset, reduction, backend):
    shape = (2, 2)
    args = [tensor(*shape).detach(), distributions(shape).detach(), class_weights(shape)]
    args = [arg.requires_grad_(needed) for arg, needed in zip(args, subset, strict=True)]
    gradchecks(lambda *args: cross_entropy(*args, reduction=reduction, label_smoothing=0.1), *args)


def test_third_order_for_probabilities(backend):
    x, target, weight = tensor(2, 3), distributions((2, 3)), class_weights((2, 3), requires_grad=True)

    def gradients(*args):
        return torch.autograd.grad(cross_entropy(*args).pow(2), args, create_graph=True)

    torch.autograd.gradgradcheck(gradients, (x, target, weight))


def test_gradcheck_of_inputs_that_are_not_contiguous(backend):
    x, target = tensor(2, 3, 2).transpose(0, 2), distributions((2, 3, 2)).transpose(0, 2)
    gradchecks(cross_entropy, x, target)
    indexed = indices((2, 3, 2))
    gradchecks(lambda x: cross_entropy(x, indexed), x)


@both_functions
def test_hessian(ours, theirs, backend):
    x, target = tensor(3, 4, requires_grad=False), torch.tensor([2, 0, -100])
    for reduction in ("sum", "mean"):
        expected = torch.func.hessian(lambda x: theirs(x, target, reduction=reduction))(x)  # noqa: B023
        assert_same(torch.func.hessian(lambda x: ours(x, target, reduction=reduction))(x), expected)  # noqa: B023


def vmapped_like_torch(ours, theirs, in_dims, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing batch rule falls back to a loop, with a warning
        output = torch.vmap(lambda *args: ours(*args, **kwargs), in_dims)(*args)
    expected = [
        theirs(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)), **kwargs)
        for i in range(output.shape[0])
    ]
    assert_same(output, torch.stack(expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "in_dims", [d for d in itertools.product((0, 1, None), (0, None), (0, None)) if d != (None, None, None)]
)
def test_vmap_does_not_mix_the_samples(in_dims, reduction, backend):
    sizes = [5 if d == 0 else 0 for d in in_dims]
    x = (
        torch.randn(5, 3, 4, 2).double().movedim(0, in_dims[0])
        if in_dims[0] is not None
        else torch.randn(3, 4, 2).double()
    )
    batch = (5,) if in_dims[1] == 0 else ()
    target = torch.randint(4, (*batch, 3, 2))
    target[..., 0, 0] = -100
    weight = torch.rand(*((5,) if sizes[2] else ()), 4).double()
    vmapped_like_torch(cross_entropy, F.cross_entropy, in_dims, x, target, weight, reduction=reduction)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    vmapped_like_torch(cross_entropy, F.cross_entropy, in_dims, x, target, weight, **options)
    probabilities = torch.rand(*batch, 3, 4, 2).double()
    vmapped_like_torch(cross_entropy, F.cross_entropy, in_dims, x, probabilities, weight, **options)
    vmapped_like_torch(nll_loss, F.nll_loss, in_dims, x, target, weight, reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_per_sample_gradients_and_nested_vmap(reduction, backend):
    x, target = torch.randn(2, 5, 3, 4).double(), torch.randint(4, (2, 5, 3))
    weight = torch.rand(5, 4).double()
    for ours, theirs in ((cross_entropy, F.cross_entropy), (nll_loss, F.nll_loss)):

        def per_sample(function):
            gradient = torch.func.grad(lambda x, t, w: function(x, t, w, reduction=reduction))
            return torch.vmap(torch.vmap(gradient), (0, 0, None))(x, target, weight)

        assert_same(per_sample(ours), per_sample(theirs))


def opcheck_arguments(shape, reduction, kind, weighted):
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    target = distributions(shape, torch.float32, False) if kind == "distribution" else indices(shape)
    return x, target, class_weights(shape, torch.float32) if weighted else None


@pytest.mark.parametrize("which", ["native", "python"])
@pytest.mark.parametrize(
    ("shape", "reduction", "kind", "weighted"),
    [
        ((4, 3), "mean", "index", True),
        ((2, 3, 4, 5), "none", "index", False),
        ((2, 3, 5), "sum", "distribution", True),
    ],
)
def test_opcheck(which, shape, reduction, kind, weighted):
    x, target, weight = opcheck_arguments(shape, reduction, kind, weighted)
    options = reduction, [], -100, 0.1
    torch.library.opcheck(getattr(cross_entropy_forward, which), (x, target, weight, *options))
    loss, lse, denominator = cross_entropy_forward(x, target, weight, *options, backend=which)
    saved = x, target, weight, lse, denominator
    torch.library.opcheck(getattr(cross_entropy_input_grad, which), (torch.randn_like(loss), *saved, *options))
    if kind == "index":
        torch.library.opcheck(getattr(nll_loss_forward, which), (x, target, weight, *options[:3]))
        arguments = torch.randn_like(loss), target, weight, denominator, shape[1], *options[:3]
        torch.library.opcheck(getattr(nll_loss_input_grad, which), arguments)


@pytest.mark.parametrize("shape", [(1000, 10), (300, 257), (2, 21, 60, 61), (4, 0)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_bits_do_not_depend_on_the_threads(shape, channels_last):
    x = torch.randn(shape, requires_grad=True)
    if len(shape) == 4 and channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    target = indices(shape) if shape[1] else torch.full((4,), -100)
    weight, probabilities = class_weights(shape, torch.float32), distributions(shape, torch.float32, False)

    def results():
        with modes.backend("native"):
            losses = [
                cross_entropy(x, target, weight),
                cross_entropy(x, target, weight, label_smoothing=0.1),
                cross_entropy(x, probabilities, weight),
                nll_loss(x, target, weight),
            ]
            return [*losses, *(torch.autograd.grad(loss, x)[0] for loss in losses)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = results()
    finally:
        torch.set_num_threads(threads)
    for repeated in (results(), results()):
        for one, other in zip(once, repeated, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_what_is_kept_for_backward(backend):
    """The logits, the targets and one lse per row, as two numbers; nll_loss keeps the targets alone."""
    rows, classes, number = 64, 50, 4
    x, target = tensor(rows, classes, dtype=torch.float32), torch.randint(classes, (rows,))
    kept = kept_bytes(lambda: cross_entropy(x, target))
    assert kept == rows * classes * 4 + rows * 8 + 2 * rows * 4 + number
    assert kept_bytes(lambda: nll_loss(x, target)) == rows * 8 + number


@pytest.mark.parametrize("which", ["python", "native"])
@pytest.mark.parametrize("kind", ["index", "smoothed", "distribution"])
def test_float32_is_no_worse_than_torchs(which, kind):
    """Against float64: many classes, many rows, and logits that share a large offset."""
    for x in (
        torch.randn(16, 5000) * 4,
        torch.randn(3000, 10),
        torch.randn(64, 100) + 10000,
        torch.randn(2, 40, 64) - 3000,
    ):
        x.requires_grad_()
        target = distributions(x.shape, torch.float32, False) if kind == "distribution" else indices(x.shape)
        label_smoothing = 0.1 if kind == "smoothed" else 0.0

        def results(function, x, target):
            loss = function(x, target, label_smoothing=label_smoothing)  # noqa: B023
            return loss.detach(), torch.autograd.grad(loss, x)[0]

        wide = x.detach().double().requires_grad_()
        exact = results(F.cross_entropy, wide, target.double() if kind == "distribution" else target)
        with modes.backend(which):
            ours = results(cross_entropy, x, target)
        for our, their, true in zip(ours, results(F.cross_entropy, x, target), exact, strict=True):
            rounding = 2 * true.abs().max() * torch.finfo(torch.float32).eps
            assert (our - true).abs().max() <= (their - true).abs().max() + rounding


@both_functions
@pytest.mark.parametrize(
    "legacy",
    [
        {"size_average": True},
        {"size_average": False},
        {"reduce": True},
        {"reduce": False},
        {"size_average": False, "reduce": True},
        {"size_average": True, "reduce": False},
    ],
)
def test_legacy_reductions(ours, theirs, legacy, backend):
    x, target = tensor(4, 5), indices((4, 5))
    with pytest.warns(UserWarning, match="size_average and reduce") as caught:
        output = ours(x, target, reduction="sum", **legacy)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="size_average"):
        assert_same(output, theirs(x, target, reduction="sum", **legacy))
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert_same(ours(x, target, reduction="elementwise_mean"), ours(x, target))


X, T = torch.zeros(4, 5), torch.tensor([0, 1, 2, 3])
PIXELS, PIXEL_TARGET = torch.zeros(2, 5, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64)
VOLUME, VOLUME_TARGET = torch.zeros(2, 5, 3, 3, 2), torch.zeros(2, 3, 3, 2, dtype=torch.int64)
WRONG = [
    ((X, torch.tensor([0, 1, 2, 5])), {}),
    ((X, torch.tensor([0, 1, 2, 2**40])), {}),
    ((X, torch.tensor([0, 1, 2, -1])), {}),
    ((X, torch.tensor([0, 1, 2, -100])), {"ignore_index": 2}),
    ((PIXELS, PIXEL_TARGET + 7), {}),
    ((PIXELS, PIXEL_TARGET - 7), {"reduction": "none"}),
    ((torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64)), {}),
    ((X, T, torch.ones(4)), {}),
    ((X, T, torch.ones(1)), {}),
    ((X, T, torch.ones(1, 5)), {}),
    ((X, T, torch.ones(5).double()), {}),
    ((X, T, torch.ones(5).half()), {}),
    ((X, T, torch.ones(5, requires_grad=True)), {}),
    ((X, T, [1.0] * 5), {}),
    ((X, T[:3]), {}),
    ((X, T[None]), {}),
    ((X, T[:, None]), {}),
    ((X, T[0]), {}),
    ((X[0], T[:2]), {}),
    ((X, T.int()), {}),
    ((X, T.bool()), {}),
    ((X, T.float()), {}),
    ((X.long(), T), {}),
    ((X.to(torch.complex64), T), {}),
    ((torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64)), {}),
    ((PIXELS, PIXEL_TARGET[:, :2]), {}),
    ((PIXELS, PIXEL_TARGET[:, 0]), {}),
    ((VOLUME, VOLUME_TARGET[:, :, :2]), {}),
    ((X, T), {"reduction": "foo"}),
    ((X, T), {"reduction": None}),
    ((X, T), {"reduction": 1}),
    ((X, T), {"ignore_index": 1.0}),
    ((X, T), {"ignore_index": None}),
    ((X, T), {"ignore_index": True}),
    (([[1.0]], T), {}),
    ((X, [0, 1, 2, 3]), {}),
    ((X, None), {}),
]
PROBABILITIES = torch.rand(4, 5)
WRONG_FOR_CROSS_ENTROPY = [
    ((X, T), {"label_smoothing": 1.1}),
    ((X, PROBABILITIES), {"label_smoothing": 2}),
    ((X, T), {"label_smoothing": "0.1"}),
    ((X, T), {"label_smoothing": None}),
    ((X, PROBABILITIES[:, :4]), {}),
    ((X, PROBABILITIES[:3]), {}),
    ((X, PROBABILITIES[:1]), {}),
    ((X, PROBABILITIES.long()), {}),
    ((torch.zeros(4), torch.zeros(4, dtype=torch.int64)), {}),
    ((X, PROBABILITIES), {"ignore_index": 3}),
    ((X, PROBABILITIES, torch.ones(4)), {}),
    ((X, PROBABILITIES, torch.ones(1)), {}),
    ((X, PROBABILITIES, torch.ones(1, 5)), {}),
    ((X.long(), PROBABILITIES), {}),
    ((X[0, 0], T[0]), {}),
    ((X[0, 0], PROBABILITIES[0, 0]), {}),
]


@pytest.mark.cpu("the same checks in Python on every device; a target out of range is an assertion on CUDA")
@both_functions
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_calls(ours, theirs, case, backend):
    args, kwargs = WRONG[case]
    assert_wrong_like_torch(ours, theirs, *args, **kwargs)


@pytest.mark.cpu("the same checks in Python on every device; a target out of range is an assertion on CUDA")
@pytest.mark.parametrize("case", range(len(WRONG_FOR_CROSS_ENTROPY)))
def test_wrong_calls_of_cross_entropy(case, backend):
    args, kwargs = WRONG_FOR_CROSS_ENTROPY[case]
    assert_wrong_like_torch(cross_entropy, F.cross_entropy, *args, **kwargs)


@pytest.mark.parametrize("label_smoothing", [-0.1, float("nan")])
def test_label_smoothing_that_torch_takes_for_none_is_refused(label_smoothing, backend):
    with pytest.raises(RuntimeError, match="cross_entropy: label_smoothing must be between 0 and 1"):
        cross_entropy(X, T, label_smoothing=label_smoothing)


def test_nll_loss_of_a_number_is_refused(backend):
    assert_wrong_like_torch(nll_loss, F.nll_loss, X[0, 0], T[0])


@pytest.mark.cpu("on CUDA an assertion on the device, after which the process can do nothing more there")
def test_the_first_bad_target_is_the_one_reported():
    target = torch.zeros(2, 64, 65, dtype=torch.int64)
    target[1, 3, 4], target[0, 60, 60], target[1, 60, 60] = 77, 99, 88
    for function in (cross_entropy, nll_loss):
        with modes.backend("native"), pytest.raises(IndexError, match="target 99 is out of bounds for 5 classes"):
            function(torch.zeros(2, 5, 64, 65), target)
