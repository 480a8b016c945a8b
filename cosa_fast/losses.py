"""The terms of the CoSA objective (Eq. 11), from the operations of cosa_kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from cosa_kernels import cam_pseudo_labels, upsample_cross_entropy
from torch import Tensor

from cosa_fast.assign import banded_labels, scale_box
from cosa_fast.config import CosaConfig
from cosa_fast.data.classes import BACKGROUND, IGNORED


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_cls of (B, C) logits against (B, C) multi-hot labels (Eq. 1)."""
    return F.binary_cross_entropy_with_logits(logits.to(labels.dtype), labels)


def cam_targets(
    cams: Sequence[Tensor], present: Tensor, thresholds: Sequence[Tensor], valid_box: Tensor, config: CosaConfig
) -> tuple[Tensor, Tensor]:
    """What the segmentation is to learn from N kinds of CAMs (Eq. 3, 4), with weights that are not yet normalised.

    Args:
        cams: main and auxiliary merged CAMs of the assignment network, (B, P, S, S) each.
        present: (B, P) the classes of these maps, then -1.
        thresholds: 0-d xi of each.
        valid_box: (B, 4), in pixels of `cams`.
        config: RAW and ignore-band switches.

    Returns:
        (N, B, S, S) uint8 labels and (N, B, S, S) weights: the reliability (RAW) or 1.
    """
    targets, weights = [], []
    for maps, threshold in zip(cams, thresholds, strict=True):
        labels, perplexity = cam_pseudo_labels(
            maps,
            threshold,
            classes=present,
            valid_box=valid_box,
            lambda_alpha=config.lambda_alpha,
            lambda_beta=config.lambda_beta,
        )
        if config.ignore_band is not None:
            labels = banded_labels(maps, present, config.ignore_band, valid_box)
        targets.append(labels)
        weights.append(perplexity.reciprocal() if config.raw else torch.ones_like(perplexity))
    return torch.stack(targets), torch.stack(weights)


def weight_totals(labels: Tensor, weights: Tensor, balance: bool) -> Tensor:
    """(N, groups) sums of `cam_targets`' weights: of background and of foreground pixels with `balance`, else of all.

    Those of all parts of a batch, added up, are what `normalised_weights` takes.
    """
    groups = [labels == BACKGROUND, labels != IGNORED]
    if balance:
        groups[1] &= labels != BACKGROUND
    kept = [torch.where(group, weights, 0) for group in (groups if balance else groups[1:])]
    return torch.stack([torch.stack([kind.sum() for kind in group]) for group in kept], dim=1)


def normalised_weights(labels: Tensor, weights: Tensor, totals: Tensor, balance: bool) -> Tensor:
    """(N, B, S, S) weights that add up to 1 over the whole batch, for each of the N kinds of CAMs (Eq. 5).

    With `balance` background and foreground pixels have half of it each (release); a batch with only one of the two
    groups gets that half. Nothing counts: all are 0.
    """
    counted = torch.where(labels != IGNORED, weights, 0)
    if not balance:
        share = torch.where(totals > 0, totals.reciprocal(), 0)
        return counted * share[:, 0, None, None, None]
    totals = torch.where(totals > 0, totals, 1)[..., None, None, None]
    return 0.5 * counted / torch.where(labels == BACKGROUND, totals[:, 0], totals[:, 1])


