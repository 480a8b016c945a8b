"""Intersection over union (the mIoU of the paper, Sec. 4) from a confusion matrix kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Count the pixels of each (true class, predicted class) pair; the host does not wait for the device.

    Args:
        truth: integers of any shape, 0 to `classes` - 1, or 255 where nothing is known: those pixels don't count.
            Nor does any other value from `classes` on; who reads the masks has to find those.
        prediction: integers of the same shape; 255 is an undecided pixel, which counts as a miss.
        classes: K, background included.

    Returns:
        (K, K + 1) int64 on the device of `truth`; rows are the truth, the last column the undecided pixels.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"the truth is {tuple(truth.shape)} but the prediction {tuple(prediction.shape)} pixels")
    side = classes + 1  # unknown and undecided pixels get a row and a column, because leaving them out means waiting
    row, column = (values.flatten().clamp(max=classes).int() for values in (truth, prediction))
    cells = row.mul_(side).add_(column)
    if cells.device.type == "cpu":
        counts = torch.bincount(cells, minlength=side * side)
    else:  # where bincount asks the device for the largest value
        counts = torch.zeros(side * side, dtype=torch.int64, device=cells.device)
        counts.scatter_add_(0, cells.long(), torch.ones_like(cells, dtype=torch.int64))
    return counts.view(side, side)[:classes]


def iou_per_class(confusion: Tensor) -> Tensor:
    """(K,) float64 IoU in [0, 1]; NaN for a class with no pixel in the truth and none in the prediction."""
    hits = confusion.diagonal().double()
    union = confusion.sum(dim=1) + confusion[:, : len(confusion)].sum(dim=0) - hits
    return hits / union


def mean_iou(confusion: Tensor) -> float:
    """PASCAL VOC's mIoU in [0, 1]: the mean IoU over classes, background included, NaN ones left out.

    Equals `torchmetrics.classification.MulticlassJaccardIndex(K, ignore_index=255)` over the same pixels; not the
    mean of per-image scores.
    """
    return float(iou_per_class(confusion).nanmean())
