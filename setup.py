"""Builds the native library. The metadata is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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


def cpu_library() -> CppExtension:
    return CppExtension(
        name="manual_ops._C",
        sources=sorted(str(path) for path in Path("csrc/cpu").glob("**/*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("**/*.h")),
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=COMPILE + STABLE_ABI + os.environ.get("MANUAL_OPS_CXXFLAGS", "").split(),
        extra_link_args=os.environ.get("MANUAL_OPS_LDFLAGS", "").split(),
        py_limited_api=True,
    )


setup(
    ext_modules=[cpu_library()],
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)},
)
