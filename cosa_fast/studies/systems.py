"""Table 1: CoSA, CoSA with CRF and CoSA-MS on the evaluation splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.dots import Panel, Rows, dot_figure
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.runs import Kind, checkpoint_metadata
from cosa_fast.studies.stats import summarise
from cosa_fast.studies.style import BLUE, ORANGE
from cosa_fast.studies.tables import Row, percent

SETTINGS = {"label-free": BLUE, "label-filtered": ORANGE}
SIGNS = {"R101": "resnet101", "WR38": "resnet38", "SWIN": "swin"}
"""The paper's networks of CoSA-MS and what ours have in their names."""
PUBLISHED = {("val", "label-filtered"): "voc_val", ("test", "label-free"): "voc_test"}
"""What the paper's numbers are of: the labels of VOC test are not available (footnote 3)."""
COLUMNS = {"paper\nVOC val": "voc_val", "paper\nVOC test": "voc_test", "paper\nCOCO": "coco_val"}


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table: a network, with or without CRF, of which we have results or only the paper has."""

    name: str
    network: str
    """Ours, or one of the paper's that we have not trained."""
    known: str | None
    """The same as the paper names it; None: the paper has no such network."""
    crf: str
    """none, release or standard."""
    table: str | None
    """The table that holds our results; None: we have none."""

    @property
    def column(self) -> str:
        """Its name in that table."""
        return self.name if self.crf == "none" else f"{self.name} + CRF"

    @property
    def published(self) -> paper.SystemResult | None:
        """The row of the paper."""
        return None if self.known is None else paper.SYSTEMS.get((self.column, self.known))


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure."""
    tables = {name: inputs.table(name) for name in ("main", "crf_release", "crf_standard")}
    systems = list(_systems(inputs))
    splits = inputs.index.eval_splits
    scores = {
        (system, split, setting): tables[system.table].get(split, system.column, setting)
        for system in systems
        if system.table
        for split in splits
        for setting in SETTINGS
    }
    rows = [
        _row(inputs, system, split, setting, scores.get((system, split, setting)))
        for system in systems
        for split in splits
        for setting in SETTINGS
        if system.table or (split, setting) in PUBLISHED
    ]
    panels = [
        Panel(
            split,
            {
                setting: [summarise([scores[system, split, setting]]) if system.table else None for system in systems]
                for setting in SETTINGS
            },
        )
        for split in splits[:2]
    ]
    published = [system.published for system in systems]
    columns = {
        header: [f"{getattr(known, field):.1f}" if known else "" for known in published]
        for header, field in COLUMNS.items()
    }
    figure = dot_figure(
        "Segmentation of CoSA and CoSA-MS (Table 1)",
        f"mIoU [%] on {inputs.dataset}. The paper's val numbers are label-filtered, its test numbers label-free. CRF: "
        "the release's, or the usual one of 10 iterations. Rows without dots: networks that were not trained here.",
        Rows([_label(system) for system in systems], columns=columns),
        panels,
        SETTINGS,
        "mIoU [%]",
    )
    return rows, figure


def _systems(inputs: Inputs) -> Iterator[System]:
    """Our rows and those that only the paper has."""
    encoder = _metadata(inputs, "cosa")["config"]["model"]["name"]
    segmenter = _metadata(inputs, "segmenter")["config"]
    network = f"{segmenter['architecture']} {segmenter['encoder']}"
    known = next((name for name, sign in SIGNS.items() if sign in network.lower()), None)
    for system, ours, theirs in (("CoSA", encoder, "ViT-B"), ("CoSA-MS", network, known)):
        yield System(system, ours, theirs, "none", "main")
        yield System(system, ours, theirs, "release", "crf_release")
        yield System(system, ours, theirs, "standard", "crf_standard")
    for system, theirs in paper.SYSTEMS:
        if system == "CoSA-MS" and theirs != known:
            yield System(system, theirs, theirs, "none", None)


def _metadata(inputs: Inputs, name: Kind) -> dict[str, Any]:
    """What the checkpoint of this name says of itself."""
    if name not in inputs.checkpoints:
        raise ValueError(f"this study needs the checkpoint {name!r}: give --checkpoint {name}:PATH")
    path = inputs.checkpoints[name]
    return checkpoint_metadata(path, name, f"make it with `snakemake --cores all {path}`")


def _label(system: System) -> str:
    crf = {"none": f", {system.network}", "release": " + CRF", "standard": " + CRF, 10 iterations"}[system.crf]
    return f"{system.name}{crf}"


def _row(inputs: Inputs, system: System, split: str, setting: str, miou: float | None) -> Row:
    known = system.published
    field = PUBLISHED.get((split, setting))
    voc = getattr(known, field) if known and field else None
    coco = known.coco_val if known and (split, setting) == ("val", "label-filtered") else None
    notes = []
    if system.table is None:
        notes.append("not trained here")
    elif voc is not None:
        crf = ", the release's CRF" if system.crf == "standard" else ""
        notes.append(inputs.paper_note(f"{system.known}, VOC 2012 {split}{crf}", f"{split}, {setting}"))
    return {
        "dataset": inputs.dataset,
        "split": split,
        "system": system.name,
        "network": system.network,
        "crf": system.crf,
        "setting": setting,
        "miou": percent(miou),
        "paper_voc": percent(voc),
        "paper_coco": percent(coco),
        "note": "; ".join(notes),
    }
