"""Triton kernels of `merge_cams`: all scales and mirrored views of a present map in one pass, then its normalisation.

The maps of absent classes are zeroed beforehand; the programs for them only read that and end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosa_kernels.gpu.launch import device_of

BLOCK = 1024
"""Pixels per program."""


@triton.jit
def interpolate(plane, y0, y1, ty, x0, x1, tx, w, inside):
    """Bilinear interpolation between four positions of a map, in float32."""
    c00 = tl.load(plane + y0 * w + x0, mask=inside, other=0.0).to(tl.float32)
    c01 = tl.load(plane + y0 * w + x1, mask=inside, other=0.0).to(tl.float32)
    c10 = tl.load(plane + y1 * w + x0, mask=inside, other=0.0).to(tl.float32)
    c11 = tl.load(plane + y1 * w + x1, mask=inside, other=0.0).to(tl.float32)
    above = c00 + tx * (c01 - c00)
    return above + ty * (c10 + tx * (c11 - c10) - above)


@triton.jit(do_not_specialize=["packed", "mirror", "H", "W", "tiles", "scales"])
def sum_kernel(
    views,  # (B * C, packed): per map all scales, then all mirrored ones
    present,  # (B * C) bool
    table,  # (scales, 3) int32: where a scale begins in a row of views, h, w
    sums,  # (B * C, H, W) float32, out: the scales added
    extremes,  # (2, B * C, tiles) float32, out: minimum and maximum of each tile
    packed,
    mirror,  # from a view to its mirrored one
    H,
    W,
    tiles,
    scales,
    MIRRORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    # 64-bit offsets: all maps together may pass 2^31 elements.
    pair, tile = (program // tiles).to(tl.int64), program % tiles
    if tl.load(present + pair) != 0:
        pixel = tile * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < H * W
        y, x = pixel // W, pixel % W
        total = tl.zeros([BLOCK], tl.float32)
        for scale in range(scales):
            h, w = tl.load(table + scale * 3 + 1), tl.load(table + scale * 3 + 2)
            # The source coordinate is ((2 y + 1) h - H) / (2 H): exact in integers, and one division for the fraction.
            upper = tl.maximum((2 * y + 1) * h - H, 0)
            y0 = upper // (2 * H)
            ty = (upper - y0 * 2 * H).to(tl.float32) / (2.0 * H)
            before = tl.maximum((2 * x + 1) * w - W, 0)
            x0 = before // (2 * W)
            tx = (before - x0 * 2 * W).to(tl.float32) / (2.0 * W)
            y1, x1 = tl.minimum(y0 + 1, h - 1), tl.minimum(x0 + 1, w - 1)
            plane = views + pair * packed + tl.load(table + scale * 3)
            value = interpolate(plane, y0, y1, ty, x0, x1, tx, w, inside)
            if MIRRORED:
                other = interpolate(plane + mirror, y0, y1, ty, x0, x1, tx, w, inside)
                # Written so that a NaN stays, and shows in the result.
                value = tl.where((other > value) | (other != other), other, value)
            total += tl.where(value <= 0.0, 0.0, value)
        tl.store(sums + pair * H * W + pixel, total, mask=inside)
        here = extremes + pair * tiles + tile
        tl.store(here, tl.min(tl.where(inside, total, float("inf")), axis=0))
        # The maxima come after the minima, one per program. Sums of positive parts: 0 is never more than the maximum.
        tl.store(here + tl.num_programs(0), tl.max(tl.where(inside, total, 0.0), axis=0))


@triton.jit(do_not_specialize=["pixels", "tiles"])
def normalise_kernel(
    present,  # (B * C) bool
    extremes,  # (2, B * C, tiles) float32
    maps,  # (B * C, pixels) float32, in and out
    eps,
    pixels,
    tiles,
    BLOCK: tl.constexpr,
):
    """(map - minimum) / (maximum - minimum + eps)"""
    program = tl.program_id(0)
    pair, tile = (program // tiles).to(tl.int64), program % tiles
    if tl.load(present + pair) != 0:
        lanes = tl.arange(0, BLOCK)
        minima = extremes + pair * tiles
        maxima = minima + tl.num_programs(0)
        low = tl.full([BLOCK], float("inf"), tl.float32)
        high = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tiles, BLOCK):
            known = start + lanes < tiles
            low = tl.minimum(low, tl.load(minima + start + lanes, mask=known, other=float("inf")))
            high = tl.maximum(high, tl.load(maxima + start + lanes, mask=known, other=0.0))
        lowest, highest = tl.min(low, axis=0), tl.max(high, axis=0)
        pixel = tile * BLOCK + lanes
        out = maps + pair * pixels + pixel
        value = tl.load(out, mask=pixel < pixels, other=0.0)
        tl.store(out, (value - lowest) / (highest - lowest + eps), mask=pixel < pixels)


def merge(
    cams: Sequence[Tensor], mirrored: Sequence[Tensor], present: Tensor, size: tuple[int, int], eps: float
) -> Tensor:
    """(B, C, *size) float32: maps of present classes in [0, 1], zero elsewhere.

    Args:
        cams: (B, C, h_k, w_k) float32, bfloat16 or float16, one dtype.
        mirrored: like `cams`, or empty.
        present: (B, C) bool.
        size: (H, W).
        eps: added to each maximum.

    Raises:
        ValueError: sizes whose product passes 2^30.
    """
    height, width = size
    sizes = tuple((view.shape[-2], view.shape[-1]) for view in cams)
    for h, w in sizes:
        if max((h + 1) * height, (w + 1) * width, height * width) >= 2**30:
            raise ValueError(f"up-sampling {h} x {w} to {height} x {width} passes the kernel's 32-bit coordinates")
    packed = torch.cat([view.flatten(2) for view in (*cams, *mirrored)], dim=2)
    if packed.shape[2] >= 2**30:
        raise ValueError(f"the views of one map have {packed.shape[2]} positions; the kernel takes fewer than 2^30")
    present = present.contiguous()
    merged = torch.zeros((*present.shape, height, width), dtype=torch.float32, device=packed.device)
    tiles = triton.cdiv(height * width, BLOCK)
    # What absent maps leave unwritten here is not read either.
    extremes = torch.empty((2, present.numel(), tiles), dtype=torch.float32, device=packed.device)
    # A single axis: the others end at 65535.
    grid = (present.numel() * tiles,)
    with device_of(packed):
        sum_kernel[grid](
            packed,
            present,
            _table(sizes, packed.is_cuda).to(packed.device, non_blocking=True),
            merged,
            extremes,
            packed.shape[2],
            sum(h * w for h, w in sizes),
            height,
            width,
            tiles,
            len(sizes),
            MIRRORED=len(mirrored) > 0,
            BLOCK=BLOCK,
            num_warps=4,
        )
        normalise_kernel[grid](present, extremes, merged, eps, height * width, tiles, BLOCK=BLOCK, num_warps=4)
    return merged


@functools.cache
def _table(sizes: tuple[tuple[int, int], ...], pinned: bool) -> Tensor:
    """(scales, 3) int32 in the host's memory: begin, h, w of each scale. Never write to it.

    Pinned, so that no copy waits for the device. Without a limit: a CUDA graph that has recorded the copy reads this
    memory whenever it runs.
    """
    begins = itertools.accumulate((h * w for h, w in sizes), initial=0)
    rows = [(begin, h, w) for begin, (h, w) in zip(begins, sizes, strict=False)]
    return torch.tensor(rows, dtype=torch.int32, device="cpu", pin_memory=pinned)
