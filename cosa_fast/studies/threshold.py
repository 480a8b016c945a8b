"""Fixed thresholds against the dynamic one (Sec. 4.2, "Impact of Dynamic Threshold")."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.inputs import NOISE, ONE_RUN, Inputs
from cosa_fast.studies.needs import needs
from cosa_fast.studies.runs import Run
from cosa_fast.studies.style import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    draw_curve,
    grid,
    iterations_axis,
    label_ends,
    mark_start,
    new_figure,
)
from cosa_fast.studies.tables import Row, fixed, percent

LOOKS = {
    "seg_filtered": ("segmentation,\nlabel-filtered", ORANGE),
    "seg_free": ("segmentation,\nlabel-free", GREEN),
    "cam": ("CAM\npseudo-labels", BLUE),
}


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure; the figure's right part shows the dynamic threshold during the training."""
    runs = {
        variant: of_seeds[0]
        for variant, of_seeds in inputs.compare(needs("threshold", inputs.studies).variants).items()
    }
    dynamic = runs.pop("cosa")
    ordered = sorted(runs.values(), key=lambda run: (run.cosa.threshold, run.variant))
    best = max(ordered, key=lambda run: run.last().miou("seg_filtered"))
    rows = [_row(inputs, run, best) for run in (*ordered, dynamic)]
    last = dynamic.last()
    figure = new_figure(
        "Fixed thresholds and the dynamic one",
        f"Assignment network on {inputs.about(last)}, at the end of the training. Diamonds and dotted lines: dynamic "
        f"threshold, at its last value. One run per threshold (seed {dynamic.seed}): {NOISE}.",
        3.1,
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _draw_quality(left, ordered, dynamic)
    curve = dynamic.curve()
    draw_curve(right, [record.iteration for record in curve], [record.xi for record in curve], BLUE)
    right.set_title("dynamic threshold")
    right.set_ylabel("ξ")
    right.set_ylim(0, 1)
    for limit in dynamic.cosa.threshold_range:
        right.axhline(limit, color=MUTED, linewidth=0.9, linestyle=":")
    right.annotate(
        "allowed range",
        (1.0, dynamic.cosa.threshold_range[1]),
        xycoords=right.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )
    iterations_axis(right, last.iteration)
    mark_start(right, dynamic.train.guidance_start, last.iteration, "fitted\nfrom here")
    return rows, figure


def _draw_quality(axes: Axes, ordered: list[Run], dynamic: Run) -> None:
    by_threshold = {run.cosa.threshold: run for run in ordered}  # the preset's own may be one of those compared
    ends = []
    for quantity, (name, colour) in LOOKS.items():
        values = [run.last().miou(quantity) for run in by_threshold.values()]
        axes.plot(list(by_threshold), values, color=colour, marker="o", markersize=4.5)
        best = dynamic.last().miou(quantity)
        axes.axhline(best, color=colour, linewidth=1, linestyle=":")
        axes.plot(dynamic.last().xi, best, "D", markersize=6.5, color=colour, mec="white", mew=0.8)
        ends.append((best, name, colour))
    axes.set_title("mIoU by threshold")
    axes.set_xlabel("fixed threshold ξ")
    axes.set_ylabel("mIoU [%]")
    axes.margins(x=0.12, y=0.12)
    grid(axes)
    label_ends(axes, ends, gap=0.16)


def _row(inputs: Inputs, run: Run, best: Run) -> Row:
    last = run.last()
    dynamic = run.cosa.dynamic_threshold
    notes = [ONE_RUN]
    known = paper.DYNAMIC_THRESHOLD if dynamic else paper.BEST_FIXED_THRESHOLD if run is best else None
    if known is not None:
        which = "dynamic" if dynamic else "best fixed"
        notes.insert(0, inputs.paper_note(f"VOC 2012 val, label-filtered, {which} threshold", last.split))
    return {
        **inputs.identity(last),
        "variant": run.variant,
        "threshold": "dynamic" if dynamic else f"{run.cosa.threshold:g}",
        "final_xi": fixed(last.xi, 4),
        "seed": str(run.seed),
        "cpl_miou": percent(last.miou("cam")),
        "seg_miou_label_free": percent(last.miou("seg_free")),
        "seg_miou_label_filtered": percent(last.miou("seg_filtered")),
        "paper_voc": percent(known),
        "note": "; ".join(notes),
    }
