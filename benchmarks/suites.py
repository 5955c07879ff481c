"""Tables of layers: of classes of operations, with the speed they should reach, and as well-known networks have them.

`manual_ops.compare.LAYERS` is the table for a first look.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manual_ops.compare import LAYERS, Layer

BATCH = 8


@dataclass(frozen=True)
class Suite:
    """Layers that are measured together.

    Attributes:
        layers: the table.
        target: what the geometric mean of the speedups should reach; None where nothing is aimed at.
        floor: the speedup below which a layer counts as lost.
        dtype, channels_last: of the inputs.
    """

    layers: tuple[Layer, ...]
    target: float | None = None
    floor: float = 0.95
    dtype: str = "float32"
    channels_last: bool = False


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


def _pool(op: str, shape: tuple[int, ...], label: str, **options: object) -> Layer:
    return Layer(op, shape, options, label=label)


def _pooling(axes: str) -> tuple[Layer, ...]:
    """The windows of well-known networks and the odd ones between, for images of so many axes ("1", "2", "3")."""
    tables = {
        "1": (
            _pool("max_pool1d", (32, 64, 4096), "max pool 2", kernel_size=2),
            _pool("max_pool1d", (32, 64, 4096), "max pool 3 stride 2", kernel_size=3, stride=2, padding=1),
            _pool("avg_pool1d", (32, 64, 4096), "average pool 2", kernel_size=2),
            _pool("adaptive_avg_pool1d", (32, 64, 4096), "adaptive average pool to 7", output_size=7),
            _pool("adaptive_max_pool1d", (32, 64, 4096), "adaptive max pool to 7", output_size=7),
        ),
        "2": (
            _pool("max_pool2d", (32, 64, 112, 112), "max pool 3x3 stride 2", kernel_size=3, stride=2, padding=1),
            _pool("max_pool2d", (32, 64, 56, 56), "max pool 2x2", kernel_size=2),
            _pool("max_pool2d", (32, 256, 28, 28), "max pool 3x3 stride 1", kernel_size=3, stride=1, padding=1),
            _pool("max_pool2d", (32, 256, 28, 28), "max pool 5x5 stride 1", kernel_size=5, stride=1, padding=2),
            _pool("max_pool2d", (32, 21, 112, 112), "max pool 3x3 stride 2", kernel_size=3, stride=2, padding=1),
            _pool("max_pool2d", (32, 3, 112, 112), "max pool 3x3 stride 2", kernel_size=3, stride=2, padding=1),
            _pool("max_pool2d", (64, 6, 28, 28), "max pool 2x2", kernel_size=2),
            _pool("avg_pool2d", (32, 64, 56, 56), "average pool 2x2", kernel_size=2),
            _pool("avg_pool2d", (32, 64, 56, 56), "average pool 3x3 stride 1", kernel_size=3, stride=1, padding=1),
            _pool("avg_pool2d", (32, 64, 56, 56), "average pool 3x3 stride 2", kernel_size=3, stride=2, padding=1),
            _pool("adaptive_avg_pool2d", (32, 256, 28, 28), "adaptive average pool to 7", output_size=7),
            _pool("adaptive_max_pool2d", (32, 256, 28, 28), "adaptive max pool to 7", output_size=7),
            _pool("adaptive_avg_pool2d", (32, 512, 7, 7), "global average pool", output_size=1),
            _pool("adaptive_max_pool2d", (32, 512, 7, 7), "global max pool", output_size=1),
        ),
        "3": (
            _pool("max_pool3d", (4, 64, 16, 56, 56), "max pool 2x2x2", kernel_size=2),
            _pool("max_pool3d", (4, 64, 16, 56, 56), "max pool 3x3x3 stride 2", kernel_size=3, stride=2, padding=1),
            _pool("avg_pool3d", (4, 64, 16, 56, 56), "average pool 2x2x2", kernel_size=2),
            _pool("adaptive_avg_pool3d", (4, 64, 16, 28, 28), "adaptive average pool to 7", output_size=7),
            _pool("adaptive_max_pool3d", (4, 64, 16, 28, 28), "adaptive max pool to 7", output_size=7),
        ),
    }
    return tuple(layer for axis in axes for layer in tables[axis])


IMAGES = ((32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 14, 14), (128, 512, 7, 7))


def _norm(op: str, label: str, **options: object) -> tuple[Layer, ...]:
    return tuple(Layer(op, shape, options, label=label) for shape in IMAGES)


BATCH_NORM = _norm("batch_norm", "batch norm")
BATCH_NORM_RELU = _norm("batch_norm_relu", "batch norm + ReLU")
BATCH_NORM_ADD_RELU = _norm("batch_norm_relu", "batch norm + add + ReLU", residual=True)
BATCH_NORM_OTHER = (
    Layer("batch_norm", (32, 64, 56, 56), {"training": False}, label="batch norm, evaluation"),
    Layer("batch_norm", (256, 512), label="batch norm of features"),
    Layer("batch_norm", (32, 128, 1024), label="batch norm of sequences"),
    Layer("batch_norm", (4, 32, 16, 28, 28), label="batch norm of volumes"),
)

PER_PIXEL = (8, 21, 256, 256)
CROSS_ENTROPY = (
    Layer("cross_entropy", (128, 1000), label="cross-entropy"),
    Layer("cross_entropy", (8192, 1000), label="cross-entropy"),
    Layer("cross_entropy", (4096, 32000), label="cross-entropy"),
    Layer("cross_entropy", (8192, 1000), {"label_smoothing": 0.1}, label="cross-entropy, smoothing"),
    Layer("cross_entropy", (8192, 1000), {"probabilities": True}, label="cross-entropy, probabilities"),
)
CROSS_ENTROPY_PER_PIXEL = (
    Layer("cross_entropy", PER_PIXEL, label="cross-entropy per pixel"),
    Layer("cross_entropy", PER_PIXEL, {"label_smoothing": 0.1}, label="cross-entropy per pixel, smoothing"),
)
SOFTMAX_PER_PIXEL = tuple(
    Layer(op, PER_PIXEL, {"dim": 1}, label=f"{label} per pixel")
    for op, label in (("softmax", "softmax"), ("log_softmax", "log-softmax"))
)
SOFTMAX = tuple(
    Layer(op, shape, {"dim": 1}, label=label)
    for op, label in (("softmax", "softmax"), ("log_softmax", "log-softmax"))
    for shape in ((128, 1000), (8192, 1000), (4096, 32000))
)


def _depthwise(channels: int, size: int, window: int = 3, stride: int = 1) -> Layer:
    options = {"groups": channels, "kernel_size": window, "stride": stride, "padding": window // 2}
    step = f" stride {stride}" if stride > 1 else ""
    return Layer("conv2d", (32, channels, size, size), options, label=f"depthwise {window}x{window}{step}")


DEPTHWISE = (
    _depthwise(96, 56),
    _depthwise(144, 28),
    _depthwise(384, 14),
    _depthwise(768, 7),
    _depthwise(96, 112, stride=2),
    _depthwise(192, 28, stride=2),
    _depthwise(96, 56, window=7),
    _depthwise(384, 14, window=7),
    _depthwise(768, 7, window=7),
)
DEPTHWISE_1D = (Layer("conv1d", (32, 256, 1024), {"groups": 256, "padding": 1}, label="depthwise 3"),)

ELEMENTWISE = tuple(
    Layer(op, shape, label=label)
    for op, label in (
        ("relu", "ReLU"),
        ("relu6", "ReLU6"),
        ("leaky_relu", "leaky ReLU"),
        ("sigmoid", "sigmoid"),
        ("tanh", "tanh"),
        ("silu", "SiLU"),
        ("gelu", "GELU"),
    )
    for shape in ((16, 64, 56, 56), (32, 64, 112, 112))
)
LOSSES = tuple(
    Layer(op, shape, options, label=label)
    for op, label, options in (
        ("mse_loss", "mean squared error", {}),
        ("mse_loss", "squared errors", {"reduction": "none"}),
        ("binary_cross_entropy_with_logits", "binary cross-entropy", {}),
        ("nll_loss", "negative log-likelihood", {}),
    )
    for shape in ((256, 1000), (8192, 1000))
)
GELU_TANH = tuple(
    Layer("gelu", shape, {"approximate": "tanh"}, label="GELU, tanh")
    for shape in ((16, 64, 56, 56), (32, 64, 112, 112))
)

TINY = (2, 4, 8, 8)


def _tiny() -> Iterator[Layer]:
    """Every operation that takes such an input, at a size where only the call itself costs."""
    yield Layer("conv2d", TINY, {"padding": 1})
    yield Layer("conv2d", TINY, {"padding": 1, "groups": 4}, label="depthwise conv2d")
    yield Layer("conv_transpose2d", TINY, {"kernel_size": 2, "stride": 2})
    yield Layer("max_pool2d", TINY, {"kernel_size": 2})
    yield Layer("avg_pool2d", TINY, {"kernel_size": 2})
    yield Layer("adaptive_avg_pool2d", TINY, {"output_size": 1})
    yield Layer("adaptive_max_pool2d", TINY, {"output_size": 1})
    yield Layer("batch_norm", TINY)
    yield Layer("batch_norm_relu", TINY)
    yield Layer("batch_norm_relu", TINY, {"residual": True}, label="batch norm + add + ReLU")
    yield Layer("cross_entropy", TINY)
    yield Layer("nll_loss", TINY)
    yield Layer("softmax", TINY, {"dim": 1})
    yield Layer("log_softmax", TINY, {"dim": 1})
    for op in ("relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu"):
        yield Layer(op, TINY)
    yield Layer("mse_loss", TINY)
    yield Layer("binary_cross_entropy_with_logits", TINY)
    yield Layer("linear", TINY, {"out_features": 8})


# The classes that are bound by memory, most with what the geometric mean of their speedups should reach on one thread.
CLASSES: dict[str, Suite] = {
    "pooling": Suite(_pooling("123"), 7),
    "pooling-channels_last": Suite(_pooling("23"), 2, channels_last=True),
    "pooling-bfloat16": Suite(_pooling("2"), 4, dtype="bfloat16"),
    "pooling-bfloat16-channels_last": Suite(_pooling("2"), 4, dtype="bfloat16", channels_last=True),
    "batch_norm": Suite(BATCH_NORM, 2),
    "batch_norm_relu": Suite(BATCH_NORM_RELU, 2.8),
    "batch_norm_add_relu": Suite(BATCH_NORM_ADD_RELU, 2.5),
    "batch_norm-channels_last": Suite(BATCH_NORM, 1.3, channels_last=True),
    "batch_norm_relu-channels_last": Suite(BATCH_NORM_RELU, 1.6, channels_last=True),
    "batch_norm_add_relu-channels_last": Suite(BATCH_NORM_ADD_RELU, 1.6, channels_last=True),
    "batch_norm-other": Suite(BATCH_NORM_OTHER),
    "cross_entropy": Suite(CROSS_ENTROPY + CROSS_ENTROPY_PER_PIXEL, 3.5),
    "cross_entropy-channels_last": Suite(CROSS_ENTROPY_PER_PIXEL, 3.5, channels_last=True),
    "softmax": Suite(SOFTMAX + SOFTMAX_PER_PIXEL, 1.5),
    "softmax-channels_last": Suite(SOFTMAX_PER_PIXEL, 1.5, channels_last=True),
    "depthwise": Suite(DEPTHWISE + DEPTHWISE_1D, 3),
    "depthwise-channels_last": Suite(DEPTHWISE, 2.8, channels_last=True),
    "elementwise": Suite(ELEMENTWISE + LOSSES, 1),
    "gelu_tanh": Suite(GELU_TANH, 2.5),
    "tiny": Suite(tuple(_tiny()), floor=1 / 3),
}


def _dense(shape: tuple[int, ...], out: int, window: int, label: str = "", op: str = "conv2d", **options: Any) -> Layer:
    options = {"out_channels": out, "kernel_size": window, "padding": window // 2, **options}
    step = f" stride {options['stride']}" if options.get("stride", 1) > 1 else ""
    return Layer(op, shape, options, label=f"{label or op} {window}{step} to {out}")


CONV_3X3 = (
    _dense((16, 64, 56, 56), 64, 3),
    _dense((16, 128, 28, 28), 128, 3),
    _dense((16, 256, 14, 14), 256, 3),
    _dense((16, 512, 7, 7), 512, 3),
    _dense((64, 16, 32, 32), 16, 3),
    _dense((64, 32, 16, 16), 32, 3),
    _dense((64, 64, 8, 8), 64, 3),
)
CONV_3X3_STRIDE_2 = (
    _dense((16, 64, 56, 56), 128, 3, stride=2),
    _dense((16, 128, 28, 28), 256, 3, stride=2),
    _dense((16, 256, 14, 14), 512, 3, stride=2),
)
CONV_STEM = (_dense((16, 3, 224, 224), 64, 7, stride=2, input_grad=False),)
CONV_1X1 = (
    _dense((16, 64, 56, 56), 256, 1),
    _dense((16, 256, 56, 56), 64, 1),
    _dense((16, 512, 14, 14), 1024, 1),
    _dense((16, 256, 56, 56), 512, 1, stride=2),
)
CONV_FEW_CHANNELS = (
    _dense((64, 1, 28, 28), 16, 3),
    _dense((64, 1, 28, 28), 6, 5),
    _dense((64, 6, 14, 14), 16, 5),
    _dense((32, 3, 32, 32), 32, 3),
    _dense((32, 8, 32, 32), 16, 3),
)
CONV_1D_DILATED_TRANSPOSED = (
    _dense((32, 64, 1024), 64, 3, op="conv1d"),
    _dense((16, 64, 56, 56), 64, 3, "dilated conv2d", dilation=2, padding=2),
    _dense((16, 64, 28, 28), 32, 4, op="conv_transpose2d", stride=2, padding=1),
    _dense((32, 64, 512), 32, 4, op="conv_transpose1d", stride=2, padding=1),
    _dense((4, 32, 8, 14, 14), 16, 2, op="conv_transpose3d", stride=2, padding=0),
)
CONV_3D = (
    _dense((2, 16, 16, 56, 56), 32, 3, op="conv3d"),
    _dense((2, 64, 8, 28, 28), 64, 3, op="conv3d"),
)
CONV_GROUPED = tuple(
    _dense((16, channels, size, size), channels, 3, f"{groups} groups of {channels // groups}, conv2d", groups=groups)
    for channels, size, groups in ((128, 56, 32), (256, 28, 32), (512, 14, 32), (1024, 7, 32))
)
DENSE = (*CONV_3X3[:4], *CONV_3X3_STRIDE_2, *CONV_1X1[:2])

# Dense convolution: what the geometric means should reach, contiguous and channels_last.
_CONVOLUTIONS = {
    "conv3x3": (CONV_3X3, 1.9, 1.7),
    "conv3x3_stride2": (CONV_3X3_STRIDE_2, 1.4, 1.2),
    "conv_stem": (CONV_STEM, 1.5, 1.3),
    "conv1x1": (CONV_1X1, 1.5, 1.1),
    "conv_few_channels": (CONV_FEW_CHANNELS, 1.7, 1.3),
    "conv_1d_dilated_transposed": (CONV_1D_DILATED_TRANSPOSED, 1.3, 1.15),
    "conv3d": (CONV_3D, 1.2, 1.1),
    "conv_grouped": (CONV_GROUPED, 3, 2),
}
CONVOLUTIONS: dict[str, Suite] = {
    **{name: Suite(layers, target) for name, (layers, target, _) in _CONVOLUTIONS.items()},
    **{
        f"{name}-channels_last": Suite(layers, target, channels_last=True)
        for name, (layers, _, target) in _CONVOLUTIONS.items()
    },
    "conv-bfloat16": Suite(DENSE, 1.2, dtype="bfloat16"),
    "conv-bfloat16-channels_last": Suite(DENSE, 1.1, dtype="bfloat16", channels_last=True),
    "conv-float64": Suite(DENSE, 3, dtype="float64"),
    "conv-float64-channels_last": Suite(DENSE, 3, dtype="float64", channels_last=True),
}

# Layers as networks have them.
NETWORKS: dict[str, Suite] = {
    name + suffix: Suite(layers, channels_last=bool(suffix))
    for name, layers in {"resnet18": RESNET18, "mobilenet_v2": MOBILENET_V2, "unet": UNET, "lenet": LENET}.items()
    for suffix in ("", "-channels_last")
}
SUITES: dict[str, Suite] = {**CLASSES, **CONVOLUTIONS, "layers": Suite(LAYERS), **NETWORKS}


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
