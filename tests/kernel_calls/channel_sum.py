from . import Call, Random

SHAPES = [
    Random((5, 3)),
    Random((70, 24)),
    Random((70, 256)),
    Random((30, 261)),
    Random((3, 5, 7)),
    Random((4, 8, 7, 7)),
    Random((9, 3, 2, 3), "stepped"),
    Random((2, 16, 5, 3), "offset"),
    Random((3, 8, 3, 5), "channels_last"),
    Random((2, 5, 3, 3, 2), "channels_last"),
    Random((3, 2, 19, 17)),  # planes that start within a pack
    Random((2, 8, 17, 19), "transposed"),
    Random((2, 3, 20, 16), "offset"),
    Random((1, 1, 130, 130)),
    Random((0, 3, 4)),
    Random((2, 0, 4)),
    Random((2, 3, 0)),
]

CALLS = [Call("channel_sum", (shape,)) for shape in SHAPES]
