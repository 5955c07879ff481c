"""Speed and memory of each layer against torch's own.

Speed: forward and backward through autograd, for both in turn (ours, theirs, theirs, ours, ...) after a warm-up, so
that whatever else the machine does meets both. `speedup` is the median, over such pairs, of torch's time divided by
ours: above 1 we are faster.

Memory: the bytes that autograd keeps alive between forward and backward, every storage counted once. That includes the
layer's input and parameters where they are kept.
"""

import ast
import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from manual_ops import modes
from manual_ops.registry import OPERATIONS, Operation
from manual_ops.verify import scaled_error

# A wrong result is not worth timing; these leave room for sums of millions of terms.
LARGEST_ERROR = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}


@dataclass(frozen=True)
class Layer:
    """A layer to measure.

    Attributes:
        op: the operation's name in the registry.
        input: its input's shape.
        options: keyword arguments of the operation; `out_channels` (`out_features` for linear) and `kernel_size` give
            the weight's shape, and weights, running statistics and targets are made to fit the input.
        quick: whether it is in the short table.
        label: how to call it; by default the operation's name.
    """

    op: str
    input: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    label: str = ""

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.input))
        return f"{self.label or self.op}, {shape}"


@dataclass(frozen=True)
class Measurement:
    """One layer, ours against torch's.

    Attributes:
        milliseconds, torch_milliseconds: medians of forward + backward.
        speedup: median of torch's time / ours; `speedup_range` holds the middle half of the pairs.
        kept_bytes, torch_kept_bytes: alive between forward and backward.
        error: largest scaled difference between the values and gradients of both (see `manual_ops.verify`).
        pairs: how many were timed.
        peer_speedups: by the names of `compare`'s peers, the median of the peer's time / ours.
    """

    layer: str
    op: str
    family: str
    input: tuple[int, ...]
    milliseconds: float
    torch_milliseconds: float
    speedup: float
    speedup_range: tuple[float, float]
    kept_bytes: int
    torch_kept_bytes: int
    error: float
    pairs: int
    peer_speedups: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    measurements: tuple[Measurement, ...]
    dtype: str
    threads: int
    channels_last: bool
    backend: str
    seconds: float

    @property
    def slower(self) -> list[Measurement]:
        """The layers that lose against torch's, the worst first."""
        return sorted((row for row in self.measurements if row.speedup < 1), key=lambda row: row.speedup)

    @property
    def mean_speedup(self) -> float:
        """The geometric mean of the layers' speedups."""
        return statistics.geometric_mean(row.speedup for row in self.measurements)

    @property
    def hungrier(self) -> list[Measurement]:
        """The layers that keep more bytes than torch's."""
        return [row for row in self.measurements if row.kept_bytes > row.torch_kept_bytes]

    @property
    def wrong(self) -> list[Measurement]:
        """The layers whose result is not torch's."""
        limit = LARGEST_ERROR[getattr(torch, self.dtype)]
        return [row for row in self.measurements if not row.error <= limit]


