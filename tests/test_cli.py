"""The command line, run as its user runs it; in this process where only its answer to an argument counts."""

import json
import os
import subprocess
import sys

import pytest

from manual_ops.cli import app

pytestmark = pytest.mark.cpu("processes of their own, on the device that they choose")

COMMANDS = ["demo", "verify", "train", "compare", "info"]


def run(*args, env=None):
    return subprocess.run(
        [sys.executable, "-m", "manual_ops", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **(env or {})},
    )


def answer(capsys, *args):
    """(exit code, stdout, stderr) of a command in this process."""
    with pytest.raises(SystemExit) as ended:
        app(list(args))
    return ended.value.code, *capsys.readouterr()


def test_help_names_every_command():
    result = run("--help")
    assert result.returncode == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    code, stdout, _ = answer(capsys, command, "--help")
    assert code == 0
    assert "Usage" in stdout


def test_info_tells_versions_and_kernels():
    result = run("info")
    assert result.returncode == 0
    for word in ("manual_ops", "torch", "Python", "threads", "native", "CUDA"):
        assert word in result.stdout


def test_verify_writes_a_row_for_each_operation_backend_and_dtype(tmp_path):
    path = tmp_path / "verify.json"
    result = run("verify", "--op", "relu", "--op", "softmax", "--json", path)
    assert result.returncode == 0, result.stdout + result.stderr
    verification = json.loads(path.read_text())["verification"]
    assert verification["passed"] is True
    rows = {(row["op"], row["backend"], row["dtype"]): row for row in verification["rows"]}
    assert set(rows) == {
        (op, backend, dtype)
        for op in ("relu", "softmax")
        for backend in ("native", "python")
        for dtype in ("float64", "float32")
    }
    assert rows["relu", "native", "float64"]["gradgradcheck"] == "passed"


def test_train_reports_both_packages(tmp_path):
    path = tmp_path / "train.json"
    result = run("train", "--epochs", 1, "--threads", 1, "--json", path)
    assert result.returncode == 0, result.stdout + result.stderr
    training = json.loads(path.read_text())["training"]
    assert len(training["torch"]["losses"]) == len(training["manual_ops"]["losses"]) == training["steps_per_epoch"]
    assert training["largest_difference"] < 1e-2


@pytest.mark.parametrize("options", [["--kernel-size", "3", "--stride=2"], ["kernel_size=3", "stride=2"]])
def test_compare_measures_a_layer_of_the_users_own(options, tmp_path):
    path = tmp_path / "compare.json"
    result = run("compare", "--op", "max_pool2d", "--input", "2,4,16,16", *options, "--quick", "--json", path)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = json.loads(path.read_text())["comparison"]["measurements"]
    assert row["input"] == [2, 4, 16, 16]
    assert row["speedup"] > 0
    assert 0 < row["kept_bytes"] < row["torch_kept_bytes"]
    assert "slower than torch:" in result.stdout


def test_compare_measures_a_training_step_of_a_network(tmp_path):
    path = tmp_path / "compare.json"
    result = run("compare", "--model", "resnet18", "--batch", 2, "--image", 32, "--json", path)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = {step["variant"]: step for step in json.loads(path.read_text())["steps"]}
    assert steps["lean"]["kept_bytes"] < steps["torch"]["kept_bytes"]
    assert "fused and lean" in result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["verify", "--op", "convolve_it"], ["no operation"]),
        (["verify", "--dtype", "float31"], ["no dtype", "float32"]),
        (["verify", "--backend", "cuda"], ["no backend", "native, python"]),
        (["verify", "--device", "tpu"], ["no device", "did you mean cpu?"]),
        (
            ["verify", "--op", "relu", "--dtype", "float32", "--json", "/nowhere/at/all.json"],
            ["--json", "folder that exists"],
        ),
        (["train", "--dtype", "int8"], ["no dtype"]),
        (["compare", "--op", "max_pool"], ["did you mean max_pool"]),
        (["compare", "--input", "2,4,16,16"], ["--op"]),
        (["compare", "--quik"], ["--quik"]),
        (["compare", "--op", "relu", "--input", "2,four"], ["whole numbers"]),
        (["compare", "--op", "relu", "--input", "2,4", "slope=1"], ["relu has no option 'slope'", "inplace"]),
        (["compare", "--op", "max_pool2d", "--input", "2,4,8,8"], ["kernel_size"]),
        (["compare", "--op", "max_pool2d", "--input", "2,4,8,8", "kernel_size=9"], ["max_pool2d"]),
        (["compare", "--op", "conv2d", "--input", "2,4,8"], ["conv2d", "4 sizes"]),
        (["compare", "--op", "batch_norm", "--input", "4"], ["batch_norm", "at least 2 sizes"]),
        (["compare", "--op", "conv2d", "--input", "2,4,8,8", "groups=3"], ["conv2d", "groups"]),
        (["compare", "--op", "relu", "--input", "2,4", "--stride"], ["--stride has no value"]),
        (["compare", "--model", "resnet19"], ["no network 'resnet19'", "resnet18"]),
        (["compare", "--model", "resnet18", "--op", "relu"], ["--model", "--op"]),
        (["compare", "--model", "resnet18", "--batch", "1", "--image", "32"], ["more than 1 value per channel"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(args, words, capsys):
    code, _, stderr = answer(capsys, *args)
    assert code == 2
    (line,) = stderr.strip().splitlines()
    for word in words:
        assert word in line


def test_a_mistake_ends_the_command_with_its_exit_code():
    result = run("verify", "--op", "conv2")
    assert result.returncode == 2
    assert result.stderr.strip() == "manual-ops: no operation 'conv2'; did you mean conv2d?"


@pytest.mark.parametrize("args", [["nonsense"], ["train", "--epochs", "many"], ["train", "--epochs", "0"]])
def test_a_malformed_command_ends_without_a_traceback(args, capsys):
    code, _, stderr = answer(capsys, *args)
    assert code == 2
    assert "Traceback" not in stderr


def test_without_its_tools_the_command_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'typer' else find(name, package)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = run("info", env={"PYTHONPATH": path})
    assert result.returncode == 1
    assert result.stderr.strip() == 'manual-ops needs typer: install with pip install "manual_ops[tools]"'
