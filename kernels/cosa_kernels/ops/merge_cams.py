"""Multi-scale CAMs merged without looking at the classes that an image does not have."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.checks import (
    check_class_labels,
    check_finite,
    check_mirrored,
    check_not_negative,
    check_same_device,
    check_size,
    check_views,
)
from cosa_kernels.implementation import Impl, accumulator, choose
from cosa_kernels.interpolation import corners
from cosa_kernels.reference import Size

Sources = tuple[Tensor, Tensor, Tensor]
"""Per output along an axis: its two sources (int64) and the share of the second one."""


def merge_cams(
    cams: Sequence[Tensor],
    mirrored: Sequence[Tensor] = (),
    *,
    class_labels: Tensor,
    size: Size,
    eps: float = 1e-5,
    impl: Impl = "auto",
) -> Tensor:
    """Merge CAM logits of several scales into one normalised map per present class.

    Per scale: up-sample bilinearly, maximum with the mirrored view, ReLU. Then the scales are added and each map of a
    present class is brought to [0, 1] by its own minimum and maximum over the image; absent classes are 0. No gradient:
    this is the side that makes pseudo-labels, and its inputs are detached. Same result from run to run.

    Args:
        cams: per scale, (B, C, h_k, w_k) CAM logits: float32, bfloat16 or float16 (float64 in plain torch).
        mirrored: per scale, the maps of the mirrored image, already flipped back; or empty.
        class_labels: (B, C), other than 0 for classes present in the image.
        size: (H, W) of the result.
        eps: added to the maximum, so that a map without any activation stays 0; >= 0.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU, else torch. "torch" saves the absent classes
            only on the CPU; elsewhere it would have to wait for the device to know them.

    Returns:
        (B, C, H, W) float32 (float64 for float64) in [0, 1].

    Raises:
        ValueError: a shape, dtype, device or value is impossible.

    Example:
        >>> cams = torch.tensor([[[[-1.0, 2.0]], [[5.0, 6.0]]]])
        >>> mirrored = torch.tensor([[[[1.0, 0.0]], [[0.0, 9.0]]]])
        >>> merge_cams([cams], [mirrored], class_labels=torch.tensor([[1, 0]]), size=(1, 2), eps=0.0).tolist()
        [[[[0.0, 1.0]], [[0.0, 0.0]]]]
    """
    check_views("cams", cams)
    check_mirrored(mirrored, cams)
    check_class_labels(class_labels, cams[0].shape[0], cams[0].shape[1])
    check_same_device(cams=cams[0], class_labels=class_labels)
    check_size(size)
    check_not_negative("eps", eps)
    chosen = choose(impl, cams[0])
    cams, mirrored = [view.detach() for view in cams], [view.detach() for view in mirrored]
    if chosen == "reference":
        return reference.merge_cams(cams, mirrored, class_labels=class_labels, size=size, eps=eps)
    return _operator(cams, mirrored, class_labels, [size[0], size[1]], eps, chosen)


@torch.library.custom_op("cosa::merge_cams", mutates_args=())
def _operator(
    cams: Sequence[Tensor], mirrored: Sequence[Tensor], class_labels: Tensor, size: Sequence[int], eps: float, impl: str
) -> Tensor:
    for view in (*cams, *mirrored):
        check_finite(cams=view)
    if impl == "triton":
        from cosa_kernels.gpu import merge_cams as gpu

        return gpu.merge(cams, mirrored, class_labels != 0, (size[0], size[1]), eps)
    with torch.autocast(cams[0].device.type, enabled=False):
        if cams[0].device.type != "cpu":
            return reference.merge_cams(cams, mirrored, class_labels=class_labels, size=(size[0], size[1]), eps=eps)
        return _merge(cams, mirrored, class_labels, (size[0], size[1]), eps)


def _merge(cams: Sequence[Tensor], mirrored: Sequence[Tensor], class_labels: Tensor, size: Size, eps: float) -> Tensor:
    """The plain torch version for the CPU, map by map: what is in work fits its cache."""
    dtype = accumulator(cams[0].dtype)
    merged = torch.zeros((*class_labels.shape, *size), dtype=dtype)
    for image, label in class_labels.nonzero().tolist():
        total = merged[image, label]
        for position, view in enumerate(cams):
            activation = _upsample(view[image, label].to(dtype), size)
            if mirrored:
                other = _upsample(mirrored[position][image, label].to(dtype), size)
                activation = torch.maximum(activation, other)
            total += activation.relu()
        low, high = total.aminmax()
        total -= low
        total /= high - low + eps
    return merged


def _upsample(plane: Tensor, size: Size) -> Tensor:
    """(h, w) to `size`; columns first, while there are few rows."""
    for axis in (1, 0):
        low, high = plane.shape[axis], size[axis]
        if low != high:
            plane = mix(plane, axis, *sources(low, high, plane.dtype))
    return plane


@functools.lru_cache(maxsize=64)
def sources(low: int, high: int, dtype: torch.dtype) -> Sources:
    """Bilinear interpolation of `low` positions at `high` others, for `mix`; on the CPU. Cached: never write to it."""
    first, second, share = corners(low, high, torch.device("cpu"))
    return first, second, share.to(dtype)


def mix(maps: Tensor, axis: int, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Interpolate along an axis: (1 - share) of position `first` and `share` of position `second`, in share's dtype.

    Copies and a sum: on a CPU faster than the product with an interpolation matrix (and than F.interpolate), and no
    setting for matrix products (TF32 on a GPU, bfloat16 on a CPU) can round it, which a temperature of 0.01 would show.
    """
    low, high = (maps.index_select(axis, positions).to(share.dtype) for positions in (first, second))
    return low.lerp_(high, share.view(-1, *[1] * (maps.ndim - 1 - axis % maps.ndim)))


@_operator.register_fake
def _(
    cams: Sequence[Tensor], mirrored: Sequence[Tensor], class_labels: Tensor, size: Sequence[int], eps: float, impl: str
) -> Tensor:
    return cams[0].new_empty((*class_labels.shape, size[0], size[1]), dtype=accumulator(cams[0].dtype))
