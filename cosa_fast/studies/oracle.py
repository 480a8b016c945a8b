"""Fig. 1: classification and CAM quality during the training, by what guides the CAMs."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies.inputs import NOISE, Inputs
from cosa_fast.studies.needs import ORACLE
from cosa_fast.studies.style import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    draw_curve,
    iterations_axis,
    label_ends,
    mark_start,
    new_figure,
)
from cosa_fast.studies.tables import Row, percent

LOOKS = {
    "gt": ("truth", GREEN),
    "cosa": ("SPL (CoSA)", BLUE),
    "no_gc": ("no guidance", ORANGE),
    "noise": ("random masks", MUTED),
}


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure."""
    runs = {variant: of_seeds[0] for variant, of_seeds in inputs.compare(ORACLE).items()}
    rows: list[Row] = [
        {
            **inputs.identity(record),
            "variant": variant,
            "guidance": LOOKS[variant][0],
            "seed": str(run.seed),
            "network": record.network,
            "iteration": str(record.iteration),
            "mean_average_precision": percent(record.mean_average_precision),
            "cpl_miou": percent(record.miou("cam")),
        }
        for variant, run in runs.items()
        for record in run.curve()
    ]
    reference = runs["cosa"]
    last, start = reference.last(), reference.train.guidance_start
    first = start // 2 if start < last.iteration else 0  # what comes before is high and the same for all
    figure = new_figure(
        "CAMs guided by the truth, by pseudo-labels, by nothing and by noise (Fig. 1)",
        f"Assignment network on {inputs.about_curve(reference)}. One run per curve (seed {reference.seed}): "
        f"{NOISE}." + (f" From iteration {first:,}; the table has all." if first else ""),
        3.0,
    )
    for axes, title, unit, quantity in zip(
        figure.subplots(1, 2),
        ("(a) classification", "(b) CAM pseudo-labels"),
        ("mean average precision [%]", "mIoU [%]"),
        ("mean_average_precision", "cam"),
        strict=True,
    ):
        ends = []
        for variant, run in runs.items():
            name, colour = LOOKS[variant]
            curve = [record for record in run.curve() if record.iteration >= first]
            values = [
                record.mean_average_precision if quantity == "mean_average_precision" else record.miou(quantity)
                for record in curve
            ]
            draw_curve(axes, [record.iteration for record in curve], values, colour)
            ends.append((values[-1], name, colour))
        axes.set_title(title)
        axes.set_ylabel(unit)
        iterations_axis(axes, last.iteration, first)
        mark_start(axes, start, last.iteration, "guidance\nstarts")
        label_ends(axes, ends)
    return rows, figure
