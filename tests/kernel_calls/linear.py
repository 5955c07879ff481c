from . import Call, Random

# Tiles with rows and columns left over, features that make packs and that do not, turned and cut matrices, one split.
CALLS = [
    Call("linear", (Random((5, 7)), Random((3, 7)), Random((3,)))),
    Call("linear", (Random((70, 16)), Random((33, 16)), None)),
    Call("linear", (Random((9, 17), "offset"), Random((5, 17), "offset"), Random((5,), "offset"))),
    Call("linear", (Random((40, 24), "transposed"), Random((11, 24), "transposed"), Random((11,)))),
    Call("linear", (Random((6, 10), "stepped"), Random((4, 10), "stepped"), Random((4,), "stepped"))),
    Call("linear", (Random((130, 9)), Random((131, 9)), Random((131,)))),
    Call("linear", (Random((3, 1100)), Random((4, 1100)), Random((4,)))),
    Call("linear", (Random((0, 4)), Random((3, 4)), None)),
    Call("linear", (Random((4, 3)), Random((0, 3)), None)),
    Call("linear", (Random((4, 0)), Random((3, 0)), Random((3,)))),
]
