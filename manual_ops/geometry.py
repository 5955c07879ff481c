"""Argument normalisation, output sizes and window tables: the arithmetic that the 1d, 2d and 3d faces share.

Along one axis, output o of a window operation reads the inputs

    o*stride - padding + tap*dilation        tap = 0 .. kernel_size-1

that lie inside 0 .. input_size-1. Adaptive pooling is the same with windows that cut the input into output_size pieces:
start = floor(o * input_size / output_size), end = ceil((o+1) * input_size / output_size).
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch


def whole(op: str, argument: str, value: Any) -> int:
    """An int, from what counts as one: NumPy's integers and integer tensors of one element too, but no bool.

    Raises:
        TypeError: for anything else, a float or a bool among them.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{op}: {argument} must be an int, got {value!r}")


def real(op: str, argument: str, value: Any) -> float:
    """A float, from what counts as one: bools, NumPy's numbers and tensors of no dimension too.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value  # type: ignore[return-value]
    if hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0:
        return float(value)
    raise TypeError(f"{op}: {argument} must be a number, got {value!r}")


def per_axis(op: str, argument: str, value: Any, axes: int) -> list[int]:
    """An int, or a tuple or list with one int an axis (or a single one for all of them), as a list of `axes` ints.

    As in torch a bool passes for an int behind the first place.

    Raises:
        TypeError: for anything else, a float among them.
        RuntimeError: for another number of ints.
    """
    if type(value) is int:  # as a rule
        return [value] * axes
    if not isinstance(value, (tuple, list)):
        return [whole(op, argument, value)] * axes
    entries = [
        whole(op, argument, int(entry) if place and isinstance(entry, bool) else entry)
        for place, entry in enumerate(value)
    ]
    if len(entries) == 1:
        return entries * axes
    if len(entries) != axes:
        raise RuntimeError(f"{op}: {argument} must be an int or a sequence of {axes} ints, got {value!r}")
    return entries


class NotATensor(TypeError, AttributeError):
    """What torch raises for an argument that is no tensor: the one or the other, where it calls a method of it first.

    To be both is to be caught by whatever code expects of torch.
    """


def check_tensor(op: str, argument: str, value: Any) -> None:
    """Raises a TypeError, which is an AttributeError too, unless `value` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise NotATensor(f"{op}: {argument} must be a Tensor, got {type(value).__name__}")


def check_alike(op: str, argument: str, value: torch.Tensor, input: torch.Tensor, *attributes: str) -> None:
    """Raises RuntimeError unless `value` has these attributes (shape, dtype, device) of the input."""
    for attribute in attributes:
        wanted, found = getattr(input, attribute), getattr(value, attribute)
        if found != wanted:
            raise RuntimeError(f"{op}: {argument} must have the {attribute} of input, {wanted}, got {found}")


def check_floating(op: str, argument: str, value: torch.Tensor) -> None:
    """Raises NotImplementedError unless `value` has one of the four floating dtypes that the kernels compute in."""
    if value.dtype not in FLOATING_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING_DTYPES)
        raise NotImplementedError(f"{op}: {argument} must be one of {names}, got {value.dtype}")


