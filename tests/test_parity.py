"""Every function against torch's own, on calls that nobody lists.

A call is drawn option by option, wrong values among them, with tensors of every dtype, layout and kind of value. Where
torch raises, ours raises an exception of the same type; where torch gives a result, ours has its value, gradients,
dtype, shape and strides. The few differences are listed in DIFFERENCES, each with its reason.
"""

import re
import warnings
from dataclasses import dataclass, field

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from manual_ops import functional, modes

pytestmark = pytest.mark.cpu(
    "its list of differences is of torch on the CPU; test_cuda.py compares the GPU's results with the CPU's"
)

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILON = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


# A call, described by values that print: the tensors are made anew for each of the two functions.


@dataclass(frozen=True)
class T:
    """A tensor: normal values, `values` says which of them are replaced by something special."""

    shape: tuple
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    values: str = "normal"
    grad: bool = True
    seed: int = 0

    def make(self):
        generator = torch.Generator().manual_seed(self.seed)
        if self.values == "classes":
            data = torch.randint(0, 3, self.shape, generator=generator)
        else:
            data = SPECIAL[self.values](torch.randn(self.shape, dtype=torch.float64, generator=generator))
        tensor = LAYOUTS[self.layout](data.to(self.dtype))
        return tensor.requires_grad_(self.grad and tensor.is_floating_point())


def _with(*numbers):
    def put(data):
        flat = data.flatten()
        for place, number in enumerate(numbers):
            if len(flat):
                flat[(place * 5 + 1) % len(flat)] = number
        return flat.reshape(data.shape)

    return put


nan, inf = float("nan"), float("inf")
SPECIAL = {
    "normal": lambda data: data,
    "ties": lambda data: data.round(),
    "nan": _with(nan),
    "nans": _with(nan, inf, nan),
    "inf": _with(inf),
    "-inf": _with(-inf),
    "all -inf": lambda data: torch.full_like(data, -inf),
    "zeros": lambda data: torch.copysign(torch.zeros_like(data), data),
    "huge": _with(1e30),
    "tiny": lambda data: data * 1e-40,
    "probability": lambda data: data.sigmoid(),
}


def _stepped(data):
    wide = torch.empty(*data.shape[:-1], 2 * data.shape[-1], dtype=data.dtype) if data.dim() else data.clone()
    view = wide[..., ::2] if data.dim() else wide
    return view.copy_(data)


def _channels_last(data):
    if data.dim() in (4, 5):
        return data.contiguous(memory_format=torch.channels_last if data.dim() == 4 else torch.channels_last_3d)
    return data.contiguous()


LAYOUTS = {
    "contiguous": lambda data: data.contiguous(),
    "channels_last": _channels_last,
    "transposed": lambda data: data.transpose(0, -1).contiguous().transpose(0, -1) if data.dim() else data,
    "stepped": _stepped,
    "expanded": lambda data: data[:1].expand(data.shape) if data.dim() and len(data) else data,
    "moved channels": lambda data: data.movedim(1, -1).contiguous().movedim(-1, 1) if data.dim() > 1 else data,
}


@dataclass(frozen=True)
class Call:
    name: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    cotangent: str = "normal"

    def make(self, dtype=None):
        """Its arguments; with a dtype every floating one is computed in that, from the values that it has here."""
        kwargs = {name: _made(value, dtype) for name, value in self.kwargs.items()}
        return [_made(arg, dtype) for arg in self.args], kwargs


def _is_dtype(value):
    return isinstance(value, torch.dtype) and value in FLOATING


def _made(value, dtype):
    if not isinstance(value, T):
        return dtype if dtype is not None and _is_dtype(value) else value
    tensor = value.make()
    if dtype is None or not tensor.is_floating_point():
        return tensor
    exact = tensor.detach().to(dtype)
    if tensor.dim() == 1:
        exact = exact.contiguous()  # torch's batch_norm reads a weight with strides as if it had none
    return exact.requires_grad_(tensor.requires_grad)


# How calls are drawn: `pick` chooses one of its arguments.


def _tensor(pick, *shape, dtype=None, values=None, grad=True, seed=0):
    if len(shape) == 1 and isinstance(shape[0], tuple):
        shape = shape[0]
    layout = pick("contiguous", "contiguous", *LAYOUTS)
    values = values or pick("normal", "normal", "normal", "ties", *(v for v in SPECIAL if v != "probability"))
    return T(shape, dtype or pick(*FLOATING), layout, values, grad, seed)


class Pick:
    """Draws by `choose`; at most one of the places where a call can go wrong does."""

    def __init__(self, choose):
        self.choose, self.places = choose, 0
        self.unusual = choose((None,) * 6 + tuple(range(16)))

    def __call__(self, *options):
        return self.choose(options)


