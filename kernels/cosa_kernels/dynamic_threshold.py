"""Dynamic CAM threshold: a two-component Gaussian mixture over recent confidences (Eq. 6), on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cosa_kernels.checks import check_cams, check_open_fraction
from cosa_kernels.reference import box_mask


def fit_bimodal_threshold(
    histogram: Tensor, *, low: float = 0.0, high: float = 1.0, iterations: int = 60, min_count: int = 50
) -> Tensor:
    """Threshold xi* between the two modes of a histogram (Eq. 6).

    A two-component Gaussian mixture is fitted by EM, started from the split with the largest between-class variance.
    The threshold is the bin edge that maximises the hard-assignment likelihood: the log of pi_fg N_fg summed over
    everything above plus the log of pi_bg N_bg summed over everything below. (As printed, Eq. 6 adds the two products
    instead of their logarithms.)

    Args:
        histogram: (bins,) counts over [low, high].
        low, high: range of the histogram.
        iterations: EM steps; a fixed number, so that nothing waits for the device.
        min_count: fewer values than this say nothing.

    Returns:
        0-d tensor of the histogram's dtype; NaN where the values are too few or not bimodal (modes less than a tenth
        of the range apart, or one of them below 2 % of the values).

    Raises:
        ValueError: `histogram` is not a 1-d floating tensor of at least 4 bins.
    """
    if histogram.ndim != 1 or len(histogram) < 4 or not histogram.is_floating_point():
        raise ValueError(
            f"histogram must be a floating (bins,) tensor with at least 4 bins, got {histogram.dtype} "
            f"{tuple(histogram.shape)}"
        )
    bins = len(histogram)
    width = (high - low) / bins
    centers = low + width * (torch.arange(bins, device=histogram.device, dtype=histogram.dtype) + 0.5)
    total = histogram.sum()
    share = histogram / total.clamp(min=1.0)
    weight, mean, variance = _otsu(share, centers, width)
    powers = torch.stack([torch.ones_like(centers), centers, centers**2])
    for _ in range(iterations):
        responsibility = _log_density(centers, weight, mean, variance).softmax(dim=0)
        moments = (responsibility * share) @ powers.T
        weight = moments[:, 0].clamp(min=1e-8)
        mean = moments[:, 1] / weight
        # A mode cannot be narrower than what one bin can tell.
        variance = (moments[:, 2] / weight - mean**2).clamp(min=width**2 / 12)
    order = mean.argsort()
    likelihood = _log_density(centers, weight[order], mean[order], variance[order]) * share
    below = likelihood[0].cumsum(dim=0)
    above = likelihood[1].sum() - likelihood[1].cumsum(dim=0)
    split = (below + above).argmax()
    bimodal = (
        (total >= min_count)
        & ((mean[1] - mean[0]).abs() >= 0.1 * (high - low))
        & (weight.min() >= 0.02)
        & (split < bins - 1)
    )
    return torch.where(bimodal, low + width * (split + 1), math.nan).to(histogram.dtype)


def _otsu(share: Tensor, centers: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and variances (2,) of the two sides of the best between-class split."""
    below, first, second = share.cumsum(0), (share * centers).cumsum(0), (share * centers**2).cumsum(0)
    above = (below[-1] - below).clamp(min=1e-8)
    under = below.clamp(min=1e-8)
    mean_below, mean_above = first / under, (first[-1] - first) / above
    # Indexed by a 1-d tensor: a 0-d one would be read by the host.
    split = (below * above * (mean_above - mean_below) ** 2)[:-1].argmax()[None]
    weight = torch.cat([under[split], above[split]])
    mean = torch.cat([mean_below[split], mean_above[split]])
    square = torch.cat([second[split] / under[split], (second[-1] - second[split]) / above[split]])
    return weight, mean, (square - mean**2).clamp(min=width**2 / 12)


def _log_density(x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(2, bins) log of pi N(x | mu, sigma^2), up to a constant."""
    scaled = (x - mean[:, None]) ** 2 / variance[:, None]
    return weight.log()[:, None] - 0.5 * (scaled + variance.log()[:, None])


class DynamicThreshold(nn.Module):
    """CAM threshold xi that follows the confidences of the last batches (Eq. 6).

    Keeps a ring buffer of one histogram per batch (not of values), refits the mixture at each update and smooths the
    result. Everything, xi included, stays on the device and in the state dict.

    Args:
        initial: xi before the first successful fit.
        queue: batches remembered.
        floor: confidences below it are left out; 0 keeps all (Eq. 6).
        limits: xi is clamped to them.
        momentum: xi <- momentum * xi + (1 - momentum) * fit.
        bins: resolution of the histograms.

    Raises:
        ValueError: `initial` or `limits` is outside (0, 1), or `queue` is not positive.
    """

    xi: Tensor
    histograms: Tensor
    position: Tensor

    def __init__(
        self,
        initial: float = 0.5,
        *,
        queue: int = 100,
        floor: float = 0.0,
        limits: tuple[float, float] = (0.15, 0.7),
        momentum: float = 0.9,
        bins: int = 256,
    ) -> None:
        super().__init__()
        check_open_fraction("initial", initial)
        for limit in limits:
            check_open_fraction("limits", limit)
        if queue < 1:
            raise ValueError(f"queue must be at least 1, got {queue}")
        self.floor, self.limits, self.momentum = floor, limits, momentum
        self.register_buffer("xi", torch.tensor(float(initial)))
        self.register_buffer("histograms", torch.zeros(queue, bins))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, cams: Tensor, valid_box: Tensor | None = None) -> Tensor:
        """Take in one batch and refit.

        Args:
            cams: (B, C, H, W) in [0, 1].
            valid_box: (B, 4) integers y0, y1, x0, x1: positions outside do not count.

        Returns:
            0-d float32 tensor: the new xi.
        """
        check_cams(cams)
        confidence = cams.amax(dim=1).float()
        counted = confidence >= self.floor
        if valid_box is not None:
            counted &= box_mask(valid_box, (cams.shape[-2], cams.shape[-1]))
        bins = self.histograms.shape[1]
        # scatter_add of ones: a histogram with a mask and without a wait for the device.
        slot = (confidence * bins).long().clamp(0, bins - 1)
        batch = torch.zeros(bins, device=cams.device).scatter_add_(0, slot.flatten(), counted.float().flatten())
        rows = torch.arange(len(self.histograms), device=cams.device)
        current = (rows == self.position % len(self.histograms))[:, None]
        self.histograms.copy_(torch.where(current, batch, self.histograms))
        self.position.add_(1)
        fit = fit_bimodal_threshold(self.histograms.sum(dim=0)).clamp(*self.limits)
        smoothed = self.momentum * self.xi + (1.0 - self.momentum) * fit
        self.xi.copy_(torch.where(fit.isnan(), self.xi, smoothed))
        return self.xi
