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
from cosa_kernels import cam_pseudo_labels
from torch import Tensor
from tqdm import tqdm

from cosa_fast.config import EvalConfig, RuntimeConfig
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import Masks, load_masks, read_mask
from cosa_fast.data.store import Pixels, PseudoLabels
from cosa_fast.figures import PanelRow, write_panel
from cosa_fast.files import write_atomically
from cosa_fast.inference import (
    chunks,
    label_map,
    normalise,
    predict,
    predict_segmenter,
    prefetch,
    read_rgb,
    resize,
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


@dataclass(frozen=True, slots=True)
class Score:
    """The confusion matrix of one system on one split."""

    split: str
    """An evaluation split, or `<training split> (store)` for what the store holds."""
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
        f"{dataset.name} {dataset.eval_splits[0]}",
        f"{len(rows)} images at even distances; CAMs use their labels, the predictions of CoSA"
        f"{' and CoSA-MS' if standalone else ''} do not",
        "Synthetic images: comparable with nothing on PASCAL VOC" if dataset.synthetic else None,
    )
    write_atomically(csv, _table(dataset, scores).encode())
    write_atomically(output, text.encode())
    log.info("%s\n%s", output, text)


def _score_split(systems: Systems, split: str, rows: list[PanelRow] | None) -> list[Score]:
    """Score everything on one split; fills `rows` of the panel unless it is None."""
    images = systems.dataset.splits[split]
    labels = torch.from_numpy(systems.dataset.multi_hot(images)).to(systems.machine.device)
    shown = set(np.linspace(0, len(images) - 1, systems.config.panel_images).round().tolist())
    totals: dict[tuple[str, str], Tensor] = {}
    progress = tqdm(total=len(images), desc=f"evaluate {split}", unit="image", disable=None)
    position = 0
    for batch in chunks(_samples(systems, split), systems.config.batch_size):
        present = labels[position : position + len(batch)]
        for sample, maps, cam in _predict_batch(systems, batch, present):
            truth = sample.truth.to(systems.machine.device)
            for key, values in maps.items():
                confusion = confusion_matrix(truth, values, len(systems.dataset.classes) + 1)
                totals[key] = totals[key] + confusion if key in totals else confusion
            if rows is not None and position in shown:
                rows.append(_panel_row(sample, maps, cam))
            position += 1
        progress.update(len(batch))
    progress.close()
    return [Score(split, system, setting, total.cpu()) for (system, setting), total in totals.items()]


def _samples(systems: Systems, split: str) -> Iterator[Sample]:
    def load(image: Image) -> Sample:
        picture = read_rgb(systems.dataset, image)
        mask = read_mask(systems.masks.path(split, image.id), (image.width, image.height))
        return Sample(image, square(picture, systems.config.size), to_tensor(picture), torch.from_numpy(mask))

    images = systems.dataset.splits[split]
    return prefetch(load, images, systems.threads, ahead=2 * systems.config.batch_size)


def _predict_batch(
    systems: Systems, batch: Sequence[Sample], present: Tensor
) -> Iterator[tuple[Sample, dict[tuple[str, str], Tensor], Tensor]]:
    """Per image: (H, W) class maps by (system, setting), and the (H, W) largest CAM."""
    config, machine, cosa = systems.config, systems.machine, systems.cosa
    squares = normalise(torch.stack([sample.square for sample in batch]), cosa.mean, cosa.std, machine.device)
    prediction = predict(cosa.net, squares, present, config.scales, config.flip, machine)
    standalone = _predict_standalone(systems, batch)
    for slot, sample in enumerate(batch):
        size = (sample.image.height, sample.image.width)
        scores = {COSA: resize(prediction.seg[slot], size)}
        if standalone:
            scores[COSA_MS] = standalone[slot]
        maps = {(system, FREE): label_map(values) for system, values in scores.items()}
        maps |= {(system, FILTERED): label_map(values, present[slot]) for system, values in scores.items()}
        cams = resize(prediction.cams[slot], size)
        maps[CAM, FILTERED] = cam_pseudo_labels(cams[None], systems.threshold)[0][0]
        yield sample, maps, cams.amax(dim=0)


