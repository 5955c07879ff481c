"""The gradient of a bias.

    y[n, c, ...] = (...) + bias[c]
    dL/dbias[c]  = sum over n and every position of dL/dy[n, c, ...]      because dy[n, c, ...]/dbias[c] = 1 everywhere

The sum is linear in grad_output, and its own derivative repeats a channel's value over the positions.
"""

from typing import Any

from torch import Tensor

from manual_ops.autograd import ManualFunction
from manual_ops.geometry import accumulation_dtype
from manual_ops.kernel import fold, kernel, unfold


@kernel("channel_sum(Tensor input) -> Tensor", meta=lambda input: input.new_empty(input.shape[1:2]))
def channel_sum(input: Tensor) -> Tensor:
    others = [dim for dim in range(input.dim()) if dim != 1]
    return input.sum(others, dtype=accumulation_dtype(input.dtype)).to(input.dtype)  # (C,)


@channel_sum.batch_rule
def _(op: Any, batch_size: int, in_dims: Any, input: Tensor) -> tuple[Tensor, int]:
    return unfold(op(fold(input, in_dims[0], batch_size, 1)), batch_size), 0


class ChannelSum(ManualFunction):
    @staticmethod
    def forward(input: Tensor, backend: str) -> Tensor:
        return channel_sum(input, backend=backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        input, _ = inputs
        ctx.shape = input.shape

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Any:
        return per_channel(grad_output, len(ctx.shape)).expand(ctx.shape), None

    @staticmethod
    def tangent(inputs: Any, output: Tensor, tangents: Any) -> Tensor:
        _, backend = inputs
        return ChannelSum.call(tangents[0], backend)


def per_channel(vector: Tensor, dims: int) -> Tensor:
    """A (C,) tensor as (1, C, 1, ...), to meet one of `dims` dimensions."""
    return vector.reshape(1, vector.shape[0], *(1,) * (dims - 2))
