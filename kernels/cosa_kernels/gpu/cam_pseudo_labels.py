"""Triton kernel of `cam_pseudo_labels`: interpolation, maximum over classes, threshold and perplexity in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosa_kernels.gpu.launch import device_of
from cosa_kernels.reference import EDGE

BLOCK = 256


@triton.jit(do_not_specialize=["C", "h", "w", "H", "W", "ignore_index"])
def label_kernel(
    cams,  # (B, C, h, w)
    names,  # (B, C) int64: the label of each map, 0 for one that is all zero; or unused
    threshold,  # 0-d
    valid_box,  # (B, 4) int64 or unused
    labels,  # (B, H, W) uint8, out
    values,  # (B, H, W) float32, out
    C,
    h,
    w,
    H,
    W,
    lambda_alpha,
    lambda_beta,
    ignore_index,
    LISTED: tl.constexpr,
    RESIZED: tl.constexpr,
    BOXED: tl.constexpr,
    RELIABILITY: tl.constexpr,
    POWER: tl.constexpr,
    EDGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < H * W
    y, x = pixel // W, pixel % W
    best = tl.zeros([BLOCK], tl.float32)
    label = tl.zeros([BLOCK], tl.int32)
    # The source coordinate is ((2 y + 1) h - H) / (2 H): exact in integers, and one division for the fraction.
    upper = tl.maximum((2 * y + 1) * h - H, 0)
    y0 = upper // (2 * H)
    ty = (upper - y0 * 2 * H).to(tl.float32) / (2.0 * H)
    before = tl.maximum((2 * x + 1) * w - W, 0)
    x0 = before // (2 * W)
    tx = (before - x0 * 2 * W).to(tl.float32) / (2.0 * W)
    y1, x1 = tl.minimum(y0 + 1, h - 1), tl.minimum(x0 + 1, w - 1)
    for c in range(C):
        plane = cams + (image * C + c) * h * w
        name = tl.load(names + image * C + c).to(tl.int32) if LISTED else c + 1
        wanted = name != 0 if LISTED else True
        if wanted:
            if RESIZED:
                c00 = tl.load(plane + y0 * w + x0, mask=inside, other=0.0).to(tl.float32)
                c01 = tl.load(plane + y0 * w + x1, mask=inside, other=0.0).to(tl.float32)
                c10 = tl.load(plane + y1 * w + x0, mask=inside, other=0.0).to(tl.float32)
                c11 = tl.load(plane + y1 * w + x1, mask=inside, other=0.0).to(tl.float32)
                above = c00 + tx * (c01 - c00)
                value = above + ty * (c10 + tx * (c11 - c10) - above)
            else:
                value = tl.load(plane + pixel, mask=inside, other=0.0).to(tl.float32)
            # The second condition lets a NaN through, which then stays and shows in the result.
            higher = (value > best) | (value != value)
            best = tl.where(higher, value, best)
            label = tl.where(higher, name, label)
    xi = tl.load(threshold).to(tl.float32)
    near = tl.minimum(tl.maximum(xi, EDGE), 1.0 - EDGE)
    distance = tl.where(best >= xi, (best - near) / (1.0 - near), (near - best) / near)
    distance = tl.where(distance != distance, distance, tl.minimum(tl.maximum(distance, 0.0), 1.0))
    perplexity = -tl.log(lambda_alpha * distance)
    if POWER:
        perplexity = tl.exp2(lambda_beta * tl.log2(perplexity))
    # Not a maximum, which would swallow a NaN.
    perplexity = tl.where(perplexity < EDGE, EDGE, perplexity)
    label = tl.where(best >= xi, label, 0)
    value = 1.0 / perplexity if RELIABILITY else perplexity
    if BOXED:
        box = valid_box + image * 4
        valid = (y >= tl.load(box)) & (y < tl.load(box + 1)) & (x >= tl.load(box + 2)) & (x < tl.load(box + 3))
        label = tl.where(valid, label, ignore_index)
        value = tl.where(valid, value, 0.0 if RELIABILITY else float("inf"))
    out = image * H * W + pixel
    tl.store(labels + out, label.to(tl.uint8), mask=inside)
    tl.store(values + out, value, mask=inside)


def assign(
    cams: Tensor,
    threshold: Tensor,
    classes: Tensor | None,
    valid_box: Tensor | None,
    lambda_alpha: float,
    lambda_beta: float,
    ignore_index: int,
    reliability: bool,
    labels: Tensor,
    values: Tensor,
) -> None:
    """Write labels (B, H, W) uint8 and perplexity, or its reciprocal, (B, H, W) float32 into contiguous tensors.

    Raises:
        ValueError: sizes whose product passes 2^30.
    """
    cams = cams.contiguous()
    batch, maps, h, w = cams.shape
    _, height, width = labels.shape
    if max((h + 1) * height, (w + 1) * width, height * width) >= 2**30:
        raise ValueError(f"up-sampling {h} x {w} to {height} x {width} passes the kernel's 32-bit coordinates")
    resized = (h, w) != (height, width)
    names = None if classes is None else classes + 1
    if resized:
        # At low resolution it is cheap to see which maps are empty; at full resolution it would read everything twice.
        names = torch.arange(1, maps + 1, device=cams.device).expand(batch, -1) if names is None else names
        names = names.masked_fill(cams.amax(dim=(2, 3)) <= 0, 0)
    with device_of(cams):
        label_kernel[(triton.cdiv(height * width, BLOCK), batch)](
            cams,
            None if names is None else names.contiguous(),
            threshold,
            None if valid_box is None else valid_box.long().contiguous(),
            labels,
            values,
            maps,
            h,
            w,
            height,
            width,
            lambda_alpha,
            lambda_beta,
            ignore_index,
            LISTED=names is not None,
            RESIZED=resized,
            BOXED=valid_box is not None,
            RELIABILITY=reliability,
            POWER=lambda_beta != 1.0,
            EDGE=EDGE,
            BLOCK=BLOCK,
            num_warps=4,
        )
