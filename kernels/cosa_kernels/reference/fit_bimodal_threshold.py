"""The threshold between the two modes of a histogram (Eq. 6), in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from cosa_kernels.checks import check_histogram


def fit_bimodal_threshold(
    histogram: Tensor, *, low: float = 0.0, high: float = 1.0, iterations: int = 100, min_count: int = 50
) -> Tensor:
    """Threshold xi* between the two modes of a histogram (Eq. 6).

    A two-component Gaussian mixture is fitted by EM, started from the split with the largest between-class variance
    (Otsu). The threshold is the bin edge that maximises the hard-assignment likelihood: the log of pi_fg N_fg summed
    over everything above plus the log of pi_bg N_bg summed over everything below; among edges of equal likelihood, with
    only empty bins between them, the one where the two densities cross. (As printed, Eq. 6 adds the two products
    instead of their logarithms.)

    Args:
        histogram: (bins,) counts over [low, high].
        low, high: range of the histogram.
        iterations: EM steps.
        min_count: fewer values than this say nothing.

    Returns:
        0-d tensor; NaN where the values are too few or not bimodal: modes less than a tenth of the range apart, one of
        them below 2 % of the values, or all values on one side of the threshold.

    Raises:
        ValueError: `histogram` is not a 1-d tensor of at least 4 bins.
    """
    check_histogram(histogram)
    counts = histogram.to(torch.promote_types(histogram.dtype, torch.float32))
    bins = len(counts)
    index = torch.arange(bins, device=counts.device)
    # In units of bins, from the middle of the histogram: the squares stay small.
    x = index.to(counts.dtype) - (bins - 1) / 2
    total = counts.sum()
    share = counts / total.clamp(min=1.0)

    below, lacking = share.cumsum(0), (share * ((share * x).sum() - x)).cumsum(0)
    between = lacking**2 / (below * (1.0 - below)).clamp(min=1e-8)
    start = index <= between[:-1].argmax()
    weight, mean, variance = _maximization(x, torch.stack([start, ~start]) * share)
    for _ in range(iterations):
        responsibility = _log_density(x, weight, mean, variance).softmax(dim=0)
        weight, mean, variance = _maximization(x, responsibility * share)

    order = mean.argsort()
    lower, upper = _log_density(x, weight[order], mean[order], variance[order])
    split = ((lower * share).cumsum(0) + (upper * share).sum() - (upper * share).cumsum(0)).argmax()
    held = share > 0
    first_above = torch.where(held & (index > split), index, bins).min()
    last_below = torch.where(held & (index <= split), index, -1).max()
    split = torch.where((index < first_above) & (held | (lower > upper)), index, 0).max()
    bimodal = (
        (total >= min_count)
        & ((mean[1] - mean[0]).abs() >= 0.1 * bins)
        & (weight.min() >= 0.02)
        & (last_below >= 0)
        & (first_above < bins)
    )
    return torch.where(bimodal, low + (high - low) / bins * (split + 1), torch.nan).to(counts.dtype)


def _maximization(x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, mean and variance (2,) of the components, from the (2, bins) values that each of them holds."""
    # Sums, not a matrix product, which autocast or TF32 would round.
    weight = shares.sum(dim=1).clamp(min=1e-8)
    mean = (shares * x).sum(dim=1) / weight
    # A mode cannot be narrower than what one bin can tell.
    return weight, mean, ((shares * x**2).sum(dim=1) / weight - mean**2).clamp(min=1 / 12)


def _log_density(x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(2, bins) log of pi N(x | mu, sigma^2), up to a constant."""
    scaled = (x - mean[:, None]) ** 2 / variance[:, None]
    return weight.log()[:, None] - 0.5 * (scaled + variance.log()[:, None])
