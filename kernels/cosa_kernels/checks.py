"""Argument checks shared by all operations: each names the argument, what it got and what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from cosa_kernels.implementation import debugging


def check_tensor(name: str, value: object) -> None:
    """A tensor, not a list or an array."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}: use torch.as_tensor({name})")


def check_maps(name: str, maps: Tensor) -> None:
    """(B, C, h, w) floating, no dimension empty."""
    check_tensor(name, maps)
    if maps.ndim != 4 or not maps.is_floating_point() or 0 in maps.shape:
        raise ValueError(
            f"{name} must be a floating (B, C, h, w) tensor with no empty dimension, got {maps.dtype} "
            f"{tuple(maps.shape)}"
        )


def check_cams(cams: Tensor) -> None:
    """(B, C, h, w) floating with as many classes as uint8 labels can name."""
    check_maps("cams", cams)
    if cams.shape[1] > 254:
        raise ValueError(f"cams has {cams.shape[1]} classes; uint8 labels leave room for 254")


def check_classes(classes: Tensor | None, cams: Tensor) -> None:
    """(B, P) integers for (B, P, h, w) maps, or none."""
    if classes is None:
        return
    check_tensor("classes", classes)
    integers = not classes.is_floating_point() and classes.dtype != torch.bool
    if classes.shape != cams.shape[:2] or not integers:
        raise ValueError(
            f"classes must be an integer {tuple(cams.shape[:2])} tensor, the class of each map of cams, got "
            f"{classes.dtype} {tuple(classes.shape)}"
        )
    check_same_device(cams=cams, classes=classes)


def check_class_values(classes: Tensor, count: int) -> None:
    """Classes in [0, count), or -1. Read where that costs nothing (CPU) or under COSA_KERNELS_DEBUG=1."""
    if classes.device.type != "cpu" and not debugging():
        return
    wrong = (classes < -1) | (classes >= count)
    if bool(wrong.any()):
        raise ValueError(
            f"classes holds {int(classes[wrong][0])}; there can be the classes 0 to {count - 1}, and -1 for a map that "
            "is padding"
        )


def check_labels(name: str, labels: Tensor, batch: int) -> None:
    """(B, H, W) integers."""
    if labels.ndim != 3 or labels.is_floating_point() or labels.dtype == torch.bool or len(labels) != batch:
        raise ValueError(f"{name} must be an integer ({batch}, H, W) tensor, got {labels.dtype} {tuple(labels.shape)}")


def check_targets(target: Tensor, batch: int) -> None:
    """(B, H, W) or (N, B, H, W) integers."""
    check_tensor("target", target)
    integers = target.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if target.ndim not in (3, 4) or not integers or target.shape[-3] != batch or 0 in target.shape:
        raise ValueError(
            f"target must be an integer ({batch}, H, W) or (N, {batch}, H, W) tensor of class indices (uint8, int8 to "
            f"int64), got {target.dtype} {tuple(target.shape)}"
        )


def check_weight(weight: Tensor | None, target: Tensor) -> None:
    """Floating, the shape of `target`; it gets no gradient."""
    if weight is None:
        return
    check_tensor("weight", weight)
    if weight.shape != target.shape or not weight.is_floating_point():
        raise ValueError(
            f"weight must be a floating tensor of target's shape {tuple(target.shape)}, got {weight.dtype} "
            f"{tuple(weight.shape)} (weights of classes: pass weight[target], with ignored targets clamped)"
        )
    if weight.requires_grad:
        raise ValueError("weight requires a gradient, which this loss does not give: pass weight.detach()")


def check_class_labels(class_labels: Tensor, batch: int, classes: int) -> None:
    """(B, C) multi-hot."""
    check_tensor("class_labels", class_labels)
    if tuple(class_labels.shape) != (batch, classes):
        raise ValueError(f"class_labels must be ({batch}, {classes}), got {tuple(class_labels.shape)}")


def check_valid_box(valid_box: Tensor, batch: int) -> None:
    """(B, 4) integers."""
    check_tensor("valid_box", valid_box)
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


def check_not_negative(name: str, value: float) -> None:
    """value >= 0."""
    if not value >= 0.0:
        raise ValueError(f"{name} must be >= 0, got {value}")


def check_size(size: tuple[int, int]) -> None:
    """(H, W), both positive."""
    if not isinstance(size, Sequence) or len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"size must be (H, W) with both at least 1, got {size}")


def check_threshold(threshold: float | Tensor, device: torch.device) -> None:
    """A float in (0, 1), or a 0-d tensor on the inputs' device (whose value is not read)."""
    if not isinstance(threshold, Tensor):
        check_open_fraction("threshold", threshold)
    elif threshold.ndim != 0 or threshold.device != device:
        raise ValueError(
            f"threshold must be a float or a 0-d tensor on {device}, got {tuple(threshold.shape)} on {threshold.device}"
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """All on the device of the first."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    (first, reference), *rest = present.items()
    for name, tensor in rest:
        if tensor.device != reference.device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {reference.device}: move one to the other")


def check_finite(**tensors: Tensor) -> None:
    """No NaN and no infinity. Waits for the device, so only under COSA_KERNELS_DEBUG=1."""
    if debugging():
        for name, tensor in tensors.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} holds NaN or infinity (found because COSA_KERNELS_DEBUG=1)")


def check_between(low: float, high: float, **tensors: Tensor) -> None:
    """All values in [low, high]. Waits for the device, so only under COSA_KERNELS_DEBUG=1."""
    check_finite(**tensors)
    if debugging():
        for name, tensor in tensors.items():
            least, most = float(tensor.min()), float(tensor.max())
            if least < low or most > high:
                raise ValueError(
                    f"{name} holds values from {least:.4g} to {most:.4g}; they must lie between {low:g} and {high:g} "
                    "(found because COSA_KERNELS_DEBUG=1)"
                )


def check_label_values(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Labels in [0, classes), or `ignore_index`. Read where that costs nothing (CPU) or under COSA_KERNELS_DEBUG=1."""
    if labels.device.type != "cpu" and not debugging():
        return
    wrong = outside(labels, classes) & (labels != ignore_index)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} holds the label {int(labels[wrong][0])}; the {classes} channels allow 0 to {classes - 1}, "
            f"and {ignore_index} (ignore_index) for pixels that do not count"
        )


