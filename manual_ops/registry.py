"""One row per operation: its function, torch's own, the layers that use it, and samples to verify it on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manual_ops import functional


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. Floating tensors are float64, those to differentiate by have requires_grad."""

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Sample":
        """The same call on fresh leaves of another floating dtype, on another device."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            target = value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
            return target.requires_grad_(value.requires_grad)

        return Sample(
            self.label,
            tuple(moved(value) for value in self.args),
            {name: moved(value) for name, value in self.kwargs.items()},
        )


@dataclass(frozen=True)
class Operation:
    """A row: `function` and torch's `reference` of the same signature, the `modules` of nn that are built on it."""

    name: str
    family: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    modules: tuple[str, ...]
    make_samples: Callable[["_Draw"], list[Sample]]

    def samples(self) -> list[Sample]:
        """Small calls that cover the operation's options; the same ones every time, on torch's default device."""
        return self.make_samples(_Draw())


class _Draw:
    """Draws the tensors of samples, the same ones every time."""

    def __init__(self) -> None:
        self.generator = torch.Generator("cpu").manual_seed(0)  # every device the same values

    def normal(self, *shape: int, grad: bool = True) -> Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=self.generator, device="cpu")
        return values.to(torch.get_default_device()).requires_grad_(grad)

    def positive(self, *shape: int, grad: bool = False) -> Tensor:
        values = torch.rand(*shape, dtype=torch.float64, generator=self.generator, device="cpu")
        return (values + 0.5).to(torch.get_default_device()).requires_grad_(grad)

    def classes(self, count: int, *shape: int) -> Tensor:
        classes = torch.randint(count, shape, generator=self.generator, device="cpu")
        return classes.to(torch.get_default_device())

    def distribution(self, *shape: int) -> Tensor:
        return self.normal(*shape, grad=False).softmax(1).requires_grad_()


def call(label: str, *args: Any, **kwargs: Any) -> Sample:
    return Sample(label, args, kwargs)


_SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 5)}


def _convolution(axes: int) -> Callable[[_Draw], list[Sample]]:
    def samples(draw: _Draw) -> list[Sample]:
        size, window = _SIZES[axes], (3, 2, 3)[:axes]
        return [
            call("plain", draw.normal(2, 3, *size), draw.normal(4, 3, *window), draw.normal(4)),
            call("stride 2, padding 1", draw.normal(2, 2, *size), draw.normal(3, 2, *window), draw.normal(3), 2, 1),
            call("dilation 2, groups 2", draw.normal(2, 4, *size), draw.normal(4, 2, *window), None, 1, 2, 2, 2),
            call("same, unbatched", draw.normal(2, *size), draw.normal(2, 2, *window), padding="same"),
            call("depthwise", draw.normal(2, 4, *size), draw.normal(4, 1, *window), draw.normal(4), 1, 1, 1, 4),
        ]

    return samples


def _transposed(axes: int) -> Callable[[_Draw], list[Sample]]:
    def samples(draw: _Draw) -> list[Sample]:
        size, window = (4, 3, 3)[:axes], (3, 2, 3)[:axes]
        return [
            call("plain", draw.normal(2, 3, *size), draw.normal(3, 2, *window), draw.normal(2)),
            call("stride 2, output padding", draw.normal(2, 2, *size), draw.normal(2, 3, *window), None, 2, 1, 1),
            call("groups 2, dilation 2", draw.normal(1, 4, *size), draw.normal(4, 1, *window), None, 1, 0, 0, 2, 2),
        ]

    return samples


def _max_pool(axes: int) -> Callable[[_Draw], list[Sample]]:
    def samples(draw: _Draw) -> list[Sample]:
        size = _SIZES[axes]
        return [
            call("kernel 2", draw.normal(2, 3, *size), 2),
            call("kernel 3, stride 2, padding 1", draw.normal(2, 3, *size), 3, 2, 1),
            call("dilation 2, ceil_mode", draw.normal(1, 2, *size), 2, 2, 1, 2, True),
            call("unbatched, overlapping", draw.normal(2, *size), 3, 1),
        ]

    return samples


