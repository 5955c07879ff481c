"""Checks every operation of the registry against torch's autograd and against finite differences.

For each operation, backend and dtype, on each of the operation's samples:

  * the value, every gradient and every tensor that the call changes (running statistics) are compared with those of
    torch's own function, run in float64 on the same numbers. The error of one tensor is

        max |ours - theirs| / max(1, max |theirs|)

    and a row reports the largest one. It may not exceed LIMITS: in float64 that is a wrong formula, in the smaller
    dtypes the limit leaves room for their rounding.
  * in float64, torch's gradcheck and gradgradcheck compare the first and second derivatives with finite differences of
    our own function, so that an error which torch shared would be found as well.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from manual_ops import modes
from manual_ops.environment import available_backends
from manual_ops.registry import OPERATIONS, Operation, Sample

# About 5000, 100, 4 and 4 units in the last place: the samples sum up to some hundred terms.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# With more inputs than this a finite difference for each one takes seconds; there gradcheck's fast mode compares a
# random projection of the Jacobian instead of every entry.
EXACT_UP_TO = 200

PASSED, FAILED, NOT_RUN = "passed", "failed", "-"


@dataclass(frozen=True)
class Row:
    """One operation on one backend in one dtype.

    Attributes:
        samples: how many samples ran.
        error: the largest scaled error over all samples.
        limit: what it may be.
        gradcheck, gradgradcheck: "passed", "failed", or "-" where they do not run (dtypes other than float64).
        problem: the first thing that went wrong, None if nothing did.
    """

    op: str
    family: str
    backend: str
    dtype: str
    samples: int
    error: float
    limit: float
    gradcheck: str
    gradgradcheck: str
    problem: str | None

    @property
    def passed(self) -> bool:
        return self.problem is None


@dataclass(frozen=True)
class Verification:
    """Attributes:
    rows: one for each operation, backend and dtype.
    problems: what is wrong with the registry itself (an operation without samples, a public name without a row).
    seconds: how long it took.
    """

    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.rows) and not self.problems and all(row.passed for row in self.rows)


def verify(
    ops: Iterable[str] | None = None,
    *,
    backends: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float64, torch.float32),
    device: str = "cpu",
    operations: Mapping[str, Operation] = OPERATIONS,
    public_names: Iterable[str] | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Verification:
    """Verify operations of the registry.

    Args:
        ops: names of the operations; all of them by default.
        backends: "native", "python"; by default those that are there.
        dtypes: of the inputs.
        device: where the operations run.
        operations: the registry.
        public_names: names that must be in the registry; by default all of `manual_ops.functional`, when all
            operations are verified.
        on_row: called with every row as soon as it is known.

    Returns:
        The rows, and what is wrong with the registry.

    Raises:
        KeyError: for an operation that is not in the registry.
        RuntimeError: for the native backend where it is not built.
    """
    began = time.perf_counter()
    if public_names is None:
        public_names = _public_names() if ops is None else ()
    problems = [f"{name} has no row in the registry" for name in sorted(set(public_names) - set(operations))]
    chosen = [operations[name] for name in (operations if ops is None else ops)]
    dtypes = tuple(dtypes)
    rows = []
    for backend in available_backends() if backends is None else tuple(backends):
        for operation in chosen:
            samples = operation.samples()
            if not samples:
                problems.append(f"{operation.name} has no samples")
                continue
            for dtype in dtypes:
                with modes.backend(backend):  # type: ignore[arg-type]
                    rows.append(_verify_row(operation, samples, backend, dtype, device))
                on_row(rows[-1])
    return Verification(tuple(rows), tuple(dict.fromkeys(problems)), time.perf_counter() - began)


def _public_names() -> Iterable[str]:
    from manual_ops import functional

    return functional.__all__


def _verify_row(operation: Operation, samples: list[Sample], backend: str, dtype: torch.dtype, device: str) -> Row:
    limit, error, problem = LIMITS[dtype], 0.0, None
    checks = {"gradcheck": NOT_RUN, "gradgradcheck": NOT_RUN}
    for sample in samples:
        moved = sample.to(dtype, device)
        try:
            sample_error = largest_error(operation, moved)
        except Exception as raised:
            error, problem = float("inf"), problem or _told(sample, raised)
            continue
        error = max(error, sample_error)
        if not sample_error <= limit:
            problem = problem or f"{sample.label}: error {sample_error:.1e}, the limit is {limit:.0e}"
        if dtype == torch.float64:
            for name, check in _GRADCHECKS.items():
                try:
                    ran = check(operation.function, moved)
                except Exception as raised:
                    checks[name], problem = FAILED, problem or _told(sample, raised, name)
                else:
                    if ran and checks[name] != FAILED:
                        checks[name] = PASSED
    return Row(
        op=operation.name,
        family=operation.family,
        backend=backend,
        dtype=str(dtype).removeprefix("torch."),
        samples=len(samples),
        error=error,
        limit=limit,
        problem=problem,
        **checks,
    )


def _told(sample: Sample, raised: Exception, during: str = "") -> str:
    first_line = (str(raised).strip().splitlines() or [""])[0]
    return f"{sample.label}: {during + ': ' if during else ''}{type(raised).__name__}: {first_line}"


def largest_error(operation: Operation, sample: Sample) -> float:
    """The largest scaled error of the operation's value, gradients and changed arguments on one sample."""
    ours = _run(operation.function, sample)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about the speed of a convolution
        theirs = _run(operation.reference, sample.to(torch.float64))
    if len(ours) != len(theirs):
        raise ValueError(f"{operation.name} returns {len(ours)} tensors and gradients, torch {len(theirs)}")
    return max((scaled_error(mine, exact) for mine, exact in zip(ours, theirs, strict=True)), default=0.0)