def _predict_standalone(systems: Systems, batch: Sequence[Sample]) -> list[Tensor]:
    """CoSA-MS's (K, H, W) probabilities of each image, images of one size together; empty without CoSA-MS."""
    if systems.segmenter is None:
        return []
    network, config, machine = systems.segmenter, systems.config, systems.machine
    results: dict[int, Tensor] = {}
    sizes = [tuple(sample.pixels.shape) for sample in batch]
    for size in dict.fromkeys(sizes):
        slots = [slot for slot, other in enumerate(sizes) if other == size]
        pixels = torch.stack([batch[slot].pixels for slot in slots])
        images = normalise(pixels, network.mean, network.std, machine.device)
        results |= zip(slots, predict_segmenter(network.net, images, config.scales, config.flip, machine), strict=True)
    return [results[slot] for slot in range(len(batch))]


def _panel_row(sample: Sample, maps: dict[tuple[str, str], Tensor], cam: Tensor) -> PanelRow:
    columns = {"CAM pseudo-label": maps[CAM, FILTERED], COSA: maps[COSA, FREE]}
    if (COSA_MS, FREE) in maps:
        columns[COSA_MS] = maps[COSA_MS, FREE]
    columns["truth"] = sample.truth
    return PanelRow(
        id=sample.image.id,
        labels=sample.image.labels,
        image=sample.pixels.permute(1, 2, 0).numpy(),
        cam=cam.cpu().numpy(),
        maps={title: values.cpu().numpy() for title, values in columns.items()},
    )


def _score_store(systems: Systems, store: PseudoLabels) -> list[Score]:
    """Score the stored pseudo-labels against the training masks, which nothing else looks at."""
    split, images = systems.dataset.train_split, systems.dataset.train

    def load(position: int) -> tuple[Pixels, Pixels, Pixels]:
        image = images[position]
        truth = read_mask(systems.masks.path(split, image.id), (image.width, image.height))
        return truth, store.labels(position), store.segmentation(position)

    classes = len(systems.dataset.classes) + 1
    cam = seg = torch.zeros(classes, classes + 1, dtype=torch.int64)
    loaded = prefetch(load, range(len(images)), systems.threads, ahead=4 * systems.threads)
    for maps in tqdm(loaded, total=len(images), desc=f"score store {split}", unit="image", disable=None):
        truth, labels, segmentation = (torch.tensor(values) for values in maps)
        cam = cam + confusion_matrix(truth, labels, classes)
        seg = seg + confusion_matrix(truth, segmentation, classes)
    return [Score(f"{split} (store)", COSA, FILTERED, seg), Score(f"{split} (store)", CAM, FILTERED, cam)]


