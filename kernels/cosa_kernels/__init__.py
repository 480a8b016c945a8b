"""Losses and pseudo-label operations for training a segmentation network from class activation maps (CoSA)."""

from cosa_kernels.dynamic_threshold import DynamicThreshold, fit_bimodal_threshold
from cosa_kernels.ops.cam_pseudo_labels import cam_pseudo_labels
from cosa_kernels.ops.raw_cross_entropy import raw_cross_entropy
from cosa_kernels.ops.upsample_cross_entropy import upsample_cross_entropy
from cosa_kernels.reference import (
    csc_info_nce,
    merge_cams,
    seg_pseudo_labels,
    seg_to_cam_loss,
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
