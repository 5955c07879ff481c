"""Builds, tests and measures on this machine's GPU; writes results/<gpu>/gpu.json, plots and a log of the tests.

python benchmarks/gpu.py                           everything, within --minutes
python benchmarks/gpu.py compiled                  this part; the others stay as an earlier run wrote them
python benchmarks/gpu.py --dry-run                 every part once on the CPU, at a reduced size

It runs unattended. Each part is a process of its own with a limit of time, and a part that measures goes case by case:
what fails, hangs or loses the GPU is written down with its error, and the rest goes on in a fresh process. The results
are written after every part, and what there was no time for is named.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_report import add_shares, geometric_means, missed, plot, wrong

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent
RESULTS = HERE / "results"

# In this order, each with the most seconds it may take: what is first is what matters most where time runs short.
LIMITS = {
    "build": 210,
    "tests": 90,
    "ceilings": 45,
    "operations": 170,
    "networks": 90,
    "peers": 30,
    "compiled": 75,
    "compiled networks": 150,
    "more tests": 200,
}
TESTS = ("test_kernel_calls.py", "test_cuda.py")
# A case is given up where it says nothing for so long: the first one of a process starts CUDA and loads libraries.
SILENCE, FIRST_SILENCE = 60, 120
SILENCE_OF_A_COMPILER = 150


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build, test and measure on this machine's GPU.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(LIMITS)}; all by default")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything together")
    parser.add_argument("--also-to", type=Path, help="a folder that gets a copy of the results after every part")
    parser.add_argument("--output", type=Path, help="instead of results/<gpu>")
    parser.add_argument("--cases", type=int, help="measure the first so many cases of each part only")
    parser.add_argument(
        "--compile-mode", default="default", help="torch.compile's mode, say max-autotune-no-cudagraphs"
    )
    parser.add_argument("--dry-run", action="store_true", help="once, on the CPU, at a reduced size")
    parser.add_argument("--build", action="store_true", help="only build, and say what goes wrong")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options)
        return
    if options.build:
        row = build(None, options)
        if "problem" in row:
            sys.exit("\n".join([*row["log"], row["problem"]]))
        print(f"built for {row['architecture']}")
        return
    unknown = set(options.parts) - set(LIMITS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    run(options)


# The process that keeps the time and writes the results. It imports no torch: what is to be built is not there yet.


def run(options: argparse.Namespace) -> None:
    end = time.monotonic() + 60 * options.minutes
    folder = options.output or (ROOT / "build" / "gpu-dry-run" if options.dry_run else RESULTS / _slug(_gpu_name()))
    folder.mkdir(parents=True, exist_ok=True)
    document = _earlier(folder / "gpu.json")
    chosen = [name for name in LIMITS if name in options.parts or not options.parts]
    for name in chosen:
        began = time.monotonic()
        limit = min(LIMITS[name], end - began)
        part: dict[str, Any] = {"date": _now(), "commit": _commit(), "limit_seconds": round(max(limit, 0), 1)}
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        try:
            if limit < 5:
                part["problem"] = "no time was left"
            elif name == "build":
                part.update(build(limit, options))
            elif name in ("tests", "more tests"):
                part.update(run_tests(limit, folder / f"{name.replace(' ', '-')}.txt", name == "tests", options))
            else:
                part.update(measure_part(name, began + limit, options))
        except Exception:  # whatever it is, the next part runs
            part["problem"] = traceback.format_exc()
        part["seconds"] = round(time.monotonic() - began, 1)
        document["parts"][name] = part
        if "problem" in part:
            print(f"   {part['problem']}", flush=True)
        write(folder, document, options)
    print_summary(document)


def write(folder: Path, document: dict[str, Any], options: argparse.Namespace) -> None:
    add_shares(document)
    document["wrong"], document["missed"] = wrong(document), missed(document)
    path = folder / "gpu.json"
    path.with_suffix(".new").write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".new").replace(path)
    try:
        plot(folder, document)
    except Exception as error:  # without matplotlib, say: the numbers are there
        print(f"   no plots: {type(error).__name__}: {error}", flush=True)
    if options.also_to:
        options.also_to.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            shutil.copy(file, options.also_to)


def _earlier(path: Path) -> dict[str, Any]:
    """What an earlier run wrote, to replace part by part."""
    if path.exists():
        return json.loads(path.read_text())
    return {"parts": {}}


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def _gpu_name() -> str:
    program = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    name = told.stdout.strip()
    if not name:
        sys.exit(f"torch finds no usable GPU; --dry-run rehearses on the CPU\n{told.stderr.strip()}")
    return name


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _stopped(process: "subprocess.Popen[Any]") -> None:
    """End a process and what it started: compilers, workers of the tests."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _logged(command: list[str], log: Path, limit: float | None, environment: dict[str, str]) -> int | None:
    """Append a command's output to a log; its exit status, or None where it ran past the limit."""
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stopped(process)


