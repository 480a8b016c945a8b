"""The authors' way of computing the same steps, written from its description, as a baseline.

Everything at the image's resolution and for all classes. What differs from the paper is part of it: two fixed
thresholds with ignored pixels between them, background and foreground balanced, no reliability weights, and three
modes in the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:  # on a bare GPU machine the losses are measured without what networks need
    from cosa_fast.models.cosa import CosaNet

IGNORED = 255
BAND = (0.25, 0.7)
"""Below the first threshold a pixel is background, above the second foreground, between them ignored."""


def pseudo_labels(cams: Tensor, class_labels: Tensor, valid_box: Tensor) -> Tensor:
    """(B, H, W) int64 labels of (B, C, H, W) CAMs: softmax over background constant and present classes, twice.

    Args:
        class_labels: (B, C), 1 for present classes.
        valid_box: (B, 4) y0, y1, x0, x1.
    """
    low, high = (_arg_max(cams, class_labels, threshold) for threshold in BAND)
    labels = torch.where(high > 0, high, torch.where(low == 0, 0, IGNORED))
    inside = torch.zeros_like(labels, dtype=torch.bool)
    for image, (y0, y1, x0, x1) in enumerate(valid_box.tolist()):
        inside[image, y0:y1, x0:x1] = True
    return labels.where(inside, IGNORED)


def _arg_max(cams: Tensor, class_labels: Tensor, background: float) -> Tensor:
    batch, _, height, width = cams.shape
    scores = torch.cat([cams.new_full((batch, 1, height, width), background), cams], dim=1)
    scores = F.interpolate(scores, size=(height // 2, width // 2), mode="bilinear", align_corners=False)
    result = []
    for image in range(batch):
        present = torch.cat([class_labels.new_zeros(1, dtype=torch.int64), class_labels[image].nonzero()[:, 0] + 1])
        kept = scores[image, present].softmax(dim=0)[None]
        kept = F.interpolate(kept, size=(height, width), mode="bilinear", align_corners=False)[0]
        result.append(present[kept.argmax(dim=0)])
    return torch.stack(result)


def balanced_cross_entropy(logits: Tensor, targets: list[Tensor]) -> Tensor:
    """Half the mean over background pixels and half the mean over foreground pixels, averaged over the targets.

    Args:
        logits: (B, K, h, w), up-sampled to the targets' size.
        targets: of each CAM head, (B, H, W) int64 labels with 255 for ignored pixels.
    """
    full = F.interpolate(logits, size=targets[0].shape[-2:], mode="bilinear", align_corners=False)
    losses = []
    for target in targets:
        for kept in (target == 0, (target > 0) & (target != IGNORED)):
            masked = target.where(kept, IGNORED)
            total = F.cross_entropy(full, masked, ignore_index=IGNORED, reduction="sum")
            losses.append(0.5 * total / (kept.sum() + 1e-6))
    return torch.stack(losses).sum() / len(targets)


def merge_cams(cams: list[Tensor], mirrored: list[Tensor], class_labels: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, *size) in [0, 1]: all classes at full resolution.

    Args:
        mirrored: as the network gave them, not flipped back.
    """
    merged = []
    for view, mirror in zip(cams, mirrored, strict=True):
        both = F.interpolate(torch.cat([view, mirror]), size=size, mode="bilinear", align_corners=False)
        merged.append(torch.maximum(both[: len(view)], both[len(view) :].flip(-1)).relu())
    total = torch.stack(merged).sum(dim=0)
    total = total + (-total).amax(dim=(2, 3), keepdim=True)
    total = total / (total.amax(dim=(2, 3), keepdim=True) + 1e-5)
    return total * class_labels[..., None, None]


def seg_pseudo_labels(
    views: list[Tensor], mirrored: list[Tensor], class_labels: Tensor, size: tuple[int, int], temperature: float = 0.01
) -> Tensor:
    """(B, C + 1, *size) probabilities: logits of all views added at full resolution, sharpened there.

    Args:
        mirrored: as the network gave them, not flipped back.
    """
    total = []
    for view, mirror in zip(views, mirrored, strict=True):
        both = F.interpolate(torch.cat([view, mirror]), size=size, mode="bilinear", align_corners=False)
        total.append(both[: len(view)] + both[len(view) :].flip(-1))
    logits = torch.stack(total).sum(dim=0)
    absent = F.pad(class_labels == 0, (1, 0), value=False)[..., None, None]
    return (torch.where(absent, -1e5, logits) / temperature).softmax(dim=1)


def seg_to_cam_loss(cam_logits: Tensor, probabilities: Tensor) -> Tensor:
    """Soft-margin loss of ReLU of the (B, C, h, w) CAMs; the (B, C + 1, H, W) probabilities are resized to them."""
    target = F.interpolate(probabilities[:, 1:], size=cam_logits.shape[-2:], mode="bilinear", align_corners=False)
    classes = cam_logits.shape[1]
    flat, goal = (maps.permute(0, 2, 3, 1).reshape(-1, classes) for maps in (cam_logits.relu(), target))
    return F.multilabel_soft_margin_loss(flat, goal)


def fit_thresholds(values: Tensor) -> tuple[float, float]:
    """Low and high threshold from scikit-learn's mixture of three Gaussians, on the CPU.

    The largest value that the lowest mode claims, and the smallest that the highest one does.
    """
    from sklearn.mixture import GaussianMixture

    data = values.float().cpu().numpy()[:, None]
    starts = np.array([[data.min()], [np.median(data)], [data.max()]])
    mixture = GaussianMixture(3, means_init=starts, precisions_init=np.ones((3, 1, 1))).fit(data)
    mode = mixture.predict(data)
    return float(data[mode == 0].max(initial=0.0)), float(data[mode == 2].min(initial=1.0))


def fit_two_modes(values: Tensor, tolerance: float = 1e-5) -> float:
    """The paper's two modes by scikit-learn: the point where the upper one takes over.

    Args:
        tolerance: of the EM; scikit-learn's default of 1e-3 stops some hundredths away from the converged answer.
    """
    from sklearn.mixture import GaussianMixture

    data = values.float().cpu().numpy()[:, None]
    starts = np.array([[data.min()], [data.max()]])
    mixture = GaussianMixture(2, means_init=starts, tol=tolerance, max_iter=1000).fit(data)
    grid = np.linspace(0.0, 1.0, 2001)[:, None]
    upper = mixture.predict(grid) == int(mixture.means_.argmax())
    between = (grid[:, 0] > mixture.means_.min()) & (grid[:, 0] < mixture.means_.max())
    return float(grid[upper & between].min())


def explicit_attention(net: CosaNet) -> CosaNet:
    """A copy whose attention keeps each head's (N, N) softmax matrix."""
    net = deepcopy(net)
    for block in net.encoder.vit.blocks:
        block.attn.fused_attn = False
    return net


@torch.no_grad()
def segment(net: CosaNet, image: Tensor, scales: Sequence[float], flip: bool, size: tuple[int, int]) -> Tensor:
    """(K, H, W) logits of one (1, 3, S, S) image: those of all views added at S x S, then resized to H x W.

    Without the CAMs that the release's evaluation makes of the same passes.
    """
    side = image.shape[-2:]
    total = image.new_zeros(())
    for scale in scales:
        scaled = F.interpolate(image, size=[int(scale * length) for length in side], mode="bilinear")
        seg = net(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled).seg
        seg = F.interpolate(seg, size=side, mode="bilinear", align_corners=False)
        total = total + seg[:1]
        if flip:
            total = total + seg[1:].flip(-1)
    return F.interpolate(total, size=size, mode="bilinear", align_corners=False)[0]
