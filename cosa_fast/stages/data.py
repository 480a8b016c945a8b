"""Stages that list a dataset and check it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosa_fast.config import (
    CocoConfig,
    DataConfig,
    MiniVocConfig,
    VocConfig,
)
from cosa_fast.stages.base import Stage


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