def _rarely(pick, value, *others):
    """`value`, but one of `others` where this is the place for something unusual."""
    pick.places += 1
    return pick(*others) if pick.places - 1 == pick.unusual else value


def _ints(pick, axes, *values):
    """An int for each axis, as people write it, and as they should not."""
    one = pick(*values)
    forms = [one, one, one, (one,), tuple(pick(*values) for _ in range(axes)), [pick(*values) for _ in range(axes)]]
    wrong = [0, -1, None, 1.0, 2.5, True, False, "a", (), (one,) * (axes + 1), (one, 1.0)[:axes], numpy.int64(one)]
    wrong += [torch.tensor(one), (None,) * axes, (torch.tensor(one),) * axes, (numpy.int64(one),) * axes]
    wrong += [torch.Size((one,) * axes), (True,) * axes, (float(one),), numpy.array([one] * axes), range(1, axes + 1)]
    wrong += [torch.tensor([one] * axes), torch.tensor(1.0), numpy.float32(1)]
    return _rarely(pick, pick(*forms), *wrong)


def _pass(pick, name, required, **options):
    """Some options by position, some by keyword, some left out."""
    names = list(options)
    positional = pick(*range(len(names) + 1))
    args = [*required, *(options[key] for key in names[:positional])]
    kwargs = {key: options[key] for key in names[positional:] if pick(True, True, False)}
    return Call(name, tuple(args), kwargs, pick("normal", "expanded", "stepped", "transposed"))


def _image(pick, axes, channels):
    shape = (channels, *(pick(5, 4, 6, 1, 2, 3, 7) for _ in range(axes)))
    shape = (pick(2, 1, 3), *shape)
    return _rarely(
        pick,
        shape,
        shape[1:],
        shape[1:],
        shape[1:],
        (0, *shape[1:]),
        (*shape[:-1], 0),
        (shape[0], 0, *shape[2:]),
        shape[2:],
        (1, *shape),
        (0, 0, *shape[2:]),
        (),
        (3,),
    )


def convolution(pick):
    axes = pick(2, 1, 3)
    transposed = pick(False, True)
    # torch's bfloat16 convolution of 3 dimensions ends in a segmentation fault for some windows larger than the input.
    dtype = pick(*(dtype for dtype in FLOATING if axes < 3 or dtype is not torch.bfloat16))
    groups = pick(1, 1, 2, 3, 4)
    ins, outs = pick(1, 2, 3, 0) if pick(*[False] * 9, True) else pick(1, 2, 3), pick(1, 2, 3)
    outs = _rarely(pick, outs, 0)
    window = tuple(pick(3, 2, 1, 4) for _ in range(axes))
    window = _rarely(pick, window, (0, *window[1:]), window[1:], (2, *window))
    channels = _rarely(pick, ins * groups, ins * groups + 1)
    shape = (ins * groups, outs, *window) if transposed else (outs * groups, ins, *window)
    input = _tensor(pick, _image(pick, axes, channels), dtype=dtype, grad=pick(True, True, False))
    weight = _tensor(
        pick,
        shape,
        dtype=_rarely(pick, dtype, *FLOATING),
        values=pick("normal", "normal", "zeros", "ties"),
        seed=1,
        grad=pick(True, True, False),
    )
    bias = T((outs * groups,), dtype, pick("contiguous", "stepped", "expanded"), seed=2)
    bias = _rarely(
        pick,
        pick(bias, None),
        T((outs * groups + 1,), dtype),
        T((1, outs * groups), dtype),
        1.0,
        T((), dtype),
        T((outs * groups,), torch.float32),
    )
    options = {
        "bias": bias,
        "stride": _ints(pick, axes, 1, 2, 3),
        "padding": _ints(pick, axes, 0, 1, 2, 3),
    }
    groups = _rarely(pick, groups, 0, -1, 5, 1.0, True, None, (1,), torch.tensor(groups), numpy.int64(groups), "a")
    dilation = _ints(pick, axes, 1, 2)
    if transposed:
        options |= {"output_padding": _ints(pick, axes, 0, 0, 1, 2), "groups": groups, "dilation": dilation}
    else:
        options |= {"dilation": dilation, "groups": groups}
        options["padding"] = _rarely(pick, options["padding"], "same", "same", "same", "valid", "full", "SAME")
    return _pass(pick, f"conv_transpose{axes}d" if transposed else f"conv{axes}d", (input, weight), **options)


def _flag(pick):
    return _rarely(pick, pick(False, True), 0, 1, None, 1.0, "a", numpy.True_, torch.tensor(True), ())


