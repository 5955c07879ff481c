"""Times on the device: contestants replayed in turn as CUDA graphs, each over inputs that the L2 cache cannot hold.

A contestant is a list of calls, one for each set of inputs. The whole list is one graph, so that launches cost next to
nothing, and every call's results stay alive, so that each writes to memory of its own. A contestant that cannot be
captured is run as it is, between the same events. On a CPU every call runs once by the host's clock: a rehearsal.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]

FEWEST_RUNS, MOST_RUNS = 5, 60
WARM_UP = 3


@dataclass(frozen=True)
class Time:
    """Microseconds of one call: the median of `runs` runs through all inputs, with the 20th and 80th percentile."""

    microseconds: float
    p20: float
    p80: float
    runs: int
    method: str


def measure(contestants: Mapping[str, Calls], device: torch.device, seconds: float) -> dict[str, Time | str]:
    """The time of each contestant, or why it has none; `seconds` is what all of them may take together."""
    if device.type != "cuda":
        return {name: _once(calls) for name, calls in contestants.items()}
    ready: dict[str, tuple[Callable[[], Any], str]] = {}
    problems: dict[str, Time | str] = {}
    for name, calls in contestants.items():
        try:
            ready[name] = _ready(calls)
        except Exception as error:
            raise_if_lost(error)
            problems[name] = describe(error)
    times = _interleaved({name: run for name, (run, _) in ready.items()}, seconds)
    measured: dict[str, Time | str] = {}
    for name, (_, method) in ready.items():
        per_call = [1e3 * value / len(contestants[name]) for value in times[name]]
        low, high = (statistics.quantiles(per_call, n=5)[place] for place in (0, 3))
        measured[name] = Time(statistics.median(per_call), low, high, len(per_call), method)
    return {name: {**measured, **problems}[name] for name in contestants}


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


class DeviceLost(Exception):
    """The process can do nothing more on its GPU."""


def raise_if_lost(error: BaseException) -> None:
    """After an assertion or an illegal access on the device every later call fails, the next synchronisation first."""
    if isinstance(error, DeviceLost):
        raise error
    try:
        torch.cuda.synchronize()
    except RuntimeError as lost:
        raise DeviceLost(describe(error)) from lost


def _ready(calls: Calls) -> tuple[Callable[[], Any], str]:
    """Something that runs all calls, and how it does."""
    for call in list(calls)[:WARM_UP] * (WARM_UP if len(calls) < WARM_UP else 1):
        call()
    torch.cuda.synchronize()
    try:
        return captured(calls), "graph"
    except Exception as error:
        raise_if_lost(error)

        def run() -> None:
            for call in calls:
                call()

        return run, f"launched one by one, as capture failed: {describe(error)}"


def captured(calls: Calls) -> Callable[[], None]:
    """A graph of the calls, as a function that replays it. Their results stay alive as long as it does."""
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        raise ValueError("captured: needs a stream of one's own, on which what backward passes need was computed too")
    graph = torch.cuda.CUDAGraph()
    # What torch.cuda.graph does, less a garbage collection that takes longer than most measurements.
    graph.capture_begin()
    try:
        results = [call() for call in calls]
    finally:
        graph.capture_end()

    def replay(results: Any = results) -> None:
        graph.replay()

    replay()
    torch.cuda.synchronize()
    return replay


def _interleaved(runs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run, in rounds whose order turns, so that whatever the machine does meets all alike."""
    if not runs:
        return {}
    estimate = sum(_events([run])[0] for run in runs.values())
    rounds = max(FEWEST_RUNS, min(MOST_RUNS, int(1e3 * seconds / max(estimate, 1e-3))))
    names = list(runs)
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    for turn in range(rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            pairs[name].append(_recorded(runs[name]))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) for begin, end in pairs[name]] for name in names}


def _recorded(run: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    return begin, end


def _events(runs: Sequence[Callable[[], Any]]) -> list[float]:
    pairs = [_recorded(run) for run in runs]
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _once(calls: Calls) -> Time | str:
    began = time.perf_counter()
    try:
        for call in calls:
            call()
    except Exception as error:
        return describe(error)
    microseconds = 1e6 * (time.perf_counter() - began) / len(calls)
    return Time(microseconds, microseconds, microseconds, 1, "host clock")
