"""Bilinear up-sampling of maps, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


def upsample(maps: Tensor, size: Size | None) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinear; unchanged when `size` is None or already the case."""
    if size is None or tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