def pool(pick):
    axes = pick(2, 1, 3)
    kind = pick("max", "avg")
    dtype = _rarely(pick, pick(*FLOATING), torch.int64, torch.bool, torch.uint8, torch.complex64)
    input = _tensor(pick, _image(pick, axes, pick(2, 1, 3)), dtype=dtype, grad=pick(True, True, False))
    options = {
        "stride": _rarely(pick, _ints(pick, axes, 1, 2, 3), None, None, (), []),
        "padding": _ints(pick, axes, 0, 0, 1, 2),
    }
    if kind == "max":
        options |= {"dilation": _ints(pick, axes, 1, 1, 2), "ceil_mode": _flag(pick), "return_indices": _flag(pick)}
    else:
        options |= {"ceil_mode": _flag(pick), "count_include_pad": _flag(pick)}
        if axes > 1:
            options["divisor_override"] = (
                pick(None, 3, -2, 1, None, None)
                if pick(*[True] * 6, False)
                else pick(0, 1.0, True, "a", (1,), torch.tensor(2), numpy.int64(2))
            )
    name = f"{kind}_pool{axes}d" + (pick("", "", "_with_indices") if kind == "max" else "")
    return _pass(pick, name, (input, _ints(pick, axes, 2, 3, 1, 4)), **options)


def adaptive_pool(pick):
    axes = pick(2, 1, 3)
    kind = pick("max", "avg")
    dtype = _rarely(pick, pick(*FLOATING), torch.int64, torch.bool, torch.uint8)
    input = _tensor(pick, _image(pick, axes, pick(2, 1, 3)), dtype=dtype)
    size = _ints(pick, axes, 1, 2, 3, 5, 8)
    size = pick(size, size, size, tuple(pick(None, 1, 2, 4, 0) for _ in range(axes)))
    options = {"return_indices": _flag(pick)} if kind == "max" else {}
    name = f"adaptive_{kind}_pool{axes}d" + (pick("", "", "_with_indices") if kind == "max" else "")
    return _pass(pick, name, (input, size), **options)


def batch_norm(pick):
    dtype = pick(*FLOATING)
    channels = pick(3, 1, 2)
    shape = (pick(4, 2, 1), channels, *[(), (3,), (3, 2), (2, 1, 3), (1, 1), (2, 2, 2, 2)][pick(*range(6))])
    shape = _rarely(pick, shape, (0, *shape[1:]), (*shape[:2], 0), (shape[0], 0), (), (3,), (1, channels))
    input = _tensor(pick, shape, dtype=dtype, values=pick("normal", "normal", "normal", "ties", "nan", "inf", "huge"))
    other = _rarely(pick, pick(dtype, dtype, torch.float32), *FLOATING)

    def vector(seed, grad, values="normal"):
        good = T((channels,), other, pick("contiguous", "stepped"), values, grad, seed)
        return _rarely(
            pick,
            pick(good, good, None),
            T((channels + 1,), other, grad=grad),
            1.0,
            T((), other, grad=grad),
            T((1, channels), other, grad=grad),
            T((channels,), dtype, values=values, grad=not grad),
            T((channels,), torch.float32, values=values, grad=grad),
        )

    # Contiguous: in evaluation torch's backward reads beyond running statistics that have strides.
    mean, var = statistics = (
        T((channels,), other, grad=False, seed=1),
        T((channels,), other, "contiguous", "probability", False, 2),
    )
    mean, var = _rarely(
        pick,
        pick(statistics, statistics, (None, None)),
        (mean, None),
        (None, var),
        (1.0, var),
        (T((channels + 1,), other, grad=False), var),
        (mean, T((1, channels), other, grad=False)),
        (mean, T((channels,), other)),
        (T((), other, grad=False), var),
        (None, 1.0),
    )
    options = {
        "weight": vector(3, True),
        "bias": vector(4, True),
        "training": _flag(pick),
        "momentum": _rarely(
            pick, pick(0.1, 0.0, 1.0, 0.5), None, 2, -1.0, "a", nan, True, torch.tensor(0.5), numpy.float64(0.5), inf
        ),
        "eps": _rarely(
            pick, pick(1e-5, 1e-3, 1.0), 0.0, 0, -1e-3, 1, None, "a", True, numpy.float32(1e-3), nan, torch.tensor(0.1)
        ),
    }
    return _pass(pick, "batch_norm", (input, mean, var), **options)


