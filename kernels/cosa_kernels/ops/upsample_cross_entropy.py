"""Cross-entropy of up-sampled logits that never writes the up-sampled logits (kernels/README.md has the derivation)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.autograd import register_ready_gradient
from cosa_kernels.checks import (
    check_choice,
    check_finite,
    check_label_values,
    check_maps,
    check_same_device,
    check_targets,
    check_weight,
)
from cosa_kernels.implementation import Impl, accumulator, choose, full_precision
from cosa_kernels.interpolation import interpolation_matrix, support

Reduction = Literal["mean", "sum"]

TILE_ROWS, TILE_COLUMNS = 32, 512
"""Output pixels the plain torch version holds at a time, for all classes: small enough for a cache."""

MOST_CLASSES = 256
"""More do not fit a thread block's registers: "auto" then takes plain torch."""


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Weighted cross-entropy of bilinearly (`align_corners=False`) up-sampled logits: sum(w * CE) / sum(w).

    Loss and gradient come from one pass over the low-resolution logits. Nothing with K channels is written at full
    resolution: memory beyond the arguments is a few times the logits' own, and a few bytes a pixel. Several targets for
    the same logits cost one pass too. Same result from run to run. No double backward.

    Args:
        logits: (B, K, h, w) float32, bfloat16 or float16 (float64 in plain torch).
        target: (B, H, W) class indices below K, or `ignore_index`; or (N, B, H, W), `torch.stack([one, other])`: N
            targets whose losses are added.
        weight: the shape of `target`, >= 0; None: 1.
        ignore_index: target of pixels that do not count.
        reduction: "mean" divides each target's loss by the sum of its weights, "sum" does not.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU, else torch.

    Returns:
        0-d float32 tensor (float64 for float64 logits); 0 with zero gradient where no pixel counts.

    Raises:
        ValueError: a shape, dtype, device or option is impossible; on the CPU (elsewhere under COSA_KERNELS_DEBUG=1)
            also for a label that is neither below K nor `ignore_index`. On a GPU such a label makes the kernel's loss
            NaN, and ends plain torch with a device-side assertion.

    Example:
        >>> logits = torch.zeros(1, 3, 7, 7, requires_grad=True)
        >>> labels = torch.ones(1, 112, 112, dtype=torch.uint8)
        >>> round(upsample_cross_entropy(logits, labels).item(), 4)  # log 3
        1.0986
    """
    check_maps("logits", logits)
    check_targets(target, len(logits))
    check_weight(weight, target)
    check_same_device(logits=logits, target=target, weight=weight)
    check_choice("reduction", reduction, Reduction)
    fits = logits.shape[1] <= MOST_CLASSES
    impl = choose(impl if fits or impl != "auto" else "torch", logits)
    if impl == "reference":
        return reference.upsample_cross_entropy(
            logits, target, weight=weight, ignore_index=ignore_index, reduction=reduction
        )
    limits = torch.iinfo(target.dtype)
    if not limits.min <= ignore_index <= limits.max:
        target = target.long()  # a comparison with what uint8 cannot hold (-100) would wrap around
    if target.ndim == 3:
        target, weight = target[None], None if weight is None else weight[None]
    dtype = accumulator(logits.dtype)
    if reduction == "mean":
        counted = target != ignore_index
        scale = reciprocal_total(counted if weight is None else torch.where(counted, weight, 0), dtype)
    else:
        scale = torch.ones(len(target), dtype=dtype, device=target.device)
    return scaled_cross_entropy(logits, target, weight, scale, ignore_index, impl)


def reciprocal_total(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) reciprocal of the sum of each target's weights (N, B, H, W); 0 where that is 0."""
    total = weight.sum(dim=(1, 2, 3), dtype=dtype)
    return torch.where(total > 0, total.reciprocal(), 0)


def scaled_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, ignore_index: int, impl: str
) -> Tensor:
    """Sum over the N targets of scale * sum(w * CE), of checked arguments; `impl` is "triton" or "torch"."""
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    loss, _ = _operator(logits, target, weight, scale, ignore_index, with_gradient, impl)
    return loss


@torch.library.custom_op("cosa::upsample_cross_entropy", mutates_args=())
def _operator(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient at low resolution (empty without `with_gradient`), for (N, B, H, W) targets."""
    check_finite(logits=logits, scale=scale)
    check_label_values("target", target, logits.shape[1], ignore_index)
    with full_precision(logits.device):
        if impl == "triton":
            from cosa_kernels.gpu import upsample_cross_entropy as gpu

            return gpu.forward(logits, target, weight, scale, ignore_index, with_gradient)
        return _forward(logits, target, weight, scale, ignore_index, with_gradient)


def _forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The plain torch version: tile by tile, interpolation as matrix products, everything else in place."""
    wide = logits.to(accumulator(logits.dtype))
    loss = wide.new_zeros(())
    gradient = torch.zeros_like(wide, memory_format=torch.contiguous_format) if with_gradient else wide.new_empty(0)
    low, high = (wide.shape[-2], wide.shape[-1]), (target.shape[-2], target.shape[-1])
    resized = low != high
    ay, ax = (interpolation_matrix(n, m, wide.dtype, wide.device) for n, m in zip(low, high, strict=True))
    for image in range(len(wide)):
        for rows, columns in _tiles(high):
            tile = source_rows, source_columns = slice(*rows), slice(*columns)
            if resized:
                source_rows, source_columns = support(low[0], high[0], *rows), support(low[1], high[1], *columns)
            labels = target[:, image, *tile]
            counted = labels != ignore_index
            labels = torch.where(counted, labels, 0).long()
            # Not a product: what is ignored may have any weight, NaN included.
            shares = counted.to(wide.dtype) if weight is None else torch.where(counted, weight[:, image, *tile], 0)
            shares = shares.to(wide.dtype) * scale[:, None, None]
            up = wide[image, :, source_rows, source_columns]
            if resized:
                here_y, here_x = ay[tile[0], source_rows], ax[tile[1], source_columns]
                up = here_y @ (up @ here_x.T)
                up -= up.amax(dim=0)
            else:
                up = up - up.amax(dim=0)
            chosen = up.gather(0, labels)
            up.exp_()
            total = up.sum(dim=0)
            loss += (shares * (total.log() - chosen)).sum()
            if with_gradient:
                up *= shares.sum(dim=0) / total
                for label, share in zip(labels, shares, strict=True):
                    # One label a pixel: no two additions meet, the order cannot matter.
                    up.scatter_add_(0, label[None], -share[None])
                if resized:
                    up = (here_y.T @ up) @ here_x
                gradient[image, :, source_rows, source_columns] += up
    return loss, gradient


def _tiles(size: tuple[int, int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    for top in range(0, size[0], TILE_ROWS):
        for left in range(0, size[1], TILE_COLUMNS):
            yield (top, min(top + TILE_ROWS, size[0])), (left, min(left + TILE_COLUMNS, size[1]))


@_operator.register_fake
def _(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(logits.dtype)
    loss = logits.new_empty((), dtype=dtype)
    return loss, logits.new_empty(logits.shape, dtype=dtype) if with_gradient else logits.new_empty(0, dtype=dtype)


register_ready_gradient(_operator)
