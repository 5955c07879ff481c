from . import Call, Random
from .max_pool import ADAPTIVE, SHARED_OUT, SLIDING, WHOLE, _layouts, _output_size

# Without dilation; and (count_include_pad, divisor_override), two in turn where they matter.
WINDOWS = [(shape, *window, ceil_mode) for shape, *window, dilation, ceil_mode in SLIDING if max(dilation) == 1]
DIVISORS = [(True, 0), (False, 0), (False, -3), (True, 0)]
CHANNELS_LAST = {"contiguous": False, "channels_last": True}


def _both(shape, output_size, window, divisor, layout):
    options = (*window, *divisor, CHANNELS_LAST[layout])
    yield Call("average_pool", (Random(shape, layout), output_size, *options))
    yield Call("average_spread", (Random((*shape[:2], *output_size), layout), list(shape[2:]), *options))


def _calls():
    for which, (shape, *window, ceil_mode) in enumerate(WINDOWS):
        output_size = _output_size(shape[2:], *window, [1] * len(window[0]), ceil_mode)
        turn = which % 2 * 2
        for divisor in DIVISORS[turn : turn + (2 if max(window[2]) > 0 or ceil_mode else 1)]:
            for layout in _layouts(shape):
                yield from _both(shape, output_size, window, divisor, layout)
    for shape, output_size in ADAPTIVE + WHOLE:
        for layout in _layouts(shape):
            yield from _both(shape, output_size, ([], [], []), (False, 0), layout)
    for layout, shape, output_size in [*SHARED_OUT, ("contiguous", (1, 2, 256, 132), [1, 1])]:
        whole = ([], [], [], False, 0, CHANNELS_LAST[layout])
        yield Call("average_pool", (Random(shape, layout, positive=True), output_size, *whole))
    window, whole = ([3, 3], [2, 2], [1, 1], False, 0), ([], [], [], False, 0)
    for layout in ("stepped", "offset"):
        for channels_last in (False, True):
            yield Call("average_pool", (Random((2, 8, 8, 9), layout), [4, 5], *window, channels_last))
            yield Call("average_pool", (Random((2, 8, 8, 8), layout), [1, 1], *whole, channels_last))
            yield Call("average_spread", (Random((1, 8, 4, 5), layout), [8, 9], *window, channels_last))
            yield Call("average_spread", (Random((2, 8, 1, 1), layout), [5, 5], *whole, channels_last))
    yield from _both((0, 3, 6, 6), [3, 3], ([2, 2], [2, 2], [0, 0]), (True, 0), "contiguous")
    yield from _both((2, 0, 6, 6), [2, 2], ([], [], []), (False, 0), "contiguous")


CALLS = list(_calls())
