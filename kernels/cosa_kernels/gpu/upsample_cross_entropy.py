"""Triton kernels of `upsample_cross_entropy`: loss and low-resolution gradient in one pass, without atomics.

The unit of work is an interpolation region: the output pixels that mix the same four logits (16 x 16 of them at stride
16). Regions are numbered (i + 1) * (w + 1) + (j + 1) for the region whose upper left logit is (i, j), i = -1 .. h - 1;
those of the border mix fewer than four.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosa_kernels.gpu.launch import device_of, dot_precision
from cosa_kernels.ops.upsample_cross_entropy import MOST_CLASSES

LANES = 32
"""Pixels per tile: one warp's width, so that a warp holds all its classes of a pixel in one thread."""
LABEL_TILES = 4
"""Tiles looked at together when the labels of a region are added up."""


@triton.jit
def first_output(position, low, high):
    """First output whose source coordinate is at or beyond `position`; 0 for -1, `high` for `low` (exact integers)."""
    numerator = tl.maximum((2 * position + 1) * high - low, 0)
    return tl.minimum((numerator + 2 * low - 1) // (2 * low), high)


@triton.jit
def share_of_second(output, position, low, high):
    """How much of the second source, `position` + 1, an output mixes; all of the one that exists at the borders."""
    share = ((2 * output + 1) * low - (2 * position + 1) * high).to(tl.float32) / (2.0 * high)
    return tl.where(position < 0, 1.0, tl.where(position >= low - 1, 0.0, share))


@triton.jit(do_not_specialize=["splits", "B", "K", "h", "w", "H", "W", "ignore_index"])
def region_kernel(
    logits,  # (B, K, h, w) float32
    target,  # (N, B, H, W) uint8, int32 or int64
    weight,  # (N, B, H, W) float32, or unused
    scale,  # (N,) float32
    losses,  # (B, regions * splits) float32, out
    partials,  # (B, regions * splits, 4, K) float32, out: gradients for the four logits
    splits,  # programs a region's columns are divided among
    B,
    K,
    h,
    w,
    H,
    W,
    ignore_index,
    N: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GRADIENT: tl.constexpr,
    KC: tl.constexpr,  # K padded to a power of two
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LABEL_TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part = tl.program_id(0)
    image = tl.program_id(1)
    region = part // splits
    i = region // (w + 1) - 1
    j = region % (w + 1) - 1
    top, bottom = first_output(i, h, H), first_output(i + 1, h, H)
    left = first_output(j, w, W) + part % splits * COLUMNS
    right = tl.minimum(first_output(j + 1, w, W), left + COLUMNS)

    # 64-bit offsets: B * K * h * w may pass 2^31.
    classes = tl.arange(0, KC)
    real = classes < K
    plane = logits + (image.to(tl.int64) * K + classes) * h * w
    upper, lower = tl.maximum(i, 0) * w, tl.minimum(i + 1, h - 1) * w
    first, second = tl.maximum(j, 0), tl.minimum(j + 1, w - 1)

    # 1. w u[label] and its way back to the four logits: per distinct label (one to three, as a rule), four sums.
    t00 = tl.zeros([KC], tl.float32)
    t01 = tl.zeros([KC], tl.float32)
    t10 = tl.zeros([KC], tl.float32)
    t11 = tl.zeros([KC], tl.float32)
    wrong = False
    NONE: tl.constexpr = 2147483647
    pixels = tl.arange(0, LABEL_TILES * ROWS * COLUMNS)
    x = left + pixels % COLUMNS
    tx = share_of_second(x, j, w, W)
    for y0 in range(top, bottom, LABEL_TILES * ROWS):
        y = y0 + pixels // COLUMNS
        ty = share_of_second(y, i, h, H)
        inside = (y < bottom) & (x < right)
        for n in tl.static_range(N):
            offset = ((n * B + image).to(tl.int64) * H + y) * W + x
            label = tl.load(target + offset, mask=inside, other=0)
            share = tl.load(scale + n)
            if WEIGHTED:
                share = share * tl.load(weight + offset, mask=inside, other=0.0)
            # What passes 32 bits has no channel either.
            code = tl.minimum(tl.maximum(label.to(tl.int64), -1), NONE - 1).to(tl.int32)
            waiting = tl.where(inside & (label != ignore_index), code, NONE)
            chosen = tl.min(waiting, axis=0)
            while chosen < NONE:
                g = tl.where(waiting == chosen, share, 0.0)
                gy = g * ty
                total = tl.sum(g, axis=0)
                total_y = tl.sum(gy, axis=0)
                total_x = tl.sum(g * tx, axis=0)
                total_yx = tl.sum(gy * tx, axis=0)
                here = classes == chosen
                t00 += tl.where(here, total - total_y - total_x + total_yx, 0.0)
                t01 += tl.where(here, total_x - total_yx, 0.0)
                t10 += tl.where(here, total_y - total_yx, 0.0)
                t11 += tl.where(here, total_yx, 0.0)
                wrong |= (chosen < 0) | (chosen >= K)
                waiting = tl.where(waiting == chosen, NONE, waiting)
                chosen = tl.min(waiting, axis=0)
    value = -tl.sum(
        t00 * tl.load(plane + upper + first, mask=real, other=0.0)
        + t01 * tl.load(plane + upper + second, mask=real, other=0.0)
        + t10 * tl.load(plane + lower + first, mask=real, other=0.0)
        + t11 * tl.load(plane + lower + second, mask=real, other=0.0),
        axis=0,
    )
    # A label without a channel must not pass unnoticed, and nothing here may wait for the host.
    value = tl.where(wrong, float("nan"), value)

    # 2. sum w log sum exp(u), and its gradient w softmax(u) on the way back to the four logits.
    # In units of log 2: the exponential is then a single instruction. Padding is far below everything, yet finite,
    # so that differences of it are 0.
    LOG2E: tl.constexpr = 1.4426950408889634
    c00 = tl.load(plane + upper + first, mask=real, other=-1e30) * LOG2E
    c01 = tl.load(plane + upper + second, mask=real, other=-1e30) * LOG2E
    c10 = tl.load(plane + lower + first, mask=real, other=-1e30) * LOG2E
    c11 = tl.load(plane + lower + second, mask=real, other=-1e30) * LOG2E
    lanes = tl.arange(0, ROWS * COLUMNS)
    row, x = lanes // COLUMNS, left + lanes % COLUMNS
    tx = share_of_second(x, j, w, W)
    above = c00[:, None] + (c01 - c00)[:, None] * tx[None, :]
    slope = (c10[:, None] + (c11 - c10)[:, None] * tx[None, :]) - above
    loss = tl.zeros([ROWS * COLUMNS], tl.float32)
    sum_all = tl.zeros([KC, ROWS * COLUMNS], tl.float32)
    sum_lower = tl.zeros([KC, ROWS * COLUMNS], tl.float32)
    for y0 in range(top, bottom, ROWS):
        y = y0 + row
        ty = share_of_second(y, i, h, H)
        inside = (y < bottom) & (x < right)
        share = tl.zeros([ROWS * COLUMNS], tl.float32)
        for n in tl.static_range(N):
            offset = ((n * B + image).to(tl.int64) * H + y) * W + x
            label = tl.load(target + offset, mask=inside, other=0)
            factor = tl.load(scale + n)
            if WEIGHTED:
                factor = factor * tl.load(weight + offset, mask=inside, other=0.0)
            share += tl.where(inside & (label != ignore_index), factor, 0.0)
        u = above + slope * ty[None, :]
        highest = tl.max(u, axis=0)
        e = tl.exp2(u - highest[None, :])
        total = tl.sum(e, axis=0)
        loss += share * (highest + tl.log2(total))
        if GRADIENT:
            flow = e * (share / total)[None, :]
            sum_all += flow
            sum_lower += flow * ty[None, :]
    value += tl.sum(loss, axis=0) * 0.6931471805599453
    here = image.to(tl.int64) * tl.num_programs(0) + part
    tl.store(losses + here, value)
    if GRADIENT:
        # The sum over pixels as a matrix product: by count, shuffles would add a third to a half to all of the above.
        slots = tl.arange(0, 16)  # its smallest width; two are used: left and right
        sides = tl.where(slots[None, :] == 0, 1.0 - tx[:, None], tl.where(slots[None, :] == 1, tx[:, None], 0.0))
        is_left = slots[None, :] == 0
        out = partials + (here * 4 + slots[None, :]) * K + classes[:, None]
        keep = real[:, None] & (slots[None, :] < 2)
        # One product after the other, for the sake of registers.
        lower_pair = tl.dot(sum_lower, sides, input_precision=PRECISION)
        tl.store(out + 2 * K, lower_pair - tl.where(is_left, t10[:, None], t11[:, None]), mask=keep)
        upper_pair = tl.dot(sum_all - sum_lower, sides, input_precision=PRECISION)
        tl.store(out, upper_pair - tl.where(is_left, t00[:, None], t01[:, None]), mask=keep)


@triton.jit(do_not_specialize=["splits", "K", "h", "w"])
def gather_kernel(
    partials,  # (B, regions * splits, 4, K)
    gradient,  # (B, K, h, w), out
    splits,
    K,
    h,
    w,
    CELLS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Each logit adds up what the four regions around it have for it, in a fixed order."""
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    label = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    y, x = cell // w, cell % w
    mask = (cell < h * w)[:, None] & (label < K)[None, :]
    total = tl.zeros([CELLS, CLASSES], tl.float32)
    for corner in tl.static_range(4):
        # As corner (0, 0) of region (y, x), (0, 1) of (y, x - 1), (1, 0) of (y - 1, x), (1, 1) of (y - 1, x - 1).
        region = image * (h + 1) * (w + 1) + (y + 1 - corner // 2) * (w + 1) + (x + 1 - corner % 2)
        for split in range(splits):
            source = partials + ((region * splits + split) * 4 + corner)[:, None] * K + label[None, :]
            total += tl.load(source, mask=mask, other=0.0)
    out = gradient + (image * K + label)[None, :] * (h * w) + cell[:, None]
    tl.store(out, total, mask=mask)


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss (0-d) and gradient (B, K, h, w; empty if not wanted), both float32.

    Args:
        logits: (B, K, h, w) float32, bfloat16 or float16.
        target: (N, B, H, W) integers.
        weight: (N, B, H, W) floating, or None.
        scale: (N,) float32 factors of the N losses.
        ignore_index: target of pixels that do not count.
        with_gradient: whether the gradient is wanted.

    Raises:
        ValueError: more than 256 classes, or sizes whose product passes 2^30.
    """
    # Few types, few kernels to compile; only what has full resolution is worth reading as it is.
    logits = logits.float().contiguous()
    target = (target if target.dtype in (torch.uint8, torch.int32) else target.long()).contiguous()
    weight = None if weight is None else weight.float().contiguous()
    batch, classes, h, w = logits.shape
    count, _, height, width = target.shape
    if classes > MOST_CLASSES:
        raise ValueError(f"logits have {classes} classes; the kernel takes up to {MOST_CLASSES}: use impl='torch'")
    if max((h + 1) * height, (w + 1) * width) >= 2**30:
        raise ValueError(f"up-sampling {h} x {w} to {height} x {width} passes the kernel's 32-bit coordinates")
    # As wide as the widest region, or its columns are divided: lanes beyond its edge would idle.
    widest = triton.cdiv(width, w)
    columns = min(LANES, max(4, triton.next_power_of_2(widest)))
    splits = triton.cdiv(widest, columns)
    parts = (h + 1) * (w + 1) * splits
    losses = torch.empty((batch, parts), dtype=torch.float32, device=logits.device)
    shape = (batch, parts, 4, classes) if with_gradient else (0,)
    partials = torch.empty(shape, dtype=torch.float32, device=logits.device)
    padded = max(16, triton.next_power_of_2(classes))
    # From 128 classes on the three-fold product of float32 on matrix units spills registers, plain arithmetic does not.
    precision = "ieee" if padded >= 128 else dot_precision()
    with device_of(logits):
        region_kernel[(parts, batch)](
            logits,
            target,
            weight,
            scale,
            losses,
            partials,
            splits,
            batch,
            classes,
            h,
            w,
            height,
            width,
            ignore_index,
            N=count,
            WEIGHTED=weight is not None,
            GRADIENT=with_gradient,
            KC=padded,
            ROWS=LANES // columns,
            COLUMNS=columns,
            LABEL_TILES=LABEL_TILES,
            PRECISION=precision,
            num_warps=max(1, padded // 32),  # 32 classes each: no thread shares a pixel within a warp
        )
        if not with_gradient:
            return losses.sum(), logits.new_empty(0, dtype=torch.float32)
        gradient = torch.empty((batch, classes, h, w), dtype=torch.float32, device=logits.device)
        grid = (triton.cdiv(h * w, 32), triton.cdiv(classes, 32), batch)
        gather_kernel[grid](partials, gradient, splits, classes, h, w, CELLS=32, CLASSES=32, num_warps=4)
    return losses.sum(), gradient
