"""Settings of what follows the CoSA training, and of the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cosa_fast.config.section import NonNegative, OpenFraction, Positive, Scales, Section, Weight


class PseudoConfig(Section):
    """The pseudo-label store written from the trained assignment network."""

    scales: Scales = (1.0, 0.5, 1.5)
    flip: bool = True
    size: Positive = 448
    """Side in pixels of the square the image is resized to before the scales are applied."""
    batch_size: Positive = 8
    shard: Positive = 64
    """Images per Zarr shard, a multiple of batch_size for several processes: what each takes at a time."""


class MultistageConfig(Section):
    """CoSA-MS: a standalone segmentation network trained on the stored pseudo-labels."""

    architecture: str = "DeepLabV3Plus"
    """Any segmentation-models-pytorch architecture, or `LargeFOV` (with `wide_resnet38`)."""
    encoder: str = "tu-resnet101d"
    """Any of its encoders, timm's included as `tu-<name>`, or `wide_resnet38` (with `LargeFOV`)."""
    encoder_weights: str | None = "imagenet"
    weights: Path | None = None
    """Local safetensors or .pth file with the encoder's weights; checked key by key."""
    iterations: Positive = 20000
    batch_size: Positive = 16
    crop: Positive = 512
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 7e-3
    head_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Learning-rate factor of everything but the encoder."""
    weight_decay: Weight = 1e-4
    """With `adamw` not of biases, normalisation and position tables."""
    warmup: NonNegative = 0
    power: Weight = 0.9
    min_confidence: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Pixels whose pseudo-label reliability is below this are ignored."""
    seed: NonNegative = 0
    checkpoint_every: Positive = 500
    log_every: Positive = 20


class EvalConfig(Section):
    """Evaluation on the splits with masks."""

    network: Literal["assignment", "online"] = "assignment"
    """Which of the two networks of the checkpoint is CoSA's result."""
    scales: Scales = (1.0, 0.5, 1.5, 0.75, 1.25)
    flip: bool = True
    size: Positive = 448
    """Side in pixels of the square every image is resized to (the release's evaluation)."""
    threshold: OpenFraction | None = None
    """CAM threshold of the pseudo-labels that are scored; None: the one the training ended with."""
    batch_size: Positive = 8
    crf: Literal["none", "release", "standard"] = "none"
    """Also score every network after a dense CRF: `release` is the authors' one iteration, `standard` the usual ten."""
    panel_images: Positive = 8
    """Rows of the qualitative panel."""


class StudiesConfig(Section):
    """The paper's tables and figures, made by `snakemake studies`."""

    seeds: tuple[NonNegative, ...] = (0, 1, 2)
    """Runs of each row of Table 3; the other studies use the first."""
    thresholds: tuple[OpenFraction, ...] = (0.3, 0.4, 0.5, 0.6)
    """Fixed thresholds that the dynamic one is compared with."""
    coexisting: tuple[str, ...] = ("bird", "train", "aeroplane", "boat", "car")
    """Classes of C-mIoU (Table 4b): those that Fig. 7 shows; the paper does not list them."""


class RuntimeConfig(Section):
    """The machine. None of these change what is computed, up to rounding."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on CPU, where bf16 is up to 80 times slower without AMX; with it inference of a
    ViT-B is 3 to 4 times faster, a step of the demo a tenth slower. `fp8`: bf16, and while CoSA trains the assignment
    network's linear layers in float8 (not measured yet)."""
    compile: Literal["auto", "on", "off", "graphs"] = "auto"
    """torch.compile of the networks; auto: on with CUDA, for evaluation and pseudo-labels from 10,000 images on.
    `graphs` replays CUDA graphs of the training as well (not measured yet)."""
