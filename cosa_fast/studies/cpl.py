"""Table 2: quality of the CAM pseudo-labels of the main CAMs, the auxiliary ones and both together."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.dots import Panel, Rows, dot_figure
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.stats import summarise
from cosa_fast.studies.style import BLUE
from cosa_fast.studies.tables import Row, percent

LABELS = {
    "CAM pseudo-labels": "main CAMs",
    "auxiliary CAM pseudo-labels": "auxiliary CAMs",
    "ensemble CAM pseudo-labels": "mean of both",
}
SETTING = "label-filtered"
"""CAM pseudo-labels need the image-level labels by definition."""


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure; one panel for the training split, one for the first evaluation split."""
    table = inputs.table("cpl")
    splits = {inputs.index.train_split: "train", inputs.index.eval_splits[0]: "val"}
    ours = {split: f"{split}, {len(inputs.index.splits[split]):,} images" for split in splits}
    rows: list[Row] = []
    panels = []
    for split, role in splits.items():
        values = [table.get(split, system, SETTING) for system in LABELS]
        panels.append(Panel(ours[split].replace(", ", ",\n", 1), {"": [summarise([value]) for value in values]}))
        for system, value in zip(LABELS, values, strict=True):
            known = _published(system, role)
            rows.append(
                {
                    "dataset": inputs.dataset,
                    "split": split,
                    "cams": LABELS[system],
                    "setting": SETTING,
                    "miou": percent(value),
                    "paper_voc": percent(known),
                    "note": f"ours: {inputs.dataset}, {ours[split]}; not in the paper"
                    if known is None
                    else inputs.paper_note(f"VOC 2012 {role}, {paper.VOC_IMAGES[role]:,} images", ours[split]),
                }
            )
    columns = {
        f"paper\nVOC {role}": [percent(_published(system, role)) for system in LABELS] for role in splits.values()
    }
    figure = dot_figure(
        "Quality of the CAM pseudo-labels (Table 2)",
        f"mIoU [%] on {inputs.dataset}; the classes of an image come from its image-level labels. Ours: "
        f"{' and '.join(f'{split} ({len(inputs.index.splits[split]):,} images)' for split in splits)}; the paper's: "
        f"{' and '.join(f'VOC {role} ({count:,})' for role, count in paper.VOC_IMAGES.items())}.",
        Rows(list(LABELS.values()), columns=columns),
        panels,
        {"": BLUE},
        "mIoU [%]",
    )
    return rows, figure


def _published(system: str, role: str) -> float | None:
    known = paper.CPL.get(system)
    return None if known is None else known.first if role == "train" else known.second
