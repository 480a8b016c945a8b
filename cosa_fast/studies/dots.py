"""Dot plots of tables: a line per row, a panel per quantity, the numbers of the paper as text beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cosa_fast.studies.stats import Summary
from cosa_fast.studies.style import GRID, INK, MUTED, new_figure

OFF = "#c9cdd1"


@dataclass(frozen=True, slots=True)
class Panel:
    """One quantity: per series, a value (or several seeds') for each row."""

    title: str
    series: Mapping[str, Sequence[Summary | None]]
    """Series name to one summary per row; None where there is none."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows, top to bottom, and what stands beside them."""

    labels: Sequence[str]
    parts: Sequence[str] = ()
    """Names of the switches of each row."""
    switches: Sequence[Sequence[bool]] = ()
    """Per row, which parts are on."""
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Header to one text per row, right of the panels."""


def dot_figure(
    title: str, subtitle: str, rows: Rows, panels: Sequence[Panel], colours: Mapping[str, str], unit: str
) -> Figure:
    """Dots for the values, a bar for the 95 % interval of their mean, the mean in figures.

    Args:
        colours: per series; a legend names them if there are several.
        unit: label of the x axes.
    """
    count = len(rows.labels)
    together = max(len(panel.series) for panel in panels)
    step = 0.27 + 0.14 * together
    figure = new_figure(title, subtitle, 0.75 + step * count, foot=0.3 if len(colours) > 1 else 0.0)
    widths = [*([0.24 * len(rows.parts)] if rows.parts else []), *(1.7 for _ in panels)]
    widths += [0.62 * len(rows.columns)] if rows.columns else []
    axes = figure.subplots(1, len(widths), width_ratios=widths, sharey=True, squeeze=False)[0]
    first = axes[0]
    first.set_ylim(count - 0.45, -0.55)
    first.set_yticks(range(count), rows.labels)
    for other in axes:
        other.tick_params(left=False)
        other.spines["left"].set_visible(False)
    remaining = list(axes)
    if rows.parts:
        _draw_switches(remaining.pop(0), rows)
    limits = _limits(panels)
    for panel, target in zip(panels, remaining, strict=False):
        _draw_panel(target, panel, count, colours, unit, limits)
    if rows.columns:
        draw_columns(remaining[-1], rows.columns)
    if len(colours) > 1:
        handles = [
            Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in colours.items()
        ]
        figure.legend(handles=handles, loc="lower left", ncols=len(handles), handletextpad=0.2)
    return figure


def about_seeds(seeds: Sequence[int]) -> str:
    """What the marks are, for the subtitle."""
    if len(seeds) == 1:
        return f"One training each (seed {seeds[0]})."
    words = ", ".join(map(str, seeds))
    return f"Ticks: seeds {words}; dot and bar: their mean and its 95 % confidence interval."


def _draw_switches(axes: Axes, rows: Rows) -> None:
    axes.set_xlim(-0.6, len(rows.parts) - 0.4)
    axes.set_xticks(range(len(rows.parts)), rows.parts, fontsize=8, rotation=45, ha="left", rotation_mode="anchor")
    axes.tick_params(bottom=False, top=False, labelbottom=False, labeltop=True, pad=1)
    axes.spines["bottom"].set_visible(False)
    for row, switches in enumerate(rows.switches):
        for column, on in enumerate(switches):
            axes.plot(column, row, marker="o", markersize=7 if on else 3.5, color=INK if on else OFF)


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """The x axis that all panels share, with room for the figures at the right."""
    known = [summary for panel in panels for series in panel.series.values() for summary in series if summary]
    low = min(min((*summary.values, summary.mean - (summary.half or 0.0))) for summary in known)
    high = max(max((*summary.values, summary.mean + (summary.half or 0.0))) for summary in known)
    span = max(high - low, 1.0)
    return low - 0.08 * span, high + 0.38 * span


def _draw_panel(
    axes: Axes, panel: Panel, count: int, colours: Mapping[str, str], unit: str, limits: tuple[float, float]
) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(unit)
    for row in range(count):
        axes.axhline(row, color=GRID, linewidth=0.8, zorder=0)
    dodge = 0.34 / max(len(panel.series) - 1, 1) if len(panel.series) > 1 else 0.0
    for number, (name, summaries) in enumerate(panel.series.items()):
        offset = (number - (len(panel.series) - 1) / 2) * dodge
        for row, summary in enumerate(summaries):
            if summary is not None:
                _draw_summary(axes, row + offset, summary, colours[name])
    axes.set_xlim(limits)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _draw_summary(axes: Axes, y: float, summary: Summary, colour: str) -> None:
    right = max(summary.values)
    if summary.half is not None:
        right = max(right, summary.mean + summary.half)
        axes.plot(
            [summary.mean - summary.half, summary.mean + summary.half],
            [y, y],
            color=colour,
            linewidth=2.2,
            alpha=0.45,
            solid_capstyle="butt",
        )
        axes.plot(summary.values, [y] * len(summary.values), "|", markersize=9, color=colour, mew=1.1)
    axes.plot(summary.mean, y, "o", markersize=6, color=colour, mec="white", mew=0.8)
    axes.annotate(
        f"{summary.mean:.1f}",
        (right, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )


def draw_columns(axes: Axes, columns: Mapping[str, Sequence[str]]) -> None:
    """Columns of text, right-aligned under their headers, one line per row of the y axis."""
    axes.set_xlim(0, len(columns))
    axes.set_xticks([position + 0.95 for position in range(len(columns))], list(columns), fontsize=8.5, ha="right")
    axes.tick_params(bottom=False, top=False, left=False, labelbottom=False, labeltop=True, pad=1, labelcolor=MUTED)
    axes.spines[["left", "bottom"]].set_visible(False)
    for position, texts in enumerate(columns.values()):
        for row, text in enumerate(texts):
            axes.text(position + 0.95, row, text, ha="right", va="center", fontsize=8.5, color=MUTED)
