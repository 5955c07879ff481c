"""Trains one small CNN twice, with torch.nn and with manual_ops.nn, on scikit-learn's handwritten digits.

Both runs start from the same weights and see the same batches in the same order, so their losses differ by rounding
alone: conv, batch norm, ReLU, max pool, conv, batch norm, ReLU, global average pool, linear, cross-entropy.

In a process group of torch.distributed, manual_ops trains in all its processes, each on its part of every batch, with
synchronised batch norm and averaged gradients: the same numbers again. torch trains as it does alone, on whole batches,
for it cannot synchronise batch norm on the CPU; every process does so for itself.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import manual_ops.nn

PACKAGES: dict[str, ModuleType] = {"torch": nn, "manual_ops": manual_ops.nn}
SEED = 0
BATCH_SIZE = 64
WIDTH = 24
LEARNING_RATE = 0.05  # the highest; the schedule climbs to it and comes down again
EPOCHS = 12
ACCURACY = 0.97

# Between the losses of a step. Rounding grows while a network learns: where it tips a ReLU's sign in float32, the
# losses part by some 1e-3. In float64 no sign tips, and the curves agree to 1e-12 or better.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 5e-2, torch.bfloat16: 1.0, torch.float16: 1.0}


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8), standardised, and labels (N,), of the training and the test part."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        package: "torch" or "manual_ops", whose layers and loss it used.
        losses: of every step.
        accuracy: on the test images, 0 to 1.
        epoch_seconds: of every epoch.
        weights: the trained parameters and running statistics.
    """

    package: str
    losses: tuple[float, ...]
    accuracy: float
    epoch_seconds: tuple[float, ...]
    weights: dict[str, Tensor]

    def same_bits(self, other: "Run") -> bool:
        """Whether two runs went through exactly the same numbers."""
        same_weights = all(torch.equal(weight, other.weights[name]) for name, weight in self.weights.items())
        return self.losses == other.losses and same_weights


@dataclass(frozen=True)
class Training:
    """Both runs.

    Attributes:
        steps_per_epoch: batches in an epoch.
        dtype: of weights and images.
        repeatable: whether a second manual_ops run gave the same bits; None if there was none.
        processes: how many manual_ops trained in.
    """

    torch: Run
    manual_ops: Run
    steps_per_epoch: int
    dtype: str
    repeatable: bool | None
    processes: int = 1

    @property
    def largest_difference(self) -> float:
        """Between the two losses of a step."""
        pairs = zip(self.torch.losses, self.manual_ops.losses, strict=True)
        return max(abs(theirs - ours) for theirs, ours in pairs)

    @property
    def allowed_difference(self) -> float:
        return AGREEMENT[getattr(torch, self.dtype)]

    def problems(self, accuracy: float = ACCURACY) -> list[str]:
        """What is wrong with the runs; empty when all is well."""
        found = [
            f"{run.package} reached {run.accuracy:.1%} of the test images, {accuracy:.0%} are expected"
            for run in (self.torch, self.manual_ops)
            if not run.accuracy >= accuracy
        ]
        if not self.largest_difference <= self.allowed_difference:
            found.append(
                f"the losses differ by {self.largest_difference:.1e}, {self.dtype} allows {self.allowed_difference:.0e}"
            )
        if self.repeatable is False:
            found.append("two runs of manual_ops gave different bits")
        return found


