"""CAM pseudo-labels and their perplexity without up-sampling the classes that an image does not have (Eq. 3, 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.checks import (
    check_between,
    check_cams,
    check_class_values,
    check_classes,
    check_open_fraction,
    check_positive,
    check_same_device,
    check_size,
    check_threshold,
    check_valid_box,
)
from cosa_kernels.implementation import Impl, accumulator, choose
from cosa_kernels.reference import Size


def cam_pseudo_labels(
    cams: Tensor,
    threshold: float | Tensor,
    *,
    classes: Tensor | None = None,
    size: Size | None = None,
    valid_box: Tensor | None = None,
    lambda_alpha: float = 0.8,
    lambda_beta: float = 1.0,
    ignore_index: int = 255,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """CAM pseudo-labels (CPL) and their perplexity (Eq. 3, 4).

    Args:
        cams: (B, C, h, w) in [0, 1], zero for absent classes; C <= 254. With `classes`: (B, P, h, w), maps of the
            present classes only.
        threshold: xi in (0, 1), a float or a 0-d tensor on the device of `cams` (its value is not read by the host).
        classes: (B, P) integers, the class of each map (below 254), -1 for padding, a map of zeros. In ascending order
            equal confidences have the result that they have with all classes. None: map c is class c.
        size: (H, W) of the labels; None: that of `cams`.
        valid_box: (B, 4) integers y0, y1, x0, x1, half open, in pixels of `size`; None: everything is valid.
        lambda_alpha: scale of the normalised distance to the threshold, in (0, 1).
        lambda_beta: exponent of the perplexity, > 0.
        ignore_index: label of pixels outside `valid_box`.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU, else torch.

    Returns:
        labels (B, H, W) uint8: 0 background, c + 1 for class c, `ignore_index` outside the box;
        perplexity (B, H, W) float32 (float64 for float64): infinite at the threshold and outside the box.

    Raises:
        ValueError: a shape, dtype, device or value is impossible.

    Example:
        >>> cams = torch.tensor([0.1, 0.5, 0.9]).view(1, 1, 1, 3)
        >>> labels, perplexity = cam_pseudo_labels(cams, 0.5)
        >>> labels.tolist(), [round(p, 2) for p in perplexity.flatten().tolist()]
        ([[[0, 1, 1]]], [0.45, inf, 0.45])
        >>> cam_pseudo_labels(cams, 0.5, classes=torch.tensor([[14]]))[0].tolist()
        [[[0, 15, 15]]]
    """
    check_arguments([cams], [threshold], classes, valid_box, lambda_alpha, lambda_beta)
    if not 0 <= ignore_index <= 255:
        raise ValueError(f"ignore_index must fit uint8 (0 to 255), got {ignore_index}")
    impl = choose(impl, cams)
    if impl == "reference":
        return reference.cam_pseudo_labels(
            cams,
            threshold,
            classes=classes,
            size=size,
            valid_box=valid_box,
            lambda_alpha=lambda_alpha,
            lambda_beta=lambda_beta,
            ignore_index=ignore_index,
        )
    labels, perplexity = assign_labels(
        [cams], [threshold], classes, 254, size, valid_box, lambda_alpha, lambda_beta, ignore_index, False, impl
    )
    return labels[0], perplexity[0]


def check_arguments(
    cams: Sequence[Tensor],
    thresholds: Sequence[float | Tensor],
    classes: Tensor | None,
    valid_box: Tensor | None,
    lambda_alpha: float,
    lambda_beta: float,
) -> None:
    """What `cam_pseudo_labels` and `raw_cross_entropy` ask of their arguments."""
    for maps, threshold in zip(cams, thresholds, strict=True):
        check_cams(maps)
        check_threshold(threshold, maps.device)
    check_classes(classes, cams[0])
    check_open_fraction("lambda_alpha", lambda_alpha)
    check_positive("lambda_beta", lambda_beta)
    if valid_box is not None:
        check_valid_box(valid_box, len(cams[0]))
        check_same_device(cams=cams[0], valid_box=valid_box)


def assign_labels(
    cams: Sequence[Tensor],
    thresholds: Sequence[float | Tensor],
    classes: Tensor | None,
    count: int,
    size: Size | None,
    valid_box: Tensor | None,
    lambda_alpha: float,
    lambda_beta: float,
    ignore_index: int,
    reliability: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(N, B, H, W) labels, and perplexity or its reciprocal, of N checked CAM tensors; no gradient.

    `classes` must be below `count`.
    """
    size = (cams[0].shape[-2], cams[0].shape[-1]) if size is None else size
    check_size(size)
    dtype = accumulator(cams[0].dtype)
    xi = [
        t.detach() if isinstance(t, Tensor) else torch.full((), t, dtype=dtype, device=cams[0].device)
        for t in thresholds
    ]
    detached = [maps.detach() for maps in cams]
    options = (valid_box, lambda_alpha, lambda_beta, ignore_index, reliability, impl)
    return _operator(detached, xi, None if classes is None else classes.long(), count, [size[0], size[1]], *options)


