"""Well-known networks, of torch.nn's layers alone, to measure with. A smaller `width` makes a toy of each."""

import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv_norm(channels: int, out: int, window: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, window, stride, window // 2, groups=groups, bias=False), nn.BatchNorm2d(out)]


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; the stride is the 3x3's."""

    expansion = 4

    def __init__(self, channels: int, hidden: int, stride: int):
        super().__init__()
        out = self.expansion * hidden
        self.conv1, self.bn1 = _conv_norm(channels, hidden, 1)
        self.conv2, self.bn2 = _conv_norm(hidden, hidden, 3, stride)
        self.conv3, self.bn3 = _conv_norm(hidden, out, 1)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels == out
        self.downsample = None if same else nn.Sequential(*_conv_norm(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the stride is the first's."""

    expansion = 1

    def __init__(self, channels: int, hidden: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv_norm(channels, hidden, 3, stride)
        self.conv2, self.bn2 = _conv_norm(hidden, hidden, 3)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels == hidden
        self.downsample = None if same else nn.Sequential(*_conv_norm(channels, hidden, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """He et al., https://arxiv.org/abs/1512.03385; bottlenecks with the stride in the 3x3 convolutions."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: tuple[int, ...], classes: int = 1000, width: int = 64
    ):
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        channels, layers = width, []
        for stage, count in enumerate(blocks):
            for index in range(count):
                layers.append(block(channels, width << stage, 2 if stage and not index else 1))
                channels = block.expansion * (width << stage)
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layers(self.stem(x))).flatten(1))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        expand = [*_conv_norm(channels, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        depthwise = [*_conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*expand, *depthwise, *_conv_norm(hidden, out, 1))
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class MobileNetV2(nn.Module):
    """Sandler et al., https://arxiv.org/abs/1801.04381; without its dropout, so that two models can be compared."""

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 1000, width: int = 32):
        super().__init__()
        layers: list[nn.Module] = [*_conv_norm(3, width, 3, 2), nn.ReLU6(inplace=True)]
        channels = width
        for expansion, out, count, stride in self.STAGES:
            out = out * width // 32
            for block in range(count):
                layers.append(InvertedResidual(channels, out, 1 if block else stride, expansion))
                channels = out
        layers += [*_conv_norm(channels, 40 * width, 1), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(40 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layers(x)).flatten(1))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand, self.act = nn.Linear(channels, 4 * channels), nn.GELU()
        self.reduce = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.reduce(self.act(self.expand(out)))).permute(0, 3, 1, 2)


class ConvNeXtTiny(nn.Module):
    """Liu et al., https://arxiv.org/abs/2201.03545; without stochastic depth, so that two models can be compared."""

    def __init__(self, classes: int = 1000, width: int = 96, blocks: tuple[int, ...] = (3, 3, 9, 3)):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width, eps=1e-6)]
        for stage, count in enumerate(blocks):
            channels = width << stage
            if stage:
                layers += [ChannelNorm(channels // 2, eps=1e-6), nn.Conv2d(channels // 2, channels, 2, 2)]
            layers += [ConvNeXtBlock(channels) for _ in range(count)]
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm, self.head = nn.LayerNorm(channels, eps=1e-6), nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.pool(self.layers(x)).flatten(1)))


class VGG(nn.Sequential):
    """Simonyan and Zisserman, https://arxiv.org/abs/1409.1556, with batch norm; one linear layer in place of three."""

    CHANNELS = (64, 128, 256, 512, 512)

    def __init__(self, convolutions: tuple[int, ...], classes: int = 1000, width: int = 64):
        layers: list[nn.Module] = []
        channels = 3
        for out, count in zip(self.CHANNELS, convolutions, strict=True):
            out = out * width // 64
            for _ in range(count):
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class DenseLayer(nn.Module):
    """Batch norm, ReLU and convolution twice; what it adds to the features, all of which it reads."""

    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet121(nn.Sequential):
    """Huang et al., https://arxiv.org/abs/1608.06993."""

    def __init__(self, classes: int = 1000, width: int = 64, blocks: tuple[int, ...] = (6, 12, 24, 16)):
        growth = width // 2
        layers: list[nn.Module] = [*_conv_norm(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage, count in enumerate(blocks):
            if stage:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
            layers.append(DenseBlock(DenseLayer(channels + growth * layer, growth) for layer in range(count)))
            channels += growth * count
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(channels, classes))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.pool, self.act, self.gate = nn.AdaptiveAvgPool2d(1), nn.SiLU(inplace=True), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))


class MBConv(nn.Module):
    def __init__(self, channels: int, out: int, window: int, stride: int, expansion: int):
        super().__init__()
        hidden = channels * expansion
        expand = [*_conv_norm(channels, hidden, 1), nn.SiLU(inplace=True)] if expansion > 1 else []
        depthwise = [*_conv_norm(hidden, hidden, window, stride, hidden), nn.SiLU(inplace=True)]
        squeeze = SqueezeExcitation(hidden, max(1, channels // 4))
        self.layers = nn.Sequential(*expand, *depthwise, squeeze, *_conv_norm(hidden, out, 1))
        self.shortcut = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class EfficientNetB0(nn.Sequential):
    """Tan and Le, https://arxiv.org/abs/1905.11946; without dropout and stochastic depth."""

    # Expansion, channels, layers, stride, window.
    STAGES = (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
    )  # fmt: skip

    def __init__(self, classes: int = 1000, width: int = 32):
        layers: list[nn.Module] = [*_conv_norm(3, width, 3, 2), nn.SiLU(inplace=True)]
        channels = width
        for expansion, out, count, stride, window in self.STAGES:
            out = out * width // 32
            for block in range(count):
                layers.append(MBConv(channels, out, window, 1 if block else stride, expansion))
                channels = out
        layers += [*_conv_norm(channels, 40 * width, 1), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(40 * width, classes))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
    "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
    "mobilenet_v2": MobileNetV2,
    "convnext_tiny": ConvNeXtTiny,
    "densenet121": DenseNet121,
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "efficientnet_b0": EfficientNetB0,
}


def network(name: str) -> Callable[..., nn.Module]:
    """What makes the network: one of `NETWORKS` by its name, or a function of your own as "package.module:function".

    Raises:
        ValueError: for a name that is neither.
    """
    module, colon, function = name.partition(":")
    if not colon:
        if name not in NETWORKS:
            raise ValueError(f"no network {name!r}; there are {', '.join(NETWORKS)}, or give package.module:function")
        return NETWORKS[name]
    try:
        made: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error
    return made
