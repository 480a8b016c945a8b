"""Settings of the CoSA training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cosa_fast.config.section import Fraction, NonNegative, OpenFraction, Positive, Scales, Section, Weight


class ModelConfig(Section):
    """The CoSA network: ViT encoder, two CAM classifiers, LargeFOV decoder."""

    name: str = "vit_base_patch16_224.orig_in21k_ft_in1k"
    """Any timm ViT, or `mini_vit`: a small ViT with a convolution stem that learns from scratch on a CPU."""
    pretrained: bool = True
    """Fetch timm's weights for `name`; ignored when `weights` is given."""
    weights: Path | None = None
    """Local safetensors file with timm-named encoder weights; checked key by key."""
    aux_block: int = -3
    """Block whose output gives the auxiliary CAM (-1 is the last block)."""
    aux_norm: bool = False
    """LayerNorm on the auxiliary features (helps from scratch; the release feeds the raw block output)."""
    decoder_dim: Positive = 512
    decoder_dilation: Positive = 5
    detach: Literal["none", "feat", "cls", "all"] = "none"
    """Stop the CAM guidance gradient at the features (F), the classifier weights (W_fc) or both (Table 4a)."""


class CosaConfig(Section):
    """CoSA itself (paper Sec. 3); each part has its own switch."""

    guidance: Literal["spl", "gt", "none", "noise"] = "spl"
    """What guides the CAMs: segmentation pseudo-labels (GC), masks (oracle), nothing, random masks (Fig. 1)."""
    swap: bool = True
    """Assignments come from the EMA assignment network (SA); off: the online network assigns to itself."""
    raw: bool = True
    """Reliability-based adaptive weighting of the CAM-to-segmentation loss (Eq. 4, 5)."""
    csc: bool = True
    """Contrastive separation in CAMs (Eq. 9, 10)."""
    dynamic_threshold: bool = True
    """Threshold from a bimodal mixture over recent CAMs (Eq. 6); off: `threshold` throughout."""

    threshold: OpenFraction = 0.5
    """Fixed threshold, and the starting point of the dynamic one."""
    threshold_queue: Positive = 100
    """Batches of CAM confidences the mixture is fitted to."""
    threshold_floor: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Confidences below this value are left out of the mixture; 0 keeps all, as in Eq. 6 (the release: 0.05)."""
    threshold_range: tuple[OpenFraction, OpenFraction] = (0.15, 0.7)
    """The dynamic threshold is clamped to this range."""
    threshold_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Smoothing of the dynamic threshold from one fit to the next."""
    ignore_band: tuple[OpenFraction, OpenFraction] | None = None
    """(low, high): confidences between them are ignored by the segmentation loss (the release's two thresholds)."""

    scales: Scales = (1.0, 0.5, 1.5)
    """Input scales whose CAMs and segmentation logits the assignment network adds up."""
    flip: bool = True
    """Also use the mirrored image at each scale."""
    momentum: Fraction = 0.9994
    """m of the EMA update of the assignment network."""
    momentum_warmup: bool = False
    """Use min(m, (1 + t) / (10 + t)): a short run's assignment network leaves its initial weights."""

    lambda_c2s: Weight = 0.1
    lambda_s2c: Weight = 0.05
    lambda_csc: Weight = 0.1
    lambda_energy: Weight = 0.0
    """Weight of the release's dense energy regulariser (0 in the paper)."""
    lambda_alpha: OpenFraction = 0.8
    """Scale of the normalised distance in the perplexity; its minimum is -log(lambda_alpha) (Eq. 4)."""
    lambda_beta: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of the perplexity (Eq. 4)."""
    epsilon: Annotated[float, Field(gt=0)] = 1.0
    """Contrastive separation uses positions with perplexity at most this (Eq. 9)."""
    spl_temperature: Annotated[float, Field(gt=0)] = 0.01
    csc_temperature: Annotated[float, Field(gt=0)] = 0.5
    """The paper does not state it (README, Fidelity)."""
    csc_scope: Literal["image", "batch"] = "image"
    """Contrast positions within each image, or across the batch."""
    balance: bool = False
    """Average foreground and background pixels separately, half the loss each (the release)."""
    s2c_relu: bool = False
    """Guide ReLU(CAM) instead of the CAM logits (the release)."""
    label_size: Positive | None = None
    """Side of the pseudo-label map in pixels; None: the crop's own size."""

    @model_validator(mode="after")
    def _consistent(self) -> CosaConfig:
        for name in ("threshold_range", "ignore_band"):
            value = getattr(self, name)
            if value is not None and value[0] >= value[1]:
                raise ValueError(f"{name} must be (low, high) with low < high, got {value}")
        if self.ignore_band is not None and (self.dynamic_threshold or self.raw):
            raise ValueError("ignore_band fixes two thresholds: set dynamic_threshold and raw to false with it")
        return self


class OptimConfig(Section):
    """AdamW with linear warm-up and polynomial decay."""

    lr: Annotated[float, Field(gt=0)] = 6e-5
    head_lr_scale: Annotated[float, Field(gt=0)] = 10.0
    """Learning-rate factor of the classifiers and the decoder."""
    weight_decay: Weight = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    warmup: NonNegative = 1500
    """Iterations of linear warm-up from lr * 1e-6."""
    power: Weight = 0.9
    clip: Weight = 0.0
    """Gradient norm limit; 0: none."""


class TrainConfig(Section):
    """Length and rhythm of the single-stage training."""

    iterations: Positive = 32000
    batch_size: Positive = 4
    """Images of an iteration, of all processes together."""
    seed: NonNegative = 0
    c2s_start: NonNegative = 6000
    """First iteration of the CAM-to-segmentation loss (release: 6000 on VOC, 10000 on COCO)."""
    guidance_start: NonNegative = 6000
    """First iteration of Seg2CAM, contrastive separation and the dynamic threshold; before the decoder is
    trained its pseudo-labels are almost all background and the CAMs collapse."""
    accumulate: Positive = 1
    """Parts that each process computes its share of the batch in, one after the other: less memory, same gradient."""
    checkpoint_every: Positive = 500
    log_every: Positive = 20

    @model_validator(mode="after")
    def _ordered(self) -> TrainConfig:
        if self.guidance_start < self.c2s_start:
            raise ValueError(
                f"guidance_start ({self.guidance_start}) must not be before c2s_start ({self.c2s_start}): "
                "an untrained decoder would guide the CAMs"
            )
        return self


class ValidationConfig(Section):
    """Quality measured during the training on the first evaluation split; it needs masks and never changes a weight."""

    every: NonNegative = 0
    """Iterations from one validation to the next; 0: none, and no mask is looked for."""
    images: Positive = 500
    """At most so many images, evenly spaced through the split; the end of the training is measured on all."""
    scales: Scales = (1.0,)
    flip: bool = True
    size: Positive = 448
    """Side in pixels of the square every image is resized to."""
    batch_size: Positive = 8
