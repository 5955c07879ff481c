"""Convolutions with few channels a group."""

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


CALLS = [
    *_calls(2, 3, (7, 9), (3, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    *_calls(2, 8, (7, 9), (8, 3, 3), (2, 2), (1, 1), (1, 1), 8, "channels_last"),
    *_calls(1, 6, (9, 8), (12, 3, 2), (2, 3), (1, 0), (3, 2), 3, "channels_last"),
    *_calls(1, 6, (9, 8), (12, 3, 9), (4, 6), (5, 14), (2, 4), 3),
    *_calls(1, 2, (5, 6, 7), (2, 2, 3, 2), (2, 1, 2), (1, 0, 1), (1, 2, 1), 2),
    *_calls(2, 34, (5,), (34, 4), (1,), (3,), (1,), 34),
]
