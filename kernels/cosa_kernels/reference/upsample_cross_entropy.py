"""Weighted cross-entropy of up-sampled logits, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_kernels.checks import check_maps, check_targets
from cosa_kernels.reference.upsample import upsample


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Weighted cross-entropy of up-sampled logits: sum(w * CE) / sum(w).

    Args:
        logits: (B, K, h, w).
        target: (B, H, W) integers below K, or `ignore_index`; or (N, B, H, W): N losses, added.
        weight: the shape of `target`, >= 0; None: 1.
        ignore_index: target of pixels that do not count.
        reduction: "mean" divides each loss by the sum of its weights, "sum" does not.

    Returns:
        0-d tensor; 0 (with zero gradient) where no pixel counts.

    Raises:
        ValueError: a shape or dtype is impossible.
    """
    check_maps("logits", logits)
    check_targets(target, len(logits))
    full = upsample(logits.to(torch.promote_types(logits.dtype, torch.float32)), (target.shape[-2], target.shape[-1]))
    targets = (target if target.ndim == 4 else target[None]).long()
    weights = torch.ones_like(targets, dtype=full.dtype) if weight is None else weight.to(full.dtype).view_as(targets)
    losses = []
    for labels, factor in zip(targets, weights, strict=True):
        counted = labels != ignore_index
        loss = F.cross_entropy(full, labels, ignore_index=ignore_index, reduction="none")
        # Not a product: what is ignored may have any weight, NaN included.
        factor = torch.where(counted, factor, 0.0)
        total = factor.sum() if reduction == "mean" else factor.new_ones(())
        losses.append((factor * loss).sum() / torch.where(total > 0, total, 1.0))
    return torch.stack(losses).sum()
