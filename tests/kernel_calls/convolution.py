"""Every tile and split of the dense kernels, each access to the operands, one to three axes."""

import torch

from manual_ops.geometry import window_output_size

from . import Call, Given, Random


def _window(axes, stride=1, padding=0, dilation=1):
    return [list(value) if isinstance(value, tuple) else [value] * axes for value in (stride, padding, dilation)]


# Relative to the largest output Winograd's errors are 2e-6 in float32, and the largest of these is about 50.
FAST = {"tolerance": {torch.float32: 1e-4}, "why": "errors at the points are those of the patch's largest value"}


def _calls(
    input, weight, groups=1, layout="contiguous", weight_layout="contiguous", bias=True, reach=0, fast=False, **window
):
    """The three passes of one convolution. `reach`: how many inputs the last window leaves out, for transposed ones."""
    stride, padding, dilation = _window(len(input) - 2, **window)
    size = list(input[2:])
    outputs = window_output_size([axis - reach for axis in size], weight[2:], stride, padding, dilation)
    output = (input[0], weight[0], *outputs)
    x, w, g = Random(input, layout), Random(weight, weight_layout), Random(output, layout)
    options = (stride, padding, dilation, groups, fast)
    tolerance = FAST if fast else {}
    return [
        Call("conv_forward", (x, w, Random(weight[:1]) if bias else None, outputs, *options), **tolerance),
        Call("conv_input_grad", (g, w, Random(input[1:2]) if bias else None, size, *options), **tolerance),
        Call("conv_weight_grad", (g, x, list(weight[2:]), *options), **tolerance),
    ]


INFINITE = torch.ones(1, 4, 3, 5)
INFINITE[0, 0, 0, 4] = float("inf")