def scaled_error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max(1, max |theirs|); infinite where shapes, or places of NaN and infinity, differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    finite = theirs.isfinite()
    elsewhere_equal = torch.allclose(ours[~finite], theirs[~finite], equal_nan=True)
    ours, theirs = ours[finite], theirs[finite]
    if not (elsewhere_equal and ours.isfinite().all()):
        return float("inf")
    if not theirs.numel():
        return 0.0
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()


def _run(function: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """Outputs, then gradients, then the arguments as the call leaves them."""
    args, kwargs = _fresh((sample.args, sample.kwargs))
    arguments = _tensors((args, kwargs))
    outputs = _tensors(function(*args, **kwargs))
    inputs = [argument for argument in arguments if argument.requires_grad]
    differentiable = [output for output in outputs if output.requires_grad]
    gradients: list[Tensor] = []
    if inputs and differentiable:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in differentiable]
        # Both sides must see the numbers that the smaller dtype can hold.
        cotangents = [_rounded(cotangent).to(out) for cotangent, out in zip(cotangents, differentiable, strict=True)]
        found = torch.autograd.grad(differentiable, inputs, cotangents, allow_unused=True)
        gradients = [
            torch.zeros_like(input) if gradient is None else gradient
            for input, gradient in zip(inputs, found, strict=True)
        ]
    return [*outputs, *gradients, *arguments]


def _rounded(cotangent: Tensor) -> Tensor:
    """To eighths in -4 .. 4, which every dtype holds exactly."""
    return cotangent.mul(8).round().div(8).clamp(-4, 4)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _fresh(tree: Any) -> Any:
    """The same arguments as leaves; those that a function may write into (running statistics) as copies."""

    def leaf_of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_() if value.requires_grad else value.clone()

    return tree_map(leaf_of, tree)


def _gradcheck(function: Callable[..., Any], sample: Sample) -> bool:
    return _check(torch.autograd.gradcheck, function, sample)


def _gradgradcheck(function: Callable[..., Any], sample: Sample) -> bool:
    return _check(torch.autograd.gradgradcheck, function, sample)


_GRADCHECKS = {"gradcheck": _gradcheck, "gradgradcheck": _gradgradcheck}


def _check(check: Callable[..., bool], function: Callable[..., Any], sample: Sample) -> bool:
    """Run one of torch's checks; False where the sample has nothing to differentiate."""
    leaves = _tensors((sample.args, sample.kwargs))
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves if leaf.requires_grad]
    if not inputs or not any(input.numel() for input in inputs):
        return False

    def of_inputs(*differentiated: Tensor) -> Any:
        moving = iter(differentiated)

        def place(leaf: Any) -> Any:
            return next(moving) if isinstance(leaf, Tensor) and leaf.requires_grad else _fresh(leaf)

        args, kwargs = tree_map(place, (sample.args, sample.kwargs))
        outputs = function(*args, **kwargs)
        return outputs if isinstance(outputs, Tensor) else tuple(_tensors(outputs))

    exact = sum(input.numel() for input in inputs) <= EXACT_UP_TO
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # thousands of calls on tiny tensors: waking a second thread costs more than it does
    try:
        return check(of_inputs, inputs, fast_mode=not exact)
    finally:
        torch.set_num_threads(threads)
