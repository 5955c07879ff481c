"""Autocast: which dtype each operation computes in inside `torch.autocast`.

Torch casts the operands of the operations on its lists, one set of lists a device, to

    lower      the dtype of the autocast block: products, which gain most and lose least
    float32    losses, and sums over long axes
    promote    the widest among the operands

and leaves all others alone. Here are the lists for manual_ops' operations. The cast stands in front of an operation's
Function, so that each gradient comes back in the dtype of its operand. A float64 operand, and one on a device without
autocast, stays as it is.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from manual_ops import recipes

Policy = Callable[[str, list[Tensor]], torch.dtype]


def _lower(device: str, operands: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(device)


def _float32(device: str, operands: list[Tensor]) -> torch.dtype:
    return torch.float32


def _promote(device: str, operands: list[Tensor]) -> torch.dtype:
    return torch.float32 if any(operand.dtype is torch.float32 for operand in operands) else operands[0].dtype


_EVERYWHERE: dict[str, Policy] = {
    **{f"conv{axes}d": _lower for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _lower for axes in (1, 2, 3)},
    "linear": _lower,
    "cross_entropy": _float32,
    "nll_loss": _float32,
    "mse_loss": _float32,
    "binary_cross_entropy_with_logits": _float32,
    "batch_norm_relu": _promote,  # ours alone: torch adds a residual with `+`, which promotes
}
_POOLS_3D = ("max_pool3d", "avg_pool3d", "adaptive_max_pool3d", "adaptive_avg_pool3d")
POLICIES: dict[str, dict[str, Policy]] = {
    "cpu": {**_EVERYWHERE, **dict.fromkeys(_POOLS_3D, _float32)},
    "cuda": {**_EVERYWHERE, "softmax": _float32, "log_softmax": _float32},
}


_any_autocast = torch._C._is_any_autocast_enabled  # a name for it: half of what `cast` costs outside autocast


def cast(op: str, *operands: Any) -> tuple[Any, ...]:
    """The operands, the input first, as `op` takes them here: themselves outside autocast."""
    if not _any_autocast() or not isinstance(operands[0], Tensor):
        return operands
    device = operands[0].device.type
    policy = POLICIES.get(device, {}).get(op.removesuffix("_with_indices"))
    if policy is None or not torch.is_autocast_enabled(device):
        return operands
    eligible = [operand for operand in operands if _is_eligible(operand, device)]
    if not eligible:
        return operands
    dtype = policy(device, eligible)
    return tuple(_in_dtype(operand, dtype) if _is_eligible(operand, device) else operand for operand in operands)


def _in_dtype(operand: Tensor, dtype: torch.dtype) -> Tensor:
    converted = operand.to(dtype)
    if converted is not operand and recipes.active():
        recipes.made(converted, functools.partial(Tensor.to, dtype=dtype), operand)
    return converted


def _is_eligible(operand: Any, device: str) -> bool:
    return (
        isinstance(operand, Tensor)
        and operand.is_floating_point()
        and operand.dtype is not torch.float64
        and operand.device.type == device
    )
