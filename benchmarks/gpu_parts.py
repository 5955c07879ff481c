"""The measurements of `gpu.py`, part by part: a part is a list of named cases, a case returns a row of numbers.

Every row has its own checks: results are compared with torch's before anything is timed.
"""

import copy
import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import manual_ops
from manual_ops import functional
from manual_ops.compare import LARGEST_ERROR, Layer, arguments, kept_bytes
from manual_ops.environment import environment
from manual_ops.networks import NETWORKS
from manual_ops.registry import OPERATIONS
from peers import PEERS, peers
from suites import GPU
from timing import Time, describe, measure, raise_if_lost

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Where to measure: `rehearsal` runs everything once, at a reduced size, and compiles nothing.

    `compile_mode` is torch.compile's.
    """

    device: torch.device
    rehearsal: bool = False
    compile_mode: str = "default"

    def compiled(self, function: Any) -> Any:
        torch._dynamo.reset()
        return (
            torch.compile(function, backend="eager")
            if self.rehearsal
            else torch.compile(function, mode=self.compile_mode)
        )


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Settings], Row]


def prepare(settings: Settings) -> None:
    """What holds for every case of a process."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if settings.device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream())  # one that can be captured


def clean_up(settings: Settings) -> None:
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


# The environment and the two ceilings.


def _environment(settings: Settings) -> Row:
    row: Row = dataclasses.asdict(environment())
    if settings.device.type == "cuda":
        properties = torch.cuda.get_device_properties(settings.device)
        row["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "capability": [properties.major, properties.minor],
        }
        row["cudnn"] = torch.backends.cudnn.version()
    row["flags"] = {"cudnn.benchmark": True, "allow_tf32": False}
    return row


def _copy_bandwidth(settings: Settings) -> Row:
    """Bytes read and written by a copy of 1 GiB, a second."""
    count = 2**16 if settings.rehearsal else 2**28
    source = torch.randn(count, device=settings.device)
    target = torch.empty_like(source)
    (time,) = measure({"copy": [lambda: target.copy_(source)] * 2}, settings.device, 0.5).values()
    if isinstance(time, str):
        raise RuntimeError(time)
    return {"bytes_per_second": 2 * source.nbytes / (1e-6 * time.microseconds), "time": dataclasses.asdict(time)}


