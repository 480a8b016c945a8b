"""The contract between the loaders and the training step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Two photometric views of one geometric crop per image: a whole batch, or the part of one process."""

    weak: Tensor
    """(B, 3, S, S) float32, normalised: the assignment network's input."""
    strong: Tensor
    """(B, 3, S, S) float32, normalised: the online network's input."""
    labels: Tensor
    """(B, C) float32 multi-hot image-level labels."""
    present: Tensor
    """(B, P) int64 the same as a list: the classes of each image in ascending order, then -1; P >= 1."""
    valid_box: Tensor
    """(B, 4) int64 y0, y1, x0, x1, half open: the pixels of the crop that show the image, not padding."""
    index: Tensor
    """(B,) int64 positions in the training split."""
    first: int = 0
    """Slot of the first image in the whole batch."""
    total: int | None = None
    """Images in the whole batch; None: these are all."""

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, copied asynchronously from pinned memory where possible."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def split(self, parts: int) -> list[Batch]:
        """`parts` equal parts of the same whole batch; B must be a multiple of it."""
        if parts == 1:
            return [self]
        size, total = len(self.weak) // parts, self.total or len(self.weak)
        return [self._slots(slice(start, start + size), total) for start in range(0, size * parts, size)]

    def _slots(self, slots: slice, total: int) -> Batch:
        part = self._map(lambda tensor: tensor[slots])
        return dataclasses.replace(part, first=self.first + slots.start, total=total)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            weak=change(self.weak),
            strong=change(self.strong),
            labels=change(self.labels),
            present=change(self.present),
            valid_box=change(self.valid_box),
            index=change(self.index),
            first=self.first,
            total=self.total,
        )
