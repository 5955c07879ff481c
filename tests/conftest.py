"""Fixtures: a test that takes `backend` runs on both sets of kernels, one that takes `device` on every device."""

from collections import Counter

import pytest
import torch

from manual_ops import kernel, modes

torch.set_num_threads(2)
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_configure(config):
    if not kernel.native_library_loaded():
        raise pytest.UsageError(f"the tests need the native kernels: {kernel.native_library_problem()}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["python", "native"])
def backend(request):
    with modes.backend(request.param):
        yield request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def pytest_terminal_summary(terminalreporter):
    for outcome in ("skipped", "xfailed"):
        reports = terminalreporter.stats.get(outcome, [])
        terminalreporter.write_line(f"{len(reports)} {outcome}")
        reasons = Counter(
            report.longrepr[2] if outcome == "skipped" and isinstance(report.longrepr, tuple) else report.wasxfail
            for report in reports
        )
        for reason, count in reasons.items():
            terminalreporter.write_line(f"  {count}: {reason}")
