"""Losses and pseudo-label operations for training a segmentation network from class activation maps (CoSA)."""

from cosa_kernels.modules import CSCInfoNCELoss, RAWCrossEntropyLoss, SegToCAMLoss, UpsampleCrossEntropyLoss
from cosa_kernels.ops.cam_pseudo_labels import cam_pseudo_labels
from cosa_kernels.ops.csc_info_nce import csc_info_nce
from cosa_kernels.ops.dynamic_threshold import DynamicThreshold
from cosa_kernels.ops.fit_bimodal_threshold import fit_bimodal_threshold
from cosa_kernels.ops.merge_cams import merge_cams
from cosa_kernels.ops.raw_cross_entropy import raw_cross_entropy
from cosa_kernels.ops.seg_to_cam_loss import seg_pseudo_labels, seg_to_cam_loss
from cosa_kernels.ops.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "CSCInfoNCELoss",
    "DynamicThreshold",
    "RAWCrossEntropyLoss",
    "SegToCAMLoss",
    "UpsampleCrossEntropyLoss",
    "cam_pseudo_labels",
    "csc_info_nce",
    "fit_bimodal_threshold",
    "merge_cams",
    "raw_cross_entropy",
    "seg_pseudo_labels",
    "seg_to_cam_loss",
    "upsample_cross_entropy",
]
