"""A whole training step of a network, with torch's layers and with ours: its time, and the memory it needs.

The variants of a network start from the same weights and take turns, step by step; `speedup` is the median, over such
rounds, of torch's time divided by the variant's. Kept are the bytes that a forward pass leaves alive for the backward,
whoever keeps them. The peak is of the process: how far its resident memory grows, in a process of its own, from what
the model and its inputs need to the highest point of two steps.
"""

import copy
import functools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manual_ops import functional
from manual_ops.compare import alive_bytes
from manual_ops.convert import convert
from manual_ops.networks import network

VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "manual_ops": convert,
    "fused": lambda model: convert(model, fuse=True),
    "lean": lambda model: convert(model, lean=True),
    "fused and lean": lambda model: convert(model, fuse=True, lean=True),
}


@dataclass(frozen=True)
class Step:
    """A training step of one variant of a network.

    Attributes:
        milliseconds: of forward, loss, backward; the median.
        speedup: the median of torch's time / this one's.
        kept_bytes: alive between forward and backward.
        peak_bytes: how far the process's memory grows; None where the system does not tell.
        loss_error: how far the loss is from torch's, over torch's.
    """

    variant: str
    milliseconds: float
    speedup: float
    kept_bytes: int
    peak_bytes: int | None
    loss_error: float


@dataclass(frozen=True)
class Setting:
    """How a network is trained: on `batch` images of 3 x `image` x `image`."""

    network: str
    batch: int = 8
    image: int = 224
    dtype: torch.dtype = torch.float32
    threads: int = 1
    channels_last: bool = False


def compare_steps(
    setting: Setting,
    *,
    variants: Iterable[str] = VARIANTS,
    rounds: int = 5,
    on_variant: Callable[[str], None] = lambda name: None,
) -> list[Step]:
    """Measure a training step of each variant.

    Args:
        setting: the network and how it is trained.
        variants: of `VARIANTS`; torch's own is measured in any case.
        rounds: steps of each that are timed.
        on_variant: called with every variant's name before its memory is measured.

    Returns:
        One Step for each variant, torch's first.

    Raises:
        ValueError: for an unknown network or variant.
    """
    names = list(dict.fromkeys(["torch", *variants]))
    if unknown := set(names) - set(VARIANTS):
        raise ValueError(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    try:
        original, images, labels = _made(setting)
        models = {name: VARIANTS[name](copy.deepcopy(original)) for name in names}
        kept = {name: alive_bytes(functools.partial(model, images))[1] for name, model in models.items()}
        losses = {name: _step(name, model, images, labels) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(rounds):
            for name in names[:: -1 if turn % 2 else 1]:
                began = time.perf_counter()
                _step(name, models[name], images, labels)
                times[name].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads_before)
    peaks = {}
    for name in names:
        on_variant(name)
        peaks[name] = _peak_of(setting, name)
    return [
        Step(
            variant=name,
            milliseconds=1e3 * statistics.median(times[name]),
            speedup=statistics.median(theirs / ours for theirs, ours in zip(times["torch"], times[name], strict=True)),
            kept_bytes=kept[name],
            peak_bytes=peaks[name],
            loss_error=abs(losses[name] - losses["torch"]) / abs(losses["torch"]),
        )
        for name in names
    ]


def _made(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    model = network(setting.network)().to(setting.dtype, memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(setting.batch, 3, setting.image, setting.image).to(setting.dtype, memory_format=layout)
    with torch.no_grad():
        classes = copy.deepcopy(model)(images).shape[1]
    return model, images, torch.arange(setting.batch) % classes


def _step(variant: str, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    cross_entropy = nn.functional.cross_entropy if variant == "torch" else functional.cross_entropy
    loss = cross_entropy(model(images), labels)
    loss.backward()
    model.zero_grad()
    return loss.item()


def _peak_of(setting: Setting, variant: str) -> int | None:
    """In a new process: what this one has seen would hide it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_peak, args=(sender, setting, variant))
    process.start()
    sender.close()
    try:
        peak: int | None = receiver.recv()
    except EOFError as error:
        raise RuntimeError(f"{setting.network}: the process that measures the memory of {variant} failed") from error
    finally:
        process.join()
    return peak


def _send_peak(sender: Any, setting: Setting, variant: str) -> None:
    if not sys.platform.startswith("linux"):
        return sender.send(None)
    torch.set_num_threads(setting.threads)
    original, images, labels = _made(setting)
    model = VARIANTS[variant](original)
    with open("/proc/self/clear_refs", "w") as highest:
        highest.write("5")  # the highest point is from now on
    before = _resident("VmRSS")
    for _ in range(2):
        _step(variant, model, images, labels)
    sender.send(_resident("VmHWM") - before)


def _resident(entry: str) -> int:
    """Bytes of an entry of this process's status: VmRSS is resident now, VmHWM at the highest point."""
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith(f"{entry}:"))
    return 1024 * int(kilobytes)
