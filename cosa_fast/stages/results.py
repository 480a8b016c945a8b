"""Stages that measure and show what was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cosa_fast.config import (
    EvalConfig,
    Positive,
    RuntimeConfig,
    StudiesConfig,
)
from cosa_fast.stages.base import Stage


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Measure mIoU of CoSA, CoSA-MS and the pseudo-labels, label-free and label-filtered, with a CRF if asked for.

    Several processes, started by torchrun, share the images of each split; the results are those of one process.
    """

    command = "evaluate"
    parallel = True

    index: Path
    """Dataset index from `cosa-fast data index`."""
    masks: Path
    """List of masks from `cosa-fast data masks`."""
    checkpoint: Path
    """Checkpoint from `cosa-fast train`."""
    segmenter: Path | None = None
    """Checkpoint from `cosa-fast multistage`; without it, CoSA alone is measured."""
    store: Path | None = None
    """Store from `cosa-fast pseudo-labels`, to be scored on the training masks."""
    splits: tuple[str, ...] = ()
    """Splits to measure on; default: all evaluation splits. The training split may be one if it has masks."""
    output: Path
    """Text to write: what was evaluated, and the mIoU of each network and split."""
    csv: Path
    """Table to write: IoU per class."""
    panel: Path | None = None
    """Figure to write: image, CAM, pseudo-label, prediction and truth side by side."""
    gallery: Path | None = None
    """Folder to write: the panel's material as single images, for the report."""
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
            self.gallery,
            splits=self.splits,
            evaluation=self.eval,
            runtime=self.runtime,
            threads=self.threads,
        )


@dataclass(frozen=True, kw_only=True)
class Speed(Stage):
    """Measure images per second of CoSA and CoSA-MS, with and without a CRF (Table 4c)."""

    command = "speed"

    index: Path
    """Dataset index from `cosa-fast data index`."""
    checkpoint: Path
    """Checkpoint from `cosa-fast train`."""
    segmenter: Path | None = None
    """Checkpoint from `cosa-fast multistage`; without it, CoSA alone is measured."""
    images: Positive = 32
    """Images of the first evaluation split that are timed."""
    output: Path
    """Table to write (CSV)."""
    eval: EvalConfig
    runtime: RuntimeConfig

    def run(self) -> None:
        from cosa_fast.speed import measure_speed

        measure_speed(
            self.index,
            self.checkpoint,
            self.segmenter,
            self.output,
            evaluation=self.eval,
            runtime=self.runtime,
            threads=self.threads,
            images=self.images,
        )


@dataclass(frozen=True, kw_only=True)
class Study(Stage):
    """Make one table or figure of the paper from the files of finished runs; it trains nothing."""

    command = "study"

    name: str
    """One of systems, cpl, ladder ...: `cosa_fast/studies/needs.py` lists them and what each reads."""
    index: Path
    """Dataset index from `cosa-fast data index`."""
    run_: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="run")] = ()
    """A run's files as variant:seed:prefix, as in cosa:0:results/cosa; once per run."""
    table: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A table of IoU per class as name:path, as in main:results/per_class_iou.csv."""
    checkpoint: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A checkpoint as name:path, as in segmenter:results/segmenter.safetensors."""
    speed: Path | None = None
    """Table from `cosa-fast speed`."""
    gallery: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A gallery from `cosa-fast evaluate` as name:path, as in main:results/gallery."""
    csv: Path
    """Table to write."""
    figure: Path
    """Figure to write (SVG or PNG)."""
    studies: StudiesConfig

    def run(self) -> None:
        from cosa_fast.data.index import Index
        from cosa_fast.studies.inputs import Inputs, parse_named_paths, parse_runs
        from cosa_fast.studies.study import write_study

        inputs = Inputs(
            index=Index.load(self.index),
            studies=self.studies,
            runs=parse_runs(self.run_),
            tables=parse_named_paths("table", self.table),
            checkpoints=parse_named_paths("checkpoint", self.checkpoint),
            speed=self.speed,
            galleries=parse_named_paths("gallery", self.gallery),
        )
        write_study(self.name, inputs, self.csv, self.figure)


@dataclass(frozen=True, kw_only=True)
class Report(Stage):
    """Gather a results folder into one self-contained HTML page."""

    command = "report"

    results: Path
    """Folder that the workflow wrote."""
    output: Path
    """Page to write."""

    def run(self) -> None:
        from cosa_fast.report import make_report

        make_report(self.results, self.output)


@dataclass(frozen=True, kw_only=True)
class Submission(Stage):
    """Write, or check, the archive that the PASCAL VOC evaluation server takes for a split without masks."""

    command = "submission"

    root: Path
    """The VOC2012 folder with JPEGImages/ and ImageSets/Segmentation/."""
    split: str = "test"
    """List in ImageSets/Segmentation/."""
    checkpoint: Path | None = None
    """CoSA's checkpoint from `cosa-fast train`; or give --segmenter."""
    segmenter: Path | None = None
    """CoSA-MS's checkpoint from `cosa-fast multistage`; or give --checkpoint."""
    output: Path
    """Archive to write (.tgz), or with --check-only to check."""
    competition: Literal["comp5", "comp6"] = "comp6"
    """The server's competition: comp6 allows data beyond VOC's own (ImageNet weights count as such), comp5 does not."""
    check_only: bool = False
    """Check an archive that exists; nothing is predicted."""
    eval: EvalConfig
    runtime: RuntimeConfig

    def run(self) -> None:
        from cosa_fast.submission import check_submission, write_submission

        if self.check_only:
            check_submission(self.output, self.root, self.split, threads=self.threads)
            return
        write_submission(
            self.root,
            self.split,
            self.checkpoint,
            self.segmenter,
            self.output,
            competition=self.competition,
            evaluation=self.eval,
            runtime=self.runtime,
            threads=self.threads,
        )
