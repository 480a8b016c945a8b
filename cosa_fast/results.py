"""What `evaluate` writes down: the scores, as a text that says what was measured and how, and as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cosa_fast.config import EvalConfig
from cosa_fast.crf import CRF_PRESETS
from cosa_fast.data.index import Index
from cosa_fast.metrics import iou_per_class, mean_iou
from cosa_fast.systems import FILTERED, FREE, ORDER, Systems


@dataclass(frozen=True, slots=True)
class Score:
    """The confusion matrix of one system on one split."""

    split: str
    """A split of the index, or `<training split> (store)` for what the store holds."""
    system: str
    setting: str
    """label-free or label-filtered."""
    confusion: Tensor
    """(K, K + 1) int64, see `cosa_fast.metrics`."""


def report(
    systems: Systems,
    splits: Sequence[str],
    scores: Sequence[Score],
    files: dict[str, Path | None],
    remarks: Sequence[str],
) -> str:
    """The text of the result file; its first line says what data the numbers are of.

    Args:
        files: where `checkpoint`, `segmenter` and `store` are.
        remarks: what a reader has to know of these files.
    """
    dataset, cosa, config = systems.dataset, systems.cosa, systems.config
    first = f"{dataset.name} (synthetic; not comparable with PASCAL VOC numbers)" if dataset.synthetic else dataset.name
    oracle = " and masks (oracle guidance)" if cosa.config["cosa"]["guidance"] == "gt" else ""
    sizes = [f"{split} ({len(dataset.splits[split])} images)" for split in splits]
    facts = [
        ("splits", f"{', '.join(sizes)}; {len(dataset.classes)} classes and background"),
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
    views = f"scales {' '.join(map(str, config.scales))}{', mirrored too' if config.flip else ''}"
    main, aux, ensemble = systems.thresholds.values()
    facts += [
        ("inference", f"{views}, {_crf(config)};"),
        ("", f"CoSA at {config.size}x{config.size} pixels, CoSA-MS at each image's own size"),
        ("CAM threshold", f"{main:.3f}, auxiliary {aux:.3f}, ensemble {ensemble:.3f}"),
    ]
    notes = [
        *(f"Attention: {remark}." for remark in remarks),
        "label-free: the network alone. Compare other methods' numbers with this column.",
        "label-filtered: only classes of the image's ground-truth labels may be predicted, as in the paper's 76.2 mIoU",
        "on VOC val. CAM pseudo-labels need those labels by definition.",
    ]
    for split, names in _unseen(dataset, scores).items():
        notes.append(f"left out of the mean, neither in the truth nor predicted ({split}): {', '.join(names)}")
    described = [f"{name:<15}{value}" for name, value in facts]
    return "\n".join([first, "", *described, "", *_score_table(scores), "", *notes]) + "\n"


def _crf(config: EvalConfig) -> str:
    if config.crf == "none":
        return "no CRF"
    values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(CRF_PRESETS[config.crf]).items())
    return f"no CRF but in the rows that say so:\n{'':<15}{config.crf} ({values})"


def _score_table(scores: Sequence[Score]) -> list[str]:
    """mIoU in percent: a row per system, a pair of columns per split."""
    percent = {(s.split, s.system, s.setting): f"{100 * mean_iou(s.confusion):.2f}" for s in scores}
    splits = list(dict.fromkeys(score.split for score in scores))
    systems = [system for system in ORDER if any(score.system == system for score in scores)]
    head = 2 + max(map(len, systems))
    widths = {FREE: len(FREE) + 3, FILTERED: len(FILTERED) + 2}
    lines = [f"{'mIoU [%]':<{head}}" + "".join(f"{split:>{sum(widths.values())}}" for split in splits)]
    lines.append(" " * head + "".join(f"{setting:>{width}}" for setting, width in widths.items()) * len(splits))
    for system in systems:
        cells = (
            f"{percent.get((split, system, setting), '-'):>{width}}"
            for split in splits
            for setting, width in widths.items()
        )
        lines.append(f"{system:<{head}}" + "".join(cells))
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


def table(dataset: Index, scores: Sequence[Score]) -> str:
    """CSV of IoU in percent; empty for a class that is neither in the truth nor predicted."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["dataset", "split", "system", "setting", "class", "iou"])
    for score in scores:
        values = [*iou_per_class(score.confusion).tolist(), mean_iou(score.confusion)]
        for name, value in zip(("background", *dataset.classes, "mIoU"), values, strict=True):
            cell = "" if value != value else f"{100 * value:.2f}"
            writer.writerow([dataset.name, score.split, score.system, score.setting, name, cell])
    return buffer.getvalue()
