"""Numbers of the paper (Yang et al., ECCV 2024), in percent unless said otherwise, by the table they stand in.

VOC is PASCAL VOC 2012, COCO is MS COCO 2014. The paper predicts only classes of the image-level labels (footnote 3),
except on VOC test: its val numbers compare with our label-filtered ones. Fig. 1, 3, 5, 8 and 9 state no numbers.
"""

from __future__ import annotations

from typing import NamedTuple


class Voc(NamedTuple):
    """Values on two splits of VOC."""

    first: float
    second: float


class Both(NamedTuple):
    """mIoU on VOC val and COCO val."""

    voc: float
    coco: float


class SystemResult(NamedTuple):
    """A row of Table 1."""

    voc_val: float
    voc_test: float
    coco_val: float


SYSTEMS: dict[tuple[str, str], SystemResult] = {
    ("CoSA", "ViT-B"): SystemResult(76.2, 75.1, 51.0),
    ("CoSA + CRF", "ViT-B"): SystemResult(76.4, 75.2, 51.1),
    ("CoSA-MS", "R101"): SystemResult(76.5, 75.3, 50.9),
    ("CoSA-MS", "WR38"): SystemResult(76.6, 74.9, 50.1),
    ("CoSA-MS", "SWIN"): SystemResult(81.4, 78.4, 53.7),
}
"""Table 1 by (system, network); the paper writes CoSA* for CoSA + CRF."""

CPL: dict[str, Voc] = {
    "CAM pseudo-labels": Voc(78.5, 76.4),
    "ensemble CAM pseudo-labels": Voc(78.9, 77.2),
}
"""Table 2: mIoU of the CAM pseudo-labels on VOC train and val."""

VOC_IMAGES = {"train": 1464, "val": 1449}
"""Of those splits: VOC 2012's own segmentation lists, without SBD."""

LADDER: dict[str, Both] = {
    "baseline": Both(55.96, 37.32),
    "gc": Both(63.09, 42.55),
    "gc_sa": Both(64.41, 43.92),
    "gc_sa_raw": Both(68.22, 45.39),
    "gc_sa_csc": Both(71.66, 47.10),
    "gc_sa_raw_csc": Both(75.54, 49.67),
    "cosa": Both(76.19, 51.00),
}
"""Table 3a: mIoU of the segmentation."""

LEAVE_ONE_OUT: dict[str, Both] = {
    "cosa": Both(76.19, 51.00),
    "gc_sa_raw_csc": Both(75.54, 49.67),
    "no_csc": Both(69.89, 45.95),
    "no_raw": Both(72.45, 47.83),
    "no_sa": Both(72.10, 49.04),
    "no_gc": Both(74.12, 49.67),
}
"""Table 3b: mIoU of the segmentation."""

GUIDANCE: dict[str, Voc] = {
    "gt": Voc(83.99, 80.16),
    "no_gc": Voc(72.28, 71.38),
    "detach_feat": Voc(74.19, 73.36),
    "detach_cls": Voc(78.05, 76.15),
    "cosa": Voc(78.54, 76.37),
}
"""Table 4a: mIoU of the CAM pseudo-labels on VOC train and val (for W_fc the text says 76.37, the table 76.15)."""

COEXISTENCE: dict[str, Voc] = {
    "FPR": Voc(53.09, 53.34),
    "ToCo": Voc(63.62, 72.33),
    "SeCo": Voc(73.18, 73.63),
    "no_csc": Voc(62.61, 67.82),
    "cosa": Voc(82.34, 76.37),
}
"""Table 4b: C-mIoU and mIoU of the CAM pseudo-labels on VOC val."""

BEST_FIXED_THRESHOLD, DYNAMIC_THRESHOLD = 75.54, 76.19
"""Sec. 4.2 and Table 3: segmentation mIoU on VOC val with the best fixed and with the dynamic threshold."""


class CrfResult(NamedTuple):
    """A row of Table 4c: mIoU on VOC val and images per second on an RTX 3090, with and without CRF."""

    miou_with: float
    miou_without: float
    speed_with: float | None
    speed_without: float | None


CRF: dict[str, CrfResult] = {
    "CoSA": CrfResult(76.4, 76.2, None, None),
    "CoSA-MS": CrfResult(76.5, 76.4, 2.36, 9.60),
}
"""Table 4c for ViT-B and R101. The speeds of ViT-B are left out: the copy of the table that we have does not tell which
of its numbers they are, and none of them gives the +165 % of the text."""

PARTS = ("GC", "SA", "RAW", "CSC", "DT")
"""What Table 3 adds up: guided CAMs, swapping assignments, reliability weighting, contrastive separation, dynamic
threshold."""
