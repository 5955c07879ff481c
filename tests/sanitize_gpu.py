"""Runs small calls of every CUDA kernel under compute-sanitizer, one tool after the other.

    python tests/sanitize_gpu.py [--seconds 240]

memcheck finds accesses out of bounds or misaligned, racecheck races in shared memory, initcheck reads of what nothing
wrote. Every tensor has an allocation of its own, so that what lies next to it is not another tensor's memory. A tool
that takes longer than its time is stopped: what it has looked at by then was clean, and the last line says so.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 66  # compute-sanitizer's status, chosen here, where it found something


def command(sanitizer: str, tool: str, python: str = sys.executable) -> list[str]:
    """float32 for the plain paths and float16 for the packed ones; what CUDA libraries do is not ours to judge."""
    pytest = [
        python,
        "-m",
        "pytest",
        "tests/test_kernel_calls.py",
        "-k",
        "native and (float32 or float16) and not bfloat16",
        "-x",
    ]
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "application-only"]
    return [sanitizer, *options, *pytest, "-p", "no:cacheprovider"]


def run(sanitizer: str, tool: str, seconds: float) -> tuple[bool, str]:
    """Whether all was clean, and a line that says what happened."""
    environment = {**os.environ, "MANUAL_OPS_TEST_DEVICES": "cuda", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command(sanitizer, tool), cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the tests are a child of its own
        process.wait()
        return True, f"{tool}: nothing found in {seconds:.0f} s, stopped before the end"
    if status == 0:
        return True, f"{tool}: nothing found"
    return False, f"{tool}: {'errors, see above' if status == FOUND else f'the tests ended with status {status}'}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The CUDA kernels' tests under compute-sanitizer.")
    parser.add_argument("--seconds", type=float, default=240, help="for each tool")
    parser.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    options = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        sys.exit("compute-sanitizer is not found; it comes with the CUDA toolkit")
    results = [run(sanitizer, tool, options.seconds) for tool in options.tools]
    for _, line in results:
        print(line)
    sys.exit(0 if all(clean for clean, _ in results) else 1)


if __name__ == "__main__":
    main()
