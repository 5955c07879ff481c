"""Convolutions with few channels a group."""

import torch

from . import Call, Random


def _out(size, kernel, stride, padding, dilation):
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def _calls(batch, channels, size, weight, stride, padding, dilation, groups, layout="contiguous", bias=True):
    """Forward, input gradient and weight gradient of one convolution; `weight` is (out channels, *window)."""
    out_channels, *window = weight
    output = _out(size, window, stride, padding, dilation)
    options = ([*stride], [*padding], [*dilation], groups)
    x, g = Random((batch, channels, *size), layout), Random((batch, out_channels, *output), layout)
    w = Random((out_channels, channels // groups, *window))
    return [
        Call("conv_forward", (x, w, Random((out_channels,)) if bias else None, output, *options)),
        Call("conv_input_grad", (g, w, Random((channels,)) if bias else None, [*size], *options)),
        Call("conv_weight_grad", (g, x, window, *options)),
    ]


SAME = {3: (1, 1), 5: (2, 2), 7: (3, 3)}
ONE, TWO = (1, 1), (2, 2)

CALLS = [
    # A window of its own for each kernel; sizes that end within a tile, and that fill tiles.
    *(
        call
        for k, padding in SAME.items()
        for size, stride in [((9, 11), ONE), ((14, 4), ONE), ((15, 10), TWO), ((8, 9), TWO)]
        for call in _calls(1, 2, size, (2, k, k), stride, padding, ONE, 2)
    ),
    *_calls(2, 3, (8, 9), (3, 3, 3), TWO, (0, 0), ONE, 3, "offset", bias=False),
    *_calls(1, 3, (8, 9), (3, 5, 5), TWO, (1, 3), ONE, 3),
    *_calls(1, 3, (9, 9), (3, 3, 3), TWO, (1, 0), ONE, 3),
    *_calls(1, 3, (40, 17), (3, 3, 3), ONE, (2, 4), (2, 4), 3),
    *_calls(1, 2, (20, 23), (2, 5, 5), ONE, (1, 6), (1, 3), 2),
    *_calls(1, 2, (23, 12), (2, 7, 7), ONE, (6, 0), (2, 1), 2),
    *_calls(1, 2, (9, 8), (4, 3, 3), ONE, ONE, ONE, 2),
    *_calls(33, 3, (9, 8), (6, 3, 3), TWO, ONE, ONE, 3),
    *(
        call
        for k, padding in SAME.items()
        for size, stride in [((9, 11), ONE), ((3, 14), ONE), ((15, 10), TWO), ((8, 9), TWO)]
        for call in _calls(1, 8, size, (8, k, k), stride, padding, ONE, 8, "channels_last")
    ),
    *_calls(1, 132, (2, 5), (132, 3, 3), ONE, ONE, ONE, 132, "channels_last"),
    *_calls(2, 4, (8, 9), (4, 3, 3), TWO, (0, 0), ONE, 4, "channels_last", bias=False),
    *_calls(2, 3, (8, 9), (3, 3, 3), TWO, ONE, ONE, 3, "channels_last"),
    *_calls(1, 4, (40, 17), (4, 3, 3), ONE, (2, 4), (2, 4), 4, "channels_last"),
    *_calls(1, 4, (19, 22), (8, 5, 5), ONE, TWO, ONE, 4, "channels_last"),
    # Several channels a group.
    *(
        call
        for layout in ("contiguous", "channels_last")
        for call in [
            *_calls(2, 12, (7, 9), (12, 3, 3), ONE, ONE, ONE, 3, layout),
            *_calls(1, 8, (5, 4), (24, 3, 3), TWO, ONE, ONE, 2, layout, bias=False),
            *_calls(1, 12, (5, 4), (6, 2, 5), ONE, (1, 2), ONE, 3, layout),
            *_calls(2, 6, (7, 5), (9, 1, 1), ONE, (0, 0), ONE, 3, layout),
        ]
    ),
    *_calls(0, 2, (5, 4), (2, 3, 3), ONE, ONE, ONE, 2),
    # More weights than the shared memory holds.
    Call(
        "conv_forward",
        (Random((1, 60, 13, 13)), Random((4, 30, 13, 13)), None, [1, 1], [1, 1], [0, 0], [1, 1], 2),
        tolerance={torch.float32: 1e-3},
        why="sums of 5070 terms",
    ),
    # Windows, strides and dilations of the kernels for any.
    *_calls(1, 6, (9, 8), (12, 3, 2), (2, 3), (1, 0), (3, 2), 3, "channels_last"),
    *_calls(1, 4, (9, 8), (4, 3, 9), (4, 6), (5, 14), (2, 4), 2),
    *_calls(1, 2, (5, 6, 7), (2, 2, 3, 2), (2, 1, 2), (1, 0, 1), (1, 2, 1), 2),
    *_calls(2, 34, (5,), (34, 4), (1,), (3,), (1,), 34),
]
