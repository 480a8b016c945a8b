"""The contract between the loaders and the training step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Two photometric views of one geometric crop per image."""

    weak: Tensor
    """(B, 3, S, S) float32, normalised: the assignment network's input."""
    strong: Tensor
    """(B, 3, S, S) float32, normalised: the online network's input."""
    labels: Tensor
    """(B, C) float32 multi-hot image-level labels."""
    valid_box: Tensor
    """(B, 4) int64 y0, y1, x0, x1, half open: the pixels of the crop that show the image, not padding."""
    index: Tensor
    """(B,) int64 positions in the training split."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied asynchronously from pinned memory where possible."""
        return Batch(
            *(
                tensor.to(device, non_blocking=True)
                for tensor in (self.weak, self.strong, self.labels, self.valid_box, self.index)
            )
        )
