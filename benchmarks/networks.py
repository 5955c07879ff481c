"""Training steps of whole networks: their time, the bytes kept for the backward, and the process's peak memory.

    python benchmarks/networks.py [resnet50 vgg16 ...] [--batch 4] [--image 224] [--channels-last]

Writes results/cpu/networks.json and .png (networks-channels_last with that option, networks-batch_16 with that).
"""

import dataclasses
import json
import os
from typing import Annotated, Any

import matplotlib
import typer
from rich.console import Console
from rich.table import Table

from manual_ops.networks import NETWORKS
from manual_ops.steps import VARIANTS, Setting, compare_steps
from run import RESULTS, provenance

matplotlib.use("agg")
from matplotlib import pyplot

BATCH = 4
# What at most, of torch's bytes, lean mode is to keep.
TARGETS = {"resnet50": 0.6, "mobilenet_v2": 0.45, "densenet121": 0.5, "vgg16": 0.75, "efficientnet_b0": 0.6}


def main(
    networks: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(NETWORKS)}; all by default")] = None,
    batch: Annotated[int, typer.Option(help="images")] = BATCH,
    image: Annotated[int, typer.Option(help="side of an image, in pixels")] = 224,
    rounds: Annotated[int, typer.Option(help="training steps of each variant that are timed")] = 5,
    threads: Annotated[int, typer.Option(help="that torch may use")] = 1,
    channels_last: Annotated[bool, typer.Option("--channels-last")] = False,
) -> None:
    """Measure, print and write; networks that the file has already stay in it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    if threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    kind = (
        f"-batch_{batch}" * (batch != BATCH) + f"-threads_{threads}" * (threads > 1) + "-channels_last" * channels_last
    )
    path = RESULTS / f"networks{kind}.json"
    document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"targets": TARGETS, "networks": {}}
    for name in networks or NETWORKS:
        setting = Setting(name, batch, image, threads=threads, channels_last=channels_last)
        steps = compare_steps(setting, rounds=rounds)
        document["networks"][name] = {
            **provenance(),
            "setting": {**dataclasses.asdict(setting), "dtype": "float32"},
            "rounds": rounds,
            "steps": {step.variant: dataclasses.asdict(step) for step in steps},
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        _print(name, document["networks"][name]["steps"])
    plot(document["networks"], path.with_suffix(".png"))


def _print(name: str, steps: dict[str, Any]) -> None:
    table = Table("", "step, ms", "torch / this", "kept, MB", "peak, MB", title=name, title_justify="left")
    for variant, step in steps.items():
        peak = "" if step["peak_bytes"] is None else f"{step['peak_bytes'] / 1e6:.0f}"
        table.add_row(
            variant, f"{step['milliseconds']:.0f}", f"{step['speedup']:.2f}", f"{step['kept_bytes'] / 1e6:.1f}", peak
        )
    console = Console(width=100)
    console.print(table)
    kept = {variant: step["kept_bytes"] / steps["torch"]["kept_bytes"] for variant, step in steps.items()}
    lean = min(kept["lean"], kept["fused and lean"])
    aim = f", aimed at {TARGETS[name]}" if name in TARGETS else ""
    slower = steps["lean"]["milliseconds"] / steps["manual_ops"]["milliseconds"]
    console.print(
        f"kept over torch's: {kept['manual_ops']:.2f}, lean {lean:.2f}{aim}; a lean step takes {slower:.2f}\n"
    )


def plot(networks: dict[str, Any], path: Any) -> None:
    """Of each variant the time of a step, and what it keeps, against torch's."""
    figure, (speed, memory) = pyplot.subplots(2, 1, figsize=(10, 7), layout="constrained", sharex=True)
    shown = [name for name in VARIANTS if name != "torch"]
    for place, variant in enumerate(shown):
        at = [index + (place - 1.5) * 0.2 for index in range(len(networks))]
        steps = [told["steps"] for told in networks.values()]
        speed.bar(at, [step[variant]["speedup"] for step in steps], 0.2, label=variant)
        memory.bar(at, [step[variant]["kept_bytes"] / step["torch"]["kept_bytes"] for step in steps], 0.2)
    for axes, label in ((speed, "torch's time / ours, a training step"), (memory, "bytes kept for backward / torch's")):
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(label)
    memory.set_xticks(range(len(networks)), list(networks))
    speed.legend(ncols=4, fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
