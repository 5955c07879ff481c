"""Compiles the CUDA kernels for the emulator: the same .cu files, with g++, once for each way of looking at them.

    python tests/cuda_emulation/build.py plain check sanitize

- plain: as they are.
- check: every access goes through the checker (races, bounds, uninitialised shared memory, writes to inputs).
- sanitize: AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import ninja
import torch
from ninja.ninja_syntax import Writer

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda_emulation"

SANITIZE = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
# What the kernels are compiled with, what the engine is, and what both are linked with.
BUILDS = {
    "plain": ("", "", ""),
    "check": ("-fsanitize=thread", "-DCUDA_EMULATION_CHECK", ""),
    "sanitize": (SANITIZE, SANITIZE, SANITIZE),
}


def library(build: str, name: str = "kernels") -> Path:
    """Where `name` of a build lies."""
    return OUTPUT / build / f"{name}.so"


def compile_libraries(builds: list[str], sources: dict[str, list[Path]] | None = None) -> None:
    """Compile what has changed. `sources`: the .cu files of each library; all kernels by default."""
    libraries = sources or {"kernels": sorted((ROOT / "csrc" / "cuda").glob("**/*.cu"))}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    # A file of their own for other sources, so that neither set takes the other's outputs for stale.
    path = OUTPUT / f"{'-'.join(libraries)}.ninja"
    path.write_text(_rules(builds, libraries))
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-f", path], cwd=OUTPUT, check=True, stdout=sys.stderr)


def _rules(builds: list[str], libraries: dict[str, list[Path]]) -> str:
    torch_root = Path(torch.__file__).parent
    text = StringIO()
    rules = Writer(text, width=120)
    rules.variable("builddir", str(OUTPUT))
    rules.variable(
        "flags",
        "-std=c++20 -O1 -fPIC -fvisibility=hidden -fwrapv -Wall -Wno-unknown-pragmas -Wno-psabi "
        f"-DTORCH_TARGET_VERSION=0x020b000000000000 -I{HERE} -I{ROOT / 'csrc'} "
        f"-isystem {torch_root / 'include'}",
    )
    rules.rule("compile", "g++ $flags $more -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d", deps="gcc")
    rules.rule("link", f"g++ -shared $more $in -L{torch_root / 'lib'} -ltorch -ltorch_cpu -lc10 -o $out")
    for build in builds:
        kernels, engine, link = BUILDS[build]
        objects = {}
        for source in [HERE / "engine.cpp", HERE / "checker.cpp", *{s for files in libraries.values() for s in files}]:
            objects[source] = str(OUTPUT / build / f"{source.name}.o")
            flags = engine if source.suffix == ".cpp" else kernels
            rules.build(objects[source], "compile", str(source), variables={"more": flags})
        for name, files in libraries.items():
            linked = [objects[HERE / "engine.cpp"], objects[HERE / "checker.cpp"], *(objects[file] for file in files)]
            rules.build(str(library(build, name)), "link", linked, variables={"more": link})
    return text.getvalue()


if __name__ == "__main__":
    compile_libraries(sys.argv[1:] or list(BUILDS))
