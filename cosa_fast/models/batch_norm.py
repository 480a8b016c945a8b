"""Batch norm over the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from cosa_fast.distributed import World


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose statistics are those of all processes' batches, on any device.

    torch's SyncBatchNorm, faster, is for GPUs only. Every process has equally many values.
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
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return centred * (scale * self.weight)[:, None, None] + self.bias[:, None, None]
        return centred * scale[:, None, None]


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


def share_batch_norm(net: nn.Module, world: World, device: torch.device) -> None:
    """Let the batch norms of `net`, in place, see the batches of all processes; its parameters stay the same objects.

    Raises:
        ValueError: a batch norm of another kind on the CPU.
    """
    if world.size == 1:
        return
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
