"""Online assignments: what the assignment network's outputs become for the online network (paper Sec. 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cosa_kernels import cam_pseudo_labels, merge_cams
from torch import Tensor

from cosa_fast.config import CosaConfig
from cosa_fast.data.batch import Batch
from cosa_fast.models.multi_scale import MultiScale


@dataclass(frozen=True, slots=True)
class Assignments:
    """Targets for the online network; S is the side of the pseudo-label map."""

    cams: Tensor
    """(B, C, S, S) merged CAMs M' in [0, 1], zero for absent classes."""
    aux_cams: Tensor
    """(B, C, S, S) merged auxiliary CAMs."""
    seg: tuple[Tensor, ...]
    """(B, C + 1, h_k, w_k) segmentation logits per view; S' is their sum at S x S, which nobody needs in full."""
    valid_box: Tensor
    """(B, 4) y0, y1, x0, x1 in pixels of the pseudo-label map."""


def assign(views: MultiScale, batch: Batch, config: CosaConfig) -> Assignments:
    """Merge the assignment network's views and keep the present classes."""
    crop = batch.weak.shape[-1]
    side = config.label_size or crop
    size = (side, side)
    return Assignments(
        cams=merge_cams(views.cams, views.mirrored_cams, class_labels=batch.labels, size=size),
        aux_cams=merge_cams(views.aux_cams, views.mirrored_aux_cams, class_labels=batch.labels, size=size),
        seg=views.seg,
        valid_box=scale_box(batch.valid_box, crop, side),
    )


def scale_box(box: Tensor, crop: int, side: int) -> Tensor:
    """A (B, 4) box in pixels of a crop to the pixels of a map of `side` whose centres it contains."""
    if side == crop:
        return box
    return torch.round(box.double() * (side / crop)).long()


def banded_labels(cams: Tensor, band: tuple[float, float], valid_box: Tensor) -> Tensor:
    """The release's two thresholds: (B, H, W) uint8, 0 below the lower one, 255 between them."""
    low, _ = cam_pseudo_labels(cams, band[0], valid_box=valid_box)
    high, _ = cam_pseudo_labels(cams, band[1], valid_box=valid_box)
    return torch.where(low == high, high, 255)
