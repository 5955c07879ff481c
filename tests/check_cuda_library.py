"""Loads manual_ops/_C_cuda.so, with stand-ins for what this torch lacks, and checks that every kernel is in it."""

import ctypes
from pathlib import Path

import torch

from manual_ops import kernel, registry  # noqa: F401  the registry imports every operation

ROOT = Path(__file__).resolve().parents[1]

if torch.version.cuda is None:
    for name in ("libc10_cuda.so", "libtorch_cuda.so"):
        ctypes.CDLL(str(ROOT / "build" / "stubs" / name), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(ROOT / "manual_ops" / "_C_cuda.so"))

missing = [
    name for name in kernel.KERNELS if not torch._C._dispatch_has_kernel_for_dispatch_key(f"manual_ops::{name}", "CUDA")
]
print(f"manual_ops._C_cuda: {len(kernel.KERNELS) - len(missing)} of {len(kernel.KERNELS)} kernels")
if missing:
    raise SystemExit(f"no CUDA kernel for {', '.join(missing)}")
