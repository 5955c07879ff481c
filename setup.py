"""Builds the native libraries: the CPU's always, CUDA's where there is a compiler for it. Metadata: pyproject.toml.

MANUAL_OPS_CUDA=1 builds the CUDA library whatever torch is installed, =0 leaves it out; unset, it is built where torch
has CUDA and an nvcc of the same major version is found. TORCH_CUDA_ARCH_LIST names the architectures.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

# The stable ABI of torch 2.11: a library built against any later torch loads there too.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
# -fno-math-errno and -fno-trapping-math let loops over exp and comparisons vectorise; neither changes a result.
COMPILE = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fwrapv",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]
COMPILE_CUDA = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden,-fwrapv", "-lineinfo"]
COMPILE_CUDA += ["-DUSE_CUDA"]  # the shim of the stable ABI declares its functions for streams
OLDEST_TOOLKIT = (12, 0)  # the first that compiles C++20
ARCHITECTURES = {"8.0": (11, 0), "9.0a": (12, 0), "10.0+PTX": (12, 8)}  # and the first toolkit that knows each
HEADERS = sorted(str(path) for path in Path("csrc").glob("**/*.h"))


def cpu_library() -> CppExtension:
    return CppExtension(
        name="manual_ops._C",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("**/*.cpp")),
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=COMPILE + STABLE_ABI + os.environ.get("MANUAL_OPS_CXXFLAGS", "").split(),
        extra_link_args=os.environ.get("MANUAL_OPS_LDFLAGS", "").split(),
        py_limited_api=True,
    )


def cuda_toolkit() -> tuple[Path, tuple[int, int]] | None:
    """The folder of the CUDA toolkit and its version."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if on_path:
        homes.insert(2, str(Path(on_path).resolve().parents[1]))
    for home in homes:
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            command = [Path(home, "bin", "nvcc"), "--version"]
            version = re.search(r"release (\d+)\.(\d+)", subprocess.run(command, capture_output=True, text=True).stdout)
            if version:
                return Path(home), (int(version[1]), int(version[2]))
    return None


def cuda_problem() -> str | None:
    """Why the CUDA library is not built; None when it is."""
    wish = os.environ.get("MANUAL_OPS_CUDA", "")
    if wish == "0":
        return "MANUAL_OPS_CUDA=0"
    if torch.version.cuda is None and wish != "1":
        return f"this torch ({torch.__version__}) is built without CUDA; MANUAL_OPS_CUDA=1 builds it all the same"
    toolkit = cuda_toolkit()
    if toolkit is None:
        return "nvcc is not found; install the CUDA toolkit, or set CUDA_HOME"
    home, version = toolkit
    if version < OLDEST_TOOLKIT:
        return f"{home} is CUDA {version[0]}.{version[1]}, older than {OLDEST_TOOLKIT[0]}.{OLDEST_TOOLKIT[1]}"
    if torch.version.cuda is not None and int(torch.version.cuda.split(".")[0]) != version[0]:
        return f"{home} is CUDA {version[0]}.{version[1]}, torch's is {torch.version.cuda}: another major version"
    return None


def link_stubs() -> Path:
    """Stand-ins for the libraries that torch's CUDA build has, to link against where the CPU's is installed."""
    folder = Path("build/stubs").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sources = {
        "libc10_cuda.so": "",
        "libtorch_cuda.so": 'extern "C" int aoti_torch_get_current_cuda_stream() { return 1; }',
    }
    for name, source in sources.items():
        command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


def cuda_library() -> CUDAExtension:
    toolkit = cuda_toolkit()
    assert toolkit is not None
    home, version = toolkit
    # cpp_extension looks for the toolkit only where torch is built with CUDA.
    cpp_extension.CUDA_HOME = str(home)
    # torch's libraries are where their CUDA build is; on another machine, where the stubs stand in for them.
    folders = [str(home / "lib64")] + ([] if torch.version.cuda else [str(link_stubs())])
    known = [name for name, first in ARCHITECTURES.items() if version >= first]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(known))
    return CUDAExtension(
        name="manual_ops._C_cuda",
        sources=sorted(str(path) for path in Path("csrc/cuda").glob("**/*.cu")),
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        library_dirs=folders,
        extra_compile_args={"nvcc": COMPILE_CUDA + STABLE_ABI + os.environ.get("MANUAL_OPS_NVCCFLAGS", "").split()},
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda", "-lc10_cuda"],  # to be loaded even if they are stubs
        py_limited_api=True,
    )


problem = cuda_problem()
if problem is not None:
    print(f"manual_ops: no CUDA kernels: {problem}", file=sys.stderr)
    if os.environ.get("MANUAL_OPS_CUDA") == "1":
        sys.exit(1)

setup(
    ext_modules=[cpu_library()] + ([cuda_library()] if problem is None else []),
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
