"""The CPU's benchmarks: every operation is in a suite, and a run writes what it measured and names what lost."""

import dataclasses
import json

import pytest
import torch

import accuracy
import run
from manual_ops.compare import Layer, arguments
from manual_ops.registry import OPERATIONS
from suites import CLASSES, SUITES, Suite

pytestmark = pytest.mark.cpu("a rehearsal of the CPU's benchmarks")


def test_every_operation_is_measured():
    in_place = {name for name in OPERATIONS if name.endswith("_")}
    assert {layer.op for suite in SUITES.values() for layer in suite.layers} == set(OPERATIONS) - in_place


@pytest.mark.parametrize("suite", SUITES)
def test_every_layer_of_a_suite_can_be_run(suite):
    dtype = getattr(torch, SUITES[suite].dtype)
    for layer in SUITES[suite].layers:
        operation = OPERATIONS[layer.op]
        small = dataclasses.replace(layer, input=(2, *layer.input[1:]))
        args, kwargs = arguments(small, operation, dtype, SUITES[suite].channels_last)
        output = operation.function(*args, **kwargs)
        assert output.dtype == dtype and output.requires_grad


def test_every_class_has_its_aim():
    assert all(suite.target or suite.floor < 0.95 for name, suite in CLASSES.items() if name != "batch_norm-other")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A suite whose second layer nothing can win, in folders of its own."""
    layers = (Layer("relu", (2, 4, 8, 8)), Layer("relu6", (2, 4, 8, 8)))
    monkeypatch.setitem(SUITES, "toy", Suite(layers, target=2, floor=1e9))
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    return tmp_path


def measured(tmp_path, setting, compiled=False):
    file = tmp_path / "told.json"
    run.measure("toy", setting, 0.01, compiled, str(file))
    return json.loads(file.read_text())


def test_a_run_is_written_plotted_and_summed_up(toy, capsys, monkeypatch):
    monkeypatch.setattr(run.os, "sched_setaffinity", lambda *_: None)  # the test's own process stays where it is
    told = measured(toy, "1-resident")
    assert set(told["lost"]) == {"relu, 2x4x8x8", "relu6, 2x4x8x8"}
    assert told["allocator"]["name"] == "resident" and told["environment"]["torch"] == torch.__version__
    run.write("toy", {"1-resident": told})
    run.write("toy", {"1-default": told})
    document = json.loads((toy / "toy.json").read_text())
    assert list(document["runs"]) == ["1-default", "1-resident"]
    assert (toy / "toy.png").stat().st_size > 0
    (row,) = [line for line in run.summary().splitlines() if line.startswith("| toy |")]
    assert "| 2 |" in row and "relu6, 2x4x8x8" in row
    run.tell(SUITES["toy"], told)
    assert "relu6" in capsys.readouterr().out


@pytest.mark.slow  # compiles two layers
def test_torch_compile_is_measured_beside_torch(toy, monkeypatch):
    monkeypatch.setattr(run.os, "sched_setaffinity", lambda *_: None)
    rows = measured(toy, "1-default", compiled=True)["comparison"]["measurements"]
    assert all(row["peer_speedups"]["torch.compile"] > 0 for row in rows)


def test_the_command_measures_in_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py", "lenet", "--settings", "2-resident", "--seconds", "0.01"])
    run.main()
    told = json.loads((tmp_path / "lenet.json").read_text())["runs"]["2-resident"]
    assert told["comparison"]["threads"] == 2
    assert len(told["comparison"]["measurements"]) == len(SUITES["lenet"].layers)
    assert "| lenet |" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_accuracy_of_a_convolution(channels_last):
    layer = Layer("conv2d", (2, 16, 12, 12), {"padding": 1})
    told = accuracy.errors(layer, torch.float32, channels_last)
    assert list(told) == ["output", "input gradient", "weight gradient"]
    assert all(0 < error < 4e-6 for found in told.values() for error in found.values())
    assert all(found["fast"] != found["strict"] for found in told.values())
    rows = accuracy.table({"toy": {"layers": {layer.name: told}}}).splitlines()
    assert len(rows) == 2 + 3 and "conv2d, 2x16x12x12" in rows[2]


def test_an_image_has_no_gradient_to_be_inaccurate():
    layer = Layer("conv2d", (2, 3, 12, 12), {"padding": 1, "input_grad": False})
    assert list(accuracy.errors(layer, torch.bfloat16, False)) == ["output", "weight gradient"]
