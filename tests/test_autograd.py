"""ManualFunction: the shortest way that is right, and never a silent zero."""

import pytest
import torch
from torch.autograd import forward_ad

from manual_ops import functional as F
from manual_ops.autograd import ManualFunction
from support import tensor


def test_without_gradients_nothing_is_recorded(backend):
    x = tensor(2, 3, requires_grad=False)
    assert F.relu(x).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert F.relu(x).grad_fn is None
    assert F.relu(x).grad_fn is not None


def test_inference_mode(backend):
    with torch.inference_mode():
        assert F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2)).is_inference()


def test_a_tangent_survives_no_grad(backend):
    x = tensor(3, requires_grad=False)
    with forward_ad.dual_level(), torch.no_grad():
        y = F.sigmoid(forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, x.sigmoid() * (1 - x.sigmoid()))


def test_every_function_has_a_forward_mode_rule():
    def subclasses(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from subclasses(sub)

    originals = [cls for cls in subclasses(ManualFunction) if "jvp" not in cls.__dict__]
    assert originals
    # In place has none: under a transform the result is copied into the input instead.
    assert [cls.__name__ for cls in originals if not hasattr(cls, "tangent")] == ["ActivateInPlace"]


OPS = {
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "softmax": lambda x: F.softmax(x, -1),
    "linear": lambda x: F.linear(x, torch.eye(4, dtype=x.dtype) * 2),
    "conv1d": lambda x: F.conv1d(x[None, None], torch.ones(1, 1, 2, dtype=x.dtype))[0, 0],
    "max_pool1d": lambda x: F.max_pool1d(x[None], 2)[0],
}


def _transforms(function):
    x = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    ones = torch.ones_like(x)

    def dual(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, ones))).tangent

    return {
        "jvp": lambda wrap: wrap(lambda x: torch.func.jvp(function, (x,), (ones,))[1])(x),
        "jacfwd": lambda wrap: wrap(torch.func.jacfwd(function))(x),
        "hessian": lambda wrap: wrap(torch.func.hessian(lambda x: (function(x) ** 2).sum()))(x),
        "grad": lambda wrap: wrap(torch.func.grad(lambda x: (function(x) ** 2).sum()))(x),
        "dual": lambda wrap: dual(wrap(function)),
    }


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "hessian", "grad", "dual"])
@pytest.mark.parametrize("name", OPS)
def test_compiled_transforms_are_right_or_raise_and_never_zero(name, transform):
    run = _transforms(OPS[name])[transform]
    expected = run(lambda function: function)
    assert expected.abs().max() > 0
    torch._dynamo.reset()
    try:
        result = run(lambda function: torch.compile(function, fullgraph=True, backend="eager"))
    except Exception as error:  # to raise is the other right answer
        message = str(error)
    else:
        torch.testing.assert_close(result, expected)
        return
    assert "torch.func inside torch.compile" in message or "functorch" in message


@pytest.mark.parametrize("name", OPS)
def test_functions_compile_without_a_break_and_train(name):
    x = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(OPS[name], fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad((compiled(x) ** 2).sum(), x)
    (want,) = torch.autograd.grad((OPS[name](x) ** 2).sum(), x)
    torch.testing.assert_close(got, want)
