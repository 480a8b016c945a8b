"""The terms of the CoSA objective (Eq. 11), from the operations of cosa_kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from cosa_kernels import cam_pseudo_labels, raw_cross_entropy, upsample_cross_entropy
from torch import Tensor

from cosa_fast.assign import banded_labels
from cosa_fast.config import CosaConfig


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """L_cls of (B, C) logits against (B, C) multi-hot labels (Eq. 1)."""
    return F.binary_cross_entropy_with_logits(logits.to(labels.dtype), labels)


def cam_to_seg_loss(
    seg: Tensor, cams: Sequence[Tensor], thresholds: Sequence[Tensor], valid_box: Tensor, config: CosaConfig
) -> Tensor:
    """L_c2s, added up over kinds of CAMs: segmentation logits against their pseudo-labels (Eq. 3 to 5), in one pass.

    Args:
        seg: (B, C + 1, h, w) logits of the online network.
        cams: main and auxiliary merged CAMs of the assignment network, (B, C, S, S) each.
        thresholds: 0-d xi of each.
        valid_box: (B, 4), in pixels of `cams`.
        config: RAW, balance and ignore-band switches.
    """
    alpha, beta = config.lambda_alpha, config.lambda_beta
    if config.raw and not config.balance:
        size = (cams[0].shape[-2], cams[0].shape[-1])
        return raw_cross_entropy(
            seg, cams, thresholds, size=size, valid_box=valid_box, lambda_alpha=alpha, lambda_beta=beta
        )
    targets, weights = [], []
    with torch.no_grad():
        for maps, threshold in zip(cams, thresholds, strict=True):
            labels, perplexity = cam_pseudo_labels(
                maps, threshold, valid_box=valid_box, lambda_alpha=alpha, lambda_beta=beta
            )
            if config.ignore_band is not None:
                labels = banded_labels(maps, config.ignore_band, valid_box)
            reliability = perplexity.reciprocal() if config.raw else torch.ones_like(perplexity)
            targets.append(labels)
            weights.append(balanced_weights(labels, reliability) if config.balance else reliability)
        target, weight = torch.stack(targets), torch.stack(weights)
    # The balanced weights of one kind of CAMs add up to 1, or to 1/2 where the batch has only one of the two groups.
    return upsample_cross_entropy(seg, target, weight=weight, reduction="sum" if config.balance else "mean")


def balanced_weights(labels: Tensor, reliability: Tensor) -> Tensor:
    """(B, H, W) weights that give background and foreground pixels half of the loss each (release)."""
    background = (labels == 0) * reliability
    foreground = ((labels != 0) & (labels != 255)) * reliability
    return 0.5 * (background / (background.sum() + 1e-6) + foreground / (foreground.sum() + 1e-6))


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
        0-d tensor, at most 0 in value.
    """
    size = tuple(round(side * scale) for side in images.shape[-2:])
    small_images = F.interpolate(images.float(), size=size, mode="nearest")
    probabilities = F.interpolate(seg.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)
    probabilities = F.interpolate(probabilities.softmax(dim=1), size=size, mode="bilinear", align_corners=False)
    small_labels = F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0]
    ys = (torch.arange(size[0], device=seg.device) + 0.5) / scale
    xs = (torch.arange(size[1], device=seg.device) + 0.5) / scale
    box = valid_box[:, :, None].float()
    rows = (ys >= box[:, 0]) & (ys < box[:, 1])
    columns = (xs >= box[:, 2]) & (xs < box[:, 3])
    region = (rows[:, :, None] & columns[:, None, :]).float()
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
