import math

import torch

from . import Call, Given, Random

INF, NAN = math.inf, math.nan


def _output_size(input_size, kernel_size, stride, padding, dilation, ceil_mode=False):
    sizes = []
    for size, kernel, step, pad, dil in zip(input_size, kernel_size, stride, padding, dilation, strict=True):
        room = size + 2 * pad - dil * (kernel - 1) - 1
        count = (room + (step - 1 if ceil_mode else 0)) // step + 1
        sizes.append(count - 1 if ceil_mode and (count - 1) * step >= size + pad else count)
    return sizes


# (shape, kernel_size, stride, padding, dilation, ceil_mode)
SLIDING = [
    # The windows with kernels of their own, at sizes around their strips and blocks, with whole and cut last blocks.
    ((2, 3, 9, 7), [2, 2], [2, 2], [0, 0], [1, 1], False),
    ((1, 4, 18, 8), [2, 2], [2, 2], [0, 0], [1, 1], False),
    ((2, 4, 9, 7), [2, 2], [2, 2], [1, 1], [1, 1], False),
    ((2, 12, 7, 11), [3, 3], [2, 2], [1, 1], [1, 1], False),
    ((1, 2, 19, 6), [3, 3], [2, 2], [1, 1], [1, 1], False),
    ((2, 4, 7, 8), [3, 3], [2, 2], [0, 0], [1, 1], True),
    ((2, 4, 6, 5), [3, 3], [1, 1], [1, 1], [1, 1], False),
    ((1, 3, 5, 9), [3, 3], [1, 1], [0, 0], [1, 1], False),
    # Any window.
    ((2, 8, 6, 7), [3, 2], [2, 3], [1, 0], [1, 1], True),
    ((1, 8, 14, 15), [3, 2], [1, 1], [1, 1], [2, 4], False),
    ((1, 3, 13, 12), [3, 3], [2, 3], [1, 1], [3, 2], False),
    ((1, 2, 23), [4], [6], [2], [4], False),
    ((2, 3, 2), [2], [1], [1], [3], False),  # nothing but padding
    ((2, 3, 11), [3], [2], [1], [1], False),
    ((1, 2, 5, 6, 7), [2, 2, 2], [2, 2, 2], [0, 0, 0], [1, 1, 1], False),
    ((1, 8, 6, 5, 4), [3, 2, 1], [2, 1, 3], [1, 1, 0], [1, 2, 1], True),
    ((2, 2, 3, 7, 6), [1, 3, 3], [1, 2, 2], [0, 1, 1], [1, 1, 1], False),
    # Large windows, of more than 256 taps in two of them.
    ((1, 3, 20, 21), [17, 17], [2, 1], [8, 8], [1, 1], False),
    ((1, 8, 9, 12), [8, 9], [1, 3], [0, 4], [1, 1], False),
    ((1, 1, 300), [290], [5], [3], [1], False),
    ((1, 2, 40, 6), [7, 6], [11, 6], [3, 0], [1, 1], False),
    ((2, 2, 40, 16), [5, 8], [5, 8], [0, 0], [1, 1], False),
]
ADAPTIVE = [
    ((2, 3, 10), [4]),
    ((1, 2, 3), [7]),
    ((2, 8, 9, 8), [3, 5]),
    ((1, 3, 40, 37), [2, 3]),
    ((1, 8, 21, 16), [2, 1]),
    ((1, 4, 7, 5), [7, 5]),
    ((1, 2, 6, 5, 8), [2, 3, 5]),
]
WHOLE = [((3, 5, 7, 7), [1, 1]), ((3, 8, 12, 6), [1, 1]), ((2, 2, 3, 4, 5), [1, 1, 1]), ((9, 4, 11), [1])]
# Few planes of so many pixels that several blocks share one.
SHARED_OUT = [("contiguous", (1, 1, 91, 91), [1, 1])]
SHARED_OUT += [("channels_last", (1, 128, 24, 22), [1, 1]), ("channels_last", (1, 128, 47, 25), [2, 1])]
SPECIAL = [
    torch.tensor([[NAN, 1, 2, NAN], [1, 1, NAN, 0], [2, 0, -0.0, 0], [2, 2, 0, -1]]).reshape(1, 1, 4, 4),
    torch.full((1, 8, 4, 4), -INF),
    torch.tensor([-INF, INF, 1.0, INF]).repeat(24).reshape(1, 4, 6, 4),
    torch.tensor([0.0, NAN, -INF, 1.0, NAN, 1.0]).repeat(48).reshape(1, 8, 6, 6),
]
WINDOWS_OF_SPECIAL = [
    ([3, 3], [1, 1], [1, 1], [1, 1]),
    ([2, 2], [1, 2], [1, 0], [2, 1]),
    ([4, 4], [4, 4], [0, 0], [1, 1]),
]


