"""Layers that look at a whole batch, or draw for it, where several processes hold a part each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import DropPath, convert_sync_batchnorm
from torch import Tensor, nn

from cosa_fast.distributed import World


def share_layers(net: nn.Module, world: World, device: torch.device) -> None:
    """Let batch norm and dropout in `net` do, in place, what they would do to the whole batch in one process.

    Parameters stay the same objects, under the same names. On GPUs torch's SyncBatchNorm waits for the device.

    Raises:
        ValueError: a batch norm of another kind than nn.BatchNorm2d on the CPU.
    """
    if world.size == 1:
        return
    for module in net.modules():
        if type(module) in _DRAWING and getattr(module, "p", getattr(module, "drop_prob", 0.0)) > 0:
            module.__class__ = _DRAWING[type(module)]
    if device.type == "cuda":
        convert_sync_batchnorm(net)
        return
    for name, module in net.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
        elif normalises_over_batch(module):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which processes on a CPU cannot share: use one process, or GPUs"
            )


def normalises_over_batch(module: nn.Module) -> bool:
    """Whether what this layer makes of an image depends on the others in the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics are those of all processes' batches, equally large, on any device.

    torch's SyncBatchNorm, faster, is for GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W)."""
        if not self.training:
            return super().forward(input)
        count = input.numel() // input.shape[1] * dist.get_world_size()
        mean = _Sum.apply(input.sum(dim=(0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked.add_(1)
            for running, value in ((self.running_mean, mean), (self.running_var, variance * (count / (count - 1)))):
                assert running is not None
                running.lerp_(value.to(running.dtype), self.momentum)
        normalised = centred * (variance + self.eps).rsqrt()[:, None, None]
        return normalised * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else normalised


class _Sum(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class _DrawsForAll(nn.Module):
    """Dropout that draws for the whole batch, as each process does from the same generator, and applies its part."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        size, rank = dist.get_world_size(), dist.get_rank()
        kept: Tensor = super().forward(input.new_ones((size * len(input), *input.shape[1:])))
        return input * kept[rank * len(input) :][: len(input)]


class _Dropout(_DrawsForAll, nn.Dropout):
    pass


class _Dropout2d(_DrawsForAll, nn.Dropout2d):
    pass


class _DropPath(_DrawsForAll, DropPath):
    pass


_DRAWING: dict[type, type] = {nn.Dropout: _Dropout, nn.Dropout2d: _Dropout2d, DropPath: _DropPath}
