"""Where the guidance of the CAMs comes from: the network's own pseudo-labels, or the oracle experiment's (Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.data.batch import Batch

MaskReader = Callable[[Tensor, int], Tensor]


class Guidance:
    """Segmentation logits for the Seg2CAM loss.

    Args:
        source: "spl" passes the assignment network's on; "gt" takes the masks' (the oracle); "noise" random masks;
            "none" is never asked.
        masks: for "gt": reads the (B, S, S) masks, in the geometry of a batch's crops, given its positions and the
            iteration.
        seed: of the noise.

    Raises:
        ValueError: "gt" without masks.
    """

    def __init__(
        self, source: Literal["spl", "gt", "none", "noise"], masks: MaskReader | None = None, seed: int = 0
    ) -> None:
        if source == "gt" and masks is None:
            raise ValueError("cosa.guidance = 'gt' is the oracle experiment and needs the training masks: give --masks")
        self.source, self.masks, self.seed = source, masks, seed

    def seg_logits(self, seg: Tensor, batch: Batch, iteration: int) -> Tensor:
        """(B, C + 1, S, S) logits; `seg` are the assignment network's, of the same shape."""
        if self.source == "gt" and self.masks is not None:
            mask = self.masks(batch.index, iteration).to(seg.device).long()
            one_hot = F.one_hot(torch.where(mask == 255, 0, mask), seg.shape[1]).movedim(-1, 1).to(seg.dtype)
            return F.interpolate(one_hot, size=seg.shape[-2:], mode="bilinear", align_corners=False)
        if self.source == "noise":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
            return torch.rand(seg.shape, generator=generator).to(seg.device)
        return seg
