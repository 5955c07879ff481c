"""Other libraries' kernels, where they are installed: an operation's function of the same arguments, or why none."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def _quack_cross_entropy(library: Any) -> Callable[..., Tensor]:
    def cross_entropy(input: Tensor, target: Tensor) -> Tensor:
        loss = library.cross_entropy(input, target)
        return loss if loss.dim() == 0 else loss.mean()  # the first versions return a loss for each row

    return cross_entropy


def _quack_softmax(library: Any) -> Callable[..., Tensor]:
    return lambda input, dim: library.softmax(input)


def _liger_cross_entropy(library: Any) -> Callable[..., Tensor]:
    # It writes the gradient over the logits: a copy of them keeps the inputs of the next call whole.
    return lambda input, target: library.liger_cross_entropy(input.clone(), target)


def _attorch_layer(layer: str) -> Callable[[Any], Callable[..., Tensor]]:
    def of(library: Any) -> Callable[..., Tensor]:
        def call(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return getattr(library, layer)(**kwargs)(input, *args)

        return call

    return of


def _attorch_cross_entropy(library: Any) -> Callable[..., Tensor]:
    return lambda input, target: library.CrossEntropyLoss()(input, target)


# By operation and name: the module to import, and what makes the function of it.
PEERS: Mapping[str, Mapping[str, tuple[str, Callable[[Any], Callable[..., Tensor]]]]] = {
    "cross_entropy": {
        "quack": ("quack", _quack_cross_entropy),
        "Liger-Kernel": ("liger_kernel.transformers.functional", _liger_cross_entropy),
        "attorch": ("attorch", _attorch_cross_entropy),
    },
    "softmax": {"quack": ("quack", _quack_softmax), "attorch": ("attorch", _attorch_layer("Softmax"))},
    "log_softmax": {"attorch": ("attorch", _attorch_layer("LogSoftmax"))},
    **{
        name: {"attorch": ("attorch", _attorch_layer(layer))}
        for name, layer in {
            "relu": "ReLU",
            "sigmoid": "Sigmoid",
            "tanh": "Tanh",
            "silu": "SiLU",
            "gelu": "GELU",
        }.items()
    },
}


def peers(op: str) -> tuple[dict[str, Callable[..., Tensor]], dict[str, str]]:
    """The functions that are there for an operation, and the reason for each that is not."""
    functions, missing = {}, {}
    for name, (module, function) in PEERS.get(op, {}).items():
        try:
            functions[name] = function(importlib.import_module(module))
        except Exception as error:  # an import may fail in many ways where there is no GPU
            missing[name] = f"{type(error).__name__}: {error}"
    return functions, missing
