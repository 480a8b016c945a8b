"""Fig. 3: how confidence, perplexity and accuracy of the CAM pseudo-labels belong together during the training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator

from cosa_fast.studies.inputs import NOISE, Inputs
from cosa_fast.studies.runs import Run, Validation
from cosa_fast.studies.stats import Counts, Floats, pearson
from cosa_fast.studies.style import INK, ORANGE, SKY, grid, new_figure
from cosa_fast.studies.tables import Row, fixed, percent

RANGES = 32
"""Confidence ranges of the heat map and of the table."""
BARS = 128
"""Bars of the histogram."""
LINES = 5
"""Moments of the training in the middle plot, at most."""
PERPLEXITIES = np.arange(0.2, 3.01, 0.2)
"""Lower edges of the perplexity groups in the middle plot; the last group is open."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Pixels of a validation, in groups; NaN where a group is empty."""

    pixels: Counts
    accuracy: Floats
    """In percent."""
    perplexity: Floats
    """Mean over the pixels."""


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table (a line per moment and confidence range) and the figure."""
    run = inputs.compare(("cosa",))["cosa"][0]
    curve, last = run.curve(), run.last()
    ranges = np.arange(len(last.right)) * RANGES // len(last.right)
    rows: list[Row] = []
    for record in curve:
        groups = group(run, record, ranges, RANGES)
        correlations = {
            "pearson_r": fixed(correlation(run, record, weighted=True), 4),
            "pearson_r_bins_equal": fixed(correlation(run, record, weighted=False), 4),
        }
        rows += [
            {
                **inputs.identity(record),
                "seed": str(run.seed),
                "network": record.network,
                "iteration": str(record.iteration),
                "xi": fixed(record.xi, 4),
                "confidence_from": fixed(number / RANGES, 5),
                "confidence_to": fixed((number + 1) / RANGES, 5),
                "pixels": str(groups.pixels[number]),
                "accuracy": percent(groups.accuracy[number]),
                "perplexity": fixed(groups.perplexity[number], 4),
                **correlations,
            }
            for number in range(RANGES)
        ]
    figure = new_figure(
        "Confidence, perplexity and accuracy of the CAM pseudo-labels (Fig. 3)",
        f"Assignment network on {inputs.about_curve(run)}. r: Pearson correlation of perplexity (Eq. 4) and accuracy "
        f"over 256 confidence bins, each weighted by its pixels. One run (seed {run.seed}): {NOISE}.",
        5.6,
    )
    axes = figure.subplot_mosaic([["heat", "heat"], ["correlation", "histogram"]], height_ratios=(1, 1.15))
    _draw_heat(figure, axes["heat"], run)
    _draw_correlation(axes["correlation"], run)
    _draw_histogram(axes["histogram"], last)
    return rows, figure


def group(run: Run, record: Validation, of_bin: Counts, count: int) -> Groups:
    """Add up the histogram's bins; `of_bin` is the group of each bin."""
    pixels = record.right + record.wrong
    sums = [np.bincount(of_bin, values, count) for values in (pixels, record.right, pixels * run.perplexity(record))]
    with np.errstate(invalid="ignore"):
        return Groups(sums[0].astype(np.int64), 100 * sums[1] / sums[0], sums[2] / sums[0])


def correlation(run: Run, record: Validation, *, weighted: bool) -> float:
    """Pearson r of perplexity and accuracy over the confidence bins that hold pixels."""
    pixels = record.right + record.wrong
    held = pixels > 0
    weights = pixels[held] if weighted else np.ones(held.sum())
    return pearson(run.perplexity(record)[held], record.right[held] / pixels[held], weights)


def _draw_heat(figure: Figure, axes: Axes, run: Run) -> None:
    curve = run.curve()
    iterations = np.array([record.iteration for record in curve], dtype=np.float64)
    ranges = np.arange(len(curve[0].right)) * RANGES // len(curve[0].right)
    accuracy = np.stack([group(run, record, ranges, RANGES).accuracy for record in curve])
    edges = np.concatenate([[0.0], (iterations[1:] + iterations[:-1]) / 2, iterations[-1:]])
    axes.set_facecolor("#dddddd")
    mesh = axes.pcolormesh(np.linspace(0, 1, RANGES + 1), edges, np.ma.masked_invalid(accuracy), cmap="cividis")
    mesh.set_edgecolor("face")
    axes.plot([record.xi for record in curve], iterations, color="white", linewidth=1.6, marker="o", markersize=2.5)
    axes.annotate(
        "threshold ξ",
        (curve[-1].xi, iterations[-1]),
        xytext=(6, -11),
        textcoords="offset points",
        color="white",
        fontsize=9,
        path_effects=[withStroke(linewidth=2, foreground="#333333")],
    )
    axes.set_title("(a) accuracy by confidence range (grey: no pixel)")
    axes.set_xlabel("confidence: largest CAM of a pixel")
    axes.set_ylabel("iteration")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14)
    bar.set_label("accuracy [%]")
    bar.outline.set_visible(False)


def _draw_correlation(axes: Axes, run: Run) -> None:
    curve = run.curve()
    chosen = [curve[k] for k in np.unique(np.linspace(0, len(curve) - 1, LINES).round().astype(int))]
    colours = colormaps["cividis_r"](np.linspace(0.15, 1.0, len(chosen)))
    for record, colour in zip(chosen, colours, strict=True):
        places = np.clip(np.digitize(run.perplexity(record), PERPLEXITIES) - 1, 0, len(PERPLEXITIES) - 1)
        groups = group(run, record, places, len(PERPLEXITIES))
        r = correlation(run, record, weighted=True)
        axes.plot(
            groups.perplexity,
            groups.accuracy,
            color=colour,
            marker="o",
            markersize=3,
            label=f"{record.iteration:,} (r = {r:.2f})",
        )
    axes.set_title("(b) accuracy by perplexity")
    axes.set_xlabel("perplexity")
    axes.set_ylabel("accuracy [%]")
    axes.legend(title="iteration", title_fontsize=9, alignment="left", loc="best", handlelength=1.4)
    grid(axes)


def _draw_histogram(axes: Axes, last: Validation) -> None:
    pixels = (last.right + last.wrong).reshape(BARS, -1).sum(axis=1)
    share = 100 * pixels / pixels.sum()
    centres = (np.arange(BARS) + 0.5) / BARS
    foreground = centres >= last.xi
    for side, colour, name, place in (
        (~foreground, SKY, "background", "left"),
        (foreground, ORANGE, "foreground", "right"),
    ):
        axes.bar(centres[side], share[side], width=1 / BARS, color=colour, linewidth=0)
        axes.annotate(
            f"{name}\n{share[side].sum():.0f} % of pixels",
            (0.02 if place == "left" else 0.98, 0.97),
            xycoords="axes fraction",
            ha=place,
            va="top",
            fontsize=9,
            color=INK,
        )
    axes.set_yscale("log")
    lowest = np.floor(np.log10(share[share > 0].min()))
    axes.set_ylim(10**lowest, 10 ** (2 + 0.45 * (2 - lowest)))  # above 100 %: room for the words
    axes.set_yticks(10.0 ** np.arange(lowest, 3))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axvline(last.xi, ymax=0.74, color=INK, linewidth=1.2)
    axes.annotate(f"ξ = {last.xi:.2f}", (last.xi, 0.75), xycoords=axes.get_xaxis_transform(), ha="center", fontsize=9)
    axes.set_xlim(0, 1)
    axes.set_title(f"(c) confidence at iteration {last.iteration:,}")
    axes.set_xlabel("confidence")
    axes.set_ylabel("pixels [%], logarithmic")