def report(systems: Systems, scores: Sequence[Score], files: dict[str, Path | None]) -> str:
    """The text of the result file; its first line says what data the numbers are of."""
    dataset, cosa, config = systems.dataset, systems.cosa, systems.config
    first = f"{dataset.name} (synthetic; not comparable with PASCAL VOC numbers)" if dataset.synthetic else dataset.name
    oracle = " and masks (oracle guidance)" if cosa.config["cosa"]["guidance"] == "gt" else ""
    splits = [f"{split} ({len(dataset.splits[split])} images)" for split in dataset.eval_splits]
    facts = [
        ("splits", f"{', '.join(splits)}; {len(dataset.classes)} classes and background"),
        ("trained on", f"image-level labels{oracle} of {dataset.train_split} ({len(dataset.train)} images)"),
        ("CoSA", f"{files['checkpoint']} (sha256 {cosa.sha256[:12]}), {cosa.iteration} iterations"),
        ("", f"{config.network} network, {cosa.config['model']['name']}; {_switches(cosa.config['cosa'])}"),
    ]
    if systems.segmenter is not None:
        standalone = systems.segmenter
        setup = standalone.config
        facts += [
            ("CoSA-MS", f"{files['segmenter']} (sha256 {standalone.sha256[:12]}), {setup.iterations} iterations"),
            ("", f"{setup.architecture} with {setup.encoder}, trained on the store {standalone.store['sha256'][:12]}"),
        ]
    if systems.store is not None:
        facts.append(("store", f"{files['store']}, threshold {systems.store.info.threshold:.3f}"))
    facts += [
        ("inference", f"scales {' '.join(map(str, config.scales))}{', mirrored too' if config.flip else ''}, no CRF;"),
        ("", f"CoSA at {config.size}x{config.size} pixels, CoSA-MS at each image's own size"),
        ("CAM threshold", f"{systems.threshold:.3f}"),
    ]
    notes = [
        "label-free: the network alone. Compare other methods' numbers with this column.",
        "label-filtered: only classes of the image's ground-truth labels may be predicted, as in the paper's 76.2 mIoU",
        "on VOC val. CAM pseudo-labels need those labels by definition.",
    ]
    for split, names in _unseen(dataset, scores).items():
        notes.append(f"left out of the mean, neither in the truth nor predicted ({split}): {', '.join(names)}")
    described = [f"{name:<15}{value}" for name, value in facts]
    return "\n".join([first, "", *described, "", *_score_table(scores), "", *notes]) + "\n"


def _score_table(scores: Sequence[Score]) -> list[str]:
    """mIoU in percent: a row per system, a pair of columns per split."""
    percent = {(s.split, s.system, s.setting): f"{100 * mean_iou(s.confusion):.2f}" for s in scores}
    splits = list(dict.fromkeys(score.split for score in scores))
    widths = {FREE: len(FREE) + 3, FILTERED: len(FILTERED) + 2}
    lines = [f"{'mIoU [%]':<19}" + "".join(f"{split:>{sum(widths.values())}}" for split in splits)]
    lines.append(" " * 19 + "".join(f"{setting:>{width}}" for setting, width in widths.items()) * len(splits))
    for system in dict.fromkeys(score.system for score in scores):
        cells = (
            f"{percent.get((split, system, setting), '-'):>{width}}"
            for split in splits
            for setting, width in widths.items()
        )
        lines.append(f"{system:<19}" + "".join(cells))
    return lines


def _switches(cosa: dict[str, Any]) -> str:
    """The parts of CoSA that were on."""
    names = {"swap": "SA", "raw": "RAW", "csc": "CSC", "dynamic_threshold": "DT"}
    parts = [name for key, name in names.items() if cosa[key]]
    off = [name for key, name in names.items() if not cosa[key]]
    return f"guidance {cosa['guidance']}; on: {' '.join(parts) or 'none'}; off: {' '.join(off) or 'none'}"


def _unseen(dataset: Index, scores: Sequence[Score]) -> dict[str, list[str]]:
    """Per split, the classes that a mean leaves out."""
    names = ("background", *dataset.classes)
    found: dict[str, dict[str, None]] = {}
    for score in scores:
        for number in iou_per_class(score.confusion).isnan().nonzero().flatten().tolist():
            found.setdefault(score.split, {})[names[number]] = None
    return {split: list(entries) for split, entries in found.items()}


def _table(dataset: Index, scores: Sequence[Score]) -> str:
    """CSV of IoU in percent; empty for a class that is neither in the truth nor predicted."""
    buffer = io.StringIO()
    writer = csv_format.writer(buffer, lineterminator="\n")
    writer.writerow(["dataset", "split", "system", "setting", "class", "iou"])
    for score in scores:
        values = [*iou_per_class(score.confusion).tolist(), mean_iou(score.confusion)]
        for name, value in zip(("background", *dataset.classes, "mIoU"), values, strict=True):
            cell = "" if value != value else f"{100 * value:.2f}"
            writer.writerow([dataset.name, score.split, score.system, score.setting, name, cell])
    return buffer.getvalue()
