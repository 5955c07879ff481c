"""Writes README.md's tables of speed and memory from the results: python benchmarks/readme.py"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
SETTING = "1-resident"

SUITES = {
    "pooling": "pooling, 1d to 3d",
    "pooling-bfloat16": "pooling, bfloat16",
    "batch_norm": "batch norm",
    "batch_norm_relu": "batch norm + ReLU",
    "batch_norm_add_relu": "batch norm + add + ReLU",
    "cross_entropy": "cross-entropy",
    "softmax": "softmax, log-softmax",
    "depthwise": "depthwise convolution",
    "elementwise": "activations and losses",
    "gelu_tanh": "GELU, tanh",
    "tiny": "every operation on 2x4x8x8, where the call itself costs",
    "conv3x3": "convolution 3x3",
    "conv3x3_stride2": "convolution 3x3, stride 2",
    "conv_stem": "convolution 7x7, stride 2, of images",
    "conv1x1": "convolution 1x1",
    "conv_few_channels": "convolution of 1 to 8 channels",
    "conv_1d_dilated_transposed": "conv1d, dilated, transposed convolution",
    "conv3d": "conv3d",
    "conv_grouped": "grouped convolution, 4 to 32 channels a group",
    "conv-bfloat16": "convolution, bfloat16",
    "conv-float64": "convolution, float64",
}
NETWORKS = {
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "mobilenet_v2": "MobileNetV2",
    "convnext_tiny": "ConvNeXt-T",
    "densenet121": "DenseNet-121",
    "vgg11": "VGG-11",
    "vgg16": "VGG-16",
    "efficientnet_b0": "EfficientNet-B0",
}


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for table in (speed(), memory(), steps()):
        head = re.escape(table[0])
        text, found = re.subn(rf"{head}\n.*?\n\n", "\n".join(table) + "\n\n", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md has {found} tables that begin with {table[0]!r}")
    readme.write_text(text)


def speed() -> list[str]:
    """Of each suite the geometric mean of the speedups, and the range."""
    rows = ["| forward + backward, torch's time / ours | contiguous | channels_last |", "|---|---:|---:|"]
    return rows + [f"| {label} | {_mean(name)} | {_mean(f'{name}-channels_last')} |" for name, label in SUITES.items()]


def _mean(suite: str) -> str:
    path = RESULTS / f"{suite}.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    if SETTING not in runs:
        return ""
    speedups = [row["speedup"] for row in runs[SETTING]["comparison"]["measurements"]]
    mean = f"{runs[SETTING]['mean_speedup']:.2f}"
    return mean if len(speedups) == 1 else f"{mean} ({min(speedups):.2f} to {max(speedups):.2f})"


def memory() -> list[str]:
    """Of each network what a training step keeps for its backward, and how long it takes."""
    rows = [
        "| network | torch | manual_ops | lean | lean / torch | a step, torch's time / ours | lean / not |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, told in _networks("networks").items():
        kept = {variant: step["kept_bytes"] for variant, step in told.items()}
        least, milliseconds = kept["fused and lean"], {variant: step["milliseconds"] for variant, step in told.items()}
        rows.append(
            f"| {NETWORKS[name]} | {kept['torch'] / 1e6:.0f} MB | {kept['manual_ops'] / 1e6:.0f} MB "
            f"| {least / 1e6:.0f} MB | {least / kept['torch']:.2f} | {told['fused']['speedup']:.2f} "
            f"| {milliseconds['lean'] / milliseconds['manual_ops']:.2f} |"
        )
    return rows


def steps() -> list[str]:
    """Of each network a training step at batch 16, in both layouts."""
    rows = ["| a training step, batch 16, torch's time / ours | contiguous | channels_last |", "|---|---:|---:|"]
    contiguous, last = _networks("networks-batch_16"), _networks("networks-batch_16-channels_last")
    return rows + [
        f"| {NETWORKS[name]} | {told['fused']['speedup']:.2f} | {last[name]['fused']['speedup']:.2f} |"
        for name, told in contiguous.items()
    ]


def _networks(name: str) -> dict[str, Any]:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    return {network: told["steps"] for network, told in document["networks"].items()}


if __name__ == "__main__":
    main()
