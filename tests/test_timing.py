"""Timing by events and graphs, with a clock that the calls themselves move."""

from types import SimpleNamespace

import pytest
import torch

import timing

pytestmark = pytest.mark.cpu("the clock is a fake; the real one runs where there is a GPU")


class _Gpu:
    """What torch.cuda does, in so far as `timing` uses it: calls take time, unless a graph is being captured."""

    def __init__(self):
        self.now, self.capturing, self.lost = 0.0, None, False
        self.order = []

    def work(self, name, milliseconds):
        def call():
            if self.capturing is not None:
                self.capturing.parts.append((name, milliseconds))
            else:
                self.order.append(name)
                self.now += milliseconds
            return torch.zeros(1)

        return call

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: device-side assert triggered")


@pytest.fixture
def gpu(monkeypatch):
    gpu = _Gpu()

    class Graph:
        def __init__(self):
            self.parts = []

        def capture_begin(self):
            gpu.capturing = self

        def capture_end(self):
            gpu.capturing = None

        def replay(self):
            gpu.order += [name for name, _ in self.parts]
            gpu.now += sum(milliseconds for _, milliseconds in self.parts)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, other):
            return other.at - self.at

    fakes = {"CUDAGraph": Graph, "Event": Event, "synchronize": gpu.synchronize}
    fakes |= {"current_stream": lambda: "own", "default_stream": lambda: "default"}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpu


CUDA = SimpleNamespace(type="cuda")


def test_times_are_per_call_and_by_graph(gpu):
    contestants = {"fast": [gpu.work("fast", 1.0)] * 4, "slow": [gpu.work("slow", 2.0), gpu.work("slow", 4.0)]}
    times = timing.measure(contestants, CUDA, seconds=0.2)
    assert times["fast"].microseconds == pytest.approx(1000) and times["slow"].microseconds == pytest.approx(3000)
    assert times["fast"].p20 == times["fast"].p80 == pytest.approx(1000)
    assert times["fast"].method == "graph"
    assert times["fast"].runs == times["slow"].runs == 20  # 10 ms a round


def test_the_order_of_contestants_turns(gpu):
    timing.measure({"a": [gpu.work("a", 50.0)], "b": [gpu.work("b", 50.0)]}, CUDA, seconds=0.1)
    rounds = gpu.order[-2 * timing.FEWEST_RUNS :]
    assert rounds[:4] == ["a", "b", "b", "a"]


def test_one_that_cannot_be_captured_is_launched(gpu):
    calls = gpu.work("shy", 1.0)

    def shy():
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return calls()

    times = timing.measure({"shy": [shy]}, CUDA, seconds=0.01)
    assert times["shy"].microseconds == pytest.approx(1000)
    assert "not permitted" in times["shy"].method


def test_one_that_fails_leaves_the_others(gpu):
    def fails():
        raise ValueError("no such layout")

    times = timing.measure({"bad": [fails], "good": [gpu.work("good", 1.0)]}, CUDA, seconds=0.01)
    assert times["bad"] == "ValueError: no such layout"
    assert times["good"].microseconds == pytest.approx(1000)
    assert list(times) == ["bad", "good"]


def test_a_lost_gpu_is_not_gone_on_with(gpu):
    def asserts():
        gpu.lost = True
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(timing.DeviceLost, match="device-side assert"):
        timing.measure({"bad": [asserts], "good": [gpu.work("good", 1.0)]}, CUDA, seconds=0.01)
