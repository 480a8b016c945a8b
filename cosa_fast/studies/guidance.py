"""Table 4a: what guides the CAMs, and which gradient of the guidance matters."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.dots import Panel, Rows, dot_figure
from cosa_fast.studies.inputs import NOISE, ONE_RUN, Inputs
from cosa_fast.studies.needs import GUIDANCE
from cosa_fast.studies.stats import summarise
from cosa_fast.studies.style import BLUE
from cosa_fast.studies.tables import Row, percent, signed

DESCRIPTIONS = (
    ("truth", "none", "truth (oracle)"),
    ("no guidance", "-", "no guidance"),
    ("SPL", "features", "SPL, features detached"),
    ("SPL", "classifier weights", "SPL, weights detached"),
    ("SPL", "none", "SPL (CoSA)"),
)
"""Source, what the gradient is stopped at, and the label, of each of `GUIDANCE`."""


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure."""
    runs = {variant: of_seeds[0] for variant, of_seeds in inputs.compare(GUIDANCE).items()}
    values = {variant: run.last().miou("cam") for variant, run in runs.items()}
    record, seed = runs["cosa"].last(), runs["cosa"].seed
    rows: list[Row] = [
        {
            **inputs.identity(record),
            "variant": variant,
            "source": source,
            "detached": detached,
            "seed": str(seed),
            "cpl_miou": percent(values[variant]),
            "difference_to_no_guidance": "" if variant == "no_gc" else signed(values[variant] - values["no_gc"]),
            "paper_voc_train": percent(paper.GUIDANCE[variant].first),
            "paper_voc_val": percent(paper.GUIDANCE[variant].second),
            "note": f"{inputs.paper_note('VOC 2012', record.split)}; {ONE_RUN}",
        }
        for variant, (source, detached, _) in zip(GUIDANCE, DESCRIPTIONS, strict=True)
    ]
    figure = dot_figure(
        "What guides the CAMs (Table 4a)",
        f"mIoU [%] of the CAM pseudo-labels of the assignment network on {inputs.about(record)}, at the end of the "
        f"training. SPL: segmentation pseudo-labels. One run per row (seed {seed}): {NOISE}.",
        Rows(
            [label for _, _, label in DESCRIPTIONS],
            columns={
                "paper\nVOC train": [percent(paper.GUIDANCE[variant].first) for variant in GUIDANCE],
                "paper\nVOC val": [percent(paper.GUIDANCE[variant].second) for variant in GUIDANCE],
            },
        ),
        [Panel(record.split, {"": [summarise([values[variant]]) for variant in GUIDANCE]})],
        {"": BLUE},
        "mIoU [%]",
    )
    return rows, figure
