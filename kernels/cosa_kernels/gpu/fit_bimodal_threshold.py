"""Triton kernel of the threshold search: the mixture fit, start to end, in one warp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosa_kernels.gpu.launch import device_of


@triton.jit
def component(share, x, centre):
    """Weight, mean and variance of a component that holds `share` of each bin; moments about its last mean.

    Moments about a distant point would cancel in float32.
    """
    offset = x - centre
    first = share * offset
    weight = tl.maximum(tl.sum(share, axis=0), 1e-8)
    shift = tl.sum(first, axis=0) / weight
    # A mode cannot be narrower than what one bin can tell.
    variance = tl.maximum(tl.sum(first * offset, axis=0) / weight - shift * shift, 1.0 / 12.0)
    return weight, centre + shift, variance


@triton.jit
def log_odds(x, w0, m0, v0, w1, m1, v1):
    """log2 of (density of component 1 / density of component 0) at x."""
    HALF_LOG2E: tl.constexpr = 0.7213475204444817
    a, b = x - m0, x - m1
    return a * a * (HALF_LOG2E / v0) - b * b * (HALF_LOG2E / v1) + (tl.log2(w1 / w0) - 0.5 * tl.log2(v1 / v0))


@triton.jit(do_not_specialize=["low", "width", "iterations", "min_count"])
def fit_kernel(
    histogram,  # (BINS,)
    threshold,  # 0-d float32, out
    low,
    width,
    iterations,
    min_count,
    BINS: tl.constexpr,
):
    # In units of bins. Per EM step: one exponential and one division a bin, and six independent sums, whose shuffles
    # overlap; with one warp none of them needs shared memory or a barrier.
    index = tl.arange(0, BINS)
    x = index.to(tl.float32) + 0.5
    counts = tl.load(histogram + index).to(tl.float32)
    total = tl.sum(counts, axis=0)
    enough = (total >= min_count) & (total > 0.0) & (total < float("inf"))
    share = tl.where(enough, counts / tl.where(enough, total, 1.0), 0.0)

    # Start: the split with the largest between-class variance (Otsu).
    mean = tl.sum(share * x, axis=0)
    below = tl.cumsum(share, axis=0)
    lacking = tl.cumsum(share * (mean - x), axis=0)
    between = lacking * lacking / tl.maximum(below * (1.0 - below), 1e-8)
    split = tl.argmax(tl.where(index < BINS - 1, between, -1.0), axis=0)
    w0, m0, v0 = component(tl.where(index <= split, share, 0.0), x, mean)
    w1, m1, v1 = component(tl.where(index > split, share, 0.0), x, mean)

    for _ in range(iterations):
        # Bounded, so that neither responsibility is lost: both come out accurate however small they are.
        odds = tl.exp2(tl.minimum(tl.maximum(log_odds(x, w0, m0, v0, w1, m1, v1), -60.0), 60.0))
        lower = share / (1.0 + odds)
        w0, m0, v0 = component(lower, x, m0)
        w1, m1, v1 = component(lower * odds, x, m1)

    # The split with the largest likelihood when every bin goes to one side entirely.
    evidence = log_odds(x, w0, m0, v0, w1, m1, v1)
    evidence = tl.where(m1 >= m0, evidence, -evidence)
    split = tl.argmax(tl.cumsum(-evidence * share, axis=0), axis=0)
    # Over empty bins the likelihood is flat; the densities cross at one of them.
    held = share > 0.0
    last_below = tl.max(tl.where(held & (index <= split), index, -1), axis=0)
    first_above = tl.min(tl.where(held & (index > split), index, BINS), axis=0)
    split = tl.max(tl.where((index < first_above) & (held | (evidence < 0.0)), index, 0), axis=0)
    bimodal = (
        enough
        & (tl.abs(m1 - m0) >= 0.1 * BINS)
        & (tl.minimum(w0, w1) >= 0.02)
        & (last_below >= 0)
        & (first_above < BINS)
    )
    tl.store(threshold, tl.where(bimodal, low + width * (split + 1), float("nan")))


def fit(histogram: Tensor, low: float, high: float, iterations: int, min_count: int) -> Tensor:
    """0-d float32 threshold between the two modes of a (bins,) histogram, NaN where there are none.

    `bins` is a power of two, at most 1024. A single program: it waits for nothing and nothing waits for it.
    """
    bins = len(histogram)
    threshold = torch.empty((), dtype=torch.float32, device=histogram.device)
    with device_of(histogram):
        fit_kernel[(1,)](
            histogram.contiguous(),
            threshold,
            low,
            (high - low) / bins,
            iterations,
            min_count,
            BINS=bins,
            num_warps=max(1, bins // 256),
        )
    return threshold
