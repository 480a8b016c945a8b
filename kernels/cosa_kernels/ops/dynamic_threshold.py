"""Dynamic CAM threshold: the fit to the confidences of the last batches, smoothed (Eq. 6), on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cosa_kernels.checks import check_bins, check_choice, check_open_fraction, check_same_device
from cosa_kernels.implementation import Impl
from cosa_kernels.ops.confidence_histogram import confidence_histogram
from cosa_kernels.ops.fit_bimodal_threshold import fit_bimodal_threshold


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
