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


def _gpu_conv(channels: int, size: int, out: int, window: int = 3, stride: int = 1, groups: int = 1) -> Layer:
    layer = _conv(channels, size, out, window, stride, groups)
    kind = {1: "conv", channels: "depthwise"}.get(groups, f"grouped by {groups}")
    step = f" stride {stride}" if stride > 1 else ""
    label = f"{kind} {window}x{window}{step} to {out}"
    return Layer(layer.op, (GPU_BATCH, channels, size, size), layer.options, label=label)


GPU_BATCH = 64
PLANE = (GPU_BATCH, 64, 112, 112)

# Large enough to fill a GPU of today: every operation of the registry, convolutions as ResNet-50, MobileNetV2 and
# ConvNeXt have them, classes from 1000 to a language model's 262144.
GPU = (
    Layer("max_pool2d", PLANE, {"kernel_size": 3, "stride": 2, "padding": 1}, label="max pool 3x3 stride 2"),
    Layer("max_pool2d", PLANE, {"kernel_size": 2}, label="max pool 2x2"),
    Layer("avg_pool2d", PLANE, {"kernel_size": 2}, label="average pool 2x2"),
    Layer("avg_pool2d", PLANE, {"kernel_size": 3, "stride": 1, "padding": 1}, label="average pool 3x3 stride 1"),
    Layer("adaptive_avg_pool2d", (256, 2048, 7, 7), {"output_size": 1}, label="global average pool"),
    Layer("adaptive_avg_pool2d", (GPU_BATCH, 256, 32, 32), {"output_size": 7}, label="adaptive average pool to 7"),
    Layer("adaptive_max_pool2d", (256, 2048, 7, 7), {"output_size": 1}, label="global max pool"),
    Layer("adaptive_max_pool2d", (GPU_BATCH, 256, 32, 32), {"output_size": 7}, label="adaptive max pool to 7"),
    Layer("batch_norm", (GPU_BATCH, 256, 56, 56), label="batch norm"),
    Layer("batch_norm", (GPU_BATCH, 512, 7, 7), label="batch norm, small"),
    Layer("batch_norm", (GPU_BATCH, 256, 56, 56), {"training": False}, label="batch norm, evaluation"),
    Layer("batch_norm_relu", (GPU_BATCH, 256, 56, 56), label="batch norm + ReLU"),
    Layer("batch_norm_relu", (GPU_BATCH, 256, 56, 56), {"residual": True}, label="batch norm + add + ReLU"),
    Layer("cross_entropy", (65536, 1000), label="cross-entropy"),
    Layer("cross_entropy", (8192, 32768), label="cross-entropy"),
    Layer("cross_entropy", (4096, 131072), label="cross-entropy"),
    Layer("cross_entropy", (2048, 262144), label="cross-entropy"),
    Layer("cross_entropy", (16, 21, 512, 512), label="cross-entropy per pixel"),
    Layer("cross_entropy", (65536, 1000), {"probabilities": True}, label="cross-entropy with probabilities"),
    Layer("nll_loss", (8192, 32768)),
    Layer("softmax", (65536, 1000), {"dim": 1}),
    Layer("softmax", (8192, 32768), {"dim": 1}),
    Layer("softmax", (16, 21, 512, 512), {"dim": 1}, label="softmax per pixel"),
    Layer("log_softmax", (8192, 32768), {"dim": 1}),
    _gpu_conv(144, 56, 144, groups=144),
    _gpu_conv(96, 112, 96, stride=2, groups=96),
    _gpu_conv(960, 7, 960, groups=960),
    _gpu_conv(96, 56, 96, window=7, groups=96),
    _gpu_conv(768, 7, 768, window=7, groups=768),
    _gpu_conv(128, 56, 128, groups=32),
    _gpu_conv(3, 224, 64, window=7, stride=2),
    _gpu_conv(64, 56, 64),
    _gpu_conv(128, 56, 128, stride=2),
    _gpu_conv(256, 14, 256),
    _gpu_conv(512, 7, 512),
    _gpu_conv(64, 56, 256, window=1),
    _gpu_conv(1024, 14, 256, window=1),
    _gpu_conv(256, 56, 512, window=1, stride=2),
    *(Layer(name, PLANE) for name in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "mse_loss")),
    Layer("binary_cross_entropy_with_logits", PLANE),
    Layer("linear", (4096, 4096), {"out_features": 4096}),
    Layer("linear", (256, 2048), {"out_features": 1000}),
    Layer("conv1d", (GPU_BATCH, 64, 4096), {"padding": 1}),
    Layer("conv3d", (8, 32, 16, 56, 56), {"padding": 1}),
    Layer("conv_transpose1d", (GPU_BATCH, 64, 2048), {"kernel_size": 4, "stride": 2, "padding": 1}),
    Layer("conv_transpose2d", (GPU_BATCH, 128, 28, 28), {"kernel_size": 4, "stride": 2, "padding": 1}),
    Layer("conv_transpose3d", (8, 32, 8, 28, 28), {"kernel_size": 2, "stride": 2}),
    Layer("max_pool1d", (GPU_BATCH, 64, 16384), {"kernel_size": 2}),
    Layer("max_pool3d", (8, 64, 16, 56, 56), {"kernel_size": 2}),
    Layer("avg_pool1d", (GPU_BATCH, 64, 16384), {"kernel_size": 2}),
    Layer("avg_pool3d", (8, 64, 16, 56, 56), {"kernel_size": 2}),
    Layer("adaptive_max_pool1d", (GPU_BATCH, 64, 16384), {"output_size": 7}),
    Layer("adaptive_max_pool3d", (8, 64, 16, 56, 56), {"output_size": 1}),
    Layer("adaptive_avg_pool1d", (GPU_BATCH, 64, 16384), {"output_size": 7}),
    Layer("adaptive_avg_pool3d", (8, 64, 16, 56, 56), {"output_size": 1}),
)
