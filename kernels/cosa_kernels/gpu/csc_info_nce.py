"""Triton kernels of `csc_info_nce`: scores are recomputed tile by tile, never stored, and nothing needs atomics.

Positions are sorted by label, those that are no anchors first. The positives of an anchor are then one range of
columns and its negatives the rest: loops pass over what they do not need, and no label is compared.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from cosa_kernels.gpu.launch import device_of, dot_precision
from cosa_kernels.implementation import interpreted

ROWS = 64
"""Anchors per program: the tensor cores' own height on Hopper."""
MOST_CHUNKS = 4
"""Chunks of 32 dimensions whose sums fit a thread block's registers; for more, each program takes a share."""


@triton.jit
def log1p(t):
    """log(1 + t) for 0 <= t <= 1, to float32's relative precision: 1 + t would round a small t away."""
    return tl.where(t < 0.03, t * (1.0 - t * (0.5 - t * (0.33333333 - t * 0.25))), tl.log(1.0 + t))


@triton.jit
def load_vectors(x, positions, mask, chunk, D: tl.constexpr, WIDTH: tl.constexpr):
    """(positions, WIDTH): one chunk of the vectors' dimensions."""
    dims = chunk * WIDTH + tl.arange(0, WIDTH)
    return tl.load(x + positions.to(tl.int64)[:, None] * D + dims[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def inner_products(
    x, row, rows, inside, columns, mask, chunks, D: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr
):
    """(rows, columns). `row` holds the rows' vectors if they are a single chunk; more do not fit the registers."""
    if D == WIDTH:
        column = load_vectors(x, columns, mask, 0, D, WIDTH)
        return tl.dot(row, tl.trans(column), input_precision=PRECISION)
    products = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for chunk in range(chunks):
        part = load_vectors(x, rows, inside, chunk, D, WIDTH)
        column = load_vectors(x, columns, mask, chunk, D, WIDTH)
        products = tl.dot(part, tl.trans(column), products, input_precision=PRECISION)
    return products


@triton.jit(do_not_specialize=["N", "chunks"])
def anchor_kernel(
    x,  # (S, N, D) float32, sorted
    first,  # (S) int32: positions before it are no anchors
    begin,  # (S, N) int32: where the positions of the same label begin
    end,  # (S, N) int32: and end
    losses,  # (S, N) float32, out
    log_ks,  # (S, N) float32, out: log2 of the sum over negatives; 0 where the anchor does not count
    pulls,  # (S, N) float32, out: weight of each positive
    pushes,  # (S, N) float32, out: weight of the negatives
    N,
    chunks,
    factor,  # from inner products to scores in units of log 2
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LOG2: tl.constexpr = 0.6931471805599453
    FAR: tl.constexpr = 2147483647
    # 64-bit offsets: S * N * D may pass 2^31.
    scope = tl.program_id(1).to(tl.int64)
    x += scope * N * D
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = scope * N + rows
    start = tl.load(first + scope)
    inside = rows < N
    anchor = inside & (rows >= start)
    low = tl.load(begin + at, mask=inside, other=0)
    high = tl.load(end + at, mask=inside, other=0)
    row = load_vectors(x, rows, inside, 0, D, WIDTH)

    # 1. log K, in the manner of a running softmax; columns that are positives of every row are left out.
    left = start // COLUMNS * COLUMNS
    shared_low = tl.max(tl.where(anchor, low, 0), axis=0)
    shared_high = tl.min(tl.where(anchor, high, FAR), axis=0)
    before = tl.cdiv(tl.maximum(shared_low - left, 0), COLUMNS)
    right = tl.maximum(tl.minimum(shared_high, N) // COLUMNS * COLUMNS, left + before * COLUMNS)
    tiles = before + tl.cdiv(tl.maximum(N - right, 0), COLUMNS)
    # Of rows that are no anchors nothing is wanted.
    tiles = tl.where(shared_high == FAR, 0, tiles)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for tile in range(tiles):
        j = tl.where(tile < before, left + tile * COLUMNS, right + (tile - before) * COLUMNS) + tl.arange(0, COLUMNS)
        scores = inner_products(x, row, rows, inside, j, j < N, chunks, D, WIDTH, PRECISION) * factor
        # From an anchor's point of view: others' columns, of anchors.
        negative = ((j < N) & (j >= start))[None, :] & ((j[None, :] < low[:, None]) | (j[None, :] >= high[:, None]))
        scores = tl.where(negative, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, axis=1))
        reference = tl.where(now == float("-inf"), 0.0, now)
        total = total * tl.exp2(highest - reference) + tl.sum(tl.exp2(scores - reference[:, None]), axis=1)
        highest = now
    count = high - low - 1
    complete = anchor & (count > 0) & (high - low < N - start)
    log_k = tl.where(complete, highest + tl.log2(tl.where(complete, total, 1.0)), 0.0)

    # 2. The positives.
    lowest = tl.min(tl.where(complete, low, FAR), axis=0) // COLUMNS * COLUMNS
    last = tl.max(tl.where(complete, high, 0), axis=0)
    loss = tl.zeros([ROWS], tl.float32)
    push = tl.zeros([ROWS], tl.float32)
    for j0 in range(lowest, last, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        away = log_k[:, None] - inner_products(x, row, rows, inside, j, j < N, chunks, D, WIDTH, PRECISION) * factor
        positive = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None]) & (j[None, :] != rows[:, None])
        t = tl.exp2(-tl.abs(away))
        loss += tl.sum(tl.where(positive, tl.maximum(away, 0.0) * LOG2 + log1p(t), 0.0), axis=1)
        push += tl.sum(tl.where(positive, tl.where(away >= 0, 1.0, t) / (1.0 + t), 0.0), axis=1)
    weight = 1.0 / tl.maximum(count, 1).to(tl.float32)
    # Not products with 0: where no anchor is, there may be NaN.
    tl.store(losses + at, tl.where(complete, loss * weight, 0.0), mask=inside)
    tl.store(log_ks + at, log_k, mask=inside)
    tl.store(pulls + at, tl.where(complete, weight, 0.0), mask=inside)
    tl.store(pushes + at, tl.where(complete, push * weight, 0.0), mask=inside)


@triton.jit(do_not_specialize=["N", "C", "chunks"])
def gradient_kernel(
    x,  # (S, N, D) float32, sorted
    order,  # (S, N) int64: where each sorted position comes from
    first,  # (S) int32
    begin,  # (S, N) int32
    end,  # (S, N) int32
    log_ks,  # (S, N) float32
    pulls,  # (S, N) float32
    pushes,  # (S, N) float32
    gradient,  # (S, C, N) float32, out: in the order of the inputs
    N,
    C,
    chunks,
    factor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNKS: tl.constexpr,  # that one program sums up
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dX_i = sum_j (G_ij + G_ji) X_j, where G_ij is the derivative of anchor i's loss by the score of j."""
    scope = tl.program_id(1).to(tl.int64)
    x += scope * N * D
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = scope * N + rows
    start = tl.load(first + scope)
    inside = rows < N
    anchor = inside & (rows >= start)
    low = tl.load(begin + at, mask=inside, other=0)
    high = tl.load(end + at, mask=inside, other=0)
    log_k = tl.load(log_ks + at, mask=inside, other=0.0)
    pull = tl.load(pulls + at, mask=inside, other=0.0)
    push = tl.load(pushes + at, mask=inside, other=0.0)
    row = load_vectors(x, rows, inside, 0, D, WIDTH)
    part = tl.program_id(2) * CHUNKS
    # Triton knows the sum of tuples, not their unpacking.
    flows = ()
    for _ in tl.static_range(CHUNKS):
        flows = flows + (tl.zeros([ROWS, WIDTH], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    # Of rows that are no anchors nothing is wanted.
    left = tl.where(tl.program_id(0) * ROWS + ROWS > start, start // COLUMNS * COLUMNS, N)
    for j0 in range(left, N, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        # Zero for columns that are no anchors: what the terms below hold there is finite and then does not count.
        other = (j < N) & (j >= start)
        scores = inner_products(x, row, rows, inside, j, other, chunks, D, WIDTH, PRECISION) * factor
        away = log_k[:, None] - scores
        back = tl.load(log_ks + scope * N + j, mask=other, other=0.0)[None, :] - scores
        # exp(-|log K - s|) serves both: a negative's score cannot pass log K.
        t = tl.exp2(-tl.abs(away))
        u = tl.exp2(-tl.abs(back))
        pull_back = tl.load(pulls + scope * N + j, mask=other, other=0.0)[None, :]
        push_back = tl.load(pushes + scope * N + j, mask=other, other=0.0)[None, :]
        same = (j[None, :] >= low[:, None]) & (j[None, :] < high[:, None])
        pulled = pull[:, None] * tl.where(away >= 0, 1.0, t) / (1.0 + t)
        pulled += pull_back * tl.where(back >= 0, 1.0, u) / (1.0 + u)
        pushed = push[:, None] * t + push_back * u
        weight = tl.where(same, tl.where(j[None, :] == rows[:, None], 0.0, -pulled), pushed)
        sums = ()
        for chunk in tl.static_range(CHUNKS):
            # Beyond the last chunk it is read again, for a sum that is not stored.
            column = load_vectors(x, j, other, tl.minimum(part + chunk, D // WIDTH - 1), D, WIDTH)
            more = tl.dot(weight, column, flows[chunk], input_precision=PRECISION)
            sums = sums + (more,)  # type: ignore[assignment]  # noqa: RUF005
        flows = sums
    to = tl.load(order + at, mask=inside, other=0)
    for chunk in tl.static_range(CHUNKS):
        dims = (part + chunk) * WIDTH + tl.arange(0, WIDTH)
        out = gradient + (scope * C + dims)[None, :] * N + to[:, None]
        tl.store(out, tl.where(anchor[:, None], flows[chunk], 0.0), mask=inside[:, None] & (dims < C)[None, :])


def forward(x: Tensor, labels: Tensor, temperature: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum over anchors (0-d), and its gradient times the temperature (S, C, N; empty if not wanted), both float32.

    Args:
        x: (S, C, N) float32 vectors in S scopes, C up to 256.
        labels: (S, N) int64; -1 for positions that are no anchors.
        temperature: what inner products are divided by.
        with_gradient: whether the gradient is wanted.
    """
    scopes, classes, positions = x.shape
    # Padded, so that rows of `x` are aligned and loaded without a mask on the dimension.
    width = 16 if classes <= 16 else 32
    chunks = triton.cdiv(classes, width)

    labels, order = labels.int().sort(dim=1, stable=True)
    begin = torch.searchsorted(labels, labels, out_int32=True)
    end = torch.searchsorted(labels, labels, out_int32=True, right=True)
    first = torch.searchsorted(labels, torch.zeros_like(labels[:, :1]), out_int32=True)
    x = x.gather(2, order[:, None].expand(-1, classes, -1))
    x = F.pad(x.transpose(1, 2), (0, chunks * width - classes)).contiguous()
    losses, log_ks, pulls, pushes = x.new_empty(4, scopes, positions)
    grid = (triton.cdiv(positions, ROWS), scopes)
    factor = 1.4426950408889634 / temperature
    options = {"D": chunks * width, "WIDTH": width, "ROWS": ROWS, "PRECISION": dot_precision()}
    options |= {"num_warps": 4, "num_stages": 1, **_register_limit()}
    with device_of(x):
        anchor_kernel[grid](
            x, first, begin, end, losses, log_ks, pulls, pushes, positions, chunks, factor, COLUMNS=32, **options
        )
        gradient = x.new_empty((scopes, classes, positions) if with_gradient else 0)
        if with_gradient:
            parts = triton.cdiv(chunks, MOST_CHUNKS)
            per_part = triton.cdiv(chunks, parts)
            gradient_kernel[(*grid, parts)](
                x,
                order,
                first,
                begin,
                end,
                log_ks,
                pulls,
                pushes,
                gradient,
                positions,
                classes,
                chunks,
                factor,
                CHUNKS=per_part,
                COLUMNS=32 if per_part < MOST_CHUNKS else 16,
                **options,
            )
    return losses.sum(), gradient


def _register_limit() -> dict[str, int]:
    """All registers a thread can have. Left to itself ptxas spills a few bytes to fit one thread block more."""
    if interpreted() or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": 255}