def activation(pick):
    name = pick("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "sigmoid", "tanh", "silu", "gelu")
    dtype = _rarely(pick, pick(*FLOATING), torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int32)
    shape = pick((3, 4), (2, 3, 4, 5), (), (5,), (0, 3), (2, 1, 1, 1), (1, 3, 2, 2, 2), (2, 3, 1, 1))
    input = _rarely(pick, _tensor(pick, shape, dtype=dtype, grad=pick(True, False)), 1.0, None, [1.0])
    options = {}
    if name.startswith("leaky"):
        options["negative_slope"] = _rarely(
            pick,
            pick(0.01, 0.2, 0.0, 1.0, 2),
            -0.5,
            nan,
            inf,
            None,
            "a",
            True,
            torch.tensor(0.3),
            numpy.float32(0.3),
            1 + 2j,
        )
    if name in ("relu", "relu6", "leaky_relu", "silu"):
        options["inplace"] = _rarely(pick, pick(False, False, True), 0, 1, None, "a", torch.tensor(True))
    if name == "gelu":
        approximate = _rarely(pick, pick("none", "tanh"), "a", None, 1)
        return Call(name, (input,), {"approximate": approximate}, pick("normal", "expanded", "stepped", "transposed"))
    return _pass(pick, name, (input,), **options)


def softmax(pick):
    name = pick("softmax", "log_softmax")
    dtype = _rarely(pick, pick(*FLOATING), torch.int64, torch.bool)
    shape = pick((3, 4), (2, 3, 4, 5), (), (5,), (0, 3), (3, 0), (2, 1, 1, 1), (2, 3, 4), (1, 70), (2, 3, 2, 2, 2))
    input = _tensor(pick, shape, dtype=dtype)
    dim = _rarely(pick, pick(0, 1, -1, 2), -2, 7, None, None, True, 1.0, "a", (0,), torch.tensor(0), numpy.int64(0))
    to = _rarely(pick, None, *FLOATING, torch.int64, "float", 6)
    return _pass(pick, name, (input,), dim=dim, _stacklevel=3, dtype=to)


def linear(pick):
    dtype = pick(*FLOATING)
    ins, outs = pick(3, 1, 4, 0), pick(2, 1, 5, 0)
    shape = pick((4, ins), (2, 3, ins), (ins,), (0, ins), (2, 0, ins), (1, ins), (4, ins + 1), (), (2, 2, 2, ins))
    input = _tensor(pick, shape, dtype=_rarely(pick, dtype, torch.int64, torch.bool, *FLOATING))
    weight = pick((outs, ins), (outs, ins), (outs, ins), (outs, ins), (ins,), (outs, ins, 1), (), (1, outs, ins))
    weight = _tensor(pick, weight, dtype=dtype, values="normal", seed=1)
    bias = T((outs,), dtype, pick("contiguous", "stepped", "expanded"), seed=2)
    bias = _rarely(
        pick,
        pick(bias, None),
        T((outs + 1,), dtype),
        T((1, outs), dtype),
        1.0,
        T((), dtype),
        T((1,), dtype),
        T((outs,), torch.float32),
        T((4, outs), dtype),
        T((7, 1, outs), dtype),
    )
    return _pass(pick, "linear", (input, weight), bias=bias)


def _reduction(pick):
    return {
        "size_average": _rarely(pick, None, True, False, 1),
        "reduce": _rarely(pick, None, True, False, 0),
        "reduction": _rarely(pick, pick("mean", "sum", "none"), "batchmean", None, "elementwise_mean", 1, "MEAN"),
    }


def cross_entropy(pick):
    name = pick("cross_entropy", "nll_loss", "cross_entropy")
    dtype = pick(*FLOATING)
    classes = pick(3, 4, 5, 1, 0, 3, 4)
    rest = pick((), (2,), (2, 3), (2, 1, 2), (0,))
    batch = pick(4, 1, 0, 4)
    shape = _rarely(pick, (batch, classes, *rest), (classes,), (classes,), ())
    rows = () if len(shape) < 2 else (batch, *rest)
    input = _tensor(
        pick,
        shape,
        dtype=_rarely(pick, dtype, torch.int64),
        values=pick("normal", "normal", "ties", "inf", "-inf", "nan", "huge", "zeros"),
    )
    good = T(rows, torch.int64, pick("contiguous", "transposed", "stepped"), "classes", seed=5)
    target = _rarely(
        pick,
        pick(good, good, good, T(shape, dtype, pick(*LAYOUTS), "probability", pick(True, False))),
        T(rows, torch.uint8, values="classes"),
        T(rows, torch.int32, values="classes"),
        T(rows, dtype),
        T((*rows, 1), torch.int64, values="classes"),
        T((1,), torch.int64, values="classes"),
        T(rows[:-1], torch.int64, values="classes"),
        T(shape, torch.float32, values="probability"),
        T(shape, torch.int64, values="classes"),
        T(rows, torch.bool, values="classes"),
        None,
    )
    weight = T((classes,), dtype, pick("contiguous", "stepped", "expanded"), "probability", False, 3)
    weight = _rarely(
        pick,
        pick(None, weight),
        T((classes + 1,), dtype, grad=False),
        T((classes,), dtype),
        T((classes,), torch.float64, grad=False),
        1.0,
        T((1, classes), dtype, grad=False),
        T((), dtype, grad=False),
    )
    ignore = _rarely(pick, pick(-100, 1, 0), 2, -1, None, 1.0, True, 1 << 40, torch.tensor(1), numpy.int64(1))
    old = _reduction(pick)
    options = {
        "weight": weight,
        "size_average": old["size_average"],
        "ignore_index": ignore,
        "reduce": old["reduce"],
        "reduction": old["reduction"],
    }
    if name == "cross_entropy":
        options["label_smoothing"] = _rarely(
            pick, pick(0.0, 0.1, 1.0, 0), -0.1, 1.5, nan, None, "a", True, torch.tensor(0.1), numpy.float64(0.1)
        )
    return _pass(pick, name, (input, target), **options)


def loss(pick):
    name = pick("mse_loss", "binary_cross_entropy_with_logits")
    dtype = _rarely(pick, pick(*FLOATING), torch.int64, torch.bool)
    shape = pick((4, 3), (5,), (), (2, 3, 2, 2), (0, 3), (1, 3))
    input = _tensor(pick, shape, dtype=dtype, grad=pick(True, True, False))
    other = _rarely(pick, dtype, torch.int64, *FLOATING)
    target = _tensor(
        pick, shape, dtype=other, values=pick("probability", "normal", "nan"), seed=1, grad=pick(True, False)
    )
    target = _rarely(pick, target, T((3,), other), T((*shape, 1), other), T((), other), 1.0, None, T((7,), other))
    weight = _rarely(
        pick,
        # Of both signs the weighted sum would cancel, and show every 16-bit rounding of what it sums in full.
        pick(None, T(shape, dtype, values="probability", seed=2, grad=pick(True, False))),
        T((3,), dtype),
        T((), dtype),
        T(shape, torch.float64),
        T((2, *shape), dtype),
        2.0,
        T((7,), dtype),
        T(shape, torch.int64),
    )
    options = _reduction(pick)
    if name == "mse_loss":
        return _pass(pick, name, (input, target), **options, weight=weight)
    p = _rarely(
        pick,
        pick(None, T(shape, dtype, seed=3, grad=pick(True, False), layout=pick(*LAYOUTS))),
        T((3,), dtype),
        T((), dtype),
        T((2, *shape), dtype),
        2.0,
        T((7,), dtype),
        T((1,), torch.float64),
    )
    return _pass(pick, name, (input, target), weight=weight, **options, pos_weight=p)


FAMILIES = [convolution, pool, adaptive_pool, batch_norm, activation, softmax, linear, cross_entropy, loss]


# How they are compared.


def outcome(function, call, dtype=None):
    """What calling gives: an error, or (outputs, gradients, the tensors without one, maybe written to)."""
    args, kwargs = call.make(dtype)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    if call.name.endswith("_") or kwargs.get("inplace") or (len(args) > 1 and call.name in IN_PLACE):
        args = [arg.clone() if isinstance(arg, torch.Tensor) and arg.requires_grad else arg for arg in args]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = function(*args, **kwargs)
    except Exception as error:
        return error
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = []
    if outputs[0].requires_grad:
        generator = torch.Generator().manual_seed(9)
        cotangent = torch.randn(outputs[0].shape, generator=generator).bfloat16().to(outputs[0].dtype)
        cotangent = LAYOUTS["contiguous" if call.cotangent == "normal" else call.cotangent](cotangent)
        try:
            gradients = torch.autograd.grad(outputs[0], leaves, cotangent, allow_unused=True)
        except Exception as error:
            return error
    return outputs, gradients, [tensor.detach() for tensor in tensors if not tensor.requires_grad]


IN_PLACE = ("relu", "relu6", "leaky_relu", "silu")


def _dtypes(call):
    values = [*call.args, *call.kwargs.values()]
    return {value.dtype for value in values if isinstance(value, T)} | {value for value in values if _is_dtype(value)}


def _steps(tensor):
    """The strides, of every dimension that has two places to be."""
    if tensor.numel() == 0:
        return []
    return [step if size > 1 else 0 for step, size in zip(tensor.stride(), tensor.shape, strict=True)]


def _close(ours, theirs, tolerance):
    ours, theirs = ours.detach(), theirs.detach()
    return torch.allclose(ours.double(), theirs.double(), tolerance, tolerance, equal_nan=True)


def differences(call):
    """What distinguishes our outcome of a call from torch's; empty where nothing does."""
    theirs, ours = outcome(getattr(F, call.name), call), outcome(getattr(functional, call.name), call)
    if isinstance(theirs, Exception) or isinstance(ours, Exception):
        if isinstance(ours, type(theirs)):
            return [] if call.name.rstrip("_") in str(ours) else [f"message: {ours}"]
        return [f"error: torch {_told(theirs)}, ours {_told(ours)}"]
    found = []
    if len(ours[0]) != len(theirs[0]):
        return [f"{len(theirs[0])} outputs, ours {len(ours[0])}"]
    for a, b in zip(ours[0], theirs[0], strict=True):
        for what in ("shape", "dtype", "requires_grad"):
            if getattr(a, what) != getattr(b, what):
                found.append(f"{what}: torch {getattr(b, what)}, ours {getattr(a, what)}")
        if a.shape == b.shape and _steps(a) != _steps(b):
            found.append(f"strides: torch {b.stride()} ours {a.stride()}")
    if found:
        return found
    precise = outcome(getattr(F, call.name), call, torch.float64)
    tolerance = max((EPSILON[dtype] for dtype in _dtypes(call) & EPSILON.keys()), default=0)
    pairs = [("output", a, b) for a, b in zip(ours[0], theirs[0], strict=True)]
    pairs += [(f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True))]
    pairs += [("argument", a, b) for a, b in zip(ours[2], theirs[2], strict=True)]
    references = [None] * len(pairs) if isinstance(precise, Exception) else [*precise[0], *precise[1], *precise[2]]
    for (what, a, b), reference in zip(pairs, references, strict=True):
        if a is None or b is None:
            if a is not b:
                found.append(f"{what}: torch {'none' if b is None else 'some'}")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            found.append(f"{what}: {b.shape} {b.dtype} ours {a.shape} {a.dtype}")
        elif not _close(a, b, tolerance) and (reference is None or not _close(a, reference.to(b.dtype), tolerance)):
            if call.name.startswith("max_pool") and (theirs[0][0] == -inf).any():
                what = f"a window of -inf: {what}"
            elif any(
                _close(torch.where(expected.isnan(), nan, a), expected, tolerance)
                for expected in (b, b if reference is None else reference.to(b.dtype))
            ):
                what = f"torch's NaN alone: {what}"
            found.append(f"{what} value: torch {b.flatten()[:8].tolist()} ours {a.flatten()[:8].tolist()}")
    return found