def cam_to_seg_loss(seg: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """L_c2s, added up over N kinds of CAMs: segmentation logits against their pseudo-labels (Eq. 3 to 5), in one pass.

    Args:
        seg: (B, C + 1, h, w) logits of the online network.
        labels: (N, B, S, S) of `cam_targets`.
        weights: (N, B, S, S) of `normalised_weights`.
    """
    return upsample_cross_entropy(seg, labels, weight=weights, reduction="sum")


def contrast_regions(
    cams: Tensor, present: Tensor, threshold: Tensor, valid_box: Tensor, grid: tuple[int, int], config: CosaConfig
) -> tuple[Tensor, Tensor]:
    """Regions for contrastive separation: labels and perplexity of auxiliary CAMs at the tokens (Eq. 9).

    Args:
        cams: (B, P, S, S) auxiliary CAMs.
        present: (B, P) the classes of these maps, then -1.
        threshold: 0-d xi.
        valid_box: (B, 4), in pixels of `cams`.
        grid: the tokens of a crop.
        config: RAW's parameters.

    Returns:
        (B, *grid) uint8 labels, and perplexity; infinite where a position does not count.
    """
    small = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)
    return cam_pseudo_labels(
        small,
        threshold,
        classes=present,
        valid_box=scale_box(valid_box, cams.shape[-1], grid[-1]),
        lambda_alpha=config.lambda_alpha,
        lambda_beta=config.lambda_beta,
    )


def dense_energy_loss(
    seg: Tensor,
    images: Tensor,
    labels: Tensor,
    valid_box: Tensor,
    *,
    sigma_color: float = 15.0,
    sigma_space: float = 100.0,
    scale: float = 0.5,
    chunk: int = 2048,
) -> Tensor:
    """The release's dense energy regulariser: similar pixels should have the same label.

    -1e-7 / B * sum over pixels i, j of gate_i * k(i, j) * <s_i, s_j>, with s the softmax segmentation inside the valid
    box and k a Gaussian of colour and position. The kernel is summed exactly, in chunks of rows, where the release
    approximates it on a lattice on the CPU.

    Args:
        seg: (B, K, h, w) logits.
        images: (B, 3, H, W) in 0..255, the online network's view.
        labels: (B, H, W) uint8 pseudo-labels; ignored pixels are gated fully open.
        valid_box: (B, 4) in pixels of `images`.
        sigma_color, sigma_space: standard deviations, in grey levels and in pixels of the full resolution.
        scale: resolution at which pixels are compared.
        chunk: rows of the affinity matrix at a time.

    Returns:
        0-d tensor, at most 0 in value; computed in float32, or in float64 if `seg` has it.
    """
    size = tuple(round(side * scale) for side in images.shape[-2:])
    dtype = torch.promote_types(seg.dtype, torch.float32)
    small_images = F.interpolate(images.to(dtype), size=size, mode="nearest")
    probabilities = F.interpolate(seg.to(dtype), size=images.shape[-2:], mode="bilinear", align_corners=False)
    probabilities = F.interpolate(probabilities.softmax(dim=1), size=size, mode="bilinear", align_corners=False)
    small_labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0]
    ys = (torch.arange(size[0], device=seg.device, dtype=dtype) + 0.5) / scale
    xs = (torch.arange(size[1], device=seg.device, dtype=dtype) + 0.5) / scale
    box = valid_box[:, :, None]
    rows = (ys >= box[:, 0]) & (ys < box[:, 1])
    columns = (xs >= box[:, 2]) & (xs < box[:, 3])
    region = (rows[:, :, None] & columns[:, None, :]).to(dtype)
    gate = (region - probabilities.detach().amax(dim=1)).clamp(min=0.0)
    gate = torch.where(small_labels == 255, 1.0, gate) * region
    position = torch.stack(torch.meshgrid(ys, xs, indexing="ij"), dim=-1).flatten(0, 1) / sigma_space
    colors = small_images.flatten(2).transpose(1, 2) / sigma_color
    features = torch.cat([position.expand(len(colors), -1, -1), colors], dim=-1)
    segments = (probabilities * region[:, None]).flatten(2).transpose(1, 2)
    with torch.no_grad():
        smoothed = torch.cat(
            [torch.exp(-0.5 * torch.cdist(part, features) ** 2) @ segments for part in features.split(chunk, dim=1)],
            dim=1,
        )
    # The kernel is symmetric: the gradient of the quadratic form is twice that of its product with a constant.
    gated = gate.flatten(1)[..., None] * smoothed
    product = (segments * gated).sum()
    return -1e-7 / len(seg) * (2.0 * product - product.detach())
