"""Training steps of whole networks: what is measured of them, and that each network is itself."""

import sys

import pytest
import torch

import manual_ops
from manual_ops.networks import NETWORKS, network
from manual_ops.steps import VARIANTS, Setting, compare_steps

pytestmark = pytest.mark.cpu("times and memory of the processor; networks on a GPU are in test_cuda.py")

# Learnable numbers of the published networks, for 1000 classes; those of VGG less its two hidden linear layers.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "convnext_tiny": 28_589_128,
    "densenet121": 7_978_856,
    "efficientnet_b0": 5_288_548,
}


def toy():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 31 * 31, 10),
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_network_has_the_parameters_of_the_published_one(name):
    with torch.device("meta"):
        model = NETWORKS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_with_our_layers(name):
    model = manual_ops.convert(NETWORKS[name](classes=5, width=8))
    x = torch.randn(2, 3, 64, 64)
    model(x).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_step_is_measured_in_every_variant():
    steps = {step.variant: step for step in compare_steps(Setting(f"{__name__}:toy", batch=8, image=64), rounds=1)}
    assert list(steps) == list(VARIANTS)
    torch_step, ours, lean = steps["torch"], steps["manual_ops"], steps["lean"]
    assert torch_step.speedup == 1 and torch_step.loss_error == 0
    assert all(step.milliseconds > 0 and step.loss_error < 1e-5 for step in steps.values())
    assert lean.kept_bytes < ours.kept_bytes < torch_step.kept_bytes
    if sys.platform.startswith("linux"):
        # The output of the convolution alone is 8 * 8 * 62 * 62 floats.
        assert all(step.peak_bytes > 8 * 8 * 62 * 62 * 4 for step in steps.values())


@pytest.mark.parametrize("name", ["resnet19", "manual_ops.networks:ResNet19", "no_such_package:model"])
def test_an_unknown_network_is_named(name):
    with pytest.raises(ValueError, match=name.rpartition(":")[2] if "no_such" not in name else "no_such_package"):
        network(name)


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="slow"):
        compare_steps(Setting("resnet18"), variants=["slow"])
