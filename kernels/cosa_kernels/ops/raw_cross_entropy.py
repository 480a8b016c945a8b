"""CAM-to-segmentation loss with reliability-based adaptive weighting (Eq. 3 to 5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.checks import check_maps, check_same_device
from cosa_kernels.implementation import Impl, accumulator, choose
from cosa_kernels.ops.cam_pseudo_labels import assign_labels, check_arguments
from cosa_kernels.ops.upsample_cross_entropy import reciprocal_total, scaled_cross_entropy
from cosa_kernels.reference import Size


def raw_cross_entropy(
    logits: Tensor,
    cams: Tensor | Sequence[Tensor],
    threshold: float | Tensor | Sequence[float | Tensor],
    *,
    classes: Tensor | None = None,
    size: Size | None = None,
    valid_box: Tensor | None = None,
    lambda_alpha: float = 0.8,
    lambda_beta: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
    """CAM-to-segmentation loss with reliability-based adaptive weighting (RAW; Eq. 3 to 5).

    sum(r * CE) / sum(r) over the batch's valid pixels, with r = 1 / perplexity. (Eq. 5 as printed weighs a pixel with
    its perplexity; its text says normalised reliability, the reciprocal.) No double backward.

    Args:
        logits: (B, C + 1, h, w) segmentation logits of the network in training; channel 0 is background.
        cams: (B, C, h', w') in [0, 1], zero for absent classes; they get no gradient. Or a sequence of such tensors
            (main and auxiliary CAMs, say): their losses are added, in one pass. With `classes`: (B, P, h', w').
        threshold: xi in (0, 1), a float or a 0-d tensor on the device; or a sequence with one for each of `cams`.
        classes: (B, P) integers below C, the class of each map, the same for all of `cams`; -1 for padding, a map of
            zeros. None: map c is class c.
        size: (H, W) at which pixels are compared; None: that of `cams`.
        valid_box: (B, 4) integers y0, y1, x0, x1, half open, in pixels of `size`.
        lambda_alpha: scale of the normalised distance to the threshold, in (0, 1).
        lambda_beta: exponent of the perplexity, > 0.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU, else torch.

    Returns:
        0-d float32 tensor (float64 for float64 logits); 0 with zero gradient where nothing is valid.

    Raises:
        ValueError: a shape, dtype, device or value is impossible.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 21, 28, 28, requires_grad=True)
        >>> cams = torch.rand(2, 20, 28, 28)
        >>> loss = raw_cross_entropy(logits, cams, 0.5, size=(448, 448))
        >>> loss.backward()
        >>> round(loss.item(), 4)  # log 21
        3.0445
    """
    maps = [cams] if isinstance(cams, Tensor) else list(cams)
    thresholds = list(threshold) if isinstance(threshold, Sequence) else [threshold] * len(maps)
    _check(logits, maps, thresholds, classes)
    check_arguments(maps, thresholds, classes, valid_box, lambda_alpha, lambda_beta)
    cams_impl, impl = choose(impl, maps[0]), choose(impl, logits)
    if impl == "reference":
        losses = [
            reference.raw_cross_entropy(
                logits,
                m,
                t,
                classes=classes,
                size=size,
                valid_box=valid_box,
                lambda_alpha=lambda_alpha,
                lambda_beta=lambda_beta,
            )
            for m, t in zip(maps, thresholds, strict=True)
        ]
        return sum(losses[1:], losses[0])
    count = logits.shape[1] - 1
    labels, reliability = assign_labels(
        maps, thresholds, classes, count, size, valid_box, lambda_alpha, lambda_beta, 255, True, cams_impl
    )
    # Ignored pixels have reliability 0.
    scale = reciprocal_total(reliability, accumulator(logits.dtype))
    return scaled_cross_entropy(logits, labels, reliability, scale, 255, impl)


def _check(logits: Tensor, cams: list[Tensor], thresholds: list[float | Tensor], classes: Tensor | None) -> None:
    check_maps("logits", logits)
    if not cams or len(thresholds) != len(cams):
        raise ValueError(
            f"give at least one tensor of cams, and one threshold for each: got {len(cams)} and {len(thresholds)}"
        )
    for maps in cams:
        channels = logits.shape[1] - 1 if classes is None else maps.shape[1]
        if maps.ndim == 4 and tuple(maps.shape[:2]) != (logits.shape[0], channels):
            raise ValueError(
                f"logits must be (B, C + 1, h, w), background first, for (B, C, h', w') cams: got "
                f"{tuple(logits.shape)} and {tuple(maps.shape)}"
            )
        if maps.shape != cams[0].shape or maps.dtype != cams[0].dtype:
            raise ValueError(
                f"all tensors of cams must have one shape and dtype: got {maps.dtype} {tuple(maps.shape)} beside "
                f"{cams[0].dtype} {tuple(cams[0].shape)}"
            )
        check_same_device(logits=logits, cams=maps)
