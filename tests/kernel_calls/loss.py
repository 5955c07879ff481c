import torch

from . import Call, Given, Random

# Below and above a pack and a tile, with a rest behind the packs; more tiles than one for a block of scalars.
SHAPES = [Random((2, 3, 5, 7)), Random((8, 4)), Random((5203,)), Random((2, 8, 3, 3), "channels_last")]
SHAPES += [Random((33, 2), "stepped"), Random((1101,), "offset"), Random((0, 3)), Random((1,))]
SPECIAL = Given(torch.tensor([0.0, -0.0, 80.0, -80.0, 1e3, -1e3]))
NUMBER = Random(())
REDUCTIONS = ("none", "mean")


def _grad_of(x, reduction):
    return x if reduction == "none" else NUMBER


def _weight_of(x):
    return Random(x.shape, x.layout, positive=True)


CALLS = [
    *(Call("total", (x, reduction)) for x in SHAPES for reduction in ("sum", "mean")),
    *(Call("mse_loss", (x, x, reduction)) for x in SHAPES for reduction in REDUCTIONS),
    *(Call("mse_loss_backward", (_grad_of(x, reduction), x, x, reduction)) for x in SHAPES for reduction in REDUCTIONS),
    *(
        Call("bce_with_logits", (x, x, weight, reduction))
        for x in SHAPES
        for weight in (None, _weight_of(x))
        for reduction in REDUCTIONS
    ),
    *(
        Call("bce_with_logits_backward", (_grad_of(x, reduction), x, x, weight, reduction))
        for x in SHAPES
        for weight in (None, _weight_of(x))
        for reduction in REDUCTIONS
    ),
    Call("bce_with_logits", (SPECIAL, SPECIAL, SPECIAL, "none")),
    Call("bce_with_logits_backward", (SPECIAL, SPECIAL, SPECIAL, None, "none")),
]
