"""What the losses share: the `reduction` argument, in its three spellings."""

import warnings
from typing import Any


def reduction_argument(op: str, size_average: Any, reduce: Any, reduction: Any) -> str:
    """The reduction, with the two arguments that it replaced: reduce=False is "none", size_average=False "sum".

    Raises:
        ValueError: for anything but "none", "mean" and "sum".
    """
    if size_average is not None or reduce is not None:
        total = "mean" if size_average is None or size_average else "sum"
        reduction = total if reduce is None or reduce else "none"
        message = f"{op}: size_average and reduce are deprecated, use reduction={reduction!r} instead"
        warnings.warn(message, stacklevel=3)
    if reduction == "elementwise_mean":
        warnings.warn(f"{op}: reduction='elementwise_mean' is deprecated, use reduction='mean' instead", stacklevel=3)
        reduction = "mean"
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return reduction
