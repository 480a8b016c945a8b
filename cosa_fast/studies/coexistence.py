"""Table 4b: CAM pseudo-labels of the classes that coexist with a context, with and without contrastive separation."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.dots import Panel, Rows, about_seeds, dot_figure
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import COEXISTENCE
from cosa_fast.studies.runs import Validation
from cosa_fast.studies.stats import mean_iou, paired_difference, summarise
from cosa_fast.studies.style import BLUE
from cosa_fast.studies.tables import Row, percent, signed

LABELS = {"no_csc": "without CSC", "cosa": "with CSC (CoSA)"}


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure; the difference is that of CSC, seed by seed."""
    runs = inputs.compare(COEXISTENCE)
    classes = inputs.studies.coexisting
    seeds = " ".join(str(run.seed) for run in runs["cosa"])
    rows: list[Row] = []
    panels = []
    for position, quantity in enumerate(("C-mIoU", "mIoU")):
        values = {
            variant: [
                c_miou(run.last(), classes) if quantity == "C-mIoU" else run.last().miou("cam") for run in of_seeds
            ]
            for variant, of_seeds in runs.items()
        }
        effect = paired_difference(values["cosa"], values["no_csc"])
        means = {variant: summarise(of_seeds) for variant, of_seeds in values.items()}
        panels.append(Panel(f"{quantity} (CSC: {effect.mean:+.1f})", {"": [means[variant] for variant in COEXISTENCE]}))
        for variant, mean in means.items():
            rows.append(
                {
                    **inputs.identity(runs["cosa"][0].last()),
                    "method": LABELS[variant],
                    "quantity": quantity,
                    "classes": " ".join(classes) if quantity == "C-mIoU" else "all, with background",
                    "n": str(len(mean.values)),
                    "seeds": seeds,
                    "values": " ".join(percent(value) for value in mean.values),
                    "cpl": percent(mean.mean),
                    "cpl_ci95": percent(mean.half),
                    "difference": signed(effect.mean) if variant == "cosa" else "",
                    "difference_ci95": percent(effect.half) if variant == "cosa" else "",
                    "paper_voc": percent(paper.COEXISTENCE[variant][position]),
                    "note": inputs.paper_note("VOC 2012 val, classes not listed", runs["cosa"][0].last().split),
                }
            )
        rows += [
            {
                **dict.fromkeys(rows[0], ""),
                "method": method,
                "quantity": quantity,
                "paper_voc": percent(known[position]),
                "note": "only in the paper",
            }
            for method, known in paper.COEXISTENCE.items()
            if method not in LABELS
        ]
    figure = dot_figure(
        "Coexisting classes with and without contrastive separation (Table 4b)",
        f"IoU [%] of the CAM pseudo-labels of the assignment network on {inputs.about(runs['cosa'][0].last())}. "
        f"C-mIoU: mean over {', '.join(classes)}. {about_seeds([run.seed for run in runs['cosa']])}",
        Rows(
            list(LABELS.values()),
            columns={
                "paper, VOC\nC-mIoU": [percent(paper.COEXISTENCE[variant].first) for variant in COEXISTENCE],
                "paper, VOC\nmIoU": [percent(paper.COEXISTENCE[variant].second) for variant in COEXISTENCE],
            },
        ),
        panels,
        {"": BLUE},
        "mIoU [%]",
    )
    return rows, figure


def c_miou(record: Validation, classes: Sequence[str]) -> float:
    """C-mIoU in percent: the mean IoU of the CAM pseudo-labels over the coexisting classes that occur.

    Raises:
        ValueError: a class is not of the dataset.
    """
    unknown = [name for name in classes if name not in record.classes]
    if unknown or not classes:
        raise ValueError(
            f"studies.coexisting names {', '.join(unknown) or 'no class'}: give classes of the dataset, out of "
            f"{', '.join(record.classes[1:])}"
        )
    return mean_iou(record.iou["cam"][[record.classes.index(name) for name in classes]])
