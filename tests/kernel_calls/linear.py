import torch

from . import Call, Random

# Both tiles, with rows and columns left over; features that make packs and that do not; turned and cut matrices; sums
# that are split and summed in runs.
CALLS = [
    Call("linear", (Random((5, 7)), Random((3, 7)), Random((3,)))),
    Call("linear", (Random((70, 16)), Random((33, 16)), None)),
    Call("linear", (Random((9, 17), "offset"), Random((5, 17), "offset"), Random((5,), "offset"))),
    Call("linear", (Random((40, 24), "transposed"), Random((11, 24), "transposed"), Random((11,)))),
    Call("linear", (Random((6, 10), "stepped"), Random((4, 10), "stepped"), Random((4,), "stepped"))),
    Call("linear", (Random((250, 40)), Random((120, 40)), Random((120,)))),
    Call("linear", (Random((250, 39)), Random((120, 39)), Random((120,)))),
    Call(
        "linear",
        (Random((250, 528)), Random((60, 528)), Random((60,))),
        tolerance={torch.float32: 5e-5},
        why="the partial sums are of the size of 20, where float32 rounds by 1e-6 at each of 528 terms",
    ),
    Call("linear", (Random((3, 3000)), Random((4, 3000)), Random((4,)))),
    Call("linear", (Random((0, 4)), Random((3, 4)), None)),
    Call("linear", (Random((4, 3)), Random((0, 3)), None)),
    Call("linear", (Random((4, 0)), Random((3, 0)), Random((3,)))),
]
