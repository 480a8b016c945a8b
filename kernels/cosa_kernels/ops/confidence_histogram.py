"""Histogram of confidences, the largest CAM of each pixel, on the device (for Eq. 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.checks import check_bins, check_finite, check_maps, check_same_device, check_valid_box
from cosa_kernels.implementation import Impl, accumulator, choose

MOST_BINS = 1024
"""More do not fit a thread block's registers."""


def confidence_histogram(
    cams: Tensor,
    *,
    bins: int = 256,
    low: float = 0.0,
    high: float = 1.0,
    floor: float = 0.0,
    valid_box: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Counts of the confidence of every pixel: its largest CAM.

    One pass over the CAMs, without a map of confidences. Same result from run to run. No gradient.

    Args:
        cams: (B, C, H, W) float32, bfloat16 or float16 (float64 in plain torch), as a rule in [0, 1]. A pixel where one
            of them is NaN does not count.
        bins: of equal width over [low, high].
        low, high: confidences beyond them count in the first and the last bin.
        floor: smaller confidences do not count.
        valid_box: (B, 4) integers y0, y1, x0, x1, half open: pixels outside do not count.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU (for 4, 8, ... 1024 bins), else torch.

    Returns:
        (bins,) int64 counts.

    Raises:
        ValueError: a shape, dtype, device or option is impossible.

    Example:
        >>> cams = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.0, 0.3]]).view(1, 2, 1, 3)
        >>> confidence_histogram(cams, bins=4).tolist()
        [1, 1, 0, 1]
    """
    check_maps("cams", cams)
    if valid_box is not None:
        check_valid_box(valid_box, len(cams))
        check_same_device(cams=cams, valid_box=valid_box)
    return count_unchecked(cams, valid_box, bins, low, high, floor, impl)


def count_unchecked(
    cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float, impl: Impl
) -> Tensor:
    """`confidence_histogram` after the checks of the tensors' shapes."""
    check_bins(bins, low, high)
    chosen = choose_for_bins(impl, cams, bins)
    if chosen == "reference":
        return _count_anywhere(cams.detach(), valid_box, bins, low, high, floor)
    return _count_operator(cams.detach(), valid_box, bins, low, high, floor, chosen)


def choose_for_bins(impl: Impl, tensor: Tensor, bins: int) -> str:
    """`choose`, for as many bins."""
    chosen = choose(impl, tensor)
    if chosen == "triton" and (bins & (bins - 1) or bins > MOST_BINS):
        if impl == "triton":
            raise ValueError(
                f"the Triton kernels take a power of two up to {MOST_BINS} as the number of bins, got {bins}: use 256 "
                f"bins, or impl='torch' or 'auto'"
            )
        return "torch"
    return chosen


@torch.library.custom_op("cosa::confidence_histogram", mutates_args=())
def _count_operator(
    cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float, impl: str
) -> Tensor:
    check_finite(confidences=cams)
    if cams.numel() == 0:
        return cams.new_zeros(bins, dtype=torch.int64)
    if impl == "triton":
        from cosa_kernels.gpu import confidence_histogram as gpu

        return gpu.count(cams, valid_box, bins, low, high, floor)
    count = _count_on_cpu if cams.device.type == "cpu" else _count_anywhere
    return count(cams, valid_box, bins, low, high, floor)


@_count_operator.register_fake
def _(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float, impl: str) -> Tensor:
    return cams.new_empty(bins, dtype=torch.int64)


def _count_anywhere(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float) -> Tensor:
    """Plainly, on any device: without indexing by a mask, the length of whose result the host would have to know."""
    confidence = cams.amax(dim=1).to(accumulator(cams.dtype))
    counted = confidence >= floor  # false for NaN
    if valid_box is not None:
        counted &= reference.box_mask(valid_box, (cams.shape[-2], cams.shape[-1]))
    slot = ((confidence - low) * (bins / (high - low))).clamp(0, bins - 1).masked_fill(~counted, bins).long().flatten()
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=cams.device)
    return counts.scatter_add_(0, slot, torch.ones_like(slot))[:bins]


def _count_on_cpu(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float) -> Tensor:
    """On the CPU, where the host may read: image by image within its box."""
    counts = cams.new_zeros(bins + 1, dtype=torch.int64)
    # The number before the floor: `threshold` replaces what is not greater.
    edge = cams.new_tensor([floor, -math.inf], dtype=accumulator(cams.dtype))
    below = torch.nextafter(edge[0], edge[1]).item()
    boxes = [[0, cams.shape[-2], 0, cams.shape[-1]]] * len(cams) if valid_box is None else valid_box.tolist()
    for maps, box in zip(cams, boxes, strict=True):
        y0, y1, x0, x1 = (max(0, side) for side in box)
        first, *others = maps[:, y0:y1, x0:x1]
        # Twice as fast as amax over the classes, whose planes lie far apart.
        largest = torch.maximum(first, others[0]) if others else first
        for plane in others[1:]:
            torch.maximum(largest, plane, out=largest)
        largest = largest.to(edge.dtype)
        if floor > -math.inf:
            # Like NaN, what lies below the floor passes through the arithmetic to a bin of its own: masks are slow.
            largest = torch.threshold(largest, below, math.nan)
        slot = (largest - low).mul_(bins / (high - low)).clamp_(0, bins - 1).nan_to_num_(nan=bins)
        # Not histc: seven times as slow.
        counts += slot.int().flatten().bincount(minlength=bins + 1)
    return counts[:bins]
