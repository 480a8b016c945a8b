"""The `evaluate` stage: mIoU of CoSA, CoSA-MS and the pseudo-labels, with and without the image-level labels."""

from __future__ import annotations

import csv as csv_format
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cosa_kernels import cam_pseudo_labels
from torch import Tensor
from tqdm import tqdm

from cosa_fast.config import EvalConfig, RuntimeConfig
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import Masks, load_masks, read_mask
from cosa_fast.data.store import PseudoLabels
from cosa_fast.figures import PanelRow, write_panel
from cosa_fast.files import write_atomically
from cosa_fast.inference import (
    chunks,
    label_maps,
    normalise,
    predict,
    predict_segmenter,
    prefetch,
    read_rgb,
    square,
    to_tensor,
)
from cosa_fast.metrics import confusion_matrix, iou_per_class, mean_iou
from cosa_fast.models.checkpoint import CosaCheckpoint, load_cosa
from cosa_fast.models.segmenter import SegmenterCheckpoint, load_segmenter
from cosa_fast.pseudo_labels import require_same_classes
from cosa_fast.runtime import Runtime, resolve

log = logging.getLogger(__name__)

FREE, FILTERED = "label-free", "label-filtered"
COSA, COSA_MS, CAM = "CoSA", "CoSA-MS", "CAM pseudo-labels"
STORED_CAM, STORED_SEG = "stored CAM pseudo-labels", "stored CoSA segmentation"


@dataclass(frozen=True, slots=True)
class Score:
    """The confusion matrix of one system on one split."""

    split: str
    system: str
    setting: str
    """label-free or label-filtered."""
    confusion: Tensor
    """(K, K + 1) int64, see `cosa_fast.metrics`."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of an evaluation split, loaded."""

    image: Image
    square: Tensor
    """(3, S, S) uint8, CoSA's input."""
    pixels: Tensor
    """(3, H, W) uint8, CoSA-MS's input."""
    truth: Tensor
    """(H, W) uint8."""


@dataclass(frozen=True, slots=True)
class Systems:
    """What is evaluated, and on what."""

    dataset: Index
    masks: Masks
    cosa: CosaCheckpoint
    segmenter: SegmenterCheckpoint | None
    store: PseudoLabels | None
    config: EvalConfig
    machine: Runtime
    threads: int

    @property
    def threshold(self) -> float:
        """xi of the CAM pseudo-labels."""
        return self.cosa.threshold if self.config.threshold is None else self.config.threshold


def evaluate(
    index: Path,
    masks: Path,
    checkpoint: Path,
    segmenter: Path | None,
    store: Path | None,
    output: Path,
    csv: Path,
    panel: Path,
    *,
    evaluation: EvalConfig,
    runtime: RuntimeConfig,
    threads: int,
) -> None:
    """Score everything on every evaluation split, and the store on the training split if that has masks.

    Args:
        index: the dataset index.
        masks: its list of masks.
        checkpoint: CoSA's, of the `train` stage.
        segmenter: CoSA-MS's, of the `multistage` stage.
        store: pseudo-labels of the training split.
        output: text file: what was evaluated and its mIoU.
        csv: IoU per split, system, setting and class.
        panel: PNG of a few images of the first split, evenly spaced through it.

    Raises:
        ValueError: a split has no masks, a file is not of this index, or the disk is full.
    """
    machine = resolve(runtime, threads)
    dataset = Index.load(index)
    truth = load_masks(masks, index)
    if not dataset.eval_splits:
        raise ValueError(f"{index} has no evaluation split: name one in eval_splits and make the index again")
    for split in dataset.eval_splits:
        if not truth.has(split):
            raise ValueError(
                f"{masks} has no masks for the split {split!r}: evaluation needs one for each image; add them and run "
                "`cosa-fast data masks` again, or take the split out of eval_splits"
            )
    cosa = load_cosa(checkpoint, evaluation.network, machine.device)
    require_same_classes(cosa.classes, checkpoint, dataset, index)
    standalone = labels = None
    if segmenter is not None:
        standalone = load_segmenter(segmenter, machine.device)
        require_same_classes(standalone.classes, segmenter, dataset, index)
    if store is not None:
        labels = PseudoLabels(store)
        labels.require_match(dataset)
    systems = Systems(dataset, truth, cosa, standalone, labels, evaluation, machine, threads)
    scores: list[Score] = []
    rows: list[PanelRow] = []
    for split in dataset.eval_splits:
        scores += _score_split(systems, split, None if rows else rows)
    if labels is not None and truth.has(dataset.train_split):
        scores += _score_store(systems, labels)
    text = report(systems, scores, {"checkpoint": checkpoint, "segmenter": segmenter, "store": store})
    write_panel(
        panel,
        rows,
        dataset.classes,
        f"{dataset.name} {dataset.eval_splits[0]}: CoSA, {cosa.iteration} iterations",
        "Synthetic images; nothing here says anything about PASCAL VOC" if dataset.synthetic else None,
    )
    write_atomically(csv, _table(dataset, scores).encode())
    write_atomically(output, text.encode())
    log.info("%s\n%s", output, text)
