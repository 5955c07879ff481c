"""Tables of layers as well-known networks have them. `manual_ops.compare.LAYERS` is the one for a first look."""

from manual_ops.compare import LAYERS, Layer

BATCH = 8


def _conv(channels: int, size: int, out: int, window: int = 3, stride: int = 1, groups: int = 1) -> Layer:
    options = {
        "out_channels": out,
        "kernel_size": window,
        "stride": stride,
        "padding": window // 2,
        "groups": groups,
    }
    kind = "depthwise" if groups > 1 else "conv"
    step = f" stride {stride}" if stride > 1 else ""
    return Layer("conv2d", (BATCH, channels, size, size), options, label=f"{kind} {window}x{window}{step} to {out}")


def _of_image(op: str, channels: int, size: int, **options: object) -> Layer:
    return Layer(op, (BATCH, channels, size, size), options)


RESNET18 = (
    _conv(3, 224, 64, window=7, stride=2),
    _of_image("batch_norm_relu", 64, 112),
    _of_image("max_pool2d", 64, 112, kernel_size=3, stride=2, padding=1),
    _conv(64, 56, 64),
    _of_image("batch_norm_relu", 64, 56),
    _conv(64, 56, 128, stride=2),
    _conv(64, 56, 128, window=1, stride=2),
    _conv(128, 28, 128),
    _conv(256, 14, 256),
    _conv(512, 7, 512),
    _of_image("batch_norm", 512, 7),
    _of_image("adaptive_avg_pool2d", 512, 7, output_size=1),
    Layer("linear", (BATCH, 512), {"out_features": 1000}),
    Layer("cross_entropy", (BATCH, 1000)),
)

MOBILENET_V2 = (
    _conv(3, 224, 32, stride=2),
    _conv(32, 112, 32, groups=32),
    _conv(32, 112, 16, window=1),
    _conv(96, 112, 96, stride=2, groups=96),
    _of_image("batch_norm", 96, 56),
    _of_image("relu6", 96, 56),
    _conv(144, 56, 24, window=1),
    _conv(384, 14, 384, groups=384),
    _conv(384, 14, 64, window=1),
    _conv(960, 7, 960, groups=960),
    _conv(320, 7, 1280, window=1),
)

UNET = (
    _conv(64, 128, 64),
    _of_image("relu", 64, 128),
    _of_image("max_pool2d", 64, 128, kernel_size=2),
    _conv(256, 32, 256),
    Layer(
        "conv_transpose2d",
        (BATCH, 128, 64, 64),
        {"out_channels": 64, "kernel_size": 2, "stride": 2},
        label="transposed conv 2x2 stride 2 to 64",
    ),
    _conv(64, 128, 21, window=1),
    _of_image("cross_entropy", 21, 128),
)

LENET = (
    Layer("conv2d", (64, 1, 28, 28), {"out_channels": 6, "kernel_size": 5, "padding": 2}, label="conv 5x5 to 6"),
    Layer("sigmoid", (64, 6, 28, 28)),
    Layer("avg_pool2d", (64, 6, 28, 28), {"kernel_size": 2}),
    Layer("conv2d", (64, 6, 14, 14), {"out_channels": 16, "kernel_size": 5}, label="conv 5x5 to 16"),
    Layer("tanh", (64, 16, 10, 10)),
    Layer("linear", (64, 400), {"out_features": 120}),
)

SUITES: dict[str, tuple[Layer, ...]] = {
    "layers": LAYERS,
    "resnet18": RESNET18,
    "mobilenet_v2": MOBILENET_V2,
    "unet": UNET,
    "lenet": LENET,
}
