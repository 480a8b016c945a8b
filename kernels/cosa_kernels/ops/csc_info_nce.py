"""Contrastive separation in CAMs without an N x N tensor (kernels/README.md has the derivation)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_kernels import reference
from cosa_kernels.autograd import register_ready_gradient
from cosa_kernels.checks import (
    check_anchor_labels,
    check_choice,
    check_finite,
    check_finite_number,
    check_maps,
    check_positions,
    check_positive,
    check_same_device,
)
from cosa_kernels.implementation import Impl, accumulator, choose, full_precision

Similarity = Literal["cosine", "dot"]
Scope = Literal["image", "batch"]

MOST_CLASSES = 256
"""Longer vectors do not fit a thread block's registers."""
EPS = 1e-6
"""Shorter vectors are divided by this instead of their length."""
SCORES = {"cpu": 2**18, "cuda": 2**22}
"""Scores the plain torch version computes at a time: on the CPU few enough for a cache."""
KEPT_SCORES = 2**20
"""Scores it keeps on the CPU rather than compute twice."""
SMALL_SCORE = 20.0
"""Sums of exponentials of scores up to this size need no maximum taken out."""


def csc_info_nce(
    cams: Tensor,
    labels: Tensor,
    perplexity: Tensor,
    *,
    epsilon: float = 1.0,
    temperature: float = 0.5,
    similarity: Similarity = "cosine",
    scope: Scope = "image",
    impl: Impl = "auto",
) -> Tensor:
    """Contrastive separation in CAMs (CSC; Eq. 9, 10).

    Every position of low perplexity is an anchor i. With s_ij the similarity of the vectors at i and j over the
    temperature, N_i the anchors of other labels and R_i those of i's own (i itself not among them):

        loss_i = mean over p in R_i of softplus(logsumexp over n in N_i of s_in - s_ip)

    which is -log(exp(s_ip) / (exp(s_ip) + sum_n exp(s_in))); the other positives are not in the denominator, unlike in
    the supervised contrastive loss of Khosla et al. Memory grows with the number of positions, not with its square.
    Same result from run to run. No double backward.

    Args:
        cams: (B, C, h, w) vectors, float32, bfloat16 or float16 (float64 in plain torch): CAMs of the online network,
            or any embedding with C channels.
        labels: (B, h, w) integers from 0 to C: pseudo-labels of the assignment network's auxiliary CAMs; anything where
            the perplexity exceeds epsilon.
        perplexity: (B, h, w) their perplexity, NaN or infinite where a position does not count. Not a mask: without
            perplexities pass zeros, and infinity for positions to leave out.
        epsilon: positions with perplexity <= epsilon take part.
        temperature: of the InfoNCE, > 0.
        similarity: "cosine", or "dot" for the plain inner product.
        scope: "image" contrasts within each image, "batch" across the batch.
        impl: "triton", "torch", "reference", or "auto": Triton on a GPU (up to 256 channels), else torch.

    Returns:
        0-d float32 tensor (float64 for float64 CAMs): the sum over anchors divided by their number |Omega| over the
        whole batch. An anchor without any positive or without any negative contributes 0 and still counts.

    Raises:
        ValueError: a shape, dtype, device or option is impossible; on the CPU (elsewhere under COSA_KERNELS_DEBUG=1)
            also for an anchor's label beyond C. On a GPU such a label is one more class, a negative one no anchor.

    Example:
        >>> cams = torch.eye(2)[[0, 0, 1, 1]].T.reshape(1, 2, 2, 2).requires_grad_()  # two classes, well separated
        >>> labels = torch.tensor([[[1, 1], [2, 2]]])
        >>> round(csc_info_nce(cams, labels, torch.zeros(1, 2, 2)).item(), 4)  # log(1 + 2 exp(-1 / 0.5))
        0.2395
    """
    check_maps("cams", cams)
    check_positions("labels", labels, cams, floating=False)
    check_positions("perplexity", perplexity, cams, floating=True)
    check_same_device(cams=cams, labels=labels, perplexity=perplexity)
    check_finite_number("epsilon", epsilon)
    check_positive("temperature", temperature)
    check_choice("similarity", similarity, Similarity)
    check_choice("scope", scope, Scope)
    chosen = choose(impl, cams)
    if chosen == "reference":
        return reference.csc_info_nce(
            cams,
            labels,
            perplexity,
            epsilon=epsilon,
            temperature=temperature,
            similarity=similarity,
            scope=scope,
        )
    if chosen == "triton" and cams.shape[1] > MOST_CLASSES:
        if impl == "triton":
            raise ValueError(
                f"cams have {cams.shape[1]} classes; the kernels take up to {MOST_CLASSES}: use impl='torch' or 'auto'"
            )
        chosen = "torch"
    vectors, labels, anchors = cams.flatten(2), labels.flatten(1), (perplexity <= epsilon).flatten(1)
    if scope == "batch":
        vectors = vectors.transpose(0, 1).flatten(1)[None]
        labels, anchors = labels.flatten()[None], anchors.flatten()[None]
    with_gradient = cams.requires_grad and torch.is_grad_enabled()
    loss, _ = _operator(vectors, labels, anchors, temperature, similarity == "cosine", with_gradient, chosen)
    return loss


