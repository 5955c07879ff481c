"""Runs the suites and writes results/cpu/<suite>.json and .png, and the table of all suites, results/cpu/summary.md.

    python benchmarks/run.py                                  every suite, in every setting
    python benchmarks/run.py pooling --settings 1-resident    one suite, one thread, page faults out of the way
    python benchmarks/run.py softmax --compiled               also against torch.compile

A setting is the number of threads and how memory is allocated. The C library hands large blocks back to the system and
gets them again, page by page, on every call: `default` measures with that cost, which lies on both sides alike and
hides differences; `resident` keeps the blocks, for both sides, as a training program's caches mostly do; `huge` gets
tensors' memory in huge pages, for both sides. Each run is a process of its own, since all this must be known at its
start; with one thread it stays on one core.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console

from manual_ops.compare import Comparison, Measurement, compare
from manual_ops.environment import environment
from suites import SUITES, Suite

matplotlib.use("agg")
from matplotlib import pyplot

RESULTS = Path(__file__).with_name("results") / "cpu"
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "resident": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(256 << 20)},
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
}
SETTINGS = {f"{threads}-{name}": (threads, name) for threads in (1, 2) for name in ALLOCATORS}
console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory against torch, suite by suite.")
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; all by default")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, help="threads-allocator")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer in each setting")
    parser.add_argument("--compiled", action="store_true", help="also against torch.compile, in the first setting")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # measure here, and write the run's JSON to this file
    options = parser.parse_args()
    unknown = set(options.suites) - set(SUITES)
    if unknown:
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    if options.worker:
        return measure(options.suites[0], options.settings[0], options.seconds, options.compiled, options.worker)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.suites or SUITES:
        runs = {}
        for setting in options.settings:
            compiled = options.compiled and setting == options.settings[0]
            runs[setting] = _in_a_process(name, setting, options.seconds, compiled)
            tell(SUITES[name], runs[setting])
        write(name, runs)
    (RESULTS / "summary.md").write_text(summary())


def _in_a_process(suite: str, setting: str, seconds: float, compiled: bool) -> dict[str, Any]:
    console.print(f"\n[bold]{suite}[/bold], {setting}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        command = [sys.executable, __file__, suite, "--settings", setting, "--seconds", str(seconds)]
        command += ["--worker", str(file), *["--compiled"] * compiled]
        subprocess.run(command, env={**os.environ, **ALLOCATORS[SETTINGS[setting][1]]}, check=True)
        run: dict[str, Any] = json.loads(file.read_text())
        return run


def measure(name: str, setting: str, seconds: float, compiled: bool, file: str) -> None:
    suite, (threads, allocator) = SUITES[name], SETTINGS[setting]
    if threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    result = compare(
        suite.layers,
        dtype=getattr(torch, suite.dtype),
        threads=threads,
        channels_last=suite.channels_last,
        seconds_per_layer=seconds,
        peers={"torch.compile": _compiled} if compiled else {},
        on_row=lambda row: _print_row(suite, row),
    )
    run = {
        **provenance(),
        "compiler_flags": os.environ.get("MANUAL_OPS_CXXFLAGS", ""),
        "allocator": {"name": allocator, **ALLOCATORS[allocator]},
        "mean_speedup": result.mean_speedup,
        "lost": {row.layer: row.speedup for row in _lost(suite, result)},
        "comparison": dataclasses.asdict(result),
    }
    Path(file).write_text(json.dumps(run))
    if result.wrong:
        console.print("  [red]results that are not torch's[/red]: " + ", ".join(row.layer for row in result.wrong))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()  # each layer is compiled for its own shape
    return torch.compile(function, dynamic=False)


def _lost(suite: Suite, result: Comparison) -> list[Measurement]:
    return [row for row in result.slower if row.speedup < suite.floor]


def _print_row(suite: Suite, row: Measurement) -> None:
    colour = "green" if row.speedup >= 1 else "yellow" if row.speedup >= suite.floor else "red"
    others = "".join(f", {speedup:.2f}x {name}" for name, speedup in row.peer_speedups.items())
    kept = f"{row.kept_bytes / 1e6:.1f} of {row.torch_kept_bytes / 1e6:.1f} MB kept"
    console.print(
        f"  [{colour}]{row.speedup:6.2f}x[/{colour}]  {row.layer}: {row.milliseconds:.3g} ms, "
        f"torch {row.torch_milliseconds:.3g}{others}; {kept}"
    )


def tell(suite: Suite, run: Mapping[str, Any]) -> None:
    aimed_at = "" if suite.target is None else f", aimed at {suite.target:g}"
    lost = ", ".join(f"{layer} ({speedup:.2f}x)" for layer, speedup in run["lost"].items())
    console.print(f"  geometric mean {run['mean_speedup']:.2f}{aimed_at}; under {suite.floor:.2g}: {lost or 'none'}")


def write(name: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Runs of other settings that the file has already stay in it."""
    suite, path = SUITES[name], RESULTS / f"{name}.json"
    known = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs = {setting: run for setting in SETTINGS for run in [{**known, **runs}.get(setting)] if run is not None}
    told = {"target": suite.target, "floor": suite.floor, "dtype": suite.dtype, "channels_last": suite.channels_last}
    path.write_text(json.dumps({"suite": name, **told, "runs": runs}, indent=1) + "\n")
    plot(RESULTS / f"{name}.png", name, runs)