def _told(result):
    return f"{type(result).__name__}: {str(result)[:90]}" if isinstance(result, Exception) else "a result"


# Where ours differs, and why. An entry covers a difference whose text it matches, in the calls that it is about.


@dataclass(frozen=True)
class Difference:
    reason: str
    text: str
    example: Call
    concerns: object = lambda call: True

    def covers(self, call, difference):
        return re.search(self.text, difference) is not None and self.concerns(call)


def _about(*names):
    return lambda call: call.name in names


def _tensors(call):
    return [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, T)]


def _empty(*names):
    return lambda call: call.name in names and 0 in call.args[0].shape


def _image_of(dtype=torch.float32, *shape, layout="contiguous", values="normal", grad=True):
    return T(shape, dtype, layout, values, grad)


def _all_dtypes(call):
    options = [value for value in call.kwargs.values() if isinstance(value, torch.dtype)]
    return [tensor.dtype for tensor in _tensors(call)] + options


def _not_floating(call):
    return any(dtype not in FLOATING for dtype in _all_dtypes(call))


def _indices(*shape):
    return T(shape, torch.int64, values="classes")


F32, F64, F16 = torch.float32, torch.float64, torch.float16
CONVOLUTIONS = [f"conv{kind}{axes}d" for kind in ("", "_transpose") for axes in (1, 2, 3)]
DIFFERENCES = [
    Difference(
        "Integer, bool and complex tensors, which each of torch's functions takes or refuses as its kernels "
        "happen to: ours takes them in max pooling and ReLU and is a NotImplementedError by name elsewhere.",
        "NotImplementedError|integer_t",
        Call("avg_pool2d", (_image_of(torch.int64, 1, 2, 4, 4), 2)),
        _not_floating,
    ),
    Difference(
        "torch has no 16-bit avg_pool3d on the CPU (it has on CUDA).",
        "avg_pool3d_out_frame. not implemented",
        Call("avg_pool3d", (_image_of(F16, 1, 2, 4, 4, 4), 2)),
    ),
    Difference(
        "The memory format of a 3-d convolution of channels_last_3d operands is that of the library that torch "
        "picks for the dtype: channels_last_3d in float32, contiguous in float64. Ours is channels_last_3d.",
        "^strides",
        Call("conv3d", (_image_of(F64, 2, 3, 4, 4, 4, layout="channels_last"), _image_of(F64, 2, 3, 2, 2, 2))),
        _about("conv3d", "conv_transpose3d"),
    ),
    Difference(
        "Where a size is 1, permuted strides may be channels_last or not: torch asks their order, ours whether the "
        "memory is laid out so.",
        "^strides",
        Call("conv2d", (T((1, 8, 1, 7), F32, "transposed"), T((4, 2, 2, 2), F32, "transposed"), None, 1, 1, 1, 4)),
        lambda call: call.name in ("conv2d", "conv_transpose2d") and 1 in (*call.args[0].shape, *call.args[1].shape),
    ),
    Difference(
        "torch makes the input of a 1-d convolution contiguous 'to avoid accidentally going through NHWC' and "
        "forgets a weight with permuted strides; ours is contiguous.",
        "^strides",
        Call("conv1d", (_image_of(F32, 2, 3, 5), _image_of(F32, 4, 3, 2, layout="moved channels"))),
        _about("conv1d", "conv_transpose1d"),
    ),
    Difference(
        "Without input channels torch skips its checks and returns an output without channels; ours has the "
        "weight's, filled with the bias, as the formula says.",
        "",
        Call("conv2d", (_image_of(F32, 1, 0, 3, 3), _image_of(F32, 2, 0, 2, 2))),
        lambda call: call.name in CONVOLUTIONS and 0 in (*call.args[0].shape, *call.args[1].shape),
    ),
    Difference(
        "A transposed convolution with an output of size 0: torch returns it in float32 and bfloat16 and raises "
        "in float64 and float16. Ours raises.",
        "torch a result, ours RuntimeError: .* the output would have the size",
        Call("conv_transpose1d", (T((3, 2, 1), torch.bfloat16), T((2, 1, 2), torch.bfloat16, grad=False), None, 1, 1)),
    ),
    Difference(
        "torch multiplies an infinity or NaN with the zeros of the padding, in some dtypes and directions; ours "
        "skips the padding, so that it spreads along the real taps only.",
        "^torch's NaN alone",
        Call(
            "conv_transpose2d", (_image_of(F64, 1, 1, 3, 3, values="inf"), _image_of(F64, 1, 1, 2, 2)), {"padding": 1}
        ),
        _about(*CONVOLUTIONS),
    ),
    Difference(
        "torch's adaptive pools return an empty output, and their backward refuses its gradient. Ours is zero.",
        "_backward.*Expected grad_output to have non-zero size",
        Call("adaptive_avg_pool2d", (_image_of(F32, 1, 2, 4, 4), 0)),
    ),
    Difference(
        "torch takes an unbatched (C, D, H, W) whose strides look like channels_last for an image, and refuses it.",
        "Unsupported memory format",
        Call("max_pool3d", (_image_of(F32, 2, 4, 3, 3, layout="channels_last"), 2)),
    ),
    Difference(
        "Where a window holds nothing above -inf torch may name a winner that is not in the window, or not in the "
        "plane, and sends the gradient there. Ours names the first tap of the window.",
        "^a window of -inf",
        Call("max_pool3d", (_image_of(F64, 1, 2, 4, 4, 4, layout="channels_last", values="all -inf"), 2)),
    ),
    Difference(
        "max_pool1d keeps channels innermost where the input has them so; torch has a contiguous special case for "
        "inputs that need no gradient, on the CPU.",
        "^strides",
        Call("max_pool1d", (_image_of(F32, 2, 3, 6, layout="moved channels", grad=False), 2)),
        _about("max_pool1d"),
    ),
    Difference(
        "Scale and shift of another shape than (C,): torch's forward takes them, in some dtypes, and its backward "
        "ends in an internal error. Ours takes them throughout.",
        "INTERNAL ASSERT|TensorAccessor expected|returned an invalid gradient",
        Call("batch_norm", (_image_of(F32, 4, 2), None, None, T((1, 2), F32), None, True)),
        _about("batch_norm"),
    ),
    Difference(
        "An input without elements returns from torch's batch_norm before anything is checked. Ours checks.",
        "torch a result, ours",
        Call("batch_norm", (_image_of(F32, 2, 3, 0), None, None)),
        _empty("batch_norm"),
    ),
    Difference(
        "The variance of 1e30 overflows float32. torch's kernel for contiguous inputs gives rstd = 0 as ours "
        "does, the one for strided inputs sums in float64.",
        "value",
        Call("batch_norm", (_image_of(F32, 2, 2, 3, layout="stepped", values="huge"), None, None, None, None, True)),
        lambda call: call.name == "batch_norm" and call.args[0].values == "huge",
    ),
    Difference(
        "Where the strides of input and target disagree, and the target's are no memory format, torch's 'none' "
        "has the target's and ours the input's.",
        "^strides",
        Call(
            "binary_cross_entropy_with_logits",
            (_image_of(F32, 3, 4), _image_of(F32, 3, 4, layout="transposed")),
            {"reduction": "none"},
        ),
        _about("binary_cross_entropy_with_logits"),
    ),
    Difference(
        "The target's gradient at an infinite logit under pos_weight: torch's is infinite, ours inf - inf.",
        "^gradient",
        Call(
            "binary_cross_entropy_with_logits",
            (_image_of(F32, 4, values="inf"), _image_of(F32, 4)),
            {"pos_weight": T((4,), F32, grad=False)},
        ),
        lambda call: (
            call.name == "binary_cross_entropy_with_logits"
            and (
                call.args[0].values in ("inf", "-inf", "all -inf", "nans")
                or (call.args[0].values == "huge" and call.args[0].dtype is F16)  # 1e30 is infinite there
            )
        ),
    ),
    Difference(
        "Whether torch takes a bias of several numbers next to a weight vector depends on the strides of the input. "
        "Ours takes one number.",
        "torch a result, ours RuntimeError: linear: bias must be a number",
        Call("linear", (_image_of(F32, 2, 3, 4, layout="expanded"), _image_of(F32, 4), _image_of(F32, 1))),
    ),
    Difference(
        "torch documents a bias in the input's dtype; whether it takes another depends on the input's strides.",
        "torch a result, ours RuntimeError: linear: bias must have the dtype of input",
        Call("linear", (_image_of(F64, 2, 3, 4, layout="stepped"), _image_of(F64, 1, 4), _image_of(F32, 1))),
    ),
    Difference(
        "torch documents a bias of shape (F,); whether it takes more dimensions depends on the input's strides and "
        "shape. Ours takes every bias that broadcasts to the output, and the (1, F) of a matrix.",
        "torch RuntimeError: .*(expand|broadcast).*, ours a result",
        Call("linear", (_image_of(F32, 3), _image_of(F32, 1, 3), _image_of(F32, 1, 1))),
        _about("linear"),
    ),
    Difference(
        "Where the input is expanded, strides of 0 leave the order of the output's open: torch asks the target for it.",
        "^strides",
        Call(
            "mse_loss",
            (_image_of(F32, 4, 3, layout="expanded"), _image_of(F32, 4, 3, layout="transposed")),
            {"reduction": "none"},
        ),
        lambda call: call.name == "mse_loss" and call.args[0].layout == "expanded",
    ),
    Difference(
        "Targets of uint8, which torch takes for class indices everywhere but in the weighted sum of label smoothing.",
        "torch RuntimeError: gather.*, ours a result",
        Call(
            "cross_entropy",
            (_image_of(F32, 1, 3), T((1,), torch.uint8, values="classes"), _image_of(F32, 3, grad=False)),
            {"label_smoothing": 0.1},
        ),
    ),
    Difference(
        "The gradient of relu6 at NaN: torch's vectorised loop stops it, the loop over the last elements passes it, "
        "as ours does.",
        "^gradient",
        Call("relu6", (T((2, 3, 4, 5), F32, values="nan"),)),
        lambda call: call.name == "relu6" and "nan" in call.args[0].values,
    ),
    Difference(
        "torch's nll_loss of a channels_last input has no backward.",
        "grad_input must be contiguous",
        Call("nll_loss", (_image_of(F32, 2, 3, 2, 2, layout="channels_last"), _indices(2, 2, 2))),
    ),
    Difference(
        "torch documents label_smoothing between 0 and 1, and ignores one that is negative or NaN where targets "
        "are indices. Ours raises.",
        "torch (a result|IndexError).*, ours RuntimeError: .*label_smoothing must be between",
        Call("cross_entropy", (_image_of(F32, 2, 3), _indices(2)), {"label_smoothing": -0.1}),
    ),
    Difference(
        "Without classes, or without rows, torch's losses stumble over their own reshapes.",
        "",
        Call("cross_entropy", (_image_of(F32, 4, 0, 2), _indices(4, 2))),
        _empty("cross_entropy", "nll_loss"),
    ),
    Difference(
        "torch documents a weight of shape (C,), and reads one of another shape with C elements where targets are "
        "pixels.",
        "torch (a result|IndexError).*weight must have one entry per class",
        Call("cross_entropy", (_image_of(F32, 1, 3, 2, 2), _indices(1, 2, 2), T((1, 3), F32, grad=False))),
    ),
]


