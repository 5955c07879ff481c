"""The CUDA kernels, run on the CPU by the emulator: right, without races, in bounds, whatever the order of threads.

This says nothing of speed, nor of what only a device shows; it is the logic that is tested.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build import BUILDS, HERE, ROOT, compile_libraries, library

pytestmark = [
    pytest.mark.cpu("the emulator runs there"),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the emulator is for g++ on x86-64"
    ),
]

# Where an access is misaligned for a pack or past a tensor, only the build that looks says so.
FOUND_BY_CHECK = {
    "missing barrier": "uninitialised|race",
    "missing barrier at the end of a loop": "race",
    "missing __syncwarp": "race",
    "return before a barrier": "deadlock|exited",
    "divergent barrier": "divergent barrier",
    "write past a shared array": "out-of-bounds write.*shared memory",
    "read of uninitialised shared memory": "uninitialised shared memory 'values'",
    "wrong shuffle mask": "mask 0x0000ffff",
    "off-by-one guard": "out-of-bounds write",
    "read behind the tensor": "out-of-bounds read",
    "write to an input": "taken as input",
    "+= for atomicAdd": "race",
    "misaligned pack": "misaligned",
}
FOUND_BY_SANITIZERS = {"off-by-one guard": "heap-buffer-overflow", "misaligned pack": "misaligned address"}
COUNT = 150  # of elements: two whole blocks of 64, and a part of one


def _environment(build, **more):
    environment = {**os.environ, **more, "MANUAL_OPS_LIBRARY": str(library(build))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    if build == "sanitize":
        names = ("libasan.so", "libstdc++.so")
        paths = [subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip() for name in names]
        environment["LD_PRELOAD"] = " ".join(paths)
        environment["ASAN_OPTIONS"] = "detect_leaks=0"  # Python's own, at exit
    return environment


@pytest.fixture(scope="session", params=list(BUILDS))
def build(request):
    compile_libraries([request.param])
    return request.param


@pytest.fixture(scope="session")
def planted():
    compile_libraries(["check", "sanitize"], {"planted": [HERE / "planted.cu"]})
    torch.ops.load_library(str(library("check", "planted")))
    return torch.ops.cuda_emulation.planted


ORDERS = {
    "plain": ["forward", "reverse+wide", "7"],
    "check": ["forward", "11+wide"],
    "sanitize": ["forward"],
}


def test_every_kernel_is_what_its_python_body_is(build, capsys):
    """Two processes, each half of the calls."""
    command = [sys.executable, HERE / "run_calls.py"]
    halves = [
        subprocess.Popen(
            [*command, str(half), "2", *ORDERS[build]],
            env=_environment(build),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in (0, 1)
    ]
    outputs = [half.communicate()[0] for half in halves]
    with capsys.disabled():
        runs = sum(int(number) for output in outputs for number in re.findall(r"([0-9]+) runs", output))
        print(f"\n{build} ({', '.join(ORDERS[build])}): {runs} runs of kernels")
    assert [half.returncode for half in halves] == [0, 0], "\n".join(output[-6000:] for output in outputs)


def test_the_kernels_without_a_mistake_pass(planted):
    values = torch.randn(COUNT)
    # The elements of the last block are turned around with zeros from behind the end.
    torch.testing.assert_close(planted(values, "none"), 2 * values)


@pytest.mark.parametrize("mistake", FOUND_BY_CHECK)
def test_the_checker_finds(planted, mistake):
    with pytest.raises(RuntimeError, match=FOUND_BY_CHECK[mistake]):
        planted(torch.randn(COUNT), mistake)
    # and the next launch is none the worse
    test_the_kernels_without_a_mistake_pass(planted)


@pytest.mark.parametrize("mistake", FOUND_BY_SANITIZERS)
def test_the_sanitizers_find(planted, mistake):
    program = (
        "import torch; "
        f"torch.ops.load_library({str(library('sanitize', 'planted'))!r}); "
        f"torch.ops.cuda_emulation.planted(torch.randn({COUNT}), {mistake!r})"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=_environment("sanitize"), capture_output=True, text=True)
    assert result.returncode != 0
    assert re.search(FOUND_BY_SANITIZERS[mistake], result.stderr), result.stderr[-3000:]


def test_every_cuda_source_is_compiled(build):
    objects = {path.name for path in (Path(library(build)).parent).glob("*.cu.o")}
    assert {f"{path.name}.o" for path in (ROOT / "csrc" / "cuda").glob("**/*.cu")} <= objects
