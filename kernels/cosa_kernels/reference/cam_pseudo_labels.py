"""CAM pseudo-labels and their perplexity (Eq. 3, 4), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from cosa_kernels.checks import check_cams, check_classes, check_open_fraction, check_positive, check_valid_box
from cosa_kernels.reference.upsample import Size, upsample

EDGE = 1e-6
"""Distance that thresholds keep from 0 and 1, and perplexities from 0."""


def perplexity_of(confidence: Tensor, threshold: float | Tensor, lambda_alpha: float, lambda_beta: float) -> Tensor:
    """Perplexity P of a CAM confidence (Eq. 4): infinite at the threshold, least far from it.

    The threshold is kept 1e-6 from 0 and 1, and P above 1e-6, so that nothing is divided by 0.
    """
    if isinstance(threshold, Tensor):
        threshold = threshold.clamp(EDGE, 1.0 - EDGE)
    else:
        threshold = min(max(threshold, EDGE), 1.0 - EDGE)
    above = (confidence - threshold) / (1.0 - threshold)
    below = (threshold - confidence) / threshold
    distance = torch.where(confidence >= threshold, above, below).clamp(0.0, 1.0)
    return ((-torch.log(lambda_alpha * distance)) ** lambda_beta).clamp(min=EDGE)


def cam_pseudo_labels(
    cams: Tensor,
    threshold: float | Tensor,
    *,
    classes: Tensor | None = None,
    size: Size | None = None,
    valid_box: Tensor | None = None,
    lambda_alpha: float = 0.8,
    lambda_beta: float = 1.0,
    ignore_index: int = 255,
) -> tuple[Tensor, Tensor]:
    """CAM pseudo-labels (CPL) and their perplexity (Eq. 3, 4).

    Args:
        cams: (B, C, h, w) in [0, 1], zero for absent classes; with `classes` (B, P, h, w).
        threshold: xi in (0, 1), a float or a 0-d tensor on the device of `cams`.
        classes: (B, P) integers, the class of each map, -1 for padding (a map of zeros); None: those of the channels.
        size: (H, W) of the labels; None: that of `cams`.
        valid_box: (B, 4) integers y0, y1, x0, x1, half open, in pixels of `size`; None: everything is valid.
        lambda_alpha: scale of the normalised distance, in (0, 1).
        lambda_beta: exponent, > 0.
        ignore_index: label of pixels outside `valid_box`.

    Returns:
        labels (B, H, W) uint8: 0 background, c + 1 for class c, `ignore_index` outside the box;
        perplexity (B, H, W), the dtype of `cams` but at least float32; infinite outside the box.

    Raises:
        ValueError: a shape or value is impossible.
    """
    check_cams(cams)
    check_classes(classes, cams)
    check_open_fraction("lambda_alpha", lambda_alpha)
    check_positive("lambda_beta", lambda_beta)
    if not isinstance(threshold, Tensor):
        check_open_fraction("threshold", threshold)
    maps = upsample(cams.to(torch.promote_types(cams.dtype, torch.float32)), size)
    confidence, best = maps.max(dim=1)
    if classes is not None:
        best = classes.long().gather(1, best.flatten(1)).view_as(best)
    labels = torch.where(confidence >= threshold, best + 1, 0).to(torch.uint8)
    perplexity = perplexity_of(confidence, threshold, lambda_alpha, lambda_beta)
    if valid_box is not None:
        check_valid_box(valid_box, len(cams))
        outside = ~box_mask(valid_box, (maps.shape[-2], maps.shape[-1]))
        labels = labels.masked_fill(outside, ignore_index)
        perplexity = perplexity.masked_fill(outside, float("inf"))
    return labels, perplexity


def box_mask(valid_box: Tensor, size: Size) -> Tensor:
    """(B, H, W) bool, true inside each (y0, y1, x0, x1)."""
    y0, y1, x0, x1 = valid_box[:, :, None].unbind(dim=1)
    rows = torch.arange(size[0], device=valid_box.device)
    columns = torch.arange(size[1], device=valid_box.device)
    return ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None, :]
