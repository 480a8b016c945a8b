"""Contrastive separation in CAMs (Eq. 9, 10), in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_kernels.checks import check_labels, check_maps, check_positive


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