def _tail(log: Path, lines: int = 40) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def build(limit: float | None, options: argparse.Namespace) -> dict[str, Any]:
    """Both libraries, in place, with what this interpreter has; TORCH_CUDA_ARCH_LIST, if set, says for which GPUs."""
    if options.dry_run:
        return {"skipped": "a dry run uses the libraries that are there"}
    program = "import torch; major, minor = torch.cuda.get_device_capability(); print(f'{major}.{minor}')"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    capability = told.stdout.strip()
    if not capability:
        return {"problem": "torch finds no usable GPU", "log": told.stderr.splitlines()[-1:]}
    environment = {**_environment(), "MANUAL_OPS_CUDA": "1"}
    # The suffix allows instructions that this generation alone has.
    native = capability + "a" if capability in ("9.0", "10.0", "12.0") else capability
    architecture = environment.setdefault("TORCH_CUDA_ARCH_LIST", native)
    environment.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary, "build.txt")
        status = _logged([sys.executable, "setup.py", "build_ext", "--inplace"], log, limit, environment)
        row = {"architecture": architecture, "status": status}
        if status == 0:
            return row
        return {**row, "problem": "the build failed" if status else "the build ran out of time", "log": _tail(log)}


def run_tests(limit: float, log: Path, first: bool, options: argparse.Namespace) -> dict[str, Any]:
    """File by file, each in a process of its own: one that loses the GPU or runs out of time leaves the others."""
    log.unlink(missing_ok=True)
    environment = {**_environment(), "MANUAL_OPS_TEST_DEVICES": "cpu" if options.dry_run else "cuda"}
    files = [ROOT / "tests" / name for name in TESTS]
    if not first:
        files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in TESTS]
    if options.cases is not None:
        files = files[: options.cases]
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    end = time.monotonic() + limit
    rows = []
    for path in files:
        left = end - time.monotonic()
        if left < 5:
            rows.append({"file": path.name, "status": "no time was left"})
            continue
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", str(path.relative_to(ROOT)), "-m", "not slow", "--tb=short"]
        status = _logged([*command, "--maxfail=25", *parallel], log, left, environment)
        told = {0: "passed", 1: "failed", 5: "nothing to run", None: "out of time"}.get(status, f"status {status}")
        counts = [line for line in _tail(log, 5) if re.search(r"\d+ (passed|failed|skipped|error)", line)]
        rows.append({"file": path.name, "status": told, "counts": counts[-1:], "seconds": time.monotonic() - began})
        print(f"   {path.name}: {told} {' '.join(counts[-1:])}", flush=True)
    return {"files": rows, "log": log.name}


def measure_part(name: str, end: float, options: argparse.Namespace) -> dict[str, Any]:
    """The cases of a part in a worker process, and in another one from the next case on whenever it ends early."""
    rows: dict[int, dict[str, Any]] = {}
    names: list[str] = []
    start = 0
    while True:
        with tempfile.TemporaryDirectory() as temporary:
            lines = Path(temporary, "lines.jsonl")
            lines.touch()
            log = Path(temporary, "log.txt")
            silences = [SILENCE_OF_A_COMPILER] * 2 if name.startswith("compiled") else [FIRST_SILENCE, SILENCE]
            why = _watched(_worker(name, start, lines, options), log, lines, end, silences)
            for message in _messages(lines):
                names = message.get("names", names)
                if "begin" in message:
                    rows[message["begin"]] = {"case": names[message["begin"]], "error": "did not end"}
                if "row" in message:
                    rows[message["index"]] = {"case": names[message["index"]], **message["row"]}
            problem = {"problem": f"the worker never began: {why}", "log": _tail(log)} if not names else {}
            last = max(rows, default=start - 1)
            if why and rows.get(last, {}).get("error") == "did not end":
                rows[last]["error"] = f"{why}; its last words: {' | '.join(_tail(log, 6))}"[:2000]
        if problem or last + 1 <= start or last + 1 >= len(names) or time.monotonic() > end - 5:
            break
        start = last + 1
    left_out = [case for index, case in enumerate(names) if index not in rows]
    return {"rows": [rows[index] for index in sorted(rows)], "left_out": left_out, **problem}


