"""Argument checks shared by all operations: each names the argument, what it got and what is wanted."""

from __future__ import annotations

import torch
from torch import Tensor


def check_cams(cams: Tensor) -> None:
    """(B, C, h, w) floating."""
    if cams.ndim != 4 or not cams.is_floating_point():
        raise ValueError(f"cams must be a floating (B, C, h, w) tensor, got {cams.dtype} {tuple(cams.shape)}")
    if cams.shape[1] > 254:
        raise ValueError(f"cams has {cams.shape[1]} classes; uint8 labels leave room for 254")


def check_logits(logits: Tensor) -> None:
    """(B, K, h, w) floating."""
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"logits must be a floating (B, K, h, w) tensor, got {logits.dtype} {tuple(logits.shape)}")


def check_labels(name: str, labels: Tensor, batch: int) -> None:
    """(B, H, W) integers."""
    if labels.ndim != 3 or labels.is_floating_point() or labels.dtype == torch.bool or len(labels) != batch:
        raise ValueError(f"{name} must be an integer ({batch}, H, W) tensor, got {labels.dtype} {tuple(labels.shape)}")


def check_class_labels(class_labels: Tensor, batch: int, classes: int) -> None:
    """(B, C) multi-hot."""
    if tuple(class_labels.shape) != (batch, classes):
        raise ValueError(f"class_labels must be ({batch}, {classes}), got {tuple(class_labels.shape)}")


def check_valid_box(valid_box: Tensor, batch: int) -> None:
    """(B, 4) integers."""
    if tuple(valid_box.shape) != (batch, 4) or valid_box.is_floating_point():
        raise ValueError(
            f"valid_box must be an integer ({batch}, 4) tensor of y0, y1, x0, x1, got {valid_box.dtype} "
            f"{tuple(valid_box.shape)}"
        )


def check_open_fraction(name: str, value: float) -> None:
    """0 < value < 1."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value}")


def check_positive(name: str, value: float) -> None:
    """value > 0."""
    if not value > 0.0:
        raise ValueError(f"{name} must be > 0, got {value}")
