"""Losses and pseudo-label operations for training a segmentation network from class activation maps (CoSA)."""

from cosa_kernels.dynamic_threshold import DynamicThreshold, fit_bimodal_threshold
from cosa_kernels.reference import (
    cam_pseudo_labels,
    csc_info_nce,
    merge_cams,
    raw_cross_entropy,
    seg_pseudo_labels,
    seg_to_cam_loss,
    upsample_cross_entropy,
)

__all__ = [
    "DynamicThreshold",
    "cam_pseudo_labels",
    "csc_info_nce",
    "fit_bimodal_threshold",
    "merge_cams",
    "raw_cross_entropy",
    "seg_pseudo_labels",
    "seg_to_cam_loss",
    "upsample_cross_entropy",
]