def _product(dtype: torch.dtype, tf32: bool = False) -> Callable[[Settings], Row]:
    """Operations a second of a square matrix product of random numbers."""

    def run(settings: Settings) -> Row:
        size = 64 if settings.rehearsal else 8192
        a, b = (torch.randn(size, size, device=settings.device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            (time,) = measure({"product": [lambda: a @ b] * 2}, settings.device, 0.5).values()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        if isinstance(time, str):
            raise RuntimeError(time)
        return {"flops_per_second": 2 * size**3 / (1e-6 * time.microseconds), "time": dataclasses.asdict(time)}

    return run


CEILINGS = [
    Case("environment", _environment),
    Case("copy", _copy_bandwidth),
    Case("product float16", _product(torch.float16)),
    Case("product bfloat16", _product(torch.bfloat16)),
    Case("product float32", _product(torch.float32)),
    Case("product tf32", _product(torch.float32, tf32=True)),
]


# Operations.


@dataclass(frozen=True)
class Pass:
    """What one pass computes: the output, or the gradients by `inputs` (None: by all that have one)."""

    name: str
    inputs: tuple[str, ...] | None = None


FORWARD, BACKWARD, TRAINING = Pass("forward"), Pass("backward"), Pass("forward + backward")
BY_INPUT, BY_WEIGHT = Pass("input gradient", ("input",)), Pass("weight gradient", ("weight",))

# The fewest times that a pass reads or writes the tensor, where a statistic over it must be known first.
TENSOR_PASSES = {"batch_norm": {"forward": 3, "backward": 5}, "batch_norm_relu": {"forward": 3, "backward": 5}}


def reduced(layer: Layer) -> Layer:
    """The same layer small enough to rehearse on a CPU."""
    options = dict(layer.options)
    few = min(layer.input[1], 8)
    if options.get("groups", 1) > 1:
        options["groups"] = few if options["groups"] == layer.input[1] else 2
    for name in ("out_channels", "out_features"):
        if name in options:
            options[name] = 8
    sizes = [min(size, 16) for size in layer.input[2:]]
    return dataclasses.replace(layer, input=(min(layer.input[0], 2), few, *sizes), options=options)


@dataclass
class _Inputs:
    """One set of arguments; `named` has the tensors by the names that passes use."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def named(self) -> dict[str, Tensor]:
        found = {"input": self.args[0], **self.kwargs}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def differentiable(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.named.items() if value.requires_grad}

    def asking_for(self, names: tuple[str, ...]) -> "_Inputs":
        """The same values, with gradients asked for by these names alone."""

        def leaf(name: str, value: Any) -> Any:
            return value.detach().requires_grad_(name in names) if isinstance(value, Tensor) else value

        kwargs = {name: leaf(name, value) for name, value in self.kwargs.items()}
        return _Inputs((leaf("input", self.args[0]), *self.args[1:]), kwargs)


def _make_inputs(layer: Layer, dtype: torch.dtype, channels_last: bool, settings: Settings, seed: int) -> _Inputs:
    args, kwargs = arguments(layer, OPERATIONS[layer.op], dtype, channels_last, settings.device.type, seed)
    if layer.op.startswith("batch_norm"):
        # Parameters and statistics stay in float32, as in mixed-precision training.
        for name in ("weight", "bias", "running_mean", "running_var"):
            wide = kwargs[name].detach().float()
            kwargs[name] = wide.requires_grad_(kwargs[name].requires_grad)
    return _Inputs(args, kwargs)


def _cotangent(output: Tensor) -> Tensor:
    return torch.empty_like(output).copy_(torch.randn(output.shape, device=output.device))


def _calls(function: Callable[..., Any], inputs: Sequence[_Inputs], which: Pass) -> list[Callable[[], Any]]:
    """One call of a pass for each set of inputs; what a backward pass needs is computed here."""

    def of(one: _Inputs) -> Callable[[], Any]:
        if which is FORWARD:

            def forward() -> Any:
                with torch.no_grad():
                    return function(*one.args, **one.kwargs)

            return forward
        one = one if which.inputs is None else one.asking_for(which.inputs)
        leaves = list(one.differentiable.values())
        output = function(*one.args, **one.kwargs)
        cotangent = _cotangent(output.detach())
        if which is TRAINING:
            return lambda: torch.autograd.grad(function(*one.args, **one.kwargs), leaves, cotangent)
        return lambda: torch.autograd.grad(output, leaves, cotangent, retain_graph=True)

    return [of(one) for one in inputs]


def _results(function: Callable[..., Any], one: _Inputs) -> list[Tensor]:
    output = function(*one.args, **one.kwargs)
    torch.manual_seed(1)
    leaves = list(one.differentiable.values())
    return [output.detach(), *torch.autograd.grad(output, leaves, _cotangent(output.detach()))]


def scaled_error(ours: Tensor, theirs: Tensor) -> float:
    """manual_ops.verify.scaled_error where the tensors lie, in float32: a copy of gigabytes takes too long."""
    if ours.shape != theirs.shape or not torch.equal(ours.isfinite(), theirs.isfinite()):
        return math.inf
    ours, theirs = ours.float().nan_to_num(0, 0, 0), theirs.float().nan_to_num(0, 0, 0)
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)) if ours.numel() else 0.0


def _bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _floors(layer: Layer, one: _Inputs, output: Tensor, kept: int) -> dict[str, dict[str, float]]:
    """Of each pass the fewest bytes that it must move, and the operations of a convolution or product."""
    read = _bytes(one.named.values())
    gradients = _bytes(one.differentiable.values())
    floors: dict[str, dict[str, float]] = {
        "forward": {"bytes": read + output.nbytes},
        "backward": {"bytes": output.nbytes + kept + gradients},
    }
    if layer.op in TENSOR_PASSES and one.kwargs["training"]:
        residual = _bytes([one.kwargs.get("residual")])
        for name, count in TENSOR_PASSES[layer.op].items():
            floors[name] = {"bytes": count * one.args[0].nbytes + residual}
    floors[TRAINING.name] = {"bytes": floors["forward"]["bytes"] + floors["backward"]["bytes"]}
    if "weight" in one.kwargs and not layer.op.startswith("batch_norm"):
        weight = one.kwargs["weight"]
        # Every element of the output, or of the input where it is transposed, meets one filter.
        places = one.args[0].numel() if "transpose" in layer.op else output.numel()
        flops = 2 * places * weight[0].numel()
        for name, times in (("forward", 1), ("backward", 2), (TRAINING.name, 3)):
            floors[name]["flops"] = times * flops
        for which, gradient in ((BY_INPUT, one.args[0]), (BY_WEIGHT, weight)):
            other = weight if which is BY_INPUT else one.args[0]
            floors[which.name] = {"bytes": output.nbytes + other.nbytes + gradient.nbytes, "flops": flops}
    return floors


def _peak_bytes(function: Callable[..., Any], one: _Inputs, settings: Settings) -> int | None:
    """The most memory that a forward and a backward pass take on top of their inputs."""
    if settings.device.type != "cuda":
        return None
    (call,) = _calls(function, [one], TRAINING)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _sets(first: _Inputs, settings: Settings) -> int:
    """How many sets of inputs it takes that none of them is in the cache when its turn comes again."""
    if settings.device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(settings.device).L2_cache_size
    return max(2, min(64, math.ceil(4 * cache / max(1, _bytes(first.named.values())))))


def _passes(layer: Layer) -> list[Pass]:
    passes = [FORWARD, BACKWARD]
    return passes + [BY_INPUT, BY_WEIGHT] if layer.op.startswith("conv") else passes


def _row(times: dict[str, Time | str], floor: dict[str, float]) -> Row:
    told = {name: time if isinstance(time, str) else dataclasses.asdict(time) for name, time in times.items()}
    row: Row = {"times": told, **floor}
    ours = times.get("manual_ops")
    if isinstance(ours, Time):
        row["speedup"] = {
            name: time.microseconds / ours.microseconds
            for name, time in times.items()
            if isinstance(time, Time) and name != "manual_ops"
        }
    return row


def _compared(
    layer: Layer,
    dtype: torch.dtype,
    channels_last: bool,
    passes: Sequence[Pass],
    contestants: dict[str, Callable[..., Any]],
    settings: Settings,
) -> Row:
    """One layer, every contestant: the error of each against torch's, then the times of each pass."""
    if settings.rehearsal:
        layer, dtype = reduced(layer), torch.float32  # torch has not every operation in float16 on the CPU
    first = _make_inputs(layer, dtype, channels_last, settings, 0)
    theirs = _results(contestants["torch"], first)
    row: Row = {
        "layer": layer.name,
        "op": layer.op,
        "family": OPERATIONS[layer.op].family,
        "dtype": str(dtype).removeprefix("torch."),
        "channels_last": channels_last,
        "largest_error": LARGEST_ERROR[dtype],
        "errors": {},
        "peak_bytes": {},
        "kept_bytes": {},
        "passes": {},
    }
    output = theirs[0]
    working: dict[str, Callable[..., Any]] = {}
    for name, function in contestants.items():
        try:
            pairs = zip(_results(function, first), theirs, strict=True)
            row["errors"][name] = max(scaled_error(a, b) for a, b in pairs)
            row["peak_bytes"][name] = _peak_bytes(function, first, settings)
            if name in ("torch", "manual_ops"):
                row["kept_bytes"][name] = kept_bytes(function, first.args, first.kwargs)
            working[name] = function
        except Exception as error:
            raise_if_lost_on(settings, error)
            row["errors"][name] = describe(error)
    floors = _floors(layer, first, output, row["kept_bytes"].get("manual_ops", row["kept_bytes"]["torch"]))
    del theirs
    count = _sets(first, settings)
    row["input_sets"] = count
    inputs = [first] + [_make_inputs(layer, dtype, channels_last, settings, seed) for seed in range(1, count)]
    for which in passes:
        calls, problems = {}, {}
        for name, function in working.items():
            try:
                calls[name] = _calls(function, inputs, which)
            except Exception as error:
                raise_if_lost_on(settings, error)
                problems[name] = describe(error)
        times = {**measure(calls, settings.device, 0.08), **problems}
        row["passes"][which.name] = _row(times, floors[which.name])
    return row


def raise_if_lost_on(settings: Settings, error: Exception) -> None:
    if settings.device.type == "cuda":
        raise_if_lost(error)


def _operation(layer: Layer, dtype: torch.dtype, channels_last: bool) -> Callable[[Settings], Row]:
    operation = OPERATIONS[layer.op]

    def run(settings: Settings) -> Row:
        contestants = {"torch": operation.reference, "manual_ops": operation.function}
        return _compared(layer, dtype, channels_last, _passes(layer), contestants, settings)

    return run


def _name(layer: Layer, dtype: torch.dtype, channels_last: bool) -> str:
    return f"{layer.name}, {str(dtype).removeprefix('torch.')}{', channels_last' * channels_last}"


def _has_channels_last(layer: Layer) -> bool:
    return len(layer.input) == 4 and OPERATIONS[layer.op].family in ("convolution", "pooling", "normalisation")


# The 16-bit rows first: what is left out, where time runs short, are the last.
OPERATION_CASES = [
    Case(_name(layer, dtype, channels_last), _operation(layer, dtype, channels_last))
    for dtype, channels_last in ((torch.float16, False), (torch.float16, True), (torch.float32, False))
    for layer in GPU
    if not channels_last or _has_channels_last(layer)
]


def _of_peers(layer: Layer) -> Callable[[Settings], Row]:
    def run(settings: Settings) -> Row:
        functions, missing = peers(layer.op)
        if not functions:
            return {"layer": layer.name, "missing": missing}
        operation = OPERATIONS[layer.op]
        contestants = {"torch": operation.reference, "manual_ops": operation.function, **functions}
        row = _compared(layer, torch.float16, False, [FORWARD, TRAINING], contestants, settings)
        return {**row, "missing": missing}

    return run


def _peers_take(layer: Layer) -> bool:
    """Rows of logits with class indices, and whatever is element by element."""
    rows = len(layer.input) == 2 and "probabilities" not in layer.options
    return layer.op in PEERS and (rows or OPERATIONS[layer.op].family == "activation")


PEER_CASES = [Case(f"{layer.name} against other libraries", _of_peers(layer)) for layer in GPU if _peers_take(layer)]


def _of_compiler(layer: Layer, channels_last: bool) -> Callable[[Settings], Row]:
    operation = OPERATIONS[layer.op]

    def run(settings: Settings) -> Row:
        compiled = settings.compiled(operation.reference)
        contestants = {"torch": operation.reference, "manual_ops": operation.function, "torch.compile": compiled}
        row = _compared(layer, torch.float16, channels_last, [FORWARD, TRAINING], contestants, settings)
        return {**row, "compile_mode": settings.compile_mode}

    return run


def _compiler_helps(layer: Layer) -> bool:
    """Whether a compiler writes a kernel of its own: convolutions and products it leaves to the libraries."""
    if layer.op.endswith(("1d", "3d")):
        return False
    family = OPERATIONS[layer.op].family
    return family in ("normalisation", "classification", "pooling") or layer.op in ("relu", "gelu", "mse_loss")


def _in_turn(layers: Sequence[Layer]) -> list[Layer]:
    """One layer of every operation, then the second of each, ...: compiling takes long, and time may run short."""
    ops = [layer.op for layer in layers]
    turn = {place: ops[:place].count(op) for place, op in enumerate(ops)}
    return [layers[place] for place in sorted(turn, key=lambda place: turn[place])]


COMPILED_CASES = [
    Case(f"{_name(layer, torch.float16, False)} against torch.compile", _of_compiler(layer, False))
    for layer in _in_turn([one for one in GPU if _compiler_helps(one) or one.label.startswith("depthwise")])
]


# Whole networks.


@dataclass(frozen=True)
class Regime:
    """How a network is trained: `autocast` to that dtype, or float32 throughout."""

    autocast: torch.dtype | None
    channels_last: bool

    def __str__(self) -> str:
        dtype = "float32" if self.autocast is None else f"autocast {str(self.autocast).removeprefix('torch.')}"
        return f"{dtype}{', channels_last' * self.channels_last}"


REGIMES = (Regime(torch.bfloat16, True), Regime(torch.bfloat16, False), Regime(None, False))
BATCH, IMAGE, CLASSES = 64, 224, 1000
# How a model is converted, and what its training step is called.
CONVERSIONS: dict[str, dict[str, bool]] = {
    "": {},
    ", fused": {"fuse": True},
    ", fused and lean": {"fuse": True, "lean": True},
}


def _training_step(
    model: torch.nn.Module, loss_of: Callable[..., Tensor], images: Tensor, labels: Tensor, regime: Regime
) -> Callable[[], Tensor]:
    """A step of SGD with momentum, as one call that leaves no gradient behind."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=regime.autocast, enabled=regime.autocast is not None):
            loss = loss_of(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _network(name: str, regime: Regime, with_compiler: bool) -> Callable[[Settings], Row]:
    def run(settings: Settings) -> Row:
        torch.manual_seed(0)
        toy = {"width": 8, "classes": 10} if settings.rehearsal else {"classes": CLASSES}
        batch, size = (2, 32) if settings.rehearsal else (BATCH, IMAGE)
        memory_format = torch.channels_last if regime.channels_last else torch.contiguous_format
        original = NETWORKS[name](**toy).to(settings.device, memory_format=memory_format)
        images = torch.randn(batch, 3, size, size, device=settings.device).to(memory_format=memory_format)
        labels = torch.randint(toy["classes"], (batch,), device=settings.device)

        def contestant(which: str) -> Callable[[], Tensor]:
            model = copy.deepcopy(original)
            if which.startswith("manual_ops"):
                model = manual_ops.convert(model, **CONVERSIONS[which.removeprefix("manual_ops")])
                return _training_step(model, functional.cross_entropy, images, labels, regime)
            if which == "torch.compile":
                model = settings.compiled(model)
            return _training_step(model, F.cross_entropy, images, labels, regime)

        row: Row = {
            "network": name, "regime": str(regime), "batch": batch, "image": size,
            "losses": {}, "peak_bytes": {},
        }  # fmt: skip
        steps, problems = {}, {}
        peer = "torch.compile" if with_compiler else "torch"
        for which in [peer, *(f"manual_ops{conversion}" for conversion in CONVERSIONS)]:
            before = torch.cuda.memory_allocated() if settings.device.type == "cuda" else 0
            try:
                step = contestant(which)
                row["losses"][which] = [float(step()) for _ in range(3)]
                row["peak_bytes"][which] = _peak_of_step(step, before, settings)
                steps[which] = [step]
            except Exception as error:
                raise_if_lost_on(settings, error)
                problems[which] = describe(error)
        times = {**measure(steps, settings.device, 2.0), **problems}
        steps_of = {
            f"training step{conversion}": _row({peer: times[peer], "manual_ops": times[f"manual_ops{conversion}"]}, {})
            for conversion in CONVERSIONS
        }
        return {**row, "passes": steps_of}

    return run


def _peak_of_step(step: Callable[[], Tensor], before: int, settings: Settings) -> int | None:
    """The most memory in use during a step, weights and momentum included, above what was in use `before`."""
    if settings.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _networks(with_compiler: bool) -> list[Case]:
    regimes = REGIMES[:1] if with_compiler else REGIMES
    against = " against torch.compile" if with_compiler else ""
    return [
        Case(f"{name}, {regime}{against}", _network(name, regime, with_compiler))
        for regime in regimes
        for name in ("resnet50", "mobilenet_v2", "convnext_tiny")
    ]


PARTS: dict[str, list[Case]] = {
    "ceilings": CEILINGS,
    "operations": OPERATION_CASES,
    "networks": _networks(with_compiler=False),
    "peers": PEER_CASES,
    "compiled": COMPILED_CASES,
    "compiled networks": _networks(with_compiler=True),
}
