import torch

from . import Call, Given, Random

# Rows: lanes of a warp, with packs and without, and a block; rows that share a pack, in parts, and read again.
ROWS = [(5, 8), (3, 4, 16), (7, 10), (70, 2), (2, 131), (2, 3, 512), (1, 1024), (2, 301), (3, 1027), (2, 5000)]
ROWS += [(1, 20001), (2, 20480), (0, 3), (4, 0)]
# Columns: neighbours in packs and without, few classes and many, in chunks and in parts.
COLUMNS = [(2, 3, 4, 8), (1, 19, 5, 5), (2, 1, 8), (3, 2, 2), (2, 40, 3, 4), (1, 300, 3, 3), (1, 600, 4, 8)]
COLUMNS += [(1, 700, 5, 5), (33, 5, 7), (2, 0, 3)]
INPUTS = [(Random(shape), len(shape) - 1) for shape in ROWS] + [(Random(shape), 1) for shape in COLUMNS]
INPUTS += [(Random((6, 5, 4)), 0), (Random((3,)), 0)]
INPUTS += [(Random(shape, layout), 1) for shape in ((3, 1027), (2, 8, 4, 4)) for layout in ("stepped", "offset")]
INPUTS += [(Random((2, 12, 3, 5), "channels_last"), 1)]

INFINITY = float("inf")
SPECIAL = [[-INFINITY] * 4, [INFINITY, 0, 1, 2], [-INFINITY, -200, -200, -201], [float("nan"), 0, 1, 2], [3e4] * 4]
# Threads that see no finite value beside others that do.
MASKED = torch.full((2, 2048), -INFINITY)
MASKED[0, 5], MASKED[1, 2000:] = -300, 200
SPECIALS = [(Given(torch.tensor(SPECIAL)), 1), (Given(torch.tensor(SPECIAL).T.contiguous()), 0), (Given(MASKED), 1)]

CALLS = [
    *(Call(f"{kind}_forward", (x, dim)) for kind in ("softmax", "log_softmax") for x, dim in INPUTS + SPECIALS),
    *(Call(f"{kind}_input_grad", (x, x, dim)) for kind in ("softmax", "log_softmax") for x, dim in INPUTS),
]
