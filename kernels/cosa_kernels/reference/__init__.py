"""CoSA's losses and pseudo-labels in plain torch, straight from the paper's equations.

The ground truth of every faster version: works in any floating dtype (float64 included) on any device, and is
differentiable by autograd. CAMs are normalised to [0, 1] and zero for absent classes; grids are up-sampled bilinearly
(`align_corners=False`).
"""

from cosa_kernels.reference.cam_pseudo_labels import EDGE, box_mask, cam_pseudo_labels, perplexity_of
from cosa_kernels.reference.csc_info_nce import csc_info_nce
from cosa_kernels.reference.fit_bimodal_threshold import fit_bimodal_threshold
from cosa_kernels.reference.merge_cams import merge_cams
from cosa_kernels.reference.raw_cross_entropy import raw_cross_entropy
from cosa_kernels.reference.seg_to_cam_loss import seg_pseudo_labels, seg_to_cam_loss
from cosa_kernels.reference.upsample import Size, upsample
from cosa_kernels.reference.upsample_cross_entropy import upsample_cross_entropy

__all__ = [
    "EDGE",
    "Size",
    "box_mask",
    "cam_pseudo_labels",
    "csc_info_nce",
    "fit_bimodal_threshold",
    "merge_cams",
    "perplexity_of",
    "raw_cross_entropy",
    "seg_pseudo_labels",
    "seg_to_cam_loss",
    "upsample",
    "upsample_cross_entropy",
]
