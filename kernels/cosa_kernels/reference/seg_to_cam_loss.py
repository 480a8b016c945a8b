"""Segmentation pseudo-labels and the loss by which they teach the CAMs (Eq. 7, 8), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_kernels.checks import check_class_labels, check_maps, check_positive, check_view_size, check_views
from cosa_kernels.reference.upsample import Size, upsample


def seg_pseudo_labels(
    seg_logits: Tensor | Sequence[Tensor],
    class_labels: Tensor,
    *,
    temperature: float = 0.01,
    size: Size | None = None,
    grid: Size | None = None,
) -> Tensor:
    """Segmentation pseudo-labels (SPL): softmax over background and present classes (Eq. 7).

    Args:
        seg_logits: (B, C + 1, h, w), or several of these (the views of a multi-scale network), which are up-sampled
            to `size` and added.
        class_labels: (B, C), 1 for present classes.
        temperature: tau > 0.
        size: (H, W) of the softmax; None: the views' own size, if they have the same.
        grid: size to which the probabilities are resized; None: they stay at `size`.

    Returns:
        (B, C + 1, *grid) probabilities, 0 for absent classes, at least float32.
    """
    views = [seg_logits] if isinstance(seg_logits, Tensor) else list(seg_logits)
    check_views("seg_logits", views)
    check_positive("temperature", temperature)
    check_class_labels(class_labels, views[0].shape[0], views[0].shape[1] - 1)
    size = check_view_size("seg_logits", views, size)
    wide = torch.promote_types(views[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=views[0].device)
    for view in views:
        total = total + upsample(view.to(wide), size)
    absent = F.pad(class_labels == 0, (1, 0), value=False)
    return upsample((total / temperature).masked_fill(absent[..., None, None], float("-inf")).softmax(dim=1), grid)


def seg_to_cam_loss(
    cam_logits: Tensor,
    seg_logits: Tensor | Sequence[Tensor],
    class_labels: Tensor,
    *,
    temperature: float = 0.01,
    size: Size | None = None,
) -> Tensor:
    """Seg2CAM loss: binary cross-entropy of the CAMs against the segmentation pseudo-labels (Eq. 7, 8).

    Args:
        cam_logits: (B, C, h, w), of the online network.
        seg_logits: (B, C + 1, h', w'), of the assignment network, or several of these; they get no gradient. Their
            probabilities are resized bilinearly to (h, w).
        class_labels, temperature, size: see `seg_pseudo_labels`.

    Returns:
        0-d tensor, the mean over images, classes and positions.
    """
    check_maps("cam_logits", cam_logits)
    grid = (cam_logits.shape[-2], cam_logits.shape[-1])
    with torch.no_grad():
        probabilities = seg_pseudo_labels(seg_logits, class_labels, temperature=temperature, size=size, grid=grid)
    wide = cam_logits.to(torch.promote_types(cam_logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(wide, probabilities[:, 1:].to(wide.dtype))
