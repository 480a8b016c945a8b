"""One image at several scales, mirrored or not: the assignment network's pass and the evaluation's (release)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from cosa_fast.models.cosa import CosaNet


@dataclass(frozen=True, slots=True)
class MultiScale:
    """Views of the same batch, one per scale; mirrored views are flipped back. Empty tuples without flipping."""

    cams: tuple[Tensor, ...]
    """(B, C, h_k, w_k) CAM logits per scale."""
    mirrored_cams: tuple[Tensor, ...]
    aux_cams: tuple[Tensor, ...]
    mirrored_aux_cams: tuple[Tensor, ...]
    seg: tuple[Tensor, ...]
    """(B, C + 1, h_k, w_k) segmentation logits, mirrored ones included."""
    logits: tuple[Tensor, ...]
    """(B, C) class logits, mirrored ones included."""

    def summed_seg(self, size: tuple[int, int]) -> Tensor:
        """(B, C + 1, *size): logits of all views, up-sampled bilinearly and added."""
        return torch.stack([_resize(view, size) for view in self.seg]).sum(dim=0)


def multi_scale(net: CosaNet, images: Tensor, scales: Sequence[float], flip: bool) -> MultiScale:
    """Run `net` on (B, 3, H, W) images at each scale (rounded to whole tokens), with their mirror images if `flip`."""
    stride = net.encoder.stride
    outputs = []
    for scale in scales:
        size = tuple(max(1, round(side * scale / stride)) * stride for side in images.shape[-2:])
        scaled = images if size == tuple(images.shape[-2:]) else _resize(images, size)
        with record_function(f"teacher x{scale:g}"):
            outputs.append(net(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled))
    count = len(images)
    return MultiScale(
        cams=tuple(out.cams[:count] for out in outputs),
        mirrored_cams=tuple(out.cams[count:].flip(-1) for out in outputs if flip),
        aux_cams=tuple(out.aux_cams[:count] for out in outputs),
        mirrored_aux_cams=tuple(out.aux_cams[count:].flip(-1) for out in outputs if flip),
        seg=tuple(out.seg[:count] for out in outputs) + tuple(out.seg[count:].flip(-1) for out in outputs if flip),
        logits=tuple(part for out in outputs for part in out.logits.split(count)),
    )


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
