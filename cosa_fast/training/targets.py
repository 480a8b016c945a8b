"""What a batch asks of the online network, from the assignment network's views; normalised over the whole batch.

The whole batch is what all processes and all of their parts (gradient accumulation) see together. Gradients are
averaged over processes, so each one's terms are its share of the whole batch's times the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cosa_kernels import DynamicThreshold
from torch import Tensor

from cosa_fast.assign import Assignments
from cosa_fast.config import CosaConfig
from cosa_fast.distributed import World
from cosa_fast.losses import cam_targets, contrast_regions, normalised_weights, weight_totals


@dataclass(frozen=True, slots=True)
class Regions:
    """Where the online network's CAMs are alike and where they are not (Eq. 9)."""

    labels: Tensor
    """(B, h, w) uint8."""
    perplexity: Tensor
    """(B, h, w)."""
    share: Tensor
    """0-d: this part's share of the whole batch's anchors, times the number of processes."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Of one part of a batch."""

    assignments: Assignments
    labels: Tensor
    """(2, B, S, S) uint8 labels of the segmentation, from main and auxiliary CAMs."""
    weights: Tensor
    """(2, B, S, S); for each kind of CAMs they add up to the number of processes over the whole batch."""
    regions: Regions | None
    """For contrastive separation; None before guidance and without it."""


@torch.no_grad()
def make_targets(
    parts: Sequence[Assignments],
    thresholds: tuple[DynamicThreshold, DynamicThreshold],
    grid: tuple[int, int],
    config: CosaConfig,
    guided: bool,
    world: World,
) -> list[Targets]:
    """Move the thresholds on, assign labels, weigh them.

    Args:
        parts: of this process; two small sums over all processes are all that they exchange.
        thresholds: of main and auxiliary CAMs; they follow the CAMs once `guided`, if they are dynamic.
        grid: the tokens of a crop.
        config: the switches.
        guided: whether guidance has started.
        world: all processes.
    """
    if guided and config.dynamic_threshold:
        _follow(parts, thresholds, world)
    main, aux = (threshold.xi for threshold in thresholds)
    labelled = [
        cam_targets((part.cams, part.aux_cams), part.present, (main, aux), part.valid_box, config) for part in parts
    ]
    regions: list[tuple[Tensor, Tensor]] = []
    if guided and config.csc:
        regions = [contrast_regions(part.aux_cams, part.present, aux, part.valid_box, grid, config) for part in parts]
    totals = torch.stack([weight_totals(*pair, config.balance) for pair in labelled]).sum(dim=0)
    counts = [(perplexity <= config.epsilon).sum() for _, perplexity in regions]
    everything = torch.cat([totals.flatten(), *(count[None] for count in counts)]).double()
    anchors = everything[totals.numel() :].sum()
    shared = torch.cat([everything[: totals.numel()], anchors[None]])
    world.add(shared)
    shared /= world.size
    totals = shared[:-1].view_as(totals).to(totals.dtype)
    # Without any anchor the loss is 0, whatever its share.
    shares = [(count / shared[-1].clamp(min=1 / world.size)).to(totals.dtype) for count in counts]
    return [
        Targets(
            assignments=part,
            labels=labels,
            weights=normalised_weights(labels, weights, totals, config.balance),
            regions=Regions(*regions[k], shares[k]) if regions else None,
        )
        for k, (part, (labels, weights)) in enumerate(zip(parts, labelled, strict=True))
    ]


def _follow(parts: Sequence[Assignments], thresholds: Sequence[DynamicThreshold], world: World) -> None:
    """Both thresholds take in the whole batch (Eq. 6)."""
    counts = torch.stack(
        [
            torch.stack([thresholds[0].count(part.cams, part.valid_box) for part in parts]).sum(dim=0),
            torch.stack([thresholds[1].count(part.aux_cams, part.valid_box) for part in parts]).sum(dim=0),
        ]
    )
    world.add(counts)
    for threshold, count in zip(thresholds, counts, strict=True):
        threshold.update_counts(count)
