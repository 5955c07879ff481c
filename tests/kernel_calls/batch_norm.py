import torch

from . import Call, Given, Random

# Both layouts; planes that packs of 16 bytes fill, that they straddle (7x7), that start within one (17x19), whose last
# byte of the mask is full or not; channels of which a pack holds several, or no whole number; one block and several.
SHAPES = [
    ((9, 5), "contiguous"),
    ((70, 24), "contiguous"),
    ((70, 256), "contiguous"),  # blocks side by side, and one below the other
    ((9, 264), "contiguous"),
    ((30, 261), "contiguous"),
    ((3, 5, 7), "contiguous"),
    ((2, 8, 7, 7), "contiguous"),
    ((3, 4, 6, 6), "stepped"),
    ((2, 3, 4, 4), "offset"),
    ((11, 40, 1, 1), "contiguous"),
    ((11, 3, 20, 16), "contiguous"),
    ((2, 8, 19, 17), "contiguous"),
    ((2, 3, 17, 19), "contiguous"),
    ((1, 2, 70, 66), "contiguous"),
    ((3, 16, 3, 5), "channels_last"),
    ((2, 5, 3, 3, 2), "channels_last"),
    ((2, 8, 3, 3), "transposed"),
    ((0, 3, 4), "contiguous"),
    ((2, 0, 4), "contiguous"),
    ((2, 3, 0), "contiguous"),
]
EPS = 1e-5


def _masks(shape, layout):
    """A mask of random bits for a gradient of this shape, as the layout of the input packs it."""
    batch, channels, *size = shape
    pixels = torch.Size(size).numel()
    rows = layout == "channels_last" or len(shape) == 2
    sizes = ((batch * pixels + 7) // 8, channels) if rows else (batch, channels, (pixels + 7) // 8)
    return Given(torch.randint(0, 256, sizes, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)))


def _calls(shape, layout):
    x, other = Random(shape, layout), Random(shape, layout)
    vector, variance = Random((shape[1],)), Random((shape[1],), positive=True)
    statistics = vector, variance
    yield Call("batch_norm_forward", (x, None, None, None, vector, vector, EPS, False))
    yield Call("batch_norm_forward", (x, other, None, None, vector, None, EPS, True))
    yield Call("batch_norm_forward", (x, other, *statistics, None, vector, EPS, False))
    yield Call("batch_norm_forward", (x, None, *statistics, None, None, EPS, True))
    yield Call("batch_norm_relu_mask", (x, *statistics, vector, vector, EPS))
    yield Call("batch_norm_masked_grad", (x, _masks(shape, layout)))
    yield Call("batch_norm_sums", (other, x, *statistics, EPS))
    yield Call("batch_norm_backward", (other, x, *statistics, vector, vector, EPS, True))
    yield Call("batch_norm_backward", (Random(shape, "transposed"), x, *statistics, vector, None, EPS, False))
    yield Call("channel_scale", (x, vector))


VECTOR, STEPPED = Random((5,)), Random((5,), "stepped")

CALLS = [
    *(call for shape in SHAPES for call in _calls(*shape)),
    Call("batch_norm_sums", (Random((4, 5, 3)), Random((4, 5, 3)), None, None, 0.0)),
    Call(
        "batch_norm_forward", (Random((4, 5, 3)), None, STEPPED, Random((5,), positive=True), STEPPED, None, EPS, False)
    ),
    *(Call("batch_norm_update", (running, VECTOR, VECTOR, STEPPED, 7, 0.3)) for running in (VECTOR, STEPPED)),
    Call("batch_norm_update", (Random((300,)), Random((300,)), Random((300,)), Random((300,)), 2, 1.0)),
    Call("batch_norm_update", (Random((0,)), Random((0,)), Random((0,)), Random((0,)), 7, 0.3)),
]
