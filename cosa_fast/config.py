"""Every setting of the pipeline: one immutable section per concern, validated before any work starts.

The defaults are the paper's VOC settings (Sec. 4.1; where the paper is silent, the authors' release, see README
"Fidelity"). `config/*.yaml` hold what differs from them, and `Config.model_json_schema()` is the schema.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A frozen group of settings that rejects unknown keys and docstrings its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """Which dataset, and how thoroughly its files are checked before training."""

    dataset: Literal["voc", "coco"] = "voc"
    """`voc` without `voc.root` and without `voc.download` means the embedded MiniVOC."""
    verify: Literal["decode", "header"] = "decode"
    """`decode` reads every pixel of every image (finds truncated files); `header` only opens them."""


class VocConfig(Section):
    """PASCAL VOC 2012, or any dataset in its layout."""

    root: Path | None = None
    """Folder with JPEGImages/, Annotations/, ImageSets/ (the VOC2012 folder itself)."""
    download: bool = False
    """Fetch the official archives into `root` (default `data/VOC2012`), checksums verified, resumable."""
    train_split: str = "train_aug"
    """train, val, trainval, train_aug (the 10,582 images with SBD masks minus val), or any ImageSets list."""
    eval_splits: tuple[str, ...] = ("val",)
    """Splits with masks on which mIoU is computed; [] trains without looking for any mask."""


class CocoConfig(Section):
    """MS COCO from its `instances_*.json` files."""

    root: Path | None = None
    """Folder with annotations/instances_<split><year>.json and <split><year>/ images."""
    year: Literal[2014, 2017] = 2014
    download: bool = False
    """Fetch the official archives into `root` (default `data/coco`), checksums verified, resumable."""
    train_split: str = "train"
    eval_splits: tuple[str, ...] = ("val",)


class MiniVocConfig(Section):
    """The embedded synthetic dataset (10 VOC class names, textured objects, coexisting backgrounds)."""

    train: Positive = 2000
    val: Positive = 200
    test: Positive = 200
    size: Annotated[int, Field(ge=32)] = 112
    """Side of the square images in pixels."""
    seed: NonNegative = 0


class AugmentConfig(Section):
    """Geometry and photometry of the training views; both views of an image share one geometry."""

    crop: Positive = 448
    """Side of the square crop in pixels."""
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.5, 2.0)
    """Range of the uniform random resize before the crop."""
    flip: Fraction = 0.5
    blur: Fraction = 0.5
    """Probability of a Gaussian blur, of both views, with a radius from `blur_radius` pixels."""
    blur_radius: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)
    strong: Fraction = 1.0
    """Probability that the strong view gets one of the nine photometric operations."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Channel means in [0, 1]; the release normalises with ImageNet's although its weights used 0.5."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _ordered(self) -> AugmentConfig:
        for name in ("scale", "blur_radius"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (low, high) with low <= high, got ({low}, {high})")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        return self


class LoaderConfig(Section):
    """How batches are produced. Both backends apply the same random draws."""

    backend: Literal["dali", "torch"] = "dali"
    workers: NonNegative = 2
    """DALI CPU threads, or torch loader processes (0: load in the training process)."""
    prefetch: Positive = 2
    """Batches prepared ahead (per worker for torch)."""


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

    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 0.5, 1.5)
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
        if not self.scales:
            raise ValueError("scales must name at least one scale, for example [1.0]")
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
    seed: NonNegative = 0
    c2s_start: NonNegative = 6000
    """First iteration of the CAM-to-segmentation loss (release: 6000 on VOC, 10000 on COCO)."""
    guidance_start: NonNegative = 6000
    """First iteration of Seg2CAM, contrastive separation and the dynamic threshold; before the decoder is
    trained its pseudo-labels are almost all background and the CAMs collapse."""
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
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)
    flip: bool = True
    size: Positive = 448
    """Side in pixels of the square every image is resized to."""
    batch_size: Positive = 8


class PseudoConfig(Section):
    """The pseudo-label store written from the trained assignment network."""

    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 0.5, 1.5)
    flip: bool = True
    size: Positive = 448
    """Side in pixels of the square the image is resized to before the scales are applied."""
    batch_size: Positive = 8
    shard: Positive = 64
    """Images per Zarr shard."""


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
    scales: tuple[Annotated[float, Field(gt=0)], ...] = (1.0, 0.5, 1.5, 0.75, 1.25)
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
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on CPU (bf16 there can be 80 times slower)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the networks; auto: on with CUDA."""


class Config(Section):
    """The whole configuration file."""

    results: Path = Path("results")
    """Folder of everything the workflow writes."""
    threads: Positive = 2
    """CPU threads of each stage. More than the idle cores of a shared machine makes it slower, not faster."""
    data: DataConfig = DataConfig()
    voc: VocConfig = VocConfig()
    coco: CocoConfig = CocoConfig()
    minivoc: MiniVocConfig = MiniVocConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    cosa: CosaConfig = CosaConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    pseudo: PseudoConfig = PseudoConfig()
    multistage: MultistageConfig = MultistageConfig()
    eval: EvalConfig = EvalConfig()
    studies: StudiesConfig = StudiesConfig()
    runtime: RuntimeConfig = RuntimeConfig()


def before_guidance(cosa: CosaConfig, model: ModelConfig) -> tuple[CosaConfig, ModelConfig]:
    """The same settings with everything that first matters at `train.guidance_start` switched off or at its default.

    Runs that agree on the rest share one warm-up.
    """
    off = {"guidance": "none", "csc": False, "dynamic_threshold": False}
    unused = (
        "threshold_floor", "threshold_range", "threshold_momentum", "lambda_s2c", "lambda_csc",
        "spl_temperature", "csc_temperature", "csc_scope", "s2c_relu",
    )  # fmt: skip
    defaults = {key: CosaConfig.model_fields[key].default for key in unused}
    return cosa.model_copy(update=off | defaults), model.model_copy(update={"detach": "none"})


def config_from_mapping(values: Mapping[str, Any], source: str = "config") -> Config:
    """Validate a nested mapping (a parsed YAML file, Snakemake's `config`).

    Raises:
        ValueError: an unknown key or a value out of range, with the key's full name, the value and `source`.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(describe_validation_error(error, source)) from None


def load_config(*paths: Path) -> Config:
    """Read YAML files, later ones overriding earlier ones key by key.

    Raises:
        ValueError: a file is missing, is not YAML, or holds an unknown key or a value out of range.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ValueError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold sections (key: value), got {type(content).__name__}")
        _merge(merged, content)
    return config_from_mapping(merged, source=", ".join(map(str, paths)))


def to_flags(config: Config, *sections: str) -> str:
    """Command-line flags that give `cosa-fast <stage>` exactly these sections (used by the Snakemake rules)."""
    flags = []
    for section in sections:
        for key, value in json.loads(getattr(config, section).model_dump_json()).items():
            words = value if isinstance(value, list) else [value]
            text = " ".join(shlex.quote(str(word)) for word in words)
            flags.append(f"--{section}.{key.replace('_', '-')} {text}".rstrip())
    return " ".join(flags)


def describe_validation_error(error: ValidationError, source: str) -> str:
    """One line per problem: where, what was given, what is wanted."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {place!r}; config/README.md lists every key")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            # A rule between keys names them itself; the whole section would only hide its message.
            between_keys = problem["type"] == "value_error" and isinstance(problem["input"], dict)
            given = "" if between_keys else f" = {problem['input']!r}"
            lines.append(f"{source}: {place}{given}: {message}")
    return "\n".join(lines)


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
