import torch

from . import Call, Given, Random

# Where the functions bend, saturate or are undefined.
SPECIAL = torch.tensor([0.0, -0.0, 6.0, -6.0, 1e-30, 80.0, -80.0, float("inf"), -float("inf"), float("nan"), 3.0])
SHAPES = [Random((2, 3, 5, 7)), Random((1031,)), Random((2, 8, 3, 3), "channels_last"), Random((33, 2), "stepped")]
SHAPES += [Random((67,), "offset"), Random((0, 3))]
ACTIVATIONS = dict.fromkeys(("relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh"), ())
ACTIVATIONS["leaky_relu"] = (0.2,)

CALLS = [
    *(Call(name, (x, *slope)) for name, slope in ACTIVATIONS.items() for x in SHAPES),
    *(Call(f"{name}_backward", (x, x, *slope)) for name, slope in ACTIVATIONS.items() for x in SHAPES),
    *(Call(f"{name}_", (x, *ACTIVATIONS[name])) for name in ("relu", "relu6", "leaky_relu", "silu") for x in SHAPES),
    *(Call(name, (Given(SPECIAL), *ACTIVATIONS[name])) for name in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh")),
]
