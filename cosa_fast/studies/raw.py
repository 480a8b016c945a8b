"""Fig. 9: what the reliability-based weighting does to the CAM pseudo-labels and their perplexity."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosa_fast.studies.inputs import NOISE, Inputs
from cosa_fast.studies.runs import Run
from cosa_fast.studies.stats import Floats
from cosa_fast.studies.style import (
    BLUE,
    INK,
    ORANGE,
    draw_curve,
    grid,
    iterations_axis,
    label_ends,
    mark_start,
    new_figure,
)
from cosa_fast.studies.tables import Row, fixed

VARIANTS = {"cosa": ("RAW", BLUE), "no_raw": ("no RAW", ORANGE)}
MEASURES = ("iou", "perplexity", "mae")


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure; MAE is `distance_to_ideal`."""
    runs = {variant: of_seeds[0] for variant, of_seeds in inputs.compare(tuple(VARIANTS)).items()}
    images = {variant: image_measures(run) for variant, run in runs.items()}
    rows = [
        _row(inputs, run, run.last().iteration, f"{measure} per image", images[variant][measure])
        for measure in MEASURES
        for variant, run in runs.items()
    ]
    rows += [
        _row(inputs, run, record.iteration, "perplexity of all pixels", np.array([run.mean_perplexity(record)]))
        | {"n": str((record.right + record.wrong).sum()), "q1": "", "median": "", "q3": ""}
        for run in runs.values()
        for record in run.curve()
    ]
    reference = runs["cosa"]
    figure = new_figure(
        "Reliability-based adaptive weighting (Fig. 9)",
        f"CAM pseudo-labels of the assignment network on {inputs.about_curve(reference)}. Boxes: quartiles over "
        "images at the end; diamonds: means. MAE to (1, 0): mean of 1 - IoU and perplexity. One run with "
        f"and one without (seed {reference.seed}): {NOISE}.",
        3.0,
    )
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 2.7))
    for target, measure, title in zip(axes, MEASURES, ("mIoU", "perplexity", "MAE to (1, 0)"), strict=False):
        _draw_boxes(target, title, {variant: images[variant][measure] for variant in VARIANTS})
    _draw_perplexity(axes[3], runs)
    return rows, figure


def image_measures(run: Run) -> dict[str, Floats]:
    """Per image of the last validation: IoU in [0, 1], perplexity, and their distance to the ideal.

    Images without any pixel of known truth are left out.

    Raises:
        ValueError: the last validation has no values per image.
    """
    images = run.last().per_image
    if images is None:
        raise ValueError(
            f"the last line of {run.path} has no per_image values: delete it and its checkpoint, then run "
            "snakemake again"
        )
    known = ~np.isnan(images[0])
    iou, perplexity = images[0][known] / 100, images[1][known]
    return {"iou": iou, "perplexity": perplexity, "mae": distance_to_ideal(iou, perplexity)}


def distance_to_ideal(iou: Floats, perplexity: Floats) -> Floats:
    """Mean absolute error of the point (IoU, perplexity) to (1, 0)."""
    return (np.abs(iou - 1.0) + np.abs(perplexity)) / 2.0


def _row(inputs: Inputs, run: Run, iteration: int, quantity: str, values: Floats) -> dict[str, str]:
    quartiles = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return {
        **inputs.identity(run.last()),
        "variant": run.variant,
        "seed": str(run.seed),
        "network": "assignment",
        "iteration": str(iteration),
        "quantity": quantity,
        "n": str(len(values)),
        "mean": fixed(float(values.mean()), 4),
        **{name: fixed(value, 4) for name, value in zip(("q1", "median", "q3"), quartiles, strict=True)},
    }


def _draw_boxes(axes: Axes, title: str, values: dict[str, Floats]) -> None:
    boxes = axes.boxplot(
        list(values.values()),
        tick_labels=[VARIANTS[variant][0] for variant in values],
        widths=0.55,
        patch_artist=True,
        showmeans=True,
        flierprops={"marker": "o", "markersize": 2.5, "markeredgewidth": 0.6},
        medianprops={"color": INK, "linewidth": 1.4},
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "white", "markeredgecolor": INK},
    )
    for box, variant in zip(boxes["boxes"], values, strict=True):
        box.set(facecolor=VARIANTS[variant][1], alpha=0.55, linewidth=0.8)
    axes.set_title(title)
    axes.tick_params(axis="x", length=0)
    grid(axes)


def _draw_perplexity(axes: Axes, runs: dict[str, Run]) -> None:
    ends = []
    for variant, run in runs.items():
        name, colour = VARIANTS[variant]
        values = [run.mean_perplexity(record) for record in run.curve()]
        draw_curve(axes, [record.iteration for record in run.curve()], values, colour)
        ends.append((values[-1], name, colour))
    last = runs["cosa"].last().iteration
    axes.set_title("mean perplexity of the pixels")
    iterations_axis(axes, last)
    mark_start(axes, runs["cosa"].train.c2s_start, last, "RAW\nstarts")
    label_ends(axes, ends)
