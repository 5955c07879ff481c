"""What the compiler says of each CUDA kernel: registers, shared memory, spills.

    python benchmarks/cuda_report.py [--arch 90a]

Compiles csrc/cuda for one architecture (no GPU is needed) and writes benchmarks/results/cuda-kernels-sm_<arch>.md, a
row a kernel over all its template instances.
"""

import re
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA", "--expt-relaxed-constexpr"]
FLAGS += [f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
FLAGS += ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-Xptxas=-v"]
INSTANCE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Instance:
    """One kernel with its template arguments, as ptxas reports it. Sizes in bytes."""

    file: str
    kernel: str
    signature: str
    registers: int
    shared: int
    stack: int
    spills: int


def compiled(source: Path, arch: str, nvcc: Path) -> list[Instance]:
    """Every kernel instance of one .cu file."""
    include = [f"-I{ROOT / 'csrc'}", "-isystem", Path(torch.__file__).parent / "include"]
    with TemporaryDirectory() as folder:
        target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-c", source, "-o", Path(folder, "object.o")]
        result = subprocess.run([nvcc, *FLAGS, *include, *target], capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(result.stderr)
    log = result.stderr
    found = [match.groupdict() for match in INSTANCE.finditer(log)]
    names = subprocess.run(
        ["c++filt"], input="\n".join(instance["name"] for instance in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        Instance(
            file=str(source.relative_to(ROOT / "csrc")),
            kernel=re.search(r"(\w+)(?=<|\()", name.replace("(anonymous namespace)::", "").split(" ", 1)[-1])[1],
            signature=name,
            registers=int(instance["registers"]),
            shared=sum(map(int, re.findall(r"(\d+) bytes smem", instance["rest"]))),
            stack=int(instance["stack"]),
            spills=int(instance["stores"]) + int(instance["loads"]),
        )
        for instance, name in zip(found, names, strict=True)
    ]


def table(instances: list[Instance], arch: str, version: str) -> str:
    """The report in Markdown."""
    kernels = defaultdict(list)
    for instance in instances:
        kernels[instance.file, instance.kernel].append(instance)
    lines = [
        f"# CUDA kernels on sm_{arch}",
        "",
        f"What ptxas of {version} reports, the largest over each kernel's instances (`benchmarks/cuda_report.py`).",
        "Static shared memory alone; spilled bytes are stores and loads together.",
        "",
        "| file | kernel | instances | registers | shared bytes | stack bytes | spilled bytes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (file, kernel), group in sorted(kernels.items()):
        most = [max(getattr(i, what) for i in group) for what in ("registers", "shared", "stack", "spills")]
        lines.append(f"| {file} | {kernel} | {len(group)} | {' | '.join(map(str, most))} |")
    spilling = [instance for instance in instances if instance.spills]
    lines += ["", f"{len(instances)} instances of {len(kernels)} kernels; {len(spilling)} of them spill.", ""]
    lines += [f"- {i.signature}: {i.spills} bytes" for i in spilling]
    return "\n".join(lines).rstrip() + "\n"


def main(
    arch: Annotated[str, typer.Option(help="the architecture's number, 90a for an H100")] = "90a",
    cuda_home: Annotated[Path, typer.Option(help="the CUDA toolkit", envvar="CUDA_HOME")] = Path("/usr/local/cuda"),
) -> None:
    """Compile every CUDA kernel and write the table."""
    nvcc = cuda_home / "bin" / "nvcc"
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    with ThreadPoolExecutor(cpu_count()) as pool:
        sources = sorted((ROOT / "csrc" / "cuda").glob("**/*.cu"))
        results = list(pool.map(lambda source: compiled(source, arch, nvcc), sources))
    release = re.search(r"release ([\d.]+)", version)
    text = table([i for group in results for i in group], arch, f"CUDA {release[1] if release else '?'}")
    path = ROOT / "benchmarks" / "results" / f"cuda-kernels-sm_{arch}.md"
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