@st.composite
def calls(draw, family):
    return family(Pick(lambda options: draw(st.sampled_from(options))))


def _unexplained(call):
    return [text for text in differences(call) if not any(entry.covers(call, text) for entry in DIFFERENCES)]


def _settings(examples):
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=quiet,
        phases=[Phase.generate],  # a call is small enough to read as it was drawn
    )


@pytest.mark.parametrize("backend_name", ["native", "python"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_any_call_is_that_of_torch(family, backend_name):
    @_settings(80 if backend_name == "native" else 30)
    @given(calls(family))
    def check(call):
        with modes.backend(backend_name):
            assert _unexplained(call) == []

    check()


@pytest.mark.slow  # minutes: thousands of calls of each family
@pytest.mark.parametrize("backend_name", ["native", "python"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_thousands_of_calls_are_those_of_torch(family, backend_name):
    @_settings(3000)
    @given(calls(family))
    def check(call):
        with modes.backend(backend_name):
            assert _unexplained(call) == []

    check()


@pytest.mark.parametrize("entry", DIFFERENCES, ids=lambda entry: f"{entry.example.name}: {entry.text}")
def test_the_differences_are_those_that_are_listed(entry):
    found = differences(entry.example)
    assert found, f"no difference any more: {entry.reason}"
    assert [text for text in found if not entry.covers(entry.example, text)] == []
