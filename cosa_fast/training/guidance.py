"""Where the guidance of the CAMs comes from: the network's own pseudo-labels, or the oracle experiment's (Fig. 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_fast.data.batch import Batch

MaskReader = Callable[[Tensor, int, int], Tensor]


class Guidance:
    """Segmentation logits for the Seg2CAM loss.

    Args:
        source: "spl" passes the assignment network's on; "gt" takes the masks' (the oracle); "noise" random masks;
            "none" is never asked.
        masks: for "gt": reads the (B, S, S) masks, in the geometry of a batch's crops, given its positions and the
            iteration and the slot of its first image in the whole batch.
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

    def seg_logits(
        self, views: Sequence[Tensor], size: tuple[int, int], batch: Batch, iteration: int
    ) -> Sequence[Tensor]:
        """(B, C + 1, h_k, w_k) logits, to be added up at `size`; `views` are the assignment network's."""
        channels, dtype = views[0].shape[1], views[0].dtype
        if self.source == "gt" and self.masks is not None:
            mask = self.masks(batch.index, iteration, batch.first).to(views[0].device).long()
            return [F.one_hot(torch.where(mask == 255, 0, mask), channels).movedim(-1, 1).to(dtype)]
        if self.source == "noise":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + iteration)
            # Of the whole batch, whatever part of it this is.
            noise = torch.rand((batch.total or len(views[0]), channels, *size), generator=generator)
            return [noise[batch.first :][: len(views[0])].to(views[0].device, dtype)]
        return views
