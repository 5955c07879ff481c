"""What training keeps: the bytes that a forward pass leaves alive for the backward, of whole networks.

    python benchmarks/memory.py [--batch 4] [--size 224]

Counts the storages that the forward made and that are alive when it is over, whoever keeps them, and times a training
step with lean mode and without. Writes results/memory.json and .png.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import manual_ops
from manual_ops.compare import alive_bytes
from manual_ops.environment import environment
from networks import CONVOLUTIONAL

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).with_name("results")
# What at most, of torch's bytes, lean mode is to keep.
TARGETS = {"ResNet-50": 0.6, "MobileNetV2": 0.45, "DenseNet-121": 0.5, "VGG-16": 0.75, "EfficientNet-B0": 0.6}
VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda model: model,
    "manual_ops": manual_ops.convert,
    "fused": lambda model: manual_ops.convert(model, fuse=True),
    "lean": lambda model: manual_ops.convert(model, lean=True),
    "fused and lean": lambda model: manual_ops.convert(model, fuse=True, lean=True),
}


def _step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    nn.functional.cross_entropy(model(x), target).backward()
    model.zero_grad()


def _seconds(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> float:
    began = time.perf_counter()
    _step(model, x, target)
    return time.perf_counter() - began


def measured(network: type[nn.Module], batch: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Bytes and the median time of a step, of each variant; the variants take turns."""
    torch.manual_seed(0)
    original = network()
    x, target = torch.randn(batch, 3, size, size), torch.arange(batch)
    models = {name: convert(copy.deepcopy(original)) for name, convert in VARIANTS.items()}
    kept = {name: alive_bytes(lambda model=model: model(x))[1] for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_seconds(model, x, target))
    return {name: {"bytes": kept[name], "seconds": statistics.median(times[name])} for name in models}


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """The share of torch's bytes that each variant keeps."""
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    shown = [name for name in VARIANTS if name != "torch"]
    for place, variant in enumerate(shown):
        shares = [rows[variant]["bytes"] / rows["torch"]["bytes"] for rows in results.values()]
        axes.bar([i + (place - 1.5) * 0.2 for i in range(len(shares))], shares, 0.2, label=variant)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(results)), list(results))
    axes.set_ylabel("bytes kept for the backward / torch's")
    axes.legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    batch: Annotated[int, typer.Option(help="images")] = 4,
    size: Annotated[int, typer.Option(help="of an image's side, in pixels")] = 224,
    rounds: Annotated[int, typer.Option(help="training steps of each variant that are timed")] = 5,
) -> None:
    """Measure, print and write."""
    results = {}
    for name, network in CONVOLUTIONAL.items():
        results[name] = measured(network, batch, size, rounds)
        document = {"batch": batch, "size": size, "rounds": rounds, "environment": asdict(environment())}
        document |= {"targets": TARGETS, "networks": results}
        RESULTS.joinpath("memory.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(results, RESULTS / "memory.png")
    table = Table("network", *VARIANTS, "lean / torch", "target", "step, lean / not", title="MB kept for the backward")
    for name, rows in results.items():
        share = min(rows["lean"]["bytes"], rows["fused and lean"]["bytes"]) / rows["torch"]["bytes"]
        cells = [f"{row['bytes'] / 1e6:.1f}" for row in rows.values()]
        slower = rows["lean"]["seconds"] / rows["manual_ops"]["seconds"]
        table.add_row(name, *cells, f"{share:.2f}", f"{TARGETS[name]:.2f}", f"{slower:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
