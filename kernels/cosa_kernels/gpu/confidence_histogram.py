"""Triton kernel of the histogram of confidences: CAMs to counts, one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosa_kernels.gpu.launch import device_of

BLOCK = 1024
"""Pixels counted at a time."""
TILES = 2
"""Of them, per program: few enough programs for their counts to be small, enough to keep the memory busy."""


@triton.jit(do_not_specialize=["C", "pixels", "W", "low", "scale", "floor"])
def count_kernel(
    cams,  # (B, C, pixels)
    valid_box,  # (B, 4) int64, or unused
    counts,  # (B * programs, BINS) int32, out
    C,
    pixels,
    W,
    low,
    scale,  # bins per unit
    floor,
    BOXED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    # 64-bit offsets: B * C * pixels may pass 2^31.
    image = tl.program_id(1).to(tl.int64)
    total = tl.zeros([BINS], tl.int32)
    for tile in range(TILES):
        pixel = (tl.program_id(0) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < pixels
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        for c in range(C):
            value = tl.load(cams + (image * C + c) * pixels + pixel, mask=inside, other=0.0).to(tl.float32)
            # The second condition lets a NaN through, which then stays: such a pixel does not count.
            best = tl.where((value > best) | (value != value), value, best)
        counted = inside & (best >= floor)
        if BOXED:
            box = valid_box + image * 4
            y, x = pixel // W, pixel % W
            counted &= (y >= tl.load(box)) & (y < tl.load(box + 1)) & (x >= tl.load(box + 2)) & (x < tl.load(box + 3))
        slot = tl.minimum(tl.maximum((best - low) * scale, 0.0), BINS - 1.0).to(tl.int32)
        # Counted within the program first: every background pixel of a batch may want the same bin.
        total += tl.histogram(slot, BINS, mask=counted)
    program = image * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + program * BINS + tl.arange(0, BINS), total)


def count(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float) -> Tensor:
    """(bins,) int64 counts of the largest confidence per pixel.

    Args:
        cams: (B, C, H, W) float32, bfloat16 or float16.
        valid_box: (B, 4) integers, or None.
        bins: a power of two, at most 1024.
        low, high: range of the bins; what lies beyond counts in the first and the last one.
        floor: smaller values are not counted, nor is NaN.

    Raises:
        ValueError: an image of 2^30 pixels or more.
    """
    cams = cams.contiguous()
    batch, classes, height, width = cams.shape
    if height * width >= 2**30:
        raise ValueError(f"{height} x {width} pixels pass the kernel's 32-bit coordinates: use impl='torch'")
    programs = triton.cdiv(height * width, BLOCK * TILES)
    counts = torch.empty((batch * programs, bins), dtype=torch.int32, device=cams.device)
    with device_of(cams):
        count_kernel[(programs, batch)](
            cams,
            None if valid_box is None else valid_box.long().contiguous(),
            counts,
            classes,
            height * width,
            width,
            low,
            bins / (high - low),
            floor,
            BOXED=valid_box is not None,
            BINS=bins,
            BLOCK=BLOCK,
            TILES=TILES,
            num_warps=4,
        )
    return counts.sum(dim=0)
