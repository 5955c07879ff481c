"""Drop-in layers: subclasses of torch.nn's, with its names, constructors, parameters, buffers, hooks and `repr`.

Only `forward` differs: it calls `manual_ops.functional`. Names of torch.nn that manual_ops does not replace
(`Sequential`, `Dropout`, ...) are torch's own, so that `from manual_ops import nn` is enough in a model.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from manual_ops import functional
from manual_ops.ops.sync_batch_norm import sync_batch_norm

__all__ = [
    "GELU",
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "CrossEntropyLoss",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
    "NLLLoss",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "SyncBatchNorm",
    "SyncBatchNormReLU",
    "Tanh",
]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn, name)


class _Conv:
    _function: Callable[..., Tensor]

    # torch.nn's forward calls this; so do subclasses that put another weight in its place.
    def _conv_forward(self: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = torch.nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._function(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1d(_Conv, torch.nn.Conv1d):
    _function = staticmethod(functional.conv1d)


class Conv2d(_Conv, torch.nn.Conv2d):
    _function = staticmethod(functional.conv2d)


class Conv3d(_Conv, torch.nn.Conv3d):
    _function = staticmethod(functional.conv3d)


class _ConvTranspose:
    _function: Callable[..., Tensor]

    def forward(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if self.padding_mode != "zeros":
            raise ValueError(f"{type(self).__name__}: padding_mode must be 'zeros', got {self.padding_mode!r}")
        axes = len(self.kernel_size)
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, axes, self.dilation
        )
        return self._function(
            input, self.weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class ConvTranspose1d(_ConvTranspose, torch.nn.ConvTranspose1d):
    _function = staticmethod(functional.conv_transpose1d)


class ConvTranspose2d(_ConvTranspose, torch.nn.ConvTranspose2d):
    _function = staticmethod(functional.conv_transpose2d)


class ConvTranspose3d(_ConvTranspose, torch.nn.ConvTranspose3d):
    _function = staticmethod(functional.conv_transpose3d)


class _MaxPool:
    _function: Callable[..., Any]

    def forward(self: Any, input: Tensor) -> Any:
        return self._function(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


class MaxPool1d(_MaxPool, torch.nn.MaxPool1d):
    _function = staticmethod(functional.max_pool1d)


class MaxPool2d(_MaxPool, torch.nn.MaxPool2d):
    _function = staticmethod(functional.max_pool2d)


class MaxPool3d(_MaxPool, torch.nn.MaxPool3d):
    _function = staticmethod(functional.max_pool3d)


class AvgPool1d(torch.nn.AvgPool1d):
    def forward(self, input: Tensor) -> Tensor:
        return functional.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


class _AvgPool:
    _function: Callable[..., Tensor]

    def forward(self: Any, input: Tensor) -> Tensor:
        return self._function(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AvgPool2d(_AvgPool, torch.nn.AvgPool2d):
    _function = staticmethod(functional.avg_pool2d)


class AvgPool3d(_AvgPool, torch.nn.AvgPool3d):
    _function = staticmethod(functional.avg_pool3d)


class _AdaptiveAvgPool:
    _function: Callable[..., Tensor]

    def forward(self: Any, input: Tensor) -> Tensor:
        return self._function(input, self.output_size)


class AdaptiveAvgPool1d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool1d):
    _function = staticmethod(functional.adaptive_avg_pool1d)


class AdaptiveAvgPool2d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool2d):
    _function = staticmethod(functional.adaptive_avg_pool2d)


class AdaptiveAvgPool3d(_AdaptiveAvgPool, torch.nn.AdaptiveAvgPool3d):
    _function = staticmethod(functional.adaptive_avg_pool3d)


class _AdaptiveMaxPool:
    _function: Callable[..., Any]

    def forward(self: Any, input: Tensor) -> Any:
        return self._function(input, self.output_size, self.return_indices)


class AdaptiveMaxPool1d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool1d):
    _function = staticmethod(functional.adaptive_max_pool1d)


class AdaptiveMaxPool2d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool2d):
    _function = staticmethod(functional.adaptive_max_pool2d)


class AdaptiveMaxPool3d(_AdaptiveMaxPool, torch.nn.AdaptiveMaxPool3d):
    _function = staticmethod(functional.adaptive_max_pool3d)


class _BatchNorm:
    def forward(self: Any, input: Tensor) -> Tensor:
        return functional.batch_norm(*self._batch_norm_arguments(input))

    def _batch_norm_arguments(self: Any, input: Tensor) -> tuple[Any, ...]:
        """What `functional.batch_norm` is called with; counts the batch."""
        self._check_input_dim(input)
        momentum = self.momentum
        tracking = self.training and self.track_running_stats
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        if momentum is None:
            # The cumulative average: batch t enters with the weight 1/t.
            counted = tracking and self.num_batches_tracked is not None
            momentum = 1.0 / float(self.num_batches_tracked) if counted else 0.0
        use_batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        keep = tracking or not self.training
        return (
            input,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            use_batch_statistics,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    pass


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    pass


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    pass


class _BatchNormReLU(_BatchNorm):
    """relu(batch_norm(input) + residual) as one layer, which keeps half of what the separate layers keep."""

    def forward(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
        arguments = (*self._batch_norm_arguments(input), residual)
        return functional.batch_norm_relu(*arguments)


class BatchNormReLU1d(_BatchNormReLU, torch.nn.BatchNorm1d):
    pass


class BatchNormReLU2d(_BatchNormReLU, torch.nn.BatchNorm2d):
    pass


class BatchNormReLU3d(_BatchNormReLU, torch.nn.BatchNorm3d):
    pass


class SyncBatchNorm(_BatchNorm, torch.nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all processes in training; also on the CPU, where torch's refuses to run.

    No subclass of torch.nn.SyncBatchNorm: DistributedDataParallel refuses every one of them on the CPU.
    """

    __signature__ = inspect.signature(torch.nn.SyncBatchNorm)  # with `bias` from torch 2.13 on, among `options` here

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] == 0:
            raise ValueError(
                f"SyncBatchNorm: input must have the shape (N, C, ...) with at least one channel, "
                f"got {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        arguments = self._batch_norm_arguments(input)
        group = self._group_to_synchronise()
        if group is None:
            return functional.batch_norm(*arguments)
        input, running_mean, running_var, weight, bias, _, momentum, eps = arguments
        return sync_batch_norm(input, running_mean, running_var, weight, bias, momentum, eps, group)

    def _group_to_synchronise(self) -> Any:
        """The process group; None in evaluation and where a process is alone."""
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replace every batch norm in `module`, of torch.nn or of manual_ops.nn, by its synchronised form.

        Args:
            module: a model, or a batch norm.
            process_group: the processes that share a batch; by default all.

        Returns:
            `module`, or the new layer where it is a batch norm itself. A new layer has the parameters and buffers of
            the one it replaces, and, as with torch's method, none of its hooks. A layer in two places stays one.
        """
        return _synchronised(module, process_group, {})


class SyncBatchNormReLU(SyncBatchNorm):
    """relu(SyncBatchNorm(input) + residual): what `convert_sync_batchnorm` makes of BatchNormReLU."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        output = super().forward(input)
        return functional.relu(output if residual is None else output + residual)


def _synchronised(
    module: torch.nn.Module, process_group: Any, done: dict[torch.nn.Module, torch.nn.Module]
) -> torch.nn.Module:
    if module in done:
        return done[module]
    output = done[module] = module
    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        twin = SyncBatchNormReLU if isinstance(module, (_BatchNormReLU, SyncBatchNormReLU)) else SyncBatchNorm
        output = done[module] = twin(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group,
            device="meta",
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(output, name, getattr(module, name))
        output.training = module.training
    for name, child in module._modules.items():
        if child is not None:
            output.add_module(name, _synchronised(child, process_group, done))
    return output


class ReLU(torch.nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class ReLU6(torch.nn.ReLU6):
    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class Sigmoid(torch.nn.Sigmoid):
    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class Tanh(torch.nn.Tanh):
    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


class SiLU(torch.nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, self.inplace)


class GELU(torch.nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class Softmax(torch.nn.Softmax):
    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim, _stacklevel=5)


class LogSoftmax(torch.nn.LogSoftmax):
    def forward(self, input: Tensor) -> Tensor:
        return functional.log_softmax(input, self.dim, _stacklevel=5)


class Linear(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class NLLLoss(torch.nn.NLLLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.nll_loss(input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction)


class MSELoss(torch.nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )
