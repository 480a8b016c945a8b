"""Segmentation pseudo-labels, computed only where they are looked at, and the Seg2CAM loss (Eq. 7, 8)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.checks import (
    check_class_labels,
    check_finite,
    check_maps,
    check_positive,
    check_same_device,
    check_size,
    check_view_size,
    check_views,
)
from cosa_kernels.implementation import Impl, accumulator, choose, full_precision
from cosa_kernels.ops.merge_cams import mix, sources
from cosa_kernels.reference import Size

Table = tuple[Tensor, ...]
"""What happens along an axis: nothing (empty), positions are chosen (one tensor) or mixed (three: `Sources`)."""


def seg_pseudo_labels(
    seg_logits: Tensor | Sequence[Tensor],
    class_labels: Tensor,
    *,
    temperature: float = 0.01,
    size: Size | None = None,
    grid: Size | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Segmentation pseudo-labels (SPL): softmax over background and present classes (Eq. 7).

    Resizing the probabilities to a coarse `grid` mixes at most two rows and two columns per output; only there are
    the logits up-sampled, added and sharpened. The result is that of the full resolution up to rounding. No gradient:
    the inputs are detached. Same result from run to run.

    Args:
        seg_logits: (B, C + 1, h, w), background first; float32, bfloat16, float16 or float64. Or a sequence of these
            (the views of a multi-scale network), which are up-sampled bilinearly to `size` and added.
        class_labels: (B, C), other than 0 for classes present in the image.
        temperature: tau > 0.
        size: (H, W) of the softmax; None: the views' own size, if they have the same.
        grid: size to which the probabilities are resized bilinearly; None: they stay at `size`.
        impl: "reference" works at full resolution. "auto", "torch" and "triton" are the same here: what is left to do
            is so little that a kernel would have nothing to save.

    Returns:
        (B, C + 1, *grid) float32 (float64 for float64) probabilities, 0 for absent classes.

    Raises:
        ValueError: a shape, dtype, device or value is impossible.

    Example:
        >>> views = [torch.zeros(1, 3, 28, 28), torch.zeros(1, 3, 14, 14)]
        >>> present = torch.tensor([[0, 1]])
        >>> seg_pseudo_labels(views, present, size=(448, 448), grid=(1, 1)).flatten().tolist()
        [0.5, 0.0, 0.5]
    """
    views = [seg_logits] if isinstance(seg_logits, Tensor) else list(seg_logits)
    check_views("seg_logits", views)
    check_positive("temperature", temperature)
    check_class_labels(class_labels, views[0].shape[0], views[0].shape[1] - 1)
    check_same_device(seg_logits=views[0], class_labels=class_labels)
    size = check_view_size("seg_logits", views, size)
    grid = size if grid is None else grid
    check_size(grid)
    views = [view.detach() for view in views]
    # There is no Triton kernel, so none that could be missing.
    if choose("torch" if impl == "triton" else impl, views[0]) == "reference":
        return reference.seg_pseudo_labels(views, class_labels, temperature=temperature, size=size, grid=grid)
    return _operator(views, class_labels, temperature, list(size), [grid[0], grid[1]])


def seg_to_cam_loss(
    cam_logits: Tensor,
    seg_logits: Tensor | Sequence[Tensor],
    class_labels: Tensor,
    *,
    temperature: float = 0.01,
    size: Size | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Seg2CAM loss: binary cross-entropy of the CAMs against the segmentation pseudo-labels (Eq. 7, 8).

    Give the teacher's views as they are, at low resolution: see `seg_pseudo_labels`. Double backward works.

    Args:
        cam_logits: (B, C, h, w), of the network in training.
        seg_logits: (B, C + 1, h', w') of the assignment network, or a sequence of these; they get no gradient. Their
            probabilities are resized bilinearly to (h, w).
        class_labels, temperature, size, impl: see `seg_pseudo_labels`.

    Returns:
        0-d float32 tensor (float64 for float64 CAMs), the mean over images, classes and positions.

    Raises:
        ValueError: a shape, dtype, device or value is impossible.

    Example:
        >>> cams = torch.zeros(2, 20, 28, 28, requires_grad=True)
        >>> views = [torch.randn(2, 21, side, side) for side in (28, 14, 42)]
        >>> loss = seg_to_cam_loss(cams, views, torch.ones(2, 20), size=(448, 448))
        >>> loss.backward()
        >>> round(loss.item(), 4)  # log 2
        0.6931
    """
    check_maps("cam_logits", cam_logits)
    views = [seg_logits] if isinstance(seg_logits, Tensor) else list(seg_logits)
    check_views("seg_logits", views)
    if views[0].shape[:2] != (cam_logits.shape[0], cam_logits.shape[1] + 1):
        raise ValueError(
            f"seg_logits must be (B, C + 1, h', w') for (B, C, h, w) cam_logits: got {tuple(views[0].shape)} and "
            f"{tuple(cam_logits.shape)}"
        )
    check_same_device(cam_logits=cam_logits, seg_logits=views[0])
    probabilities = seg_pseudo_labels(
        views,
        class_labels,
        temperature=temperature,
        size=size,
        grid=(cam_logits.shape[-2], cam_logits.shape[-1]),
        impl=impl,
    )
    wide = cam_logits.to(accumulator(cam_logits.dtype))
    return F.binary_cross_entropy_with_logits(wide, probabilities[:, 1:].to(wide.dtype))


@torch.library.custom_op("cosa::seg_pseudo_labels", mutates_args=())
def _operator(
    views: Sequence[Tensor], class_labels: Tensor, temperature: float, size: Sequence[int], grid: Sequence[int]
) -> Tensor:
    for view in views:
        check_finite(seg_logits=view)
    arguments = (temperature, (size[0], size[1]), (grid[0], grid[1]))
    with full_precision(views[0].device):
        if views[0].device.type != "cpu":
            absent = F.pad(class_labels == 0, (1, 0), value=False)
            return _probabilities(views, absent, *arguments)
        # Reading the labels costs nothing: leave the absent classes out from the start.
        result = _empty(views, grid).zero_()
        for image, labels in enumerate(class_labels):
            channels = F.pad(labels != 0, (1, 0), value=True).nonzero()[:, 0]
            chosen = [view[image].index_select(0, channels)[None] for view in views]
            result[image].index_copy_(0, channels, _probabilities(chosen, None, *arguments)[0])
        return result


def _probabilities(
    views: Sequence[Tensor], absent: Tensor | None, temperature: float, size: Size, grid: Size
) -> Tensor:
    """(B, K, *grid) in the accumulation dtype; `absent` is (B, K) bool, None where all K channels are present."""
    dtype = accumulator(views[0].dtype)
    # Interpolation is linear: views of one size are added before it, not after.
    sums: dict[Size, Tensor] = {}
    for view in views:
        low = (view.shape[-2], view.shape[-1])
        sums[low] = sums[low].to(dtype) + view if low in sums else view
    *samples, rows, columns = _tables_on(views[0].device, tuple(sums), size, grid, dtype)
    total: Tensor | None = None
    for view, along_y, along_x in zip(sums.values(), samples[::2], samples[1::2], strict=True):
        view = _resample(_resample(view, -2, along_y), -1, along_x)
        # Not in place: where nothing was to do, this is still the caller's tensor.
        total = view.to(dtype) if total is None else total + view
    assert total is not None  # there is at least one view
    total = total / temperature
    if absent is not None:
        total.masked_fill_(absent[..., None, None], float("-inf"))
    return _resample(_resample(total.softmax(dim=1), -2, rows), -1, columns)


def _resample(maps: Tensor, axis: int, table: Table) -> Tensor:
    if len(table) == 1:
        return maps.index_select(axis, *table)
    return mix(maps, axis, *table) if table else maps


def _tables_on(
    device: torch.device, lows: tuple[Size, ...], size: Size, grid: Size, dtype: torch.dtype
) -> Sequence[Table]:
    """`_tables` on a device: made by the host, once, and brought there by a single copy that it does not wait for.

    Each call copies anew: a remembered tensor might lie in the memory of a CUDA graph that has not run yet, or still be
    on its way on another stream.
    """
    tables = _tables(lows, size, grid, dtype)
    if device.type == "cpu" or not any(tables):
        return tables
    packed = _packed(lows, size, grid, dtype, device.type == "cuda")
    return _unpacked(packed.to(device, non_blocking=True), tables)


@functools.cache
def _packed(lows: tuple[Size, ...], size: Size, grid: Size, dtype: torch.dtype, pinned: bool) -> Tensor:
    """The bytes of `_tables`, some KB. Never write to it.

    Without a limit, unlike other caches: a CUDA graph that has recorded the copy reads this memory whenever it runs.
    """
    packed = torch.cat([part.view(torch.uint8) for part in _in_memory_order(_tables(lows, size, grid, dtype))])
    return packed.pin_memory() if pinned else packed


def _unpacked(packed: Tensor, tables: Sequence[Table]) -> Sequence[Table]:
    """Views of `packed`, the bytes of `tables`."""
    parts = _in_memory_order(tables)
    memory = packed.split([part.nbytes for part in parts])
    there = {id(part): piece.view(part.dtype) for part, piece in zip(parts, memory, strict=True)}
    return [tuple(there[id(part)] for part in table) for table in tables]


def _in_memory_order(tables: Sequence[Table]) -> list[Tensor]:
    """Positions before shares, so that all are aligned."""
    return sorted((part for table in tables for part in table), key=Tensor.is_floating_point)


@functools.lru_cache(maxsize=64)
def _tables(lows: tuple[Size, ...], size: Size, grid: Size, dtype: torch.dtype) -> Sequence[Table]:
    """Of each of `lows` along y and along x, then of the probabilities along both. Never write to them."""
    samples = [_sample(low[axis], size[axis], grid[axis], dtype) for low in lows for axis in (0, 1)]
    return [*samples, *(_needed(size[axis], grid[axis], dtype)[1] for axis in (0, 1))]


def _sample(low: int, high: int, wanted: int, dtype: torch.dtype) -> Table:
    """Up-samples `low` positions to `high`, of which only those are made that resizing to `wanted` mixes."""
    positions, _ = _needed(high, wanted, dtype)
    return positions if low == high else tuple(part[(*positions,)] for part in sources(low, high, dtype))


def _needed(high: int, wanted: int, dtype: torch.dtype) -> tuple[Table, Table]:
    """Which of `high` positions resizing to `wanted` mixes, and how: per output its sources among these.

    All positions (empty) where that is not more; no mixture (empty) where the size stays.
    """
    if wanted == high:
        return (), ()
    if 2 * wanted >= high:
        return (), sources(high, wanted, dtype)
    first, second, share = sources(high, wanted, dtype)
    outputs = torch.arange(wanted, device="cpu")
    return (torch.cat([first, second]),), (outputs, outputs + wanted, share)


def _empty(views: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
    return views[0].new_empty((*views[0].shape[:2], grid[0], grid[1]), dtype=accumulator(views[0].dtype))


@_operator.register_fake
def _(
    views: Sequence[Tensor], class_labels: Tensor, temperature: float, size: Sequence[int], grid: Sequence[int]
) -> Tensor:
    return _empty(views, grid)
