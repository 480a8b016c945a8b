"""Dynamic CAM threshold: a two-component Gaussian mixture over recent confidences (Eq. 6), on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cosa_kernels import reference
from cosa_kernels.checks import (
    check_bins,
    check_choice,
    check_finite,
    check_histogram,
    check_maps,
    check_open_fraction,
    check_same_device,
    check_valid_box,
)
from cosa_kernels.implementation import Impl, accumulator, choose

MOST_BINS = 1024
"""More do not fit a thread block's registers."""


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
        counts = _count(values.reshape(1, 1, 1, -1), None, bins, low, high, -math.inf, impl)
        # The values' own precision decides that of the result.
        histogram = counts.to(accumulator(values.dtype))
    elif histogram is None or values is not None:
        raise ValueError(f"give either histogram or values: got {'neither' if histogram is None else 'both'} of them")
    check_histogram(histogram)
    check_bins(len(histogram), low, high)
    chosen = _choose(impl, histogram, len(histogram))
    if chosen == "reference":
        return reference.fit_bimodal_threshold(
            histogram.detach(), low=low, high=high, iterations=iterations, min_count=min_count
        )
    return _fit_operator(histogram.detach(), low, high, iterations, min_count, chosen)


def confidence_histogram(
    cams: Tensor,
    *,
    bins: int = 256,
    low: float = 0.0,
    high: float = 1.0,
    floor: float = 0.0,
    valid_box: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Counts of the confidence of every pixel: its largest CAM.

    One pass over the CAMs, without a map of confidences. Same result from run to run. No gradient.

    Args:
        cams: (B, C, H, W) float32, bfloat16 or float16 (float64 in plain torch), as a rule in [0, 1]. A pixel where one
            of them is NaN does not count.
        bins: of equal width over [low, high].
        low, high: confidences beyond them count in the first and the last bin.
        floor: smaller confidences do not count.
        valid_box: (B, 4) integers y0, y1, x0, x1, half open: pixels outside do not count.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU (for 4, 8, ... 1024 bins), else torch.

    Returns:
        (bins,) int64 counts.

    Raises:
        ValueError: a shape, dtype, device or option is impossible.

    Example:
        >>> cams = torch.tensor([[0.1, 0.9, 0.3], [0.2, 0.0, 0.3]]).view(1, 2, 1, 3)
        >>> confidence_histogram(cams, bins=4).tolist()
        [1, 1, 0, 1]
    """
    check_maps("cams", cams)
    if valid_box is not None:
        check_valid_box(valid_box, len(cams))
        check_same_device(cams=cams, valid_box=valid_box)
    return _count(cams, valid_box, bins, low, high, floor, impl)


def _count(
    cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float, impl: Impl
) -> Tensor:
    """`confidence_histogram` after the checks of the tensors' shapes."""
    check_bins(bins, low, high)
    chosen = _choose(impl, cams, bins)
    if chosen == "reference":
        return _count_anywhere(cams.detach(), valid_box, bins, low, high, floor)
    return _count_operator(cams.detach(), valid_box, bins, low, high, floor, chosen)


def _choose(impl: Impl, tensor: Tensor, bins: int) -> str:
    """`choose`, for as many bins."""
    chosen = choose(impl, tensor)
    if chosen == "triton" and (bins & (bins - 1) or bins > MOST_BINS):
        if impl == "triton":
            raise ValueError(
                f"the Triton kernels take a power of two up to {MOST_BINS} as the number of bins, got {bins}: use 256 "
                f"bins, or impl='torch' or 'auto'"
            )
        return "torch"
    return chosen


@torch.library.custom_op("cosa::confidence_histogram", mutates_args=())
def _count_operator(
    cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float, impl: str
) -> Tensor:
    check_finite(confidences=cams)
    if cams.numel() == 0:
        return cams.new_zeros(bins, dtype=torch.int64)
    if impl == "triton":
        from cosa_kernels.gpu import dynamic_threshold as gpu

        return gpu.count(cams, valid_box, bins, low, high, floor)
    count = _count_on_cpu if cams.device.type == "cpu" else _count_anywhere
    return count(cams, valid_box, bins, low, high, floor)


@_count_operator.register_fake
def _(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float, impl: str) -> Tensor:
    return cams.new_empty(bins, dtype=torch.int64)


def _count_anywhere(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float) -> Tensor:
    """Plainly, on any device: without indexing by a mask, the length of whose result the host would have to know."""
    confidence = cams.amax(dim=1).to(accumulator(cams.dtype))
    counted = confidence >= floor  # false for NaN
    if valid_box is not None:
        counted &= reference.box_mask(valid_box, (cams.shape[-2], cams.shape[-1]))
    slot = ((confidence - low) * (bins / (high - low))).clamp(0, bins - 1).masked_fill(~counted, bins).long().flatten()
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=cams.device)
    return counts.scatter_add_(0, slot, torch.ones_like(slot))[:bins]