def outside(labels: Tensor, classes: int) -> Tensor:
    """Where labels are negative or not below `classes`."""
    # A comparison with what the labels' dtype cannot hold would wrap around.
    fits = classes <= torch.iinfo(labels.dtype).max
    return (labels < 0) | (labels >= classes) if fits else labels < 0


def check_views(name: str, views: Sequence[Tensor]) -> None:
    """At least one floating (B, K, h, w) tensor; h and w may differ, the rest is that of the first."""
    if isinstance(views, Tensor):
        raise ValueError(f"{name} must be a sequence with the maps of each scale, got one tensor: pass [{name}]")
    if not views:
        raise ValueError(f"{name} is empty: give the maps of at least one scale")
    first = views[0]
    for position, view in enumerate(views):
        if view.ndim != 4 or not view.is_floating_point() or 0 in view.shape:
            raise ValueError(
                f"{name}[{position}] must be a floating (B, C, h, w) tensor with no empty dimension, got {view.dtype} "
                f"{tuple(view.shape)}"
            )
        if view.shape[:2] != first.shape[:2] or view.dtype != first.dtype or view.device != first.device:
            raise ValueError(
                f"all of {name} must have one batch, one number of classes, one dtype and one device: got "
                f"{view.dtype} {tuple(view.shape)} on {view.device} beside {first.dtype} {tuple(first.shape)} on "
                f"{first.device}"
            )


def check_mirrored(mirrored: Sequence[Tensor], cams: Sequence[Tensor]) -> None:
    """Empty, or a tensor like each of `cams`."""
    if mirrored and len(mirrored) != len(cams):
        raise ValueError(
            f"mirrored must be empty or hold one map per scale: got {len(mirrored)} for {len(cams)} scales"
        )
    for position, (mirror, view) in enumerate(zip(mirrored, cams, strict=False)):
        if mirror.shape != view.shape or mirror.dtype != view.dtype or mirror.device != view.device:
            raise ValueError(
                f"mirrored[{position}] must be like cams[{position}], {view.dtype} {tuple(view.shape)} on "
                f"{view.device}: got {mirror.dtype} {tuple(mirror.shape)} on {mirror.device}"
            )


def check_view_size(name: str, views: Sequence[Tensor], size: tuple[int, int] | None) -> tuple[int, int]:
    """`size`, or where it is None the one size that all views have."""
    if size is not None:
        check_size(size)
        return (size[0], size[1])
    sizes = [(view.shape[-2], view.shape[-1]) for view in views]
    for other in sizes:
        if other != sizes[0]:
            raise ValueError(
                f"{name} holds views of different sizes, {sizes[0]} and {other}: give size=(H, W), at which they are "
                f"added"
            )
    return sizes[0]


def check_positions(name: str, tensor: Tensor, cams: Tensor, *, floating: bool) -> None:
    """(B, h, w) like `cams` (B, C, h, w), floating or integer."""
    kind = "a floating" if floating else "an integer"
    shape = (cams.shape[0], cams.shape[2], cams.shape[3])
    if tuple(tensor.shape) != shape or tensor.is_floating_point() != floating or tensor.dtype == torch.bool:
        raise ValueError(
            f"{name} must be {kind} {shape} tensor, one value per position of cams, got {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )


def check_finite_number(name: str, value: float) -> None:
    """Neither infinite nor NaN."""
    if not -float("inf") < value < float("inf"):
        raise ValueError(f"{name} must be a finite number, got {value}")


def check_choice(name: str, value: object, choices: object) -> None:
    """One of the strings of a `Literal`."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def check_anchor_labels(labels: Tensor, anchors: Tensor, classes: int) -> None:
    """0 to `classes` at the anchors. Read where that costs nothing (CPU) or under COSA_KERNELS_DEBUG=1."""
    if labels.device.type != "cpu" and not debugging():
        return
    wrong = anchors & outside(labels, classes + 1)
    if bool(wrong.any()):
        raise ValueError(
            f"labels holds {int(labels[wrong][0])} at a position with perplexity <= epsilon; the {classes} channels "
            f"of cams allow 0 to {classes}: give positions that do not count an infinite perplexity"
        )


def check_histogram(histogram: Tensor) -> None:
    """(bins,) counts, at least 4 of them."""
    if histogram.ndim != 1 or len(histogram) < 4 or histogram.dtype == torch.bool or histogram.is_complex():
        raise ValueError(
            f"histogram must be a (bins,) tensor of counts with at least 4 bins, got {histogram.dtype} "
            f"{tuple(histogram.shape)}"
        )


def check_bins(bins: int, low: float, high: float) -> None:
    """At least 4, over a range that is not empty."""
    if bins < 4:
        raise ValueError(f"bins must be at least 4, got {bins}")
    if not -float("inf") < low < high < float("inf"):
        raise ValueError(f"low and high must be finite and low < high, got {low} and {high}")
