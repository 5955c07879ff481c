"""Fixtures: a test that takes `backend` runs on both sets of kernels; every test runs on every device.

A test that takes `device` makes its tensors there. Any other test runs once for each device as torch's default one:
whatever it makes without naming a device lies there. A test marked `cpu` is about the CPU alone, for the reason in the
mark, and one marked `gpu` makes its own tensors on the GPU. MANUAL_OPS_TEST_DEVICES=cuda chooses the devices; unset,
they are those of this machine.
"""

import importlib.util
import os
from collections import Counter

import pytest
import torch

from manual_ops import kernel, modes

torch.set_num_threads(2)
# cuBLAS reads it when it starts: without it torch.use_deterministic_algorithms refuses a matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The tolerances are those of float32: with TF32 a product has the accuracy of float16.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
DEVICES = os.environ.get("MANUAL_OPS_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu").split(",")

# Files that cannot be read without these packages, and packages that torch imports in the middle of a test.
NEEDS = {"test_parity.py": "hypothesis", "test_cli.py": "typer", "test_jobs.py": "sklearn", "cuda_emulation": "ninja"}
NEEDED_BY_TORCH = ("expecttest",)
not_collected = []


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu(reason): about the CPU alone")
    config.addinivalue_line("markers", "gpu: makes its own tensors on the GPU")
    if not kernel.native_library_loaded():
        raise pytest.UsageError(f"the tests need the native kernels: {kernel.native_library_problem()}")
    if "cuda" in DEVICES and not torch.cuda.is_available():
        raise pytest.UsageError("MANUAL_OPS_TEST_DEVICES has cuda, and torch finds no usable GPU")


def pytest_ignore_collect(collection_path):
    package = NEEDS.get(collection_path.name)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    not_collected.append(f"{collection_path.name} is left out: {package} is not installed")
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name in NEEDED_BY_TORCH:
            pytest.skip(f"{error.name} is not installed")
        raise


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("gpu"):
        return
    mark = metafunc.definition.get_closest_marker("cpu")
    devices = ["cpu"] if mark else DEVICES
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices)
    elif devices != ["cpu"]:
        metafunc.parametrize("_default_device", devices, indirect=True)


def pytest_collection_modifyitems(items):
    if "cpu" in DEVICES:
        return
    for item in items:
        mark = item.get_closest_marker("cpu")
        if mark:
            item.add_marker(pytest.mark.skip(reason=f"about the CPU alone: {mark.args[0]}"))


@pytest.fixture(autouse=True)
def _default_device(request):
    device = getattr(request, "param", "cpu")
    if device == "cpu":
        yield
    else:
        with torch.device(device):
            yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["python", "native"])
def backend(request):
    with modes.backend(request.param):
        yield request.param


def pytest_runtest_teardown(item):
    """After an assertion or a bad access on the GPU every later call fails: better to stop where it happened."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{item.nodeid} lost the GPU: {str(error).splitlines()[0]}", returncode=1)


def pytest_terminal_summary(terminalreporter):
    for line in not_collected:
        terminalreporter.write_line(line)
    for outcome in ("skipped", "xfailed"):
        reports = terminalreporter.stats.get(outcome, [])
        terminalreporter.write_line(f"{len(reports)} {outcome}")
        reasons = Counter(
            report.longrepr[2] if outcome == "skipped" and isinstance(report.longrepr, tuple) else report.wasxfail
            for report in reports
        )
        for reason, count in reasons.items():
            terminalreporter.write_line(f"  {count}: {reason}")
