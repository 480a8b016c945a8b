"""Stages that train, and the pseudo-labels between the trainings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa_fast.config import (
    AugmentConfig,
    CosaConfig,
    LoaderConfig,
    ModelConfig,
    MultistageConfig,
    OptimConfig,
    PseudoConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
)
from cosa_fast.stages.base import Stage


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
    parallel = True

    output: Path
    """Folder to write: the state and the logs so far."""

    def run(self) -> None:
        from cosa_fast.training.single_stage import warm_up

        warm_up(self.index, self.output, self.resume, self.masks, self.validation_index, **self.sections)


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """Train CoSA from image-level labels; killed and started again, it continues."""

    command = "train"
    parallel = True

    output: Path
    """Checkpoint to write (safetensors); the logs come to stand beside it (.metrics.jsonl, .validation.jsonl)."""
    warmup: Path | None = None
    """Folder from `cosa-fast warmup` to begin with; without it, the training begins at the beginning."""

    def run(self) -> None:
        from cosa_fast.training.single_stage import train

        train(self.index, self.output, self.resume, self.masks, self.validation_index, self.warmup, **self.sections)


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(Stage):
    """Write the trained assignment network's pseudo-labels of the training images to a Zarr store.

    Several processes, started by torchrun, share the shards of the store; it is the one that one process writes.
    """

    command = "pseudo-labels"
    parallel = True

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
    parallel = True

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