FLOATING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit dtypes, the dtype itself otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that its sums are formed in."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def channels_last_format(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format that an output has whose input is `tensor`: channels_last if that is its suggestion."""
    if tensor.dim() == 4 and _is_channels_last(tensor, torch.channels_last):
        return torch.channels_last
    if tensor.dim() == 5 and _is_channels_last(tensor, torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _is_channels_last(tensor: torch.Tensor, memory_format: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=memory_format) and not tensor.is_contiguous()


def window_output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """How many windows fit, an axis each: floor((input + 2*padding - dilation*(kernel-1) - 1) / stride) + 1.

    The result is zero or less where the window is larger than the padded input.
    """
    return [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(input_size, kernel_size, stride, padding, dilation, strict=True)
    ]


# Pooling. `window` is (kernel_size, stride, padding, dilation), four lists with one int an axis each; all four are
# empty for adaptive pooling, whose windows follow from the sizes of input and output.

Window = tuple[list[int], list[int], list[int], list[int]]
ADAPTIVE: Window = ([], [], [], [])


def check_pool_dimensions(op: str, axes: int, input: torch.Tensor) -> None:
    """Raises unless `input` is (N, C, *I) or (C, *I)."""
    if input.dim() not in (axes + 1, axes + 2):
        # torch's avg_pool2d looks at the third dimension from the end before it looks at their number.
        error = IndexError if op == "avg_pool2d" and input.dim() < 3 else RuntimeError
        raise error(
            f"{op}: input must have {axes + 2} dimensions, or {axes + 1} unbatched, got the shape {tuple(input.shape)}"
        )


def check_pool_input(op: str, axes: int, input: torch.Tensor) -> None:
    """Raises unless `input` is (N, C, *I) or (C, *I) with no empty dimension but the batch."""
    check_pool_dimensions(op, axes, input)
    # An unbatched input has no batch to be empty, but torch's adaptive pools let its channels be; two let them always.
    first = 1 if op.startswith("adaptive") else -axes - 1
    if op in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
        first = -axes
    if 0 in input.shape[first:]:
        raise RuntimeError(
            f"{op}: input must have no empty dimension but the batch, got the shape {tuple(input.shape)}"
        )


def pool_window(
    op: str, axes: int, input: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> Window:
    """The normalised window; a stride of None or () is the kernel_size. Checks the input too, between types and values.

    Raises:
        TypeError: for values that are not ints.
        RuntimeError: for the wrong number of ints, and for ints out of range.
    """
    kernel_size = per_axis(op, "kernel_size", kernel_size, axes)
    empty = stride is None or (isinstance(stride, (tuple, list)) and len(stride) == 0)
    stride = list(kernel_size) if empty else per_axis(op, "stride", stride, axes)
    padding = per_axis(op, "padding", padding, axes)
    dilation = per_axis(op, "dilation", dilation, axes)
    check_pool_input(op, axes, input)
    for name, values, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(values) < least:
            raise RuntimeError(f"{op}: {name} must be at least {least}, got {values}")
    if max(padding) > 0 and any(pad > size // 2 for pad, size in zip(padding, kernel_size, strict=True)):
        raise RuntimeError(f"{op}: padding must be at most half of kernel_size={kernel_size}, got {padding}")
    return kernel_size, stride, padding, dilation


def pool_output_size(op: str, input_size: Sequence[int], window: Window, ceil_mode: Any) -> list[int]:
    """How many windows fit, an axis each; with ceil_mode also those that start inside but end behind the padded input.

    Raises:
        TypeError: if ceil_mode is not a bool.
        RuntimeError: where no window fits.
    """
    check_bool(op, "ceil_mode", ceil_mode)
    kernel_size, _, padding, dilation = window
    output_size = []
    for size, kernel, step, pad, dil in zip(input_size, *window, strict=True):
        room = size + 2 * pad - dil * (kernel - 1) - 1
        count = (room + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (count - 1) * step >= size + pad:
            count -= 1
        output_size.append(count)
    if min(output_size) < 1:
        raise RuntimeError(
            f"{op}: the window (kernel_size={kernel_size}, dilation={dilation}) is larger than the padded input "
            f"(size={list(input_size)}, padding={padding})"
        )
    return output_size


def _has_entries(size: Any) -> bool:
    """Whether `size` is a sequence, an array or a tensor of some dimension."""
    if isinstance(size, (int, torch.SymInt)):  # torch.compile has no hasattr for its symbolic ints
        return False
    return hasattr(size, "__len__") and bool(getattr(size, "ndim", True))


def adaptive_output_size(op: str, axes: int, input: torch.Tensor, output_size: Any) -> list[int]:
    """`output_size` as a list with one int an axis, None replaced by the input's size where there are several axes.

    Raises:
        ValueError: for several sizes and an input that has no more dimensions than that.
        TypeError: for values that are not ints.
        RuntimeError: for the wrong number of ints, and for negative ones.
    """
    if axes > 1 and _has_entries(output_size):
        if input.dim() <= len(output_size):
            raise ValueError(
                f"{op}: input must have more dimensions than output_size={output_size!r} has entries, got the shape "
                f"{tuple(input.shape)}"
            )
        output_size = list(output_size)  # an array, a tensor or a range too, where None may stand for a size
    listed = isinstance(output_size, (tuple, list))
    if axes > 1 and not listed and not isinstance(output_size, (int, torch.SymInt)):
        raise TypeError(f"{op}: output_size must be an int or a sequence of {axes} ints, got {output_size!r}")
    if listed and axes > 1:
        pairs = zip(input.shape[-axes:], output_size, strict=False)
        output_size = [size if out is None else out for size, out in pairs] + list(output_size[axes:])
    sizes = per_axis(op, "output_size", output_size, axes)
    if listed and len(output_size) != axes:
        raise RuntimeError(f"{op}: output_size must be an int or a sequence of {axes} ints, got {output_size!r}")
    if min(sizes) < 0:
        raise RuntimeError(f"{op}: output_size must be at least 0, got {output_size!r}")
    return sizes


def check_bool(op: str, argument: str, value: Any) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {argument} must be a bool, got {value!r}")


def prefers_channels_last(tensor: torch.Tensor) -> bool:
    """Whether the strides of a (N, C, *I) tensor grow from the channels over the last axis to the batch.

    Strides alone decide, so that (N, C, 1, 1) has an answer, and so that it can be asked under vmap.
    """
    if tensor.is_contiguous() or tensor.dim() not in (4, 5):
        return False
    least = 0
    strides, shape = tensor.stride(), tensor.shape
    for dim in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if shape[dim] == 0 or strides[dim] < least or (dim == 0 and strides[dim] == strides[1]):
            return False
        least = strides[dim] * max(1, shape[dim])
    return True


def window_of_image(window: Sequence[list[int]]) -> tuple[list[int], ...]:
    """The window of a signal (kernel_size, stride, padding, dilation), as that of an image of height 1."""
    neutral = (1, 1, 0, 1)
    return tuple([first, *values] if values else [] for first, values in zip(neutral, window, strict=False))


def empty_like_format(
    like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> torch.Tensor:
    """What a pooling kernel returns: a new tensor, channels_last or contiguous."""
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


def window_taps(input_size: Sequence[int], output_size: Sequence[int], kernel_size: Sequence[int]) -> list[int]:
    """Taps of the largest window, an axis each; for adaptive windows a bound, exact where the sizes divide."""
    if kernel_size:
        return list(kernel_size)
    sizes = ((size, max(1, out)) for size, out in zip(input_size, output_size, strict=True))
    return [size // out if size % out == 0 else (size + 2 * out - 2) // out for size, out in sizes]


def window_positions(
    input_size: Sequence[int], output_size: Sequence[int], window: Window
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Where the taps of every window lie, an axis each: `positions` (O, T), and `inside`, which of them are real."""
    kernel_size, stride, padding, dilation = window
    tables = []
    for axis, taps in enumerate(window_taps(input_size, output_size, kernel_size)):
        size, outputs = input_size[axis], torch.arange(output_size[axis])
        if kernel_size:
            start, step = outputs * stride[axis] - padding[axis], dilation[axis]
            end = torch.full_like(start, size)
        else:
            count, step = max(1, output_size[axis]), 1
            start, end = outputs * size // count, ((outputs + 1) * size + count - 1) // count
        positions = start[:, None] + torch.arange(taps) * step
        tables.append((positions, (positions >= 0) & (positions < end[:, None])))
    return tables


def covering_windows(
    positions: torch.Tensor, inside: torch.Tensor, input_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """An axis of `window_positions` from the input's side: (I, J) outputs and taps that meet input i, -1 for none."""
    outputs, taps = inside.nonzero(as_tuple=True)
    inputs, order = positions[outputs, taps].sort(stable=True)
    rank = torch.arange(len(inputs)) - torch.searchsorted(inputs, inputs)
    most = int(rank.max()) + 1 if len(inputs) else 0
    table = torch.full((2, input_size, most), -1)
    table[:, inputs, rank] = torch.stack([outputs[order], taps[order]])
    return table[0], table[1]
