"""Tables 3a and 3b: rows of CoSA's parts over seeds, each with its difference to one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from cosa_fast.config import CosaConfig
from cosa_fast.studies import paper
from cosa_fast.studies.dots import Panel, Rows, about_seeds, dot_figure
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.runs import Run
from cosa_fast.studies.stats import Summary, paired_difference, summarise
from cosa_fast.studies.style import BLUE
from cosa_fast.studies.tables import Row, percent, signed

QUANTITIES = {
    "seg_filtered": "segmentation, label-filtered",
    "seg_free": "segmentation, label-free",
    "cam": "CAM pseudo-labels",
}


def parts(cosa: CosaConfig) -> tuple[bool, ...]:
    """Which of `paper.PARTS` a run has on."""
    return (cosa.guidance != "none", cosa.swap, cosa.raw, cosa.csc, cosa.dynamic_threshold)


def ablation(
    inputs: Inputs, labels: Mapping[str, str], reference: str, published: Mapping[str, paper.Both], title: str
) -> tuple[list[Row], Figure]:
    """The table and the figure.

    Args:
        labels: variants in the order of the rows, with their names in the figure.
        reference: the variant that differences are to.
        published: the paper's mIoU of each variant.
    """
    runs = inputs.compare(tuple(labels))
    rows: list[Row] = []
    panels = []
    for quantity, name in QUANTITIES.items():
        values = {variant: [run.last().miou(quantity) for run in runs[variant]] for variant in labels}
        means = {variant: summarise(of_seeds) for variant, of_seeds in values.items()}
        panels.append(Panel(name.replace(", ", ",\n"), {"": list(means.values())}))
        for variant in labels:
            difference = None if variant == reference else paired_difference(values[variant], values[reference])
            rows.append(_row(inputs, runs[variant], name, means[variant], difference, published, reference))
    first = runs[reference][0].last()
    figure = dot_figure(
        title,
        f"mIoU [%] of the assignment network on {inputs.about(first)}, at the end of the training. "
        f"{about_seeds([run.seed for run in runs[reference]])} Paper: VOC and COCO val, label-filtered.",
        Rows(
            labels=list(labels.values()),
            parts=paper.PARTS,
            switches=[parts(runs[variant][0].cosa) for variant in labels],
            columns={
                "paper\nVOC": [f"{published[variant].voc:.2f}" for variant in labels],
                "paper\nCOCO": [f"{published[variant].coco:.2f}" for variant in labels],
            },
        ),
        panels,
        {"": BLUE},
        "mIoU [%]",
    )
    return rows, figure


def _row(
    inputs: Inputs,
    runs: Sequence[Run],
    name: str,
    mean: Summary,
    difference: Summary | None,
    published: Mapping[str, paper.Both],
    reference: str,
) -> Row:
    variant, record = runs[0].variant, runs[0].last()
    known = published[variant] if name == QUANTITIES["seg_filtered"] else None
    base = published[reference]
    return {
        **inputs.identity(record),
        "variant": variant,
        **{part: "yes" if on else "no" for part, on in zip(paper.PARTS, parts(runs[0].cosa), strict=True)},
        "quantity": name,
        "n": str(len(runs)),
        "seeds": " ".join(str(run.seed) for run in runs),
        "values": " ".join(percent(value) for value in mean.values),
        "miou": percent(mean.mean),
        "miou_ci95": percent(mean.half),
        "difference_to": "" if difference is None else reference,
        "difference": signed(difference.mean) if difference else "",
        "difference_ci95": percent(difference.half) if difference else "",
        "paper_voc": percent(known.voc) if known else "",
        "paper_voc_difference": signed(known.voc - base.voc) if known and difference else "",
        "paper_coco": percent(known.coco) if known else "",
        "paper_coco_difference": signed(known.coco - base.coco) if known and difference else "",
        "note": inputs.paper_note("VOC 2012 and COCO 2014 val, label-filtered", f"{record.split}, one run per seed")
        if known
        else "not in the paper's Table 3",
    }