@torch.library.custom_op("cosa::csc_info_nce", mutates_args=())
def _operator(
    cams: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
    cosine: bool,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of `cams` (empty without `with_gradient`), for (S, C, N) CAM vectors in S scopes."""
    check_finite(cams=cams)
    check_anchor_labels(labels, anchors, cams.shape[1])
    with full_precision(cams.device):
        x = cams.to(accumulator(cams.dtype))
        labels = torch.where(anchors, labels.long(), -1)
        if cosine:
            # By hand: a quarter of the time of F.normalize and its derivative.
            length = x.square().sum(dim=1, keepdim=True).sqrt_()
            inverse = length.clamp(min=EPS).reciprocal_()
            x = x * inverse
        if impl == "triton":
            from cosa_kernels.gpu import csc_info_nce as gpu

            loss, gradient = gpu.forward(x, labels, temperature, with_gradient)
        else:
            forward = _by_class if x.device.type == "cpu" else _masked
            loss, gradient = forward(x, labels, temperature, with_gradient)
        share = (labels >= 0).sum().clamp(min=1).to(x.dtype).reciprocal()
        if with_gradient:
            gradient *= share / temperature
            if cosine:
                along = (gradient * x).sum(dim=1, keepdim=True)
                along *= length >= EPS
                gradient.addcmul_(x, along, value=-1).mul_(inverse)
        return loss * share, gradient


def _by_class(x: Tensor, labels: Tensor, temperature: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Plain torch where reading values is free: sorted by label, positives and negatives are matrices of their own.

    Returns the sum over anchors and, per unit of 1 / temperature, its gradient.
    """
    loss = x.new_zeros(())
    gradient = x.new_zeros(x.shape if with_gradient else 0)
    for scope in range(len(x)):
        ordered, order = labels[scope].sort(stable=True)
        counts = ordered.unique_consecutive(return_counts=True)[1].tolist()
        first = counts.pop(0) if int(ordered[0]) < 0 else 0
        if len(counts) > 1:
            order = order[first:]
            value, flow = _sorted_scope(x[scope].index_select(1, order), counts, temperature, with_gradient)
            loss += value
            if flow is not None:
                gradient[scope].index_copy_(1, order, flow)
    return loss, gradient


def _sorted_scope(
    x: Tensor, counts: list[int], temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """One scope of `_by_class`: (C, N) anchors sorted by class, at least two classes of these sizes.

    A score serves both its anchors: each pair of classes is computed once, as rows of one against all later columns.
    """
    positions = x.shape[1]
    stops = list(itertools.accumulate(counts))
    classes = list(zip([0, *stops], stops, strict=False))
    pairs = [(rows, stop) for start, stop in classes[:-1] for rows in _chunks(start, stop, positions - stop)]
    scaled = x / temperature
    small = bool((scaled * x).sum(dim=0).amax() <= SMALL_SCORE)

    def against_later_classes(rows: slice, stop: int) -> Tensor:
        scores = scaled[:, rows].T @ x[:, stop:]
        return scores.exp_() if small else scores

    # 1. log K of each anchor: its sum over negatives, as a row and as a column.
    log_k = x.new_full((positions,), 0.0 if small else -torch.inf)
    kept: list[Tensor] = []
    room = KEPT_SCORES
    for rows, stop in pairs:
        scores = against_later_classes(rows, stop)
        if small:
            log_k[rows] += scores.sum(dim=1)
            log_k[stop:] += scores.sum(dim=0)
        else:
            log_k[rows] = torch.logaddexp(log_k[rows], scores.logsumexp(dim=1))
            log_k[stop:] = torch.logaddexp(log_k[stop:], scores.logsumexp(dim=0))
        room -= scores.numel()
        if with_gradient and room >= 0:
            kept.append(scores)
    if small:
        log_k.log_()

    # 2. Positives: the loss, and how much each anchor is pushed off its negatives.
    loss = x.new_zeros(())
    push = torch.zeros_like(log_k)
    flow = torch.zeros_like(x) if with_gradient else None
    for (start, stop), count in zip(classes, counts, strict=True):
        if count == 1:
            continue
        same, share = x[:, start:stop], 1.0 / (count - 1)
        for rows in _chunks(start, stop, count):
            scores = scaled[:, rows].T @ same
            scores.diagonal(rows.start - start).fill_(torch.inf)  # an anchor is not its own positive
            pull = log_k[rows, None] - scores
            loss.add_(F.softplus(pull).sum(), alpha=share)
            if flow is not None:
                pull.sigmoid_()
                push[rows] = pull.sum(dim=1).mul_(share)
                pull += torch.sub(log_k[start:stop], scores, out=scores).sigmoid_()
                flow[:, rows].addmm_(same, pull.T, alpha=-share)
    if flow is None:
        return loss, None

    # 3. Negatives.
    factor = push * log_k.neg().exp_() if small else push
    for position, (rows, stop) in enumerate(pairs):
        scores = kept[position] if position < len(kept) else against_later_classes(rows, stop)
        if small:
            scores *= factor[rows, None] + factor[stop:]
        else:
            backward = (scores - log_k[stop:]).exp_().mul_(factor[stop:])
            scores.sub_(log_k[rows, None]).exp_().mul_(factor[rows, None]).add_(backward)
        flow[:, rows].addmm_(x[:, stop:], scores.T)
        flow[:, stop:].addmm_(x[:, rows], scores)
    return loss, flow


def _chunks(start: int, stop: int, columns: int, device: str = "cpu") -> Iterator[slice]:
    """Rows start..stop-1 in parts that have few enough scores with `columns` others."""
    rows = max(1, SCORES.get(device, SCORES["cuda"]) // columns)
    for top in range(start, stop, rows):
        yield slice(top, min(top + rows, stop))


def _masked(x: Tensor, labels: Tensor, temperature: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Plain torch where reading a value would wait for the device: masks. Returns what `_by_class` does."""
    loss = x.new_zeros(())
    gradient = x.new_zeros(x.shape if with_gradient else 0)
    scopes, _, positions = x.shape
    x = x.masked_fill((labels < 0)[:, None], 0.0)  # where no anchor is, there may be NaN
    for rows in _chunks(0, positions, scopes * positions, x.device.type):
        here, label = x[:, :, rows], labels[:, rows, None]
        both = (label >= 0) & (labels[:, None] >= 0)
        same = label == labels[:, None]
        negative, positive = both & ~same, both & same
        positive.diagonal(rows.start, 1, 2).fill_(False)  # an anchor is not its own positive
        count = positive.sum(dim=2, keepdim=True)
        complete = (count > 0) & negative.any(dim=2, keepdim=True)
        share = complete / count.clamp(min=1).to(x.dtype)
        scores = (here / temperature).mT @ x
        # 0 instead of -inf where there is no negative: that row's share is 0, and 0 times infinity is not.
        log_k = torch.where(negative, scores, -torch.inf).logsumexp(dim=2, keepdim=True)
        log_k = torch.where(complete, log_k, 0.0)
        pull = torch.where(positive, log_k - scores, -torch.inf)
        loss += (F.softplus(pull) * share).sum()
        if with_gradient:
            pull.sigmoid_().mul_(share)
            scores = torch.where(negative & complete, scores - log_k, -torch.inf).exp_()
            scores.mul_(pull.sum(dim=2, keepdim=True)).sub_(pull)
            gradient[:, :, rows] += x @ scores.mT
            gradient += here @ scores
    return loss, gradient


@_operator.register_fake
def _(
    cams: Tensor,
    labels: Tensor,
    anchors: Tensor,
    temperature: float,
    cosine: bool,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(cams.dtype)
    loss = cams.new_empty((), dtype=dtype)
    return loss, cams.new_empty(cams.shape if with_gradient else 0, dtype=dtype)


register_ready_gradient(_operator)
