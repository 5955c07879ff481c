"""The GPU's measurements, rehearsed on the CPU: every case runs, and what fails, hangs or crashes leaves the rest."""

import json
import stat
import sys

import pytest
import torch

import gpu
import gpu_parts
import gpu_report
import sanitize_gpu
from manual_ops.registry import OPERATIONS
from suites import GPU

pytestmark = pytest.mark.cpu("a rehearsal; on a GPU the measurements themselves run")

REHEARSAL = gpu_parts.Settings(torch.device("cpu"), rehearsal=True)


def _one_of_each_family():
    cases = {}
    for layer, case in zip(GPU, gpu_parts.OPERATION_CASES, strict=False):
        cases.setdefault(OPERATIONS[layer.op].family, case)
    return list(cases.values())


def _check(row):
    for name, error in row.get("errors", {}).items():
        assert error <= row["largest_error"], (name, error)
    times = [time for told in row.get("passes", {}).values() for time in told["times"].values()]
    assert [time for time in times if isinstance(time, str)] == []
    json.dumps(row)


def test_every_operation_is_measured():
    in_place = {name for name in OPERATIONS if name.endswith("_")}
    assert {layer.op for layer in GPU} == set(OPERATIONS) - in_place
    names = [case.name for cases in gpu_parts.PARTS.values() for case in cases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", _one_of_each_family(), ids=lambda case: case.name)
def test_a_case_of_each_family_runs(case):
    _check(case.run(REHEARSAL))


@pytest.mark.slow  # some hundred cases, and training steps of whole networks
@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_every_case_runs(part):
    for case in gpu_parts.PARTS[part]:
        _check(case.run(REHEARSAL))


def test_the_fewest_bytes_of_a_pass():
    layer = next(layer for layer in GPU if layer.op == "max_pool2d")
    one = gpu_parts._make_inputs(gpu_parts.reduced(layer), torch.float16, False, REHEARSAL, 0)
    output = torch.empty(2, 8, 8, 8, dtype=torch.float16)
    floors = gpu_parts._floors(layer, one, output, kept=output.numel())
    read, written = one.args[0].nbytes, output.nbytes
    assert floors["forward"]["bytes"] == read + written
    assert floors["backward"]["bytes"] == written + output.numel() + read  # the winners are one byte each


def test_the_operations_of_a_convolution():
    layer = next(layer for layer in GPU if layer.op == "conv2d" and layer.label.startswith("conv 3x3"))
    one = gpu_parts._make_inputs(gpu_parts.reduced(layer), torch.float32, False, REHEARSAL, 0)
    output = OPERATIONS["conv2d"].function(*one.args, **one.kwargs).detach()
    floors = gpu_parts._floors(layer, one, output, kept=0)
    assert floors["forward"]["flops"] == 2 * output.numel() * one.args[0].shape[1] * 9
    assert floors["backward"]["flops"] == 2 * floors["forward"]["flops"]


# A worker of four cases: the second ends the process, the third says nothing any more.
WORKER = """
import json, os, sys, time
start, path = int(sys.argv[1]), sys.argv[2]
lines = open(path, "a")
def tell(**message):
    print(json.dumps(message), file=lines, flush=True)
tell(names=["good", "crashes", "hangs", "last"])
for index in range(start, 4):
    tell(begin=index)
    if index == 1:
        print("a last word", flush=True)
        os._exit(7)
    if index == 2:
        time.sleep(60)
    tell(index=index, row={"passes": {}}, told="")
"""


@pytest.fixture
def options():
    return gpu.argparse.Namespace(dry_run=True, cases=None, also_to=None)


def test_cases_that_crash_or_hang_leave_the_others(monkeypatch, options):
    monkeypatch.setattr(gpu, "_worker", lambda name, start, lines, _: [sys.executable, "-c", WORKER, str(start), lines])
    monkeypatch.setattr(gpu, "FIRST_SILENCE", 3)
    part = gpu.measure_part("operations", gpu.time.monotonic() + 60, options)
    rows = {row["case"]: row.get("error") for row in part["rows"]}
    assert list(rows) == ["good", "crashes", "hangs", "last"]
    assert rows["good"] is None and rows["last"] is None
    assert "status 7" in rows["crashes"] and "a last word" in rows["crashes"]
    assert "silent for 3 s" in rows["hangs"]
    assert part["left_out"] == []


def test_what_there_was_no_time_for_is_named(monkeypatch, options):
    monkeypatch.setattr(gpu, "_worker", lambda name, start, lines, _: [sys.executable, "-c", WORKER, "2", lines])
    part = gpu.measure_part("operations", gpu.time.monotonic() + 2, options)
    assert [row["error"].partition(";")[0] for row in part["rows"]] == ["no time was left"]
    assert part["left_out"] == ["good", "crashes", "last"]


def test_a_worker_that_never_begins_is_told_of(monkeypatch, options):
    monkeypatch.setattr(gpu, "_worker", lambda *_: [sys.executable, "-c", "raise SystemExit('no torch')"])
    part = gpu.measure_part("operations", gpu.time.monotonic() + 20, options)
    assert "never began" in part["problem"] and part["log"] == ["no torch"]


def test_a_part_that_fails_leaves_the_others_and_the_results_are_copied(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("this part fails")

    monkeypatch.setattr(gpu, "run_tests", fails)
    arguments = ["--dry-run", "--cases", "2", "--output", str(tmp_path / "own"), "--also-to", str(tmp_path / "other")]
    gpu.main([*arguments, "tests", "ceilings"])
    document = json.loads((tmp_path / "other" / "gpu.json").read_text())
    assert "this part fails" in document["parts"]["tests"]["problem"]
    assert [row["case"] for row in document["parts"]["ceilings"]["rows"]] == ["environment", "copy"]
    assert document["parts"]["ceilings"]["rows"][1]["bytes_per_second"] > 0


def _document(microseconds, dtype="float16"):
    time = {"microseconds": microseconds, "p20": microseconds, "p80": microseconds, "runs": 9, "method": "graph"}
    row = {
        "case": "a case", "layer": "a layer", "op": "relu", "family": "activation", "dtype": dtype,
        "channels_last": False, "largest_error": 0.1, "errors": {"torch": 0.0, "manual_ops": 0.2},
        "passes": {"forward": {"times": {"manual_ops": time, "torch": "OutOfMemoryError: none left"}, "bytes": 2e6}},
    }  # fmt: skip
    ceilings = [{"case": "copy", "bytes_per_second": 1e12}, {"case": "product float16", "error": "failed"}]
    return {"parts": {"ceilings": {"rows": ceilings}, "operations": {"rows": [row]}}}


def test_shares_misses_and_wrong_results(tmp_path):
    document = _document(4.0)
    gpu_report.add_shares(document)
    told = document["parts"]["operations"]["rows"][0]["passes"]["forward"]
    assert told["share_of_copy"] == {"manual_ops": pytest.approx(0.5)} and told["share_of_product"] == {}
    assert gpu_report.missed(document) == ["50% of the copy bandwidth: a case, forward"]
    assert gpu_report.wrong(document) == ["a case"]
    gpu_report.plot(tmp_path, document)
    assert (tmp_path / "operations-float16.png").exists()


@pytest.mark.parametrize(
    ("script", "clean", "line"),
    [
        ("exit 0", True, "memcheck: nothing found"),
        ("exit 66", False, "memcheck: errors, see above"),
        ("exit 1", False, "memcheck: the tests ended with status 1"),
        ("sleep 30", True, "memcheck: nothing found in 1 s, stopped before the end"),
    ],
)
def test_what_compute_sanitizer_says_is_passed_on(tmp_path, script, clean, line):
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(f"#!/bin/sh\n{script}\n")
    sanitizer.chmod(sanitizer.stat().st_mode | stat.S_IEXEC)
    assert sanitize_gpu.run(str(sanitizer), "memcheck", 1.0) == (clean, line)