def _avg_pool(axes: int) -> Callable[[_Draw], list[Sample]]:
    def samples(draw: _Draw) -> list[Sample]:
        size = _SIZES[axes]
        calls = [
            call("kernel 2", draw.normal(2, 3, *size), 2),
            call("kernel 3, stride 2, padding 1", draw.normal(2, 3, *size), 3, 2, 1),
            call("padding not counted, ceil_mode", draw.normal(1, 2, *size), 3, 2, 1, True, False),
        ]
        if axes > 1:
            calls.append(call("divisor", draw.normal(1, 2, *size), 2, divisor_override=3))
        return calls

    return samples


def _adaptive(axes: int) -> Callable[[_Draw], list[Sample]]:
    def samples(draw: _Draw) -> list[Sample]:
        size = _SIZES[axes]
        return [
            call("to 1", draw.normal(2, 3, *size), 1),
            call("uneven windows", draw.normal(2, 3, *size), (4, 3, 3)[:axes]),
            call("unbatched", draw.normal(2, *size), 2),
        ]

    return samples


def _batch_norm(draw: _Draw) -> list[Sample]:
    def affine() -> tuple[Tensor, Tensor]:
        return draw.normal(3), draw.normal(3)

    def statistics() -> tuple[Tensor, Tensor]:
        return draw.normal(3, grad=False), draw.positive(3)

    return [
        call("training", draw.normal(4, 3, 3, 2), None, None, *affine(), True),
        call("training, no affine", draw.normal(6, 3), None, None, None, None, True),
        call("evaluation", draw.normal(2, 3, 4), *statistics(), *affine(), False),
        call("evaluation, no affine", draw.normal(2, 3, 2, 2, 2), *statistics(), None, None, False),
    ]


def _batch_norm_relu(draw: _Draw) -> list[Sample]:
    residual = draw.normal(4, 3, 3, 2)
    return [
        *_batch_norm(draw),
        call(
            "training, residual", draw.normal(4, 3, 3, 2), None, None, draw.normal(3), draw.normal(3), True,
            residual=residual,
        ),
    ]  # fmt: skip


def _torch_batch_norm_relu(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, residual=None
):
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.relu(output if residual is None else output + residual)


def _softmax(draw: _Draw) -> list[Sample]:
    return [
        call("rows", draw.normal(4, 5), 1),
        call("first dimension", draw.normal(3, 4), 0),
        call("channels of an image", draw.normal(2, 3, 2, 3), dim=1),
    ]


def _cross_entropy(draw: _Draw) -> list[Sample]:
    targets = draw.classes(5, 6)
    targets[0] = -100
    return [
        call("classes", draw.normal(6, 5), draw.classes(5, 6)),
        call("weight, ignored, smoothing", draw.normal(6, 5), targets, draw.positive(5), label_smoothing=0.1),
        call("per pixel, sum", draw.normal(2, 3, 2, 3), draw.classes(3, 2, 2, 3), reduction="sum"),
        call("probabilities", draw.normal(4, 5), draw.distribution(4, 5)),
        call("probabilities, none, smoothing", draw.normal(2, 3, 2), draw.distribution(2, 3, 2), reduction="none",
             label_smoothing=0.2),
        call("unbatched", draw.normal(5), draw.classes(5, 1)[0]),
    ]  # fmt: skip


def _nll_loss(draw: _Draw) -> list[Sample]:
    return [
        call("classes", draw.normal(6, 5), draw.classes(5, 6)),
        call("weight, ignored", draw.normal(6, 5), draw.classes(5, 6), draw.positive(5), ignore_index=2),
        call("per pixel, none", draw.normal(2, 3, 2, 3), draw.classes(3, 2, 2, 3), reduction="none"),
    ]


def _elementwise(*options: dict[str, Any]) -> Callable[[_Draw], list[Sample]]:
    def samples(draw: _Draw) -> list[Sample]:
        chosen: tuple[dict[str, Any], ...] = options or ({},)
        return [call(str(kwargs or "plain"), draw.normal(3, 4, 2), **kwargs) for kwargs in chosen]

    return samples


def _linear(draw: _Draw) -> list[Sample]:
    return [
        call("rows", draw.normal(4, 3), draw.normal(5, 3), draw.normal(5)),
        call("no bias, more dimensions", draw.normal(2, 3, 4), draw.normal(2, 4)),
        call("a vector", draw.normal(4), draw.normal(3, 4), draw.normal(3)),
    ]


