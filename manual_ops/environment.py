"""What a measurement depends on: versions, processor, threads, and which kernels are there."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from manual_ops import kernel


@dataclass(frozen=True)
class Environment:
    """What `manual-ops info` prints.

    Attributes:
        native_kernels, cuda_kernels, kernels: how many operators have a C++ and a CUDA version, of how many.
        native_problem: why the C++ library is not loaded and what to do; None when it is.
        cpu_isa: the instruction set that our C++ kernels run on; None without them.
        torch_cpu: the instruction set that torch's own kernels run on.
        cuda_problem: why our CUDA kernels are not used; None when they are.
    """

    manual_ops: str
    torch: str
    python: str
    system: str
    processor: str
    cores: int
    threads: int
    backends: tuple[str, ...]
    native_kernels: int
    cuda_kernels: int
    kernels: int
    native_problem: str | None
    cpu_isa: str | None
    torch_cpu: str
    torch_cuda: str | None
    cuda_device: str | None
    cuda_problem: str | None

    def lines(self) -> list[tuple[str, str]]:
        """(what, value) for people to read."""
        native = f"C++ for {self.native_kernels} of {self.kernels} kernels, running on {self.cpu_isa}"
        if self.torch_cuda is None:
            cuda = "none, built for the CPU"
        else:
            cuda = f"{self.torch_cuda}, {self.cuda_device or 'no usable GPU'}"
        return [
            ("manual_ops", self.manual_ops),
            ("torch", f"{self.torch}, its CPU kernels on {self.torch_cpu}"),
            ("Python", self.python),
            ("system", self.system),
            ("processor", f"{self.processor}, {self.cores} cores"),
            ("threads", f"{self.threads} (torch.get_num_threads())"),
            ("backends", ", ".join(self.backends)),
            ("native kernels", native if self.native_problem is None else f"not loaded: {self.native_problem}"),
            ("CUDA of torch", cuda),
            ("CUDA kernels", self.cuda_problem or f"for {self.cuda_kernels} of {self.kernels} kernels"),
        ]


def environment() -> Environment:
    """The environment of this process, read now."""
    native = kernel.native_library_loaded()
    has_native = torch._C._dispatch_has_kernel_for_dispatch_key
    return Environment(
        manual_ops=_version(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        backends=available_backends(),
        native_kernels=sum(has_native(f"manual_ops::{name}", "CPU") for name in kernel.KERNELS),
        cuda_kernels=sum(has_native(f"manual_ops::{name}", "CUDA") for name in kernel.KERNELS),
        kernels=len(kernel.KERNELS),
        native_problem=kernel.native_library_problem(),
        cpu_isa=str(torch.ops.manual_ops.cpu_isa()) if native and hasattr(torch.ops.manual_ops, "cpu_isa") else None,
        torch_cpu=torch.backends.cpu.get_cpu_capability(),
        torch_cuda=torch.version.cuda,
        cuda_device=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cuda_problem=_cuda_problem(),
    )


def available_backends() -> tuple[str, ...]:
    """The backends that can run here, the default first."""
    return ("native", "python") if kernel.native_library_loaded() else ("python",)


def _version() -> str:
    try:
        return importlib.metadata.version("manual_ops")
    except importlib.metadata.PackageNotFoundError:
        return "not installed (imported from a source tree)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _cuda_problem() -> str | None:
    problem = kernel.cuda_library_problem()
    if problem is not None:
        return f"not loaded: {problem}; on a GPU the Python kernels run"
    return None if torch.cuda.is_available() else "loaded, but torch finds no usable GPU"