CALLS = [
    *_calls((2, 3, 9), (4, 3, 3), stride=2, padding=1),
    *_calls((1, 4, 23), (6, 4, 4), stride=3, padding=2, dilation=2, bias=False),
    *_calls((2, 3, 8, 7), (5, 3, 3, 3), padding=1, layout="offset"),
    *_calls((2, 5, 9, 8), (6, 5, 1, 1), bias=False),
    *_calls((1, 4, 9, 12), (6, 4, 2, 2), stride=(4, 3), layout="stepped"),
    *_calls((1, 66, 5, 4), (6, 33, 2, 3), groups=2, padding=1),
    *_calls((2, 5, 7, 8), (10, 5, 3, 2), stride=(2, 3), padding=(1, 0), dilation=(1, 2)),
    *_calls((1, 2, 7, 9), (3, 2, 3, 3), dilation=(2, 4), stride=(4, 2), padding=4, layout="transposed"),
    *_calls((2, 3, 5, 6, 4), (4, 3, 3, 2, 3), stride=(2, 1, 1), padding=1),
    # channels_last: packs of channels, and channels that make none.
    *_calls((2, 16, 6, 5), (9, 16, 3, 3), padding=1, layout="channels_last", weight_layout="channels_last"),
    *_calls((1, 80, 7, 6), (4, 40, 3, 2), groups=2, stride=2, padding=1, layout="channels_last"),
    *_calls((2, 3, 6, 9), (8, 3, 3, 3), layout="channels_last", weight_layout="channels_last"),
    *_calls((1, 8, 3, 4, 5), (4, 8, 2, 2, 2), stride=2, layout="channels_last"),
    # A stride beyond the window, a window that leaves inputs out, a stride beyond the input.
    *_calls((1, 3, 11, 10), (2, 3, 2, 2), stride=4, reach=2),
    *_calls((1, 2, 5, 4), (3, 2, 2, 3), stride=(7, 9), padding=1),
    # Large tiles, with rows and columns left over.
    *_calls((1, 120, 15, 17), (60, 120, 1, 1)),
    *_calls((1, 120, 15, 17), (60, 120, 1, 1), layout="channels_last"),
    # Windows of one tap over planes: tiles of rows, pixels that fill no vector, groups, a line and a volume.
    *_calls((2, 20, 8, 8), (30, 20, 1, 1)),
    *_calls((1, 140, 14, 14), (17, 140, 1, 1)),
    *_calls((2, 22, 14, 14), (36, 11, 1, 1), groups=2, bias=False),
    *_calls((3, 9, 96), (10, 9, 1)),
    *_calls((1, 12, 3, 5, 6), (9, 12, 1, 1, 1), bias=False),
    # Windows of more taps than are packed at a time; few pixels under a large weight.
    *_calls((1, 3, 16, 14), (34, 3, 13, 12), padding=6),
    *_calls((2, 20, 4, 3, 5), (70, 20, 3, 2, 3), padding=1, stride=(2, 1, 2)),
    # Many terms: they are split, and summed in runs.
    *_calls((1, 100, 4, 5), (33, 100, 3, 3), padding=1),
    *_calls((2, 4, 25, 40), (8, 4, 1, 1)),
    *_calls((2, 4, 25, 40), (3, 4, 1, 1), layout="channels_last"),
    *_calls((2, 0, 5), (3, 0, 3), padding=1),
    # To few channels, with rows of many pixels: in steps, in phases, a volume.
    *_calls((2, 3, 9, 40), (5, 3, 3, 3), padding=1),
    *_calls((1, 3, 10, 100), (7, 3, 3, 5), stride=(2, 3), padding=(1, 2), layout="channels_last"),
    *_calls((1, 5, 4, 6, 33), (2, 5, 3, 2, 3), stride=(2, 1, 2), dilation=(1, 2, 3), padding=(1, 0, 2)),
    *_calls((1, 1, 700), (1, 1, 9), padding=12, dilation=3),
    # Groups of few channels: planes of whole blocks, in steps, in phases, a line, a volume; more channels than rows of
    # a tile; vectors of whole groups.
    *_calls((2, 12, 9, 11), (15, 4, 3, 3), groups=3, padding=1),
    *_calls((1, 18, 10, 13), (9, 6, 3, 4), groups=3, stride=(2, 3), padding=(1, 2), dilation=(2, 1)),
    *_calls((2, 12, 70), (6, 2, 5), groups=6, padding=4, dilation=2, bias=False),
    *_calls((1, 8, 4, 7, 6), (12, 4, 2, 3, 3), groups=2, stride=(1, 2, 1), padding=(1, 1, 0)),
    *_calls((1, 32, 14, 14), (32, 16, 3, 3), groups=2, padding=1),
    *_calls((2, 21, 6, 9), (14, 3, 3, 3), groups=7, padding=1, layout="channels_last", weight_layout="channels_last"),
    *_calls((2, 40, 6, 19), (40, 4, 3, 3), groups=10, padding=1, layout="channels_last"),
    *_calls((2, 24, 9, 12), (24, 8, 3, 3), groups=3, stride=2, padding=1, layout="channels_last"),
    *_calls((1, 36, 5, 16), (36, 2, 2, 5), groups=18, padding=(1, 2), layout="channels_last"),
    *_calls((1, 16, 3, 5, 6), (16, 2, 3, 1, 3), groups=8, padding=1, layout="channels_last"),
    # A gradient that does not stay in a cache, of several images at once.
    *_calls((5, 150, 6, 7), (100, 150, 3, 3), stride=2, padding=1),
    Call(
        "conv_weight_grad",
        (
            *(Random((4, channels, 5, 3), "channels_last") for channels in (520, 256)),
            *([1, 1], [1, 1], [0, 0], [1, 1], 1, False),
        ),
    ),
    # Winograd: patches with outputs outside, channels left over, many images in a block, groups, a volume in phases.
    *_calls((2, 17, 13, 18), (35, 17, 3, 3), padding=1, fast=True),
    *_calls((3, 32, 12, 15), (32, 16, 3, 3), groups=2, layout="channels_last", bias=False, fast=True),
    *_calls((25, 16, 4, 4), (16, 16, 3, 3), padding=1, fast=True),
    *_calls((2, 16, 6, 10, 11), (16, 16, 3, 3, 3), stride=(2, 1, 1), padding=(1, 2, 2), fast=True),
    *_calls((1, 160, 8, 11), (144, 80, 3, 3), groups=2, padding=1, fast=True),
    *_calls((2, 80, 7, 5), (72, 80, 3, 3), padding=1, weight_layout="channels_last", fast=True),
    # An infinity that only the window's last column meets.
    Call("conv_weight_grad", (Given(torch.ones(1, 4, 3, 3)), Given(INFINITE), [3, 3], [1, 1], [1, 0], [1, 1], 2)),
    Call("conv_forward", (Random((0, 3, 5, 4)), Random((2, 3, 3, 3)), None, [3, 2], [1, 1], [0, 0], [1, 1], 1)),
    Call("conv_weight_grad", (Random((0, 2, 3)), Random((0, 3, 5)), [3], [1], [0], [1], 1)),
    Call("conv_input_grad", (Random((1, 0, 3)), Random((0, 3, 3)), Random((3,)), [5], [1], [0], [1], 1)),
    Call(
        "conv_forward",
        (
            Given(torch.tensor([[[1.0, float("inf"), 2.0, float("nan"), 3.0, 4.0]]])),
            Given(torch.ones(1, 1, 2)),
            *(None, [5], [1], [0], [1], 1),
        ),
    ),
]