def _worker(name: str, start: int, lines: Path, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(HERE / "gpu.py"), "--worker", name, "--start", str(start), "--lines", str(lines)]
    command += ["--compile-mode", options.compile_mode]
    command += ["--dry-run"] if options.dry_run else []
    return command + (["--cases", str(options.cases)] if options.cases is not None else [])


def _messages(lines: Path) -> list[dict[str, Any]]:
    """What a worker has said so far; it may have been stopped in the middle of a line."""
    return [json.loads(line) for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _watched(command: list[str], log: Path, lines: Path, end: float, silences: list[int]) -> str:
    """Run a worker until it ends, is silent for too long, or time is up; which of them, "" for a good end.

    `silences`: how long it may say nothing at first, and how long after its first case.
    """
    seen = 0
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        heard = time.monotonic()
        allowed = silences[0]
        ended = False
        try:
            while not ended:
                time.sleep(0.05)
                ended = process.poll() is not None
                messages = _messages(lines)
                for message in messages[seen:]:
                    heard = time.monotonic()
                    if "row" in message:
                        allowed = silences[1]
                        print(f"   {message['told']}", flush=True)
                seen = len(messages)
                if time.monotonic() > end:
                    return "no time was left"
                if time.monotonic() - heard > allowed:
                    return f"silent for {allowed} s"
        finally:
            _stopped(process)
    return "" if process.returncode == 0 else f"the process ended with status {process.returncode}"


# The process that measures.


def work(options: argparse.Namespace) -> None:
    import torch

    from gpu_parts import PARTS, Settings, clean_up, prepare
    from timing import DeviceLost, describe

    cases = PARTS[options.worker][: options.cases]
    settings = Settings(torch.device("cpu" if options.dry_run else "cuda"), options.dry_run, options.compile_mode)

    with options.lines.open("a") as lines:

        def tell(**message: Any) -> None:
            lines.write(json.dumps(message) + "\n")
            lines.flush()

        tell(names=[case.name for case in cases])
        prepare(settings)
        for index in range(options.start, len(cases)):
            tell(begin=index)
            began = time.monotonic()
            lost = False
            try:
                row = cases[index].run(settings)
            except DeviceLost as error:
                row, lost = {"error": f"the GPU was lost: {error}"}, True
            except Exception as error:
                row = {"error": describe(error), "traceback": traceback.format_exc().splitlines()[-8:]}
            row["seconds"] = round(time.monotonic() - began, 2)
            tell(index=index, row=row, told=_told(cases[index].name, row))
            if lost:
                sys.exit(3)
            try:
                clean_up(settings)
            except RuntimeError:  # an error of the device that nothing had waited for
                sys.exit(4)


def _told(name: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{name}: {row['error']}"
    shares = []
    for which, told in row.get("passes", {}).items():
        speedups = " ".join(f"{value:.2f}x {peer}" for peer, value in told.get("speedup", {}).items())
        shares.append(f"{which} {speedups or told['times']}")
    return f"{name} ({row['seconds']} s): {'; '.join(shares)}"


def print_summary(document: dict[str, Any]) -> None:
    """A short table, last: what ran, and each pass's geometric mean of the speedups."""
    print("\nparts")
    for name, part in document["parts"].items():
        rows, left_out = part.get("rows", []), part.get("left_out", [])
        failed = sum("error" in row for row in rows)
        problem = ", PROBLEM" if "problem" in part else ""
        print(f"  {name}: {part['seconds']} s, {len(rows)} cases, {failed} failed, {len(left_out)} left out{problem}")
    for line in geometric_means(document):
        print(f"  {line}")
    if document["wrong"]:
        print(f"WRONG RESULTS: {'; '.join(document['wrong'])}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
