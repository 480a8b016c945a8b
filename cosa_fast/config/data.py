"""Settings of the datasets and of how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cosa_fast.config.section import Fraction, NonNegative, Positive, Section


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
