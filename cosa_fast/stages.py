"""The stages of the pipeline as dataclasses: paths and configuration sections in, one call of the stage's code out.

The fields become the flags of `cosa-fast <command>`, their docstrings its help. Stage code is imported in `run`, so
that reading this module, and every `--help`, stays clear of torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from cosa_fast.config import (
    AugmentConfig,
    CocoConfig,
    CosaConfig,
    DataConfig,
    EvalConfig,
    LoaderConfig,
    MiniVocConfig,
    ModelConfig,
    MultistageConfig,
    OptimConfig,
    Positive,
    PseudoConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
    VocConfig,
)


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """Flags that every stage takes."""

    command: ClassVar[str]

    threads: Positive = 2
    """CPU threads. More than the idle cores of a shared machine makes it slower, not faster."""
    config: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """YAML file whose values become the defaults of the other flags; given again, later files win."""
    log: Path | None = None
    """Also write the log to this file."""

    @abstractmethod
    def run(self) -> None:
        """Do the work."""


@dataclass(frozen=True, kw_only=True)
class MiniVoc(Stage):
    """Generate MiniVOC, the embedded synthetic dataset in VOC2012 layout."""

    command = "data minivoc"

    root: Path
    """Folder to make: JPEGImages/, Annotations/, SegmentationClass/, ImageSets/."""
    minivoc: MiniVocConfig

    def run(self) -> None:
        from cosa_fast.data.minivoc import generate

        generate(self.root, **self.minivoc.model_dump(), workers=self.threads, progress=True)


@dataclass(frozen=True, kw_only=True)
class Index(Stage):
    """Index a dataset: splits, sizes, image-level labels; every image file is checked."""

    command = "data index"

    output: Path
    """Index to write (JSON)."""
    cache: Path
    """Folder for what is generated or derived once (MiniVOC, COCO's masks)."""
    data: DataConfig
    voc: VocConfig
    coco: CocoConfig
    minivoc: MiniVocConfig

    def run(self) -> None:
        from cosa_fast.data.prepare import prepare_index

        prepare_index(
            self.output,
            self.cache,
            data=self.data,
            voc=self.voc,
            coco=self.coco,
            minivoc=self.minivoc,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class Masks(Stage):
    """Find and check the masks of the evaluation splits; training never reads them."""

    command = "data masks"

    index: Path
    """Dataset index from `cosa-fast data index`."""
    output: Path
    """List of masks to write (JSON)."""
    cache: Path
    """The folder given to `cosa-fast data index`."""

    def run(self) -> None:
        from cosa_fast.data.masks import prepare_masks

        prepare_masks(self.index, self.output, self.cache, threads=self.threads)


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """What both parts of the CoSA training take."""

    index: Path
    """Dataset index from `cosa-fast data index`."""
    resume: Path
    """Folder for the state of an unfinished run, its metrics and TensorBoard files."""
    masks: Path | None = None
    """List of masks from `cosa-fast data masks`; only for validation and the oracle, `--cosa.guidance gt`."""
    validation_index: Path | None = None
    """Dataset index with the split to validate on; default: `--index`."""
    augment: AugmentConfig
    loader: LoaderConfig
    model: ModelConfig
    cosa: CosaConfig
    optim: OptimConfig
    train: TrainConfig
    validation: ValidationConfig
    runtime: RuntimeConfig

    @property
    def sections(self) -> dict[str, Any]:
        """The settings, by name."""
        names = ("augment", "loader", "model", "cosa", "optim", "train", "validation", "runtime", "threads")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Warmup(Training):
    """Train CoSA up to train.guidance_start: what all variants of its guidance can begin with."""

    command = "warmup"

    output: Path
    """Folder to write: the state and the logs so far."""

    def run(self) -> None:
        from cosa_fast.training.single_stage import warm_up

        warm_up(self.index, self.output, self.resume, self.masks, self.validation_index, **self.sections)


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Train CoSA from image-level labels; killed and started again, it continues."""

    command = "train"

    output: Path
    """Checkpoint to write (safetensors); the logs come to stand beside it (.metrics.jsonl, .validation.jsonl)."""
    warmup: Path | None = None
    """Folder from `cosa-fast warmup` to begin with; without it, the training begins at the beginning."""

    def run(self) -> None:
        from cosa_fast.training.single_stage import train

        train(self.index, self.output, self.resume, self.masks, self.validation_index, self.warmup, **self.sections)


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(Stage):
    """Write the trained assignment network's pseudo-labels of the training images to a Zarr store."""

    command = "pseudo-labels"

    index: Path
    """Dataset index from `cosa-fast data index`."""
    checkpoint: Path
    """Checkpoint from `cosa-fast train`."""
    output: Path
    """Store to write (a .zarr folder)."""
    pseudo: PseudoConfig
    runtime: RuntimeConfig

    def run(self) -> None:
        from cosa_fast.pseudo_labels import write_pseudo_labels

        write_pseudo_labels(
            self.index, self.checkpoint, self.output, pseudo=self.pseudo, runtime=self.runtime, threads=self.threads
        )


@dataclass(frozen=True, kw_only=True)
class Export(Stage):
    """Export the pseudo-label store as palette PNG files in the VOC colours."""

    command = "export"

    store: Path
    """Store from `cosa-fast pseudo-labels`."""
    output: Path
    """Folder to make: SegmentationClass/, one PNG per image."""
    confidence: bool = False
    """Also write the confidences, as grey values, to Confidence/."""

    def run(self) -> None:
        from cosa_fast.pseudo_labels import export_png

        export_png(self.store, self.output, confidence=self.confidence)


@dataclass(frozen=True, kw_only=True)
class Multistage(Stage):
    """Train a standalone segmentation network on the stored pseudo-labels (CoSA-MS); it continues when killed."""

    command = "multistage"

    index: Path
    """Dataset index from `cosa-fast data index`."""
    store: Path
    """Store from `cosa-fast pseudo-labels`."""
    output: Path
    """Checkpoint to write (safetensors)."""
    resume: Path
    """Folder for the state of an unfinished run, its metrics and TensorBoard files."""
    multistage: MultistageConfig
    runtime: RuntimeConfig

    def run(self) -> None:
        from cosa_fast.training.multi_stage import train_segmenter

        train_segmenter(
            self.index,
            self.store,
            self.output,
            self.resume,
            multistage=self.multistage,
            runtime=self.runtime,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Measure mIoU of CoSA, CoSA-MS and the pseudo-labels, label-free and label-filtered."""

    command = "evaluate"

    index: Path
    """Dataset index from `cosa-fast data index`."""
    masks: Path
    """List of masks from `cosa-fast data masks`."""
    checkpoint: Path
    """Checkpoint from `cosa-fast train`."""
    segmenter: Path
    """Checkpoint from `cosa-fast multistage`."""
    store: Path
    """Store from `cosa-fast pseudo-labels`."""
    output: Path
    """Text to write: what was evaluated, and the mIoU of each network and split."""
    csv: Path
    """Table to write: IoU per class."""
    panel: Path
    """Figure to write: image, CAM, pseudo-label, prediction and truth side by side."""
    eval: EvalConfig
    runtime: RuntimeConfig

    def run(self) -> None:
        from cosa_fast.evaluate import evaluate

        evaluate(
            self.index,
            self.masks,
            self.checkpoint,
            self.segmenter,
            self.store,
            self.output,
            self.csv,
            self.panel,
            evaluation=self.eval,
            runtime=self.runtime,
            threads=self.threads,
        )


STAGES: tuple[type[Stage], ...] = (MiniVoc, Index, Masks, Warmup, Train, PseudoLabels, Export, Multistage, Evaluate)