LAYERS = (
    Layer("conv2d", (16, 64, 56, 56), {"padding": 1}, quick=True, label="conv 3x3"),
    Layer("conv2d", (16, 128, 28, 28), {"kernel_size": 1, "out_channels": 256}, quick=True, label="conv 1x1"),
    Layer("conv2d", (16, 64, 56, 56), {"out_channels": 128, "stride": 2, "padding": 1}, label="conv 3x3 stride 2"),
    Layer("conv2d", (16, 3, 64, 64), {"out_channels": 32, "padding": 1}, label="conv 3x3, RGB"),
    Layer("conv2d", (16, 128, 28, 28), {"padding": 1, "groups": 128}, quick=True, label="depthwise 3x3"),
    Layer("conv1d", (16, 64, 512), {"padding": 1}, label="conv1d 3"),
    Layer("conv3d", (2, 16, 16, 32, 32), {"padding": 1}, label="conv3d 3x3x3"),
    Layer(
        "conv_transpose2d",
        (8, 64, 28, 28),
        {"kernel_size": 4, "out_channels": 32, "stride": 2, "padding": 1},
        quick=True,
        label="transposed conv 4x4 stride 2",
    ),
    Layer("max_pool2d", (16, 64, 56, 56), {"kernel_size": 2}, label="max pool 2x2"),
    Layer(
        "max_pool2d",
        (16, 64, 112, 112),
        {"kernel_size": 3, "stride": 2, "padding": 1},
        quick=True,
        label="max pool 3x3 stride 2",
    ),
    Layer("avg_pool2d", (16, 64, 56, 56), {"kernel_size": 2}, quick=True, label="average pool 2x2"),
    Layer("adaptive_avg_pool2d", (16, 512, 7, 7), {"output_size": 1}, quick=True, label="global average pool"),
    Layer("adaptive_avg_pool2d", (16, 64, 28, 28), {"output_size": 5}, label="adaptive average pool to 5"),
    Layer("adaptive_max_pool2d", (16, 64, 28, 28), {"output_size": 7}, label="adaptive max pool to 7"),
    Layer("batch_norm", (16, 64, 56, 56), quick=True, label="batch norm"),
    Layer("batch_norm", (16, 64, 56, 56), {"training": False}, label="batch norm, evaluation"),
    Layer("batch_norm_relu", (16, 64, 56, 56), quick=True, label="batch norm + ReLU"),
    Layer("cross_entropy", (256, 1000), quick=True, label="cross-entropy"),
    Layer("cross_entropy", (4, 21, 128, 128), label="cross-entropy per pixel"),
    Layer("nll_loss", (256, 1000), label="nll loss"),
    Layer("softmax", (256, 1000), {"dim": 1}, quick=True, label="softmax"),
    Layer("log_softmax", (256, 1000), {"dim": 1}, label="log-softmax"),
    Layer("relu", (16, 64, 56, 56), quick=True, label="ReLU"),
    Layer("relu6", (16, 64, 56, 56), label="ReLU6"),
    Layer("leaky_relu", (16, 64, 56, 56), label="leaky ReLU"),
    Layer("sigmoid", (16, 64, 56, 56), label="sigmoid"),
    Layer("tanh", (16, 64, 56, 56), label="tanh"),
    Layer("silu", (16, 64, 56, 56), label="SiLU"),
    Layer("gelu", (16, 64, 56, 56), quick=True, label="GELU"),
    Layer("linear", (256, 512), {"out_features": 1000}, quick=True, label="linear"),
    Layer("mse_loss", (256, 1000), label="mean squared error"),
    Layer("binary_cross_entropy_with_logits", (256, 1000), quick=True, label="binary cross-entropy"),
    Layer("relu", (8, 16), label="ReLU, tiny"),
    Layer("conv2d", (1, 8, 8, 8), {"padding": 1}, quick=True, label="conv 3x3, tiny"),
)


def compare(
    layers: Iterable[Layer] = LAYERS,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    channels_last: bool = False,
    backend: str | None = None,
    seconds_per_layer: float = 2.0,
    operations: Mapping[str, Operation] = OPERATIONS,
    peers: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]] | None = None,
    on_row: Callable[[Measurement], None] = lambda row: None,
) -> Comparison:
    """Measure layers.

    Args:
        layers: what to measure.
        dtype: of the inputs.
        threads: that torch may use meanwhile.
        channels_last: whether 4-d and 5-d inputs and weights have this memory format.
        backend: "native" or "python"; by default this thread's.
        seconds_per_layer: time to spend on one layer, beyond the pairs that a median needs at least.
        operations: the registry.
        peers: further contestants by name, each made from torch's function; `torch.compile` is one.
        on_row: called with every measurement as soon as it is there.

    Returns:
        One measurement for each layer.

    Raises:
        ValueError: for options that do not fit the operation.
    """
    backend = backend or modes.current_backend()
    began, threads_before = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for layer in layers:
            with modes.backend(backend):  # type: ignore[arg-type]
                rows.append(_measure(layer, operations[layer.op], dtype, channels_last, seconds_per_layer, peers or {}))
            on_row(rows[-1])
    finally:
        torch.set_num_threads(threads_before)
    name = str(dtype).removeprefix("torch.")
    return Comparison(tuple(rows), name, threads, channels_last, backend, time.perf_counter() - began)