@torch.library.custom_op("cosa::cam_pseudo_labels", mutates_args=())
def _operator(
    cams: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    classes: Tensor | None,
    count: int,
    size: Sequence[int],
    valid_box: Tensor | None,
    lambda_alpha: float,
    lambda_beta: float,
    ignore_index: int,
    reliability: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    labels, values = _empty(cams, size)
    if classes is not None:
        check_class_values(classes, count)
    for position, (maps, threshold) in enumerate(zip(cams, thresholds, strict=True)):
        check_between(-1e-3, 1.001, cams=maps, threshold=threshold)  # up to rounding
        out = labels[position], values[position]
        if impl == "triton":
            from cosa_kernels.gpu import cam_pseudo_labels as gpu

            gpu.assign(maps, threshold, classes, valid_box, lambda_alpha, lambda_beta, ignore_index, reliability, *out)
        else:
            _assign(maps, threshold, classes, valid_box, lambda_alpha, lambda_beta, ignore_index, reliability, *out)
    return labels, values


def _empty(cams: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = (len(cams), len(cams[0]), size[0], size[1])
    return (
        cams[0].new_empty(shape, dtype=torch.uint8),
        cams[0].new_empty(shape, dtype=accumulator(cams[0].dtype)),
    )


def _assign(
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
    """The plain torch version, image by image; on the CPU without the channels that are zero."""
    size = (labels.shape[-2], labels.shape[-1])
    threshold = threshold.to(values.dtype)
    for image, maps in enumerate(cams):
        names = torch.arange(1, len(maps) + 1, device=maps.device) if classes is None else classes[image] + 1
        if maps.device.type == "cpu":
            # Not "> 0": a map with NaN stays in, and shows in the result.
            active = ~(maps.amax(dim=(1, 2)) <= 0.0)
            active[0] |= ~active.any()
            maps, names = maps[active], names[active]
        confidence, best = reference.upsample(maps[None].to(values.dtype), size)[0].max(dim=0)
        labels[image] = torch.where(confidence >= threshold, names[best], 0)
        perplexity = reference.perplexity_of(confidence, threshold, lambda_alpha, lambda_beta)
        values[image] = perplexity.reciprocal_() if reliability else perplexity
    if valid_box is not None:
        outside = ~reference.box_mask(valid_box, size)
        labels.masked_fill_(outside, ignore_index)
        values.masked_fill_(outside, 0.0 if reliability else float("inf"))


@_operator.register_fake
def _(
    cams: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    classes: Tensor | None,
    count: int,
    size: Sequence[int],
    valid_box: Tensor | None,
    lambda_alpha: float,
    lambda_beta: float,
    ignore_index: int,
    reliability: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return _empty(cams, size)