def _mse_loss(draw: _Draw) -> list[Sample]:
    return [
        call("mean", draw.normal(4, 3), draw.normal(4, 3)),
        call("sum", draw.normal(2, 3, 2), draw.normal(2, 3, 2), reduction="sum"),
        call("none", draw.normal(4), draw.normal(4), reduction="none"),
    ]


def _bce_with_logits(draw: _Draw) -> list[Sample]:
    return [
        call("mean", draw.normal(4, 3), draw.distribution(4, 3)),
        call("weight, pos_weight, sum", draw.normal(4, 3), draw.distribution(4, 3), draw.positive(3), reduction="sum",
             pos_weight=draw.positive(3)),
        call("none", draw.normal(4, 2), draw.distribution(4, 2), reduction="none"),
    ]  # fmt: skip


def _on_a_copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """An in-place function as one that leaves its input alone, as a check by finite differences needs it."""

    def on_a_copy(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input.clone(), *args, **kwargs)

    return on_a_copy


def _faces(family: str, name: str, modules: str, samples: Callable[[int], Any]) -> list[Operation]:
    """The 1d, 2d and 3d rows of an N-d operation."""
    return [
        Operation(
            name.format(axes), family, getattr(functional, name.format(axes)), getattr(F, name.format(axes)),
            (modules.format(axes),), samples(axes),
        )
        for axes in (1, 2, 3)
    ]  # fmt: skip


def _row(family: str, name: str, samples: Callable[[_Draw], list[Sample]], *modules: str) -> Operation:
    ours, theirs = getattr(functional, name), getattr(F, name)
    if name.endswith("_"):
        ours, theirs = _on_a_copy(ours), _on_a_copy(theirs)
    return Operation(name, family, ours, theirs, modules, samples)


_ROWS = [
    *_faces("convolution", "conv{}d", "Conv{}d", _convolution),
    *_faces("convolution", "conv_transpose{}d", "ConvTranspose{}d", _transposed),
    *_faces("pooling", "max_pool{}d", "MaxPool{}d", _max_pool),
    *_faces("pooling", "avg_pool{}d", "AvgPool{}d", _avg_pool),
    *_faces("pooling", "adaptive_max_pool{}d", "AdaptiveMaxPool{}d", _adaptive),
    *_faces("pooling", "adaptive_avg_pool{}d", "AdaptiveAvgPool{}d", _adaptive),
    _row("normalisation", "batch_norm", _batch_norm, "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    Operation(
        "batch_norm_relu",
        "normalisation",
        functional.batch_norm_relu,
        _torch_batch_norm_relu,
        ("BatchNormReLU1d", "BatchNormReLU2d", "BatchNormReLU3d", "SyncBatchNormReLU"),
        _batch_norm_relu,
    ),
    _row("classification", "cross_entropy", _cross_entropy, "CrossEntropyLoss"),
    _row("classification", "nll_loss", _nll_loss, "NLLLoss"),
    _row("classification", "softmax", _softmax, "Softmax"),
    _row("classification", "log_softmax", _softmax, "LogSoftmax"),
    _row("activation", "relu", _elementwise(), "ReLU"),
    _row("activation", "relu_", _elementwise()),
    _row("activation", "relu6", _elementwise(), "ReLU6"),
    _row("activation", "leaky_relu", _elementwise({}, {"negative_slope": 0.2}), "LeakyReLU"),
    _row("activation", "leaky_relu_", _elementwise({"negative_slope": 0.2})),
    _row("activation", "sigmoid", _elementwise(), "Sigmoid"),
    _row("activation", "tanh", _elementwise(), "Tanh"),
    _row("activation", "silu", _elementwise(), "SiLU"),
    _row("activation", "gelu", _elementwise({}, {"approximate": "tanh"}), "GELU"),
    _row("dense and losses", "linear", _linear, "Linear"),
    _row("dense and losses", "mse_loss", _mse_loss, "MSELoss"),
    _row("dense and losses", "binary_cross_entropy_with_logits", _bce_with_logits, "BCEWithLogitsLoss"),
]

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _ROWS}