def _count_on_cpu(cams: Tensor, valid_box: Tensor | None, bins: int, low: float, high: float, floor: float) -> Tensor:
    """On the CPU, where the host may read: image by image within its box."""
    counts = cams.new_zeros(bins + 1, dtype=torch.int64)
    # The number before the floor: `threshold` replaces what is not greater.
    edge = cams.new_tensor([floor, -math.inf], dtype=accumulator(cams.dtype))
    below = torch.nextafter(edge[0], edge[1]).item()
    boxes = [[0, cams.shape[-2], 0, cams.shape[-1]]] * len(cams) if valid_box is None else valid_box.tolist()
    for maps, box in zip(cams, boxes, strict=True):
        y0, y1, x0, x1 = (max(0, side) for side in box)
        first, *others = maps[:, y0:y1, x0:x1]
        # Twice as fast as amax over the classes, whose planes lie far apart.
        largest = torch.maximum(first, others[0]) if others else first
        for plane in others[1:]:
            torch.maximum(largest, plane, out=largest)
        largest = largest.to(edge.dtype)
        if floor > -math.inf:
            # Like NaN, what lies below the floor passes through the arithmetic to a bin of its own: masks are slow.
            largest = torch.threshold(largest, below, math.nan)
        slot = (largest - low).mul_(bins / (high - low)).clamp_(0, bins - 1).nan_to_num_(nan=bins)
        # Not histc: seven times as slow.
        counts += slot.int().flatten().bincount(minlength=bins + 1)
    return counts[:bins]


@torch.library.custom_op("cosa::fit_bimodal_threshold", mutates_args=())
def _fit_operator(histogram: Tensor, low: float, high: float, iterations: int, min_count: int, impl: str) -> Tensor:
    check_finite(histogram=histogram)
    if impl == "triton":
        from cosa_kernels.gpu import dynamic_threshold as gpu

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


class DynamicThreshold(nn.Module):
    """CAM threshold xi that follows the confidences of the last batches (Eq. 6).

    A confidence is the largest CAM of a pixel. Keeps a ring buffer of one histogram per batch (not of values), refits
    the mixture at each update and smooths the result. The threshold is the 0-d tensor `.xi` (`.xi.clone()` to keep
    one); it, the buffer and its position stay on the device and are the state dict. `update` sees the batch of its own
    process: where several train together, add up what `count` returns and pass the sum to `update_counts`.

    Args:
        initial: xi before the first successful fit.
        queue: batches remembered.
        floor: confidences below it are left out; 0 keeps all (Eq. 6).
        limits: each fit is clamped to them.
        momentum: xi <- momentum * xi + (1 - momentum) * fit.
        bins: resolution of the histograms.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU (for 4, 8, ... 1024 bins), else torch.

    Raises:
        ValueError: `initial` or `limits` is outside (0, 1), `queue` is not positive, `bins` is less than 4, or `impl`
            is unknown; `limits` are not in order or `momentum` is not in [0, 1).

    Example:
        >>> threshold = DynamicThreshold(0.5, momentum=0.0)
        >>> cams = torch.cat([torch.linspace(0.1, 0.3, 700), torch.linspace(0.6, 0.9, 300)]).view(1, 1, 25, 40)
        >>> round(threshold.update(cams).item(), 2)
        0.43
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
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_open_fraction("initial", initial)
        for limit in limits:
            check_open_fraction("limits", limit)
        if limits[0] > limits[1]:
            raise ValueError(f"limits must be (low, high), got {limits}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if queue < 1:
            raise ValueError(f"queue must be at least 1, got {queue}")
        check_bins(bins, 0.0, 1.0)
        check_choice("impl", impl, Impl)
        self.floor, self.limits, self.momentum, self.impl = floor, limits, momentum, impl
        self.register_buffer("xi", torch.tensor(float(initial)))
        # Integers: module.half() leaves them alone.
        self.register_buffer("histograms", torch.zeros(queue, bins, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        """The options, for `print`."""
        queue, bins = self.histograms.shape
        return (
            f"queue={queue}, floor={self.floor}, limits={self.limits}, momentum={self.momentum}, bins={bins}, "
            f"impl={self.impl!r}"
        )

    def update(self, cams: Tensor, valid_box: Tensor | None = None) -> Tensor:
        """Take in one batch and refit.

        Args:
            cams: (B, C, H, W) in [0, 1]; a pixel with a NaN does not count.
            valid_box: (B, 4) integers y0, y1, x0, x1: positions outside do not count.

        Returns:
            0-d tensor: xi itself, which the next update changes in place.

        Raises:
            ValueError: a shape, dtype or device is impossible.
        """
        return self.update_counts(self.count(cams, valid_box))

    def count(self, cams: Tensor, valid_box: Tensor | None = None) -> Tensor:
        """(bins,) int64 histogram of some images: the sum over all parts of a batch is what `update_counts` takes.

        Arguments and errors are those of `update`.
        """
        check_same_device(cams=cams, histograms=self.histograms)
        bins = self.histograms.shape[1]
        return confidence_histogram(cams, bins=bins, floor=self.floor, valid_box=valid_box, impl=self.impl)

    @torch.no_grad()
    def update_counts(self, counts: Tensor) -> Tensor:
        """Take in the (bins,) histogram of one batch and refit; returns xi itself."""
        queue = len(self.histograms)
        self.histograms.index_copy_(0, (self.position % queue)[None], counts[None])
        self.position.add_(1)
        fit = fit_bimodal_threshold(self.histograms.sum(dim=0), impl=self.impl).clamp(*self.limits)
        # NaN where there is nothing to fit: then xi stays.
        self.xi.add_((fit - self.xi).nan_to_num(nan=0.0), alpha=1.0 - self.momentum)
        return self.xi
