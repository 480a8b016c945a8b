"""The learning curves, from the logs of the training and of the validations during it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cosa_fast.report.charts import Line, Mark, line_chart
from cosa_fast.report.markup import Html, Missing, Section, element, join
from cosa_fast.report.sources import read_records

CHARTS = (
    ("Loss, total (Eq. 11)", {"loss": "loss"}),
    ("Classification loss", {"cls": "main", "cls_aux": "auxiliary"}),
    ("CAM to segmentation (RAW, Eq. 5)", {"c2s": "main", "c2s_aux": "auxiliary"}),
    ("Segmentation to CAM (Eq. 8)", {"s2c": "seg to CAM"}),
    ("Contrastive separation (CSC, Eq. 10)", {"csc": "CSC"}),
    ("CAM threshold ξ (Eq. 6)", {"threshold": "ξ"}),
    ("Seconds per iteration", {"seconds_per_iteration": "seconds"}),
    ("Share of the time spent waiting for the loader", {"waiting": "share"}),
)
"""Title, and the logged keys with the names of their curves."""

VALIDATIONS = (
    ("Segmentation, label-free: mIoU in %", "seg_free"),
    ("Segmentation, label-filtered: mIoU in %", "seg_filtered"),
    ("CAM pseudo-labels: mIoU in %", "cam"),
    ("Auxiliary CAM pseudo-labels: mIoU in %", "aux_cam"),
)
MARKS = (
    "Dotted lines: the CAM-to-segmentation loss starts (C2S), then Seg2CAM, CSC and the dynamic threshold (guidance)."
)
NETWORKS = ("assignment", "online")
TITLES = {"cosa": "CoSA", "segmenter": "CoSA-MS"}
"""Names of the runs by the stem of their files."""


def learning_curves(results: Path, config: Mapping[str, Any], how: str) -> Section | Missing:
    """Charts of every `*.metrics.jsonl` and `*.validation.jsonl`.

    Raises:
        ValueError: a file is damaged.
    """
    runs = sorted(path.name.removesuffix(".metrics.jsonl") for path in results.glob("*.metrics.jsonl"))
    if not runs:
        return Missing("learning curves", how)
    marks = starts(config)
    parts = [element("p", "By iteration; the number in a legend is the curve's last value.", class_="muted")]
    if marks:
        parts.append(element("p", MARKS, class_="muted"))
    for run in runs:
        fix = f"make it again with `cosa-fast {'multistage' if run == 'segmenter' else 'train'}`"
        path = results / f"{run}.metrics.jsonl"
        parts.append(element("h3", TITLES.get(run, run)))
        parts.append(_training(path, read_records(path, fix), marks if run == "cosa" else [], fix))
        path = results / f"{run}.validation.jsonl"
        if path.exists() and path.stat().st_size:  # empty if the training was not validated
            parts.append(_validation(path, read_records(path, fix), marks if run == "cosa" else [], fix))
    return Section("curves", "Learning curves", join(*parts))


def starts(config: Mapping[str, Any]) -> list[Mark]:
    """Where parts of the loss start, from the checkpoint's configuration."""
    train = config.get("train", {})
    names = {"c2s_start": "C2S", "guidance_start": "guidance"}
    return [Mark(train[key], name) for key, name in names.items() if isinstance(train.get(key), int)]


def has_validation(results: Path) -> bool:
    """Whether anything was validated during a training."""
    return any(path.stat().st_size for path in results.glob("*.validation.jsonl"))


def _training(path: Path, records: Sequence[dict[str, Any]], marks: Sequence[Mark], fix: str) -> Html:
    known = {key for _, keys in CHARTS for key in keys}
    others = dict.fromkeys(key for record in records for key in record if key not in known and key != "iteration")
    end = records[-1]["iteration"]
    charts = []
    for title, keys in [*CHARTS, *((key, {key: key}) for key in others)]:
        lines = [Line(name, _points(path, records, key, fix)) for key, name in keys.items()]
        if shown := [line for line in lines if line.points]:
            charts.append(line_chart(title, shown, marks, right=end))
    return element("div", *charts, class_="charts")


def _validation(path: Path, records: Sequence[dict[str, Any]], marks: Sequence[Mark], fix: str) -> Html:
    end = max(record["iteration"] for record in records)
    charts = []
    for title, key in VALIDATIONS:
        lines = [
            Line(
                network,
                [
                    (record["iteration"], value)
                    for record in records
                    if record.get("network") == network and (value := _mean_iou(path, record, key, fix)) is not None
                ],
            )
            for network in NETWORKS
        ]
        if shown := [line for line in lines if line.points]:
            charts.append(line_chart(title, shown, marks, right=end))
    first = records[0]
    where = f"Validated on {first.get('images', '?')} images of {first.get('split', '?')} during the training; "
    note = element("p", where, "the assignment network is the moving average of the online one.", class_="muted")
    return join(note, element("div", *charts, class_="charts"))


def _points(path: Path, records: Sequence[dict[str, Any]], key: str, fix: str) -> list[tuple[float, float]]:
    """(iteration, value) where the key was logged; a value that is not finite is left out."""
    points = []
    for record in records:
        value = record.get(key)
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {key} of iteration {record['iteration']} is {value!r}, no number: {fix}")
        if math.isfinite(value):
            points.append((float(record["iteration"]), float(value)))
    return points


def _mean_iou(path: Path, record: Mapping[str, Any], key: str, fix: str) -> float | None:
    """mIoU in percent from pixel counts; classes in neither truth nor prediction are left out, as VOC does."""
    if key not in record:
        return None
    try:
        counts = [record[key][part] for part in ("hits", "truth", "predicted")]
        pairs = [(hits, truth + predicted - hits) for hits, truth, predicted in zip(*counts, strict=True)]
        ious = [hits / union for hits, union in pairs if union]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {key} of iteration {record['iteration']} has no pixel counts: {fix}") from None
    return 100 * sum(ious) / len(ious) if ious else None