def load_digits(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Digits:
    """The 1,797 images, three quarters of every class for training; always the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels, test_pixels, labels, test_labels = train_test_split(
        pixels, labels, test_size=0.25, stratify=labels, random_state=SEED
    )
    mean, std = pixels.mean(), pixels.std()

    def images(values):
        return torch.tensor((values - mean) / std, dtype=dtype, device=device).reshape(-1, 1, 8, 8)

    return Digits(
        images(pixels),
        torch.tensor(labels, device=device),
        images(test_pixels),
        torch.tensor(test_labels, device=device),
    )


def small_cnn(layers: ModuleType, width: int = WIDTH) -> nn.Sequential:
    """The network, with the layers of torch.nn or manual_ops.nn."""
    return nn.Sequential(
        layers.Conv2d(1, width, 3, padding=1),  # (N, width, 8, 8)
        layers.BatchNorm2d(width),
        layers.ReLU(),
        layers.MaxPool2d(2),  # (N, width, 4, 4)
        layers.Conv2d(width, 2 * width, 3, padding=1),  # (N, 2*width, 4, 4)
        layers.BatchNorm2d(2 * width),
        layers.ReLU(),
        layers.AdaptiveAvgPool2d(1),  # (N, 2*width, 1, 1)
        nn.Flatten(),
        layers.Linear(2 * width, 10),
    )


def train(
    epochs: int = EPOCHS,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeat: bool = False,
    on_step: Callable[[str, int, int, float], None] = lambda package, step, steps, loss: None,
) -> Training:
    """Train with both packages, on this thread's backend.

    Args:
        epochs: passes over the training images.
        dtype: of weights and images.
        device: where to train.
        repeat: train with manual_ops a second time and compare the bits.
        on_step: called with the package, the steps done, the steps of a run and the loss.

    Returns:
        Both runs; the same in every process of a group.
    """
    digits = load_digits(dtype, device)

    def run(package: str) -> Run:
        return _run(package, digits, epochs, on_step)

    theirs, ours = run("torch"), run("manual_ops")
    repeatable = ours.same_bits(run("manual_ops")) if repeat else None
    name = str(dtype).removeprefix("torch.")
    return Training(theirs, ours, steps_per_epoch(len(digits.labels)), name, repeatable, _processes())


def steps_per_epoch(images: int) -> int:
    """Batches in an epoch: whole ones only, so that batch norm never sees a remainder."""
    return images // BATCH_SIZE


def _processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _run(package: str, digits: Digits, epochs: int, on_step: Callable[[str, int, int, float], None]) -> Run:
    layers = PACKAGES[package]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = small_cnn(nn)
    if layers is not nn:
        initial = model.state_dict()
        model = small_cnn(layers)
        model.load_state_dict(initial)
    model.to(digits.images.device, digits.images.dtype)
    processes = _processes() if package == "manual_ops" else 1
    trained: nn.Module = model
    if processes > 1:
        trained = DistributedDataParallel(manual_ops.nn.SyncBatchNorm.convert_sync_batchnorm(model))
    loss_function = layers.CrossEntropyLoss(reduction="sum")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    total = epochs * steps_per_epoch(len(digits.labels))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=total)

    losses: list[float] = []
    epoch_seconds = []
    for epoch in range(epochs):
        began = time.perf_counter()
        for images, labels in _batches(digits, epoch):
            optimizer.zero_grad()
            if processes > 1:
                images, labels = (_part(each, processes) for each in (images, labels))
            loss = loss_function(trained(images), labels) / BATCH_SIZE
            # The processes' losses add up to the batch's; their gradients are averaged.
            (loss * processes).backward()
            optimizer.step()
            schedule.step()
            losses.append(_total(loss.detach(), processes).item())
            on_step(package, len(losses), total, losses[-1])
        epoch_seconds.append(time.perf_counter() - began)

    model.eval()
    with torch.no_grad():
        accuracy = (model(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()
    weights = {name: weight.detach().cpu().clone() for name, weight in model.state_dict().items()}
    return Run(package, tuple(losses), accuracy, tuple(epoch_seconds), weights)


def _part(batch: Tensor, processes: int) -> Tensor:
    """This process's part of a batch."""
    return batch.tensor_split(processes)[distributed.get_rank()]


def _total(value: Tensor, processes: int) -> Tensor:
    """The sum over the processes."""
    if processes > 1:
        distributed.all_reduce(value)
    return value


def _batches(digits: Digits, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, in an order that the epoch alone decides."""
    order = torch.randperm(len(digits.labels), generator=torch.Generator().manual_seed(SEED + epoch))
    order = order[: steps_per_epoch(len(order)) * BATCH_SIZE].to(digits.labels.device)
    for indices in order.split(BATCH_SIZE):
        yield digits.images[indices], digits.labels[indices]