def parse_options(words: Iterable[str]) -> dict[str, Any]:
    """`["kernel_size=3", "--stride", "2"]` as `{"kernel_size": 3, "stride": 2}`; values are literals or words."""
    options = {}
    waiting: str | None = None
    for word in words:
        if waiting is not None:
            options[waiting], waiting = _literal(word), None
            continue
        written, equals, value = word.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        if equals:
            options[name] = _literal(value)
        elif word.startswith("--"):
            waiting = name
        else:
            raise ValueError(f"{word!r} is not an option; write name=value, for example kernel_size=3")
    if waiting is not None:
        raise ValueError(f"--{waiting} has no value")
    return options


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def arguments(
    layer: Layer,
    operation: Operation,
    dtype: torch.dtype,
    channels_last: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operation's arguments: its input, and tensors of fitting shapes for whatever else it takes.

    The option `residual` or `probabilities`, if true, makes a residual or a target of probabilities; `input_grad`, if
    false, an input without a gradient, as images have none.

    Raises:
        ValueError: for an option that the operation does not have, naming those that it has.
    """
    accepted = list(inspect.signature(operation.function).parameters)
    options = dict(layer.options)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device=device).to(dtype)
        if channels_last and values.dim() in (4, 5):
            values = values.to(memory_format=torch.channels_last if values.dim() == 4 else torch.channels_last_3d)
        return values.requires_grad_(grad)

    input = normal(*layer.input, grad=options.pop("input_grad", True))
    tensors: dict[str, Any] = {}
    if operation.name.startswith("conv"):
        axes = int(operation.name[-2])
        if len(layer.input) != axes + 2:
            raise ValueError(f"{layer.op}: --input needs {axes + 2} sizes (N, C, ...), got {list(layer.input)}")
        accepted += ["out_channels", "kernel_size"]
        channels, groups = layer.input[1], options.get("groups", 1)
        out_channels, size = options.pop("out_channels", channels), options.pop("kernel_size", 3)
        window = (size,) * axes if isinstance(size, int) else tuple(size)
        transposed = "transpose" in operation.name
        first, second = (channels, out_channels) if transposed else (out_channels, channels)
        tensors = {"weight": normal(first, second // groups, *window), "bias": normal(out_channels)}
    elif operation.name == "linear":
        accepted.append("out_features")
        features = options.pop("out_features", layer.input[-1])
        tensors = {"weight": normal(features, layer.input[-1]), "bias": normal(features)}
    elif len(layer.input) < 2 and accepted[1] in ("running_mean", "target"):
        raise ValueError(f"{layer.op}: --input needs at least 2 sizes (N, C, ...), got {list(layer.input)}")
    elif "running_mean" in accepted:
        channels = layer.input[1]
        tensors = {
            "running_mean": torch.zeros(channels, dtype=dtype, device=device),
            "running_var": torch.ones(channels, dtype=dtype, device=device),
            "weight": normal(channels),
            "bias": normal(channels),
            "training": True,
        }
        if options.pop("residual", False):
            tensors["residual"] = normal(*layer.input)
    elif options.pop("probabilities", False):
        tensors = {"target": normal(*layer.input, grad=False).softmax(1)}
    elif operation.name in ("cross_entropy", "nll_loss"):
        shape = (layer.input[0], *layer.input[2:])
        tensors = {"target": torch.randint(layer.input[1], shape, generator=generator, device=device)}
    elif "target" in accepted:
        tensors = {"target": normal(*layer.input, grad=False).sigmoid()}
    for name in options:
        if name not in accepted:
            raise ValueError(f"{layer.op} has no option {name!r}; it takes {', '.join(accepted[1:])}")
    return (input,), {**tensors, **options}


def _measure(
    layer: Layer,
    operation: Operation,
    dtype: torch.dtype,
    channels_last: bool,
    seconds: float,
    peers: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]],
) -> Measurement:
    args, kwargs = arguments(layer, operation, dtype, channels_last)
    ours, error_ours = _pass(operation.function, args, kwargs)
    theirs, error_theirs = _pass(operation.reference, args, kwargs)
    error = max(scaled_error(mine, exact) for mine, exact in zip(error_ours(), error_theirs(), strict=True))

    others = [_pass(make(operation.reference), args, kwargs)[0] for make in peers.values()]
    rounds = _timed_rounds([ours, theirs, *others], seconds)
    low, speedup, high = statistics.quantiles([times[1] / times[0] for times in rounds], n=4)
    return Measurement(
        layer=layer.name,
        op=layer.op,
        family=operation.family,
        input=layer.input,
        milliseconds=1e3 * statistics.median(times[0] for times in rounds),
        torch_milliseconds=1e3 * statistics.median(times[1] for times in rounds),
        speedup=speedup,
        speedup_range=(low, high),
        kept_bytes=kept_bytes(operation.function, args, kwargs),
        torch_kept_bytes=kept_bytes(operation.reference, args, kwargs),
        error=error,
        pairs=len(rounds),
        peer_speedups={
            name: statistics.median(times[place] / times[0] for times in rounds) for place, name in enumerate(peers, 2)
        },
    )


def _pass(
    function: Callable[..., Any], args: Any, kwargs: Any
) -> tuple[Callable[[], None], Callable[[], list[Tensor]]]:
    """One forward and backward pass: to time, and to look at its results."""
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]

    def forward() -> Tensor:
        output = function(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    output = forward().detach()
    generator = torch.Generator(output.device).manual_seed(1)
    cotangent = torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
    # A gradient arrives in the memory format of the output, as it would from a next layer.
    cotangent = torch.empty_like(output).copy_(cotangent)

    def results() -> list[Tensor]:
        output = forward()
        return [output.detach(), *torch.autograd.grad(output, inputs, cotangent)]

    def timed() -> None:
        torch.autograd.grad(forward(), inputs, cotangent)

    return timed, results


def _timed_rounds(contestants: Sequence[Callable[[], None]], seconds: float) -> list[tuple[float, ...]]:
    """Seconds of each contestant, in rounds that run back and forth through them: at least 7, and at most as many as
    fit into `seconds` (or 1000)."""
    for _ in range(3):
        for contestant in contestants:
            contestant()
    # A single call of a tiny layer is too short for the clock: time as many as take 1 ms.
    estimate = _time(contestants[0], 1)
    calls = max(1, min(200, int(1e-3 / max(estimate, 1e-9))))
    rounds: list[tuple[float, ...]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 7 or (time.perf_counter() < end and len(rounds) < 1000):
        step = -1 if len(rounds) % 2 else 1
        rounds.append(tuple([_time(contestant, calls) for contestant in contestants[::step]][::step]))
    return rounds


def _time(function: Callable[[], None], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


def kept_bytes(function: Callable[..., Any], args: Any, kwargs: Any) -> int:
    """Bytes that autograd keeps alive for the backward of function(*args, **kwargs), each storage counted once."""
    storages: dict[int, int] = {}
    alive = []

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        alive.append(storage)  # so that no address is used twice
        storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        function(*args, **kwargs)
    return sum(storages.values())


class _Storages(TorchDispatchMode):
    """Remembers, without keeping them, the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                self._made[storage._cdata] = storage._weak_ref(), storage.nbytes()  # type: ignore[attr-defined]
        return results

    def alive(self) -> int:
        gc.collect()
        return sum(size for weak, size in self._made.values() if not torch.UntypedStorage._expired(weak))  # type: ignore


def alive_bytes(function: Callable[[], Any]) -> tuple[Any, int]:
    """function(), and the bytes of what it made that are alive as long as its result is, whoever keeps them.

    `kept_bytes` asks what autograd was given; this sees what hooks on saved tensors, as lean mode has them, hide.
    """
    with _Storages() as storages:
        output = function()
    return output, storages.alive()
