"""CoSA's losses and pseudo-labels in plain torch, straight from the paper's equations.

The ground truth of every faster version: works in any floating dtype (float64 included) on any device, and is
differentiable by autograd. CAMs are normalised to [0, 1] and zero for absent classes; grids are up-sampled bilinearly
(`align_corners=False`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_kernels.checks import (
    check_cams,
    check_class_labels,
    check_classes,
    check_histogram,
    check_labels,
    check_maps,
    check_mirrored,
    check_open_fraction,
    check_positive,
    check_size,
    check_targets,
    check_valid_box,
    check_view_size,
    check_views,
)

Size = tuple[int, int]

EDGE = 1e-6
"""Distance that thresholds keep from 0 and 1, and perplexities from 0."""


def upsample(maps: Tensor, size: Size | None) -> Tensor:
    """(B, C, h, w) to (B, C, *size), bilinear; unchanged when `size` is None or already the case."""
    if size is None or tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def merge_cams(
    cams: Sequence[Tensor], mirrored: Sequence[Tensor] = (), *, class_labels: Tensor, size: Size, eps: float = 1e-5
) -> Tensor:
    """Merge CAM logits of several scales into one normalised map per present class.

    Per scale: up-sample, maximum with the mirrored view, ReLU. Then the scales are added and each map of a present
    class is brought to [0, 1] by its own minimum and maximum over the image; absent classes are 0.

    Args:
        cams: per scale, (B, C, h_k, w_k) CAM logits.
        mirrored: per scale, the maps of the mirrored image, already flipped back; or empty.
        class_labels: (B, C), 1 for classes present in the image.
        size: (H, W) of the result.
        eps: added to the maximum, so that a map without any activation stays 0.

    Returns:
        (B, C, H, W) in [0, 1], at least float32.
    """
    check_views("cams", cams)
    check_mirrored(mirrored, cams)
    check_class_labels(class_labels, cams[0].shape[0], cams[0].shape[1])
    check_size(size)
    wide = torch.promote_types(cams[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=cams[0].device)
    for position, view in enumerate(cams):
        merged = upsample(view.to(wide), size)
        if mirrored:
            merged = torch.maximum(merged, upsample(mirrored[position].to(wide), size))
        total = total + merged.relu()
    total = total - total.amin(dim=(-2, -1), keepdim=True)
    total = total / (total.amax(dim=(-2, -1), keepdim=True) + eps)
    return total.masked_fill((class_labels == 0)[..., None, None], 0.0)


def perplexity_of(confidence: Tensor, threshold: float | Tensor, lambda_alpha: float, lambda_beta: float) -> Tensor:
    """Perplexity P of a CAM confidence (Eq. 4): infinite at the threshold, least far from it.

    The threshold is kept 1e-6 from 0 and 1, and P above 1e-6, so that nothing is divided by 0.
    """
    if isinstance(threshold, Tensor):
        threshold = threshold.clamp(EDGE, 1.0 - EDGE)
    else:
        threshold = min(max(threshold, EDGE), 1.0 - EDGE)
    above = (confidence - threshold) / (1.0 - threshold)
    below = (threshold - confidence) / threshold
    distance = torch.where(confidence >= threshold, above, below).clamp(0.0, 1.0)
    return ((-torch.log(lambda_alpha * distance)) ** lambda_beta).clamp(min=EDGE)


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
) -> tuple[Tensor, Tensor]:
    """CAM pseudo-labels (CPL) and their perplexity (Eq. 3, 4).

    Args:
        cams: (B, C, h, w) in [0, 1], zero for absent classes; with `classes` (B, P, h, w).
        threshold: xi in (0, 1), a float or a 0-d tensor on the device of `cams`.
        classes: (B, P) integers, the class of each map, -1 for padding (a map of zeros); None: those of the channels.
        size: (H, W) of the labels; None: that of `cams`.
        valid_box: (B, 4) integers y0, y1, x0, x1, half open, in pixels of `size`; None: everything is valid.
        lambda_alpha: scale of the normalised distance, in (0, 1).
        lambda_beta: exponent, > 0.
        ignore_index: label of pixels outside `valid_box`.

    Returns:
        labels (B, H, W) uint8: 0 background, c + 1 for class c, `ignore_index` outside the box;
        perplexity (B, H, W), the dtype of `cams` but at least float32; infinite outside the box.

    Raises:
        ValueError: a shape or value is impossible.
    """
    check_cams(cams)
    check_classes(classes, cams)
    check_open_fraction("lambda_alpha", lambda_alpha)
    check_positive("lambda_beta", lambda_beta)
    if not isinstance(threshold, Tensor):
        check_open_fraction("threshold", threshold)
    maps = upsample(cams.to(torch.promote_types(cams.dtype, torch.float32)), size)
    confidence, best = maps.max(dim=1)
    if classes is not None:
        best = classes.long().gather(1, best.flatten(1)).view_as(best)
    labels = torch.where(confidence >= threshold, best + 1, 0).to(torch.uint8)
    perplexity = perplexity_of(confidence, threshold, lambda_alpha, lambda_beta)
    if valid_box is not None:
        check_valid_box(valid_box, len(cams))
        outside = ~box_mask(valid_box, (maps.shape[-2], maps.shape[-1]))
        labels = labels.masked_fill(outside, ignore_index)
        perplexity = perplexity.masked_fill(outside, float("inf"))
    return labels, perplexity


def box_mask(valid_box: Tensor, size: Size) -> Tensor:
    """(B, H, W) bool, true inside each (y0, y1, x0, x1)."""
    y0, y1, x0, x1 = valid_box[:, :, None].unbind(dim=1)
    rows = torch.arange(size[0], device=valid_box.device)
    columns = torch.arange(size[1], device=valid_box.device)
    return ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None, :]


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: str = "mean",
) -> Tensor:
    """Weighted cross-entropy of up-sampled logits: sum(w * CE) / sum(w).

    Args:
        logits: (B, K, h, w).
        target: (B, H, W) integers below K, or `ignore_index`; or (N, B, H, W): N losses, added.
        weight: the shape of `target`, >= 0; None: 1.
        ignore_index: target of pixels that do not count.
        reduction: "mean" divides each loss by the sum of its weights, "sum" does not.

    Returns:
        0-d tensor; 0 (with zero gradient) where no pixel counts.

    Raises:
        ValueError: a shape or dtype is impossible.
    """
    check_maps("logits", logits)
    check_targets(target, len(logits))
    full = upsample(logits.to(torch.promote_types(logits.dtype, torch.float32)), (target.shape[-2], target.shape[-1]))
    targets = (target if target.ndim == 4 else target[None]).long()
    weights = torch.ones_like(targets, dtype=full.dtype) if weight is None else weight.to(full.dtype).view_as(targets)
    losses = []
    for labels, factor in zip(targets, weights, strict=True):
        counted = labels != ignore_index
        loss = F.cross_entropy(full, labels, ignore_index=ignore_index, reduction="none")
        # Not a product: what is ignored may have any weight, NaN included.
        factor = torch.where(counted, factor, 0.0)
        total = factor.sum() if reduction == "mean" else factor.new_ones(())
        losses.append((factor * loss).sum() / torch.where(total > 0, total, 1.0))
    return torch.stack(losses).sum()


def raw_cross_entropy(
    logits: Tensor,
    cams: Tensor,
    threshold: float | Tensor,
    *,
    classes: Tensor | None = None,
    size: Size | None = None,
    valid_box: Tensor | None = None,
    lambda_alpha: float = 0.8,
    lambda_beta: float = 1.0,
) -> Tensor:
    """CAM-to-segmentation loss with reliability-based adaptive weighting (RAW; Eq. 3 to 5).

    Eq. 5 as printed weighs a pixel with its perplexity; its text says normalised reliability, the reciprocal, and
    that is what this computes: sum(r * CE) / sum(r) with r = 1 / P over the batch's valid pixels.

    Args:
        logits: (B, C + 1, h, w) segmentation logits.
        cams: (B, C, h', w') in [0, 1], of the assignment network; they get no gradient.
        threshold, classes, size, valid_box, lambda_alpha, lambda_beta: see `cam_pseudo_labels`.

    Returns:
        0-d tensor; 0 (with zero gradient) where nothing is valid.
    """
    if classes is None and logits.shape[1] != cams.shape[1] + 1:
        raise ValueError(
            f"logits must have one channel more than cams (the background): got {logits.shape[1]} and {cams.shape[1]}"
        )
    with torch.no_grad():
        labels, perplexity = cam_pseudo_labels(
            cams,
            threshold,
            classes=classes,
            size=size,
            valid_box=valid_box,
            lambda_alpha=lambda_alpha,
            lambda_beta=lambda_beta,
        )
    return upsample_cross_entropy(logits, labels, weight=perplexity.reciprocal())


def seg_pseudo_labels(
    seg_logits: Tensor | Sequence[Tensor],
    class_labels: Tensor,
    *,
    temperature: float = 0.01,
    size: Size | None = None,
    grid: Size | None = None,
) -> Tensor:
    """Segmentation pseudo-labels (SPL): softmax over background and present classes (Eq. 7).

    Args:
        seg_logits: (B, C + 1, h, w), or several of these (the views of a multi-scale network), which are up-sampled
            to `size` and added.
        class_labels: (B, C), 1 for present classes.
        temperature: tau > 0.
        size: (H, W) of the softmax; None: the views' own size, if they have the same.
        grid: size to which the probabilities are resized; None: they stay at `size`.

    Returns:
        (B, C + 1, *grid) probabilities, 0 for absent classes, at least float32.
    """
    views = [seg_logits] if isinstance(seg_logits, Tensor) else list(seg_logits)
    check_views("seg_logits", views)
    check_positive("temperature", temperature)
    check_class_labels(class_labels, views[0].shape[0], views[0].shape[1] - 1)
    size = check_view_size("seg_logits", views, size)
    wide = torch.promote_types(views[0].dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=views[0].device)
    for view in views:
        total = total + upsample(view.to(wide), size)
    absent = F.pad(class_labels == 0, (1, 0), value=False)
    return upsample((total / temperature).masked_fill(absent[..., None, None], float("-inf")).softmax(dim=1), grid)


def seg_to_cam_loss(
    cam_logits: Tensor,
    seg_logits: Tensor | Sequence[Tensor],
    class_labels: Tensor,
    *,
    temperature: float = 0.01,
    size: Size | None = None,
) -> Tensor:
    """Seg2CAM loss: binary cross-entropy of the CAMs against the segmentation pseudo-labels (Eq. 7, 8).

    Args:
        cam_logits: (B, C, h, w), of the online network.
        seg_logits: (B, C + 1, h', w'), of the assignment network, or several of these; they get no gradient. Their
            probabilities are resized bilinearly to (h, w).
        class_labels, temperature, size: see `seg_pseudo_labels`.

    Returns:
        0-d tensor, the mean over images, classes and positions.
    """
    check_maps("cam_logits", cam_logits)
    grid = (cam_logits.shape[-2], cam_logits.shape[-1])
    with torch.no_grad():
        probabilities = seg_pseudo_labels(seg_logits, class_labels, temperature=temperature, size=size, grid=grid)
    wide = cam_logits.to(torch.promote_types(cam_logits.dtype, torch.float32))
    return F.binary_cross_entropy_with_logits(wide, probabilities[:, 1:].to(wide.dtype))


def csc_info_nce(
    cams: Tensor,
    labels: Tensor,
    perplexity: Tensor,
    *,
    epsilon: float = 1.0,
    temperature: float = 0.5,
    similarity: str = "cosine",
    scope: str = "image",
) -> Tensor:
    """Contrastive separation in CAMs (CSC; Eq. 9, 10).

    Every position of low perplexity is an anchor: the CAM vectors of positions with its pseudo-label are pulled to it,
    those of other pseudo-labels pushed away.

    Args:
        cams: (B, C, h, w) CAM vectors of the online network.
        labels: (B, h, w) pseudo-labels of the assignment network's auxiliary CAMs.
        perplexity: (B, h, w) their perplexity.
        epsilon: positions with perplexity <= epsilon take part.
        temperature: of the InfoNCE, > 0.
        similarity: "cosine", or "dot" for the plain inner product.
        scope: "image" contrasts within each image, "batch" across the batch.

    Returns:
        0-d tensor: the sum over anchors divided by their number |Omega| over the whole batch. An anchor without any
        positive or without any negative contributes 0 and still counts.

    Raises:
        ValueError: a shape, `temperature`, `similarity` or `scope` is impossible.
    """
    check_maps("cams", cams)
    check_labels("labels", labels, len(cams))
    check_positive("temperature", temperature)
    if similarity not in ("cosine", "dot"):
        raise ValueError(f"similarity must be 'cosine' or 'dot', got {similarity!r}")
    if scope not in ("image", "batch"):
        raise ValueError(f"scope must be 'image' or 'batch', got {scope!r}")
    wide = torch.promote_types(cams.dtype, torch.float32)
    vectors = cams.to(wide).flatten(2).transpose(1, 2)
    labels, anchors = labels.flatten(1).long(), (perplexity <= epsilon).flatten(1)
    if scope == "batch":
        vectors, labels, anchors = (tensor.flatten(0, 1)[None] for tensor in (vectors, labels, anchors))
    if similarity == "cosine":
        vectors = F.normalize(vectors, dim=-1, eps=1e-6)
    with torch.autocast(cams.device.type, enabled=False):  # which would round what the temperature magnifies
        scores = vectors @ vectors.transpose(1, 2) / temperature

    both = anchors[:, :, None] & anchors[:, None, :]
    same = labels[:, :, None] == labels[:, None, :]
    itself = torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    positive, negative = both & same & ~itself, both & ~same
    counts = positive.sum(dim=-1)
    complete = (counts > 0) & negative.any(dim=-1)
    # log K over the negatives; rows without any keep all entries, against NaN gradients, and are dropped below.
    log_k = scores.masked_fill(~negative & complete[..., None], float("-inf")).logsumexp(dim=-1, keepdim=True)
    # -log(L / (L + K)) = softplus(log K - log L), finite for any temperature.
    terms = torch.where(positive, F.softplus(log_k - scores), 0.0).sum(dim=-1) / counts.clamp(min=1)
    return torch.where(complete, terms, 0.0).sum() / anchors.sum().clamp(min=1)


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
