"""CAM logits of several scales to one normalised map per present class (Sec. 3.2), in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosa_kernels.checks import check_class_labels, check_mirrored, check_size, check_views
from cosa_kernels.reference.upsample import Size, upsample


def merge_cams(
    cams: Sequence[Tensor], mirrored: Sequence[Tensor] = (), *, class_labels: Tensor, size: Size, eps: float = 1e-5
) -> Tensor:
    """Merge CAM logits of several scales into one normalised map per present class.

    Per scale: up-sample, maximum with the mirrored view, ReLU. Then the scales are added and each map of a present
    class is brought to [0, 1] by its own minimum and maximum over the image; absent classes are 0.

    Args:
        cams: per scale, (B, C, h_k, w_k) CAM logits.
        mirrored: per scale, the maps of the mirrored image, already flipped back; or empty.
        class_labels: (B, C), 1 for classes present in the image.
        size: (H, W) of the result.
        eps: added to the maximum, so that a map without any activation stays 0.

    Returns:
        (B, C, H, W) in [0, 1], at least float32.
    """
    check_views("cams", cams)
    check_mirrored(mirrored, cams)
    check_class_labels(class_labels, cams[0].shape[0], cams[0].shape[1])
    check_size(size)
    wide = torch.promote_types(cams[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=cams[0].device)
    for position, view in enumerate(cams):
        merged = upsample(view.to(wide), size)
        if mirrored:
            merged = torch.maximum(merged, upsample(mirrored[position].to(wide), size))
        total = total + merged.relu()
    total = total - total.amin(dim=(-2, -1), keepdim=True)
    total = total / (total.amax(dim=(-2, -1), keepdim=True) + eps)
    return total.masked_fill((class_labels == 0)[..., None, None], 0.0)