def summary() -> str:
    """A table of all suites that were measured, as Markdown."""
    told = {
        name: json.loads(path.read_text())["runs"] for name in SUITES if (path := RESULTS / f"{name}.json").exists()
    }
    settings = [setting for setting in SETTINGS if any(setting in runs for runs in told.values())]
    lines = [
        "Torch's time / ours, forward + backward: the geometric mean of each suite, by threads and allocation, and the",
        "layers that fall below the suite's floor in some setting. From the JSON files beside this one.",
        "",
        f"| suite | aim | {' | '.join(settings)} | below the floor |",
        f"|---|---|{'---|' * len(settings)}---|",
    ]
    for name, runs in told.items():
        means = [f"{runs[setting]['mean_speedup']:.2f}" if setting in runs else "" for setting in settings]
        lost: dict[str, float] = {}
        for run in runs.values():
            for layer, speedup in run["lost"].items():
                lost[layer] = min(speedup, lost.get(layer, speedup))
        names = "; ".join(
            f"{layer} ({speedup:.2f})" for layer, speedup in sorted(lost.items(), key=lambda item: item[1])
        )
        aim = "" if SUITES[name].target is None else f"{SUITES[name].target:g}"
        lines.append(f"| {name} | {aim} | {' | '.join(means)} | {names} |")
    return "\n".join(lines) + "\n"


def provenance() -> dict[str, Any]:
    """When, of which commit and where figures were measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "environment": dataclasses.asdict(environment()),
    }


def commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or "unknown"


def plot(path: Path, suite: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Left the speedup of each layer in each setting; right the bytes kept, over torch's."""
    tables = {setting: run["comparison"]["measurements"][::-1] for setting, run in runs.items()}
    rows = next(iter(tables.values()))
    figure, (speed, memory) = pyplot.subplots(
        1, 2, figsize=(12, 1.6 + 0.4 * len(rows)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    height = 0.8 / len(tables)
    for place, (setting, table) in enumerate(tables.items()):
        at = [index + 0.4 - (place + 0.5) * height for index in range(len(rows))]
        speedups = [row["speedup"] for row in table]
        spread = [
            [max(0.0, row["speedup"] - row["speedup_range"][0]) for row in table],
            [max(0.0, row["speedup_range"][1] - row["speedup"]) for row in table],
        ]
        # On a logarithmic axis a bar starts at 1x.
        speed.barh(at, [value - 1 for value in speedups], height, left=1, xerr=spread, ecolor="#888", label=setting)
        compiled = [row["peer_speedups"].get("torch.compile") for row in table]
        if any(compiled):
            speed.plot(compiled, at, "k|", label=f"against torch.compile, {setting}")
    speed.set_xscale("log", base=2)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    speed.set_yticks(range(len(rows)), [row["layer"] for row in rows])
    speed.set_xlabel("torch's time / ours, forward + backward")
    speed.legend(fontsize="small", title="threads-allocator")
    shares = [row["kept_bytes"] / max(1, row["torch_kept_bytes"]) for row in rows]
    memory.barh(range(len(rows)), shares, color="#0f766e")
    memory.axvline(1, color="black", linewidth=0.8)
    memory.set_xlabel("bytes kept for backward / torch's")
    figure.suptitle(suite)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
