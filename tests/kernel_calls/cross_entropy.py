import math

import torch

from manual_ops.geometry import accumulation_dtype

from . import Call, Given, Random

IGNORED = 1


class Accumulated(Given):
    """These values in the dtype that kernels accumulate in."""

    def make(self, generator, rounded, dtype):
        return self.values.to(torch.float32).to(accumulation_dtype(dtype))


def _indices(rows, classes):
    """Targets of every class in turn, ignored ones among them."""
    count = math.prod(rows)
    return Given((torch.arange(count) * 7 % classes).reshape(rows))


def _probabilities(shape, layout="contiguous"):
    generator = torch.Generator().manual_seed(1)
    return Given(torch.rand(shape, dtype=torch.float64, generator=generator) / shape[1], layout)


# Rows: lanes of a warp, with packs and without, and a block; rows that share a pack, in parts, and read again. Then
# columns: neighbours in packs and without, few classes and many, in chunks and in parts.
SHAPES = [(5, 8), (7, 10), (2, 131), (3, 512), (2, 301), (1, 20001), (2, 2, 4), (1, 19, 5, 5), (1, 300, 3, 3)]
SHAPES += [(1, 600, 4, 8), (1, 700, 5, 5), (33, 5, 7)]
INPUTS = [Random(shape) for shape in SHAPES]
INPUTS += [Random((3, 5, 4, 6), "channels_last"), Random((2, 8, 2, 2, 2), "channels_last")]
INPUTS += [Random((3, 1027), "stepped"), Random((3, 1027), "offset"), Random((2, 4, 2, 8), "offset")]
SMALL = [Random((6, 5)), Random((6, 4, 4))]


def _target_of(input, distribution):
    if distribution:
        return _probabilities(input.shape, "channels_last" if input.layout == "channels_last" else "contiguous")
    return _indices([input.shape[0], *input.shape[2:]], input.shape[1])


def _calls(input, *, distribution=False, weight=None, reduction="mean", samples=(), smoothing=0.0):
    target = _target_of(input, distribution)
    rows = (input.shape[0], *input.shape[2:])
    reduced = reduction != "none"
    grad_output = Random(tuple(samples) if reduced else rows)
    denominator = Accumulated(torch.full(tuple(samples), 3.0))
    options = reduction, list(samples), IGNORED
    lse = Accumulated(torch.stack([torch.full(rows, 2.0), torch.full(rows, 1.5)]))
    calls = [
        Call("cross_entropy_forward", (input, target, weight, *options, smoothing)),
        Call(
            "cross_entropy_input_grad",
            (grad_output, input, target, weight, lse, denominator, *options, smoothing),
        ),
    ]
    if not distribution and not smoothing:
        calls += [
            Call("nll_loss_forward", (input, target, weight, *options)),
            Call("nll_loss_input_grad", (grad_output, target, weight, denominator, input.shape[1], *options)),
        ]
    return calls


def _weight(input, *samples):
    return Random((*samples, input.shape[1]), positive=True)


INFINITY = float("inf")
SPECIAL = Given(torch.tensor([[-INFINITY] * 3, [INFINITY, 0, 1], [-INFINITY, -200, -201]], dtype=torch.float32))
FIRST, LAST = Given(torch.tensor([0, 0, 0])), Given(torch.tensor([2, 2, 2]))

CALLS = [
    *(call for input in INPUTS for call in _calls(input)),
    *(call for input in INPUTS for call in _calls(input, distribution=True)),
    *(call for input in INPUTS for call in _calls(input, smoothing=0.1, weight=_weight(input))),
    *(
        call
        for input in SMALL
        for reduction in ("none", "mean")
        for samples, weight in (((), _weight(input)), ((3,), _weight(input)), ((2, 3), _weight(input, 2, 3)))
        for kind in ({}, {"smoothing": 0.3}, {"distribution": True, "smoothing": 0.3})
        for call in _calls(input, reduction=reduction, samples=samples, weight=weight, **kind)
    ),
    *_calls(SMALL[0], reduction="sum"),
    *(call for shape in ((0, 3), (0, 3, 2)) for call in _calls(Random(shape))),
    *_calls(Random((0, 3)), distribution=True),
    *(Call("cross_entropy_forward", (SPECIAL, t, None, "none", [], -100, 0.0)) for t in (FIRST, LAST)),
    Call("cross_entropy_forward", (SPECIAL, FIRST, None, "none", [], 0, 0.0)),
]
