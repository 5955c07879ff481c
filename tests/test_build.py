"""setup.py says in one line why there are no CUDA kernels, and the CPU's are built all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.cpu("about the build, which has no device")


def setup(tmp_path, version=None, torch_cuda=None, **environment):
    """`setup.py --name` with a toolkit of the given version in CUDA_HOME, and a torch of the given CUDA."""
    if version is not None:
        (tmp_path / "bin").mkdir()
        (tmp_path / "include").mkdir()
        (tmp_path / "include" / "cuda_runtime.h").touch()
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
        nvcc.chmod(0o755)
        environment["CUDA_HOME"] = str(tmp_path)
    program = (
        f"import runpy, sys, torch; torch.version.cuda = {torch_cuda!r}; sys.argv = ['setup.py', '--name']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("manual_ops: ")]
    return result.returncode, lines


def test_it_is_left_out_when_asked(tmp_path):
    assert setup(tmp_path, MANUAL_OPS_CUDA="0") == (0, ["manual_ops: no CUDA kernels: MANUAL_OPS_CUDA=0"])


def test_a_torch_without_cuda_has_none_unless_asked(tmp_path):
    code, lines = setup(tmp_path, MANUAL_OPS_CUDA="")
    assert code == 0 and len(lines) == 1 and "is built without CUDA; MANUAL_OPS_CUDA=1" in lines[0]


def test_a_toolkit_that_is_too_old(tmp_path):
    code, lines = setup(tmp_path, "11.8", MANUAL_OPS_CUDA="1")
    assert code == 1 and lines == [f"manual_ops: no CUDA kernels: {tmp_path} is CUDA 11.8, older than 12.0"]


def test_a_toolkit_of_another_major_version(tmp_path):
    code, lines = setup(tmp_path, "13.0", "12.8", MANUAL_OPS_CUDA="")
    said = f"manual_ops: no CUDA kernels: {tmp_path} is CUDA 13.0, torch's is 12.8: another major version"
    assert (code, lines) == (0, [said])