def _layouts(shape):
    return ["contiguous"] if len(shape) == 3 else ["contiguous", "channels_last"]


def _winner(shape, output_size, taps, layout):
    """Codes from one less to one more than there are."""
    count = math.prod(shape[:2]) * math.prod(output_size)
    dtype = torch.uint8 if taps <= 256 else torch.int32
    values = (torch.arange(count) * 7 % (taps + 2)).clamp(max=255 if taps <= 256 else taps + 2).to(dtype)
    return Given(values.reshape(*shape[:2], *output_size), layout)


def _all_three(shape, output_size, window, layout):
    channels_last = layout == "channels_last"
    taps = math.prod(window[0]) if window[0] else math.prod(map(_pieces, shape[2:], output_size))
    winner = _winner(shape, output_size, taps, layout)
    grad = Random((*shape[:2], *output_size), layout)
    yield Call("max_pool_forward", (Random(shape, layout), output_size, *window, channels_last))
    yield Call("max_pool_scatter", (grad, winner, list(shape[2:]), *window, channels_last))
    yield Call("max_pool_pick", (Random(shape, layout), winner, *window, channels_last))


def _pieces(size, outputs):
    return size // outputs if size % outputs == 0 else (size + 2 * outputs - 2) // outputs


def _calls():
    for shape, *window, ceil_mode in SLIDING:
        output_size = _output_size(shape[2:], *window, ceil_mode)
        for layout in _layouts(shape):
            yield from _all_three(shape, output_size, window, layout)
    for shape, output_size in ADAPTIVE + WHOLE:
        for layout in _layouts(shape):
            yield from _all_three(shape, output_size, [[]] * 4, layout)
    for layout, shape, output_size in SHARED_OUT:
        yield Call("max_pool_forward", (Random(shape, layout), output_size, *[[]] * 4, layout == "channels_last"))
    for values in SPECIAL:
        for window in WINDOWS_OF_SPECIAL:
            output_size = _output_size(values.shape[2:], *window)
            for layout in _layouts(values.shape):
                yield Call("max_pool_forward", (Given(values, layout), output_size, *window, layout == "channels_last"))
    # Operands that are neither, or that no access of 16 bytes may read.
    window, whole = ([3, 3], [2, 2], [1, 1], [1, 1]), [[]] * 4
    for layout in ("stepped", "offset"):
        for channels_last in (False, True):
            yield Call("max_pool_forward", (Random((2, 8, 8, 9), layout), [4, 5], *window, channels_last))
            yield Call("max_pool_forward", (Random((2, 8, 8, 8), layout), [1, 1], *whole, channels_last))
            winner = Given((torch.arange(160) % 9).to(torch.uint8).reshape(1, 8, 4, 5), layout)
            yield Call("max_pool_scatter", (Random((1, 8, 4, 5), layout), winner, [8, 9], *window, channels_last))
            yield Call("max_pool_pick", (Random((1, 8, 8, 9), layout), winner, *window, channels_last))
    # Bytes would do, but the winners are wider: as any kernel is called, not as the forward leaves them.
    wide = Given((torch.arange(40) % 9).to(torch.int32).reshape(1, 2, 4, 5))
    yield Call("max_pool_scatter", (Random((1, 2, 4, 5)), wide, [8, 9], *window, False))
    yield from _all_three((0, 3, 6, 6), [3, 3], window, "contiguous")
    yield from _all_three((2, 0, 6, 6), [2, 2], [[]] * 4, "contiguous")


CALLS = list(_calls())
