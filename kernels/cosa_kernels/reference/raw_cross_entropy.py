"""CAM-to-segmentation loss with reliability-based adaptive weighting (Eq. 3 to 5), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from cosa_kernels.reference.cam_pseudo_labels import cam_pseudo_labels
from cosa_kernels.reference.upsample import Size
from cosa_kernels.reference.upsample_cross_entropy import upsample_cross_entropy


def raw_cross_entropy(
    logits: Tensor,
    cams: Tensor,
    threshold: float | Tensor,
    *,
    classes: Tensor | None = None,
    size: Size | None = None,
    valid_box: Tensor | None = None,
    lambda_alpha: float = 0.8,
    lambda_beta: float = 1.0,
) -> Tensor:
    """CAM-to-segmentation loss with reliability-based adaptive weighting (RAW; Eq. 3 to 5).

    Eq. 5 as printed weighs a pixel with its perplexity; its text says normalised reliability, the reciprocal, and
    that is what this computes: sum(r * CE) / sum(r) with r = 1 / P over the batch's valid pixels.

    Args:
        logits: (B, C + 1, h, w) segmentation logits.
        cams: (B, C, h', w') in [0, 1], of the assignment network; they get no gradient.
        threshold, classes, size, valid_box, lambda_alpha, lambda_beta: see `cam_pseudo_labels`.

    Returns:
        0-d tensor; 0 (with zero gradient) where nothing is valid.
    """
    if classes is None and logits.shape[1] != cams.shape[1] + 1:
        raise ValueError(
            f"logits must have one channel more than cams (the background): got {logits.shape[1]} and {cams.shape[1]}"
        )
    with torch.no_grad():
        labels, perplexity = cam_pseudo_labels(
            cams,
            threshold,
            classes=classes,
            size=size,
            valid_box=valid_box,
            lambda_alpha=lambda_alpha,
            lambda_beta=lambda_beta,
        )
    return upsample_cross_entropy(logits, labels, weight=perplexity.reciprocal())
