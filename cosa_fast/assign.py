"""Online assignments: what the assignment network's outputs become for the online network (paper Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from cosa_kernels import cam_pseudo_labels, merge_cams
from torch import Tensor

from cosa_fast.config import CosaConfig
from cosa_fast.data.batch import Batch
from cosa_fast.models.multi_scale import MultiScale


@dataclass(frozen=True, slots=True)
class Assignments:
    """Targets for the online network; S is the side of the pseudo-label map, P the most classes of an image."""

    cams: Tensor
    """(B, P, S, S) merged CAMs M' in [0, 1] of the present classes."""
    aux_cams: Tensor
    """(B, P, S, S) merged auxiliary CAMs."""
    present: Tensor
    """(B, P) int64 the classes of these maps in ascending order; -1 where an image has fewer, and the maps are zero."""
    seg: tuple[Tensor, ...]
    """(B, C + 1, h_k, w_k) segmentation logits per view; S' is their sum at S x S, which nobody needs in full."""
    valid_box: Tensor
    """(B, 4) y0, y1, x0, x1 in pixels of the pseudo-label map."""


def assign(views: MultiScale, batch: Batch, config: CosaConfig) -> Assignments:
    """Merge the assignment network's views of the present classes; maps of absent ones are never up-sampled."""
    crop = batch.weak.shape[-1]
    side = config.label_size or crop
    return Assignments(
        cams=_merge(views.cams, views.mirrored_cams, batch.present, side),
        aux_cams=_merge(views.aux_cams, views.mirrored_aux_cams, batch.present, side),
        present=batch.present,
        seg=views.seg,
        valid_box=scale_box(batch.valid_box, crop, side),
    )


def _merge(cams: Sequence[Tensor], mirrored: Sequence[Tensor], present: Tensor, side: int) -> Tensor:
    index = present.clamp(min=0)[..., None, None]
    few, few_mirrored = ([view.take_along_dim(index, dim=1) for view in views] for views in (cams, mirrored))
    return merge_cams(few, few_mirrored, class_labels=present >= 0, size=(side, side))


def scale_box(box: Tensor, crop: int, side: int) -> Tensor:
    """A (B, 4) box in pixels of a crop to the pixels of a map of `side` whose centres it contains."""
    if side == crop:
        return box
    return torch.round(box.double() * (side / crop)).long()


def banded_labels(cams: Tensor, present: Tensor, band: tuple[float, float], valid_box: Tensor) -> Tensor:
    """The release's two thresholds on the CAMs of (B, P) `present` classes.

    Returns:
        (B, H, W) uint8, 0 below the lower threshold, 255 between them.
    """
    low, _ = cam_pseudo_labels(cams, band[0], classes=present, valid_box=valid_box)
    high, _ = cam_pseudo_labels(cams, band[1], classes=present, valid_box=valid_box)
    return torch.where(low == high, high, 255)
