"""Runs the suites and writes results/<suite>-<settings>.json and .png.

python benchmarks/run.py                                every suite, one thread and all, contiguous
python benchmarks/run.py resnet18 --threads 1 --channels-last
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
from pathlib import Path

import matplotlib
import torch

from manual_ops.compare import Comparison, compare
from manual_ops.environment import environment
from suites import SUITES

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).with_name("results")


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory against torch, suite by suite.")
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--threads", type=int, nargs="*", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each layer")
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")

    RESULTS.mkdir(exist_ok=True)
    for suite in options.suites or SUITES:
        for threads in options.threads:
            print(f"{suite}, {options.dtype}, {threads} threads{', channels_last' * options.channels_last}", flush=True)
            result = compare(
                SUITES[suite],
                dtype=getattr(torch, options.dtype),
                threads=threads,
                channels_last=options.channels_last,
                seconds_per_layer=options.seconds,
                on_row=lambda row: print(f"  {row.speedup:6.2f}x  {row.layer}", flush=True),
            )
            name = f"{suite}-{options.dtype}-{threads}threads{'-channels_last' * options.channels_last}"
            write_json(RESULTS / f"{name}.json", suite, result)
            plot(RESULTS / f"{name}.png", suite, result)


def write_json(path: Path, suite: str, result: Comparison) -> None:
    document = {
        "suite": suite,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "compiler_flags": os.environ.get("MANUAL_OPS_CXXFLAGS", ""),
        "environment": dataclasses.asdict(environment()),
        "comparison": dataclasses.asdict(result),
        "slower": [row.layer for row in result.slower],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def _commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or "unknown"


def plot(path: Path, suite: str, result: Comparison) -> None:
    """Left the speedup of each layer, with the middle half of the pairs; right the bytes kept, over torch's."""
    rows = result.measurements[::-1]
    figure, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(12, 1.2 + 0.3 * len(rows)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    colours = ["#0f766e" if row.speedup >= 1 else "#b45309" for row in rows]
    speedups = [row.speedup for row in rows]
    spread = [
        [max(0.0, row.speedup - row.speedup_range[0]) for row in rows],
        [max(0.0, row.speedup_range[1] - row.speedup) for row in rows],
    ]
    # On a logarithmic axis a bar starts at 1x.
    speed.barh(range(len(rows)), [value - 1 for value in speedups], left=1, color=colours, xerr=spread, ecolor="#888")
    speed.set_xscale("log", base=2)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    speed.set_yticks(range(len(rows)), [row.layer for row in rows])
    speed.set_xlabel("torch's time / ours, forward + backward")
    shares = [row.kept_bytes / max(1, row.torch_kept_bytes) for row in rows]
    memory.barh(range(len(rows)), shares, color="#0f766e")
    memory.axvline(1, color="black", linewidth=0.8)
    memory.set_xlabel("bytes kept for backward / torch's")
    settings = f"{result.dtype}, {result.threads} threads{', channels_last' * result.channels_last}"
    figure.suptitle(f"{suite}: {settings}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
