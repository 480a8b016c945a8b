"""Threshold between the two modes of a histogram: a two-component Gaussian mixture (Eq. 6), on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.checks import check_bins, check_finite, check_histogram
from cosa_kernels.implementation import Impl, accumulator
from cosa_kernels.ops.confidence_histogram import choose_for_bins, count_unchecked


def fit_bimodal_threshold(
    histogram: Tensor | None = None,
    *,
    values: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
    bins: int = 256,
    iterations: int = 100,
    min_count: int = 50,
    impl: Impl = "auto",
) -> Tensor:
    """Threshold xi* between the two modes of a histogram, or of values (Eq. 6).

    A two-component Gaussian mixture is fitted by EM, started from the split with the largest between-class variance
    (Otsu). The threshold is the bin edge that maximises the likelihood when everything below is background and
    everything above foreground; over empty bins, where that is flat, the edge where the two densities cross. Nothing
    waits for the device. Same result from run to run. No gradient.

    Args:
        histogram: (bins,) counts over [low, high], integers or floating, at least 4 bins.
        values: instead of a histogram, a floating tensor of any shape. Those beyond [low, high] count as its ends, NaN
            does not count.
        low, high: range of the histogram.
        bins: of the histogram made from `values`; the threshold is as exact as one of them.
        iterations: EM steps; a fixed number, so that nothing waits for the device.
        min_count: fewer values than this say nothing.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU (for 4, 8, ... 1024 bins), else torch.

    Returns:
        0-d float32 tensor (float64 for float64 inputs); NaN where the values are too few or not bimodal: modes less
        than a tenth of the range apart, one of them below 2 % of the values, or all values on one side.

    Raises:
        ValueError: not exactly one of `histogram` and `values`; a shape, dtype or option is impossible.

    Example:
        >>> values = torch.cat([torch.linspace(0.1, 0.3, 700), torch.linspace(0.6, 0.9, 300)])
        >>> round(fit_bimodal_threshold(values=values).item(), 2)
        0.43
    """
    if values is not None and histogram is None:
        if not values.is_floating_point():
            raise ValueError(f"values must be floating, got {values.dtype}: use values.float()")
        counts = count_unchecked(values.reshape(1, 1, 1, -1), None, bins, low, high, -math.inf, impl)
        # The values' own precision decides that of the result.
        histogram = counts.to(accumulator(values.dtype))
    elif histogram is None or values is not None:
        raise ValueError(f"give either histogram or values: got {'neither' if histogram is None else 'both'} of them")
    check_histogram(histogram)
    check_bins(len(histogram), low, high)
    chosen = choose_for_bins(impl, histogram, len(histogram))
    if chosen == "reference":
        return reference.fit_bimodal_threshold(
            histogram.detach(), low=low, high=high, iterations=iterations, min_count=min_count
        )
    return _fit_operator(histogram.detach(), low, high, iterations, min_count, chosen)


@torch.library.custom_op("cosa::fit_bimodal_threshold", mutates_args=())
def _fit_operator(histogram: Tensor, low: float, high: float, iterations: int, min_count: int, impl: str) -> Tensor:
    check_finite(histogram=histogram)
    if impl == "triton":
        from cosa_kernels.gpu import fit_bimodal_threshold as gpu

        return gpu.fit(histogram, low, high, iterations, min_count)
    if histogram.device.type == "cpu":
        threshold = _fit_on_cpu(histogram.double(), low, high, iterations, min_count)
        return histogram.new_full((), threshold, dtype=accumulator(histogram.dtype))
    # Elsewhere a number read is a wait.
    return reference.fit_bimodal_threshold(histogram, low=low, high=high, iterations=iterations, min_count=min_count)


@_fit_operator.register_fake
def _(histogram: Tensor, low: float, high: float, iterations: int, min_count: int, impl: str) -> Tensor:
    return histogram.new_empty((), dtype=accumulator(histogram.dtype))


Component = tuple[float, float, float]
"""Weight, mean and variance."""


def _fit_on_cpu(counts: Tensor, low: float, high: float, iterations: int, min_count: int) -> float:
    """`reference.fit_bimodal_threshold` of float64 counts: tensors for the bins, Python's numbers for the rest.

    On the CPU reading a number costs less than computing with tensors of one element.
    """
    bins, total = len(counts), counts.sum().item()
    if not (total >= min_count and 0.0 < total < math.inf):
        return math.nan
    # In units of bins, from the middle of the histogram.
    x = torch.arange(bins, dtype=counts.dtype, device=counts.device) - (bins - 1) / 2
    powers = torch.stack([torch.ones_like(x), x, x * x], dim=1)
    shared = (powers * (counts / total)[:, None]).T.contiguous()
    sums = shared.sum(dim=1).tolist()
    moments, responsibility = torch.empty_like(shared[:, 0]), torch.empty_like(x)

    def maximization() -> tuple[Component, Component]:
        """The lower and the upper component, from the responsibility of the upper one."""
        upper = torch.mv(shared, responsibility, out=moments).tolist()
        return _component(*(s - u for s, u in zip(sums, upper, strict=True))), _component(*upper)

    below, first = shared[:2].cumsum(dim=1)
    between = (first - sums[1] * below) ** 2 / (below * (1.0 - below)).clamp(min=1e-8)
    split = int(between[:-1].argmax())
    responsibility[: split + 1], responsibility[split + 1 :] = 0.0, 1.0
    lower, upper = maximization()
    for _ in range(iterations):
        torch.mv(powers, x.new_tensor(_log_odds(lower, upper)), out=responsibility).sigmoid_()
        lower, upper = maximization()

    evidence = powers @ x.new_tensor(_log_odds(lower, upper))  # for the component with the higher mean
    if upper[1] < lower[1]:
        evidence = -evidence
    split = int((-evidence * shared[0]).cumsum(dim=0).argmax())
    held = (counts > 0).nonzero()[:, 0]
    before = int((held <= split).sum())
    apart = abs(upper[1] - lower[1]) >= 0.1 * bins
    if not (apart and min(lower[0], upper[0]) >= 0.02 and 0 < before < len(held)):
        return math.nan
    # Over empty bins the likelihood is flat; the densities cross at one of them.
    last_below, first_above = held[before - 1 : before + 1].tolist()
    split = last_below
    for position, odds in enumerate(evidence[last_below + 1 : first_above].tolist(), last_below + 1):
        split = position if odds < 0 else split
    return low + (high - low) / bins * (split + 1)


def _component(weight: float, first: float, second: float) -> Component:
    """From its share of the values and the sums of x and x^2 over it."""
    weight = max(weight, 1e-8)
    mean = first / weight
    # A mode cannot be narrower than what one bin can tell.
    return weight, mean, max(second / weight - mean * mean, 1 / 12)


def _log_odds(lower: Component, upper: Component) -> tuple[float, float, float]:
    """Coefficients of 1, x, x^2 in log(density of the upper component / density of the lower one)."""
    (w0, m0, v0), (w1, m1, v1) = lower, upper
    constant = math.log(w1 / w0) - 0.5 * math.log(v1 / v0) - 0.5 * (m1 * m1 / v1 - m0 * m0 / v0)
    return constant, m1 / v1 - m0 / v0, 0.5 / v0 - 0.5 / v1
