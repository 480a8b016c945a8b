"""One look for all figures of the studies: colours, headings, line-end labels, files with the same bytes every time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cosa_fast.files import write_atomically

INK, MUTED, GRID = "#1a1a1a", "#5f6368", "#e3e3e3"
BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d98000", "#009e73", "#56b4e9"
"""Okabe and Ito's colours, told apart with any colour vision; the orange darkened for text on white."""
WIDTH = 8.0
"""Inches; 768 CSS pixels."""
CHARACTERS = 118
"""Longest line of a subtitle."""

_SETTINGS: Any = {  # Any: matplotlib wants literal keys
    "svg.fonttype": "none",
    "svg.hashsalt": "cosa-fast",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 1.8,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save inside of this."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(title: str, subtitle: str, height: float, foot: float = 0.0) -> Figure:
    """A figure with a headline and what it is of.

    Args:
        height: of the part below the heading, in inches; the axes are laid out there.
        foot: inches left free below the axes.
    """
    lines = textwrap.wrap(subtitle, CHARACTERS, break_on_hyphens=False)
    head = 0.42 + 0.17 * len(lines)
    total = height + foot + head
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    # Not "constrained": its solver does not give the same digits every time.
    figure.set_layout_engine("tight", rect=(0.0, foot / total, 1.0, 1 - head / total), pad=0.5, w_pad=1.2, h_pad=1.2)
    figure.text(0.012, 1 - 0.09 / total, title, va="top", fontsize=12.5, fontweight="bold")
    figure.text(0.012, 1 - 0.36 / total, "\n".join(lines), va="top", fontsize=9, color=MUTED, linespacing=1.3)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    """Write SVG or PNG, by the ending of `path`, atomically and without a date.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None, "Creator": "cosa-fast"} if kind == "svg" else {"Software": "cosa-fast"}
    write_atomically(path, partial(figure.savefig, format=kind, metadata=metadata, dpi=150))


def grid(axes: Axes, axis: str = "y") -> None:
    """Light lines behind the data."""
    axes.grid(axis=axis, color=GRID, linewidth=0.8)  # type: ignore[arg-type]


def iterations_axis(axes: Axes, last: int, first: int = 0) -> None:
    """An x axis over the training, from `first` on."""
    axes.set_xlim(first, last)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    grid(axes)


def draw_curve(
    axes: Axes, iterations: Sequence[int], values: Sequence[float], colour: str, linestyle: str = "-"
) -> None:
    """A line over the training with a dot at each measurement."""
    axes.plot(iterations, values, color=colour, linestyle=linestyle, marker="o", markersize=2.6, clip_on=False)


def mark_start(axes: Axes, start: int, last: int, text: str) -> None:
    """A vertical line where something begins, if it does, with what at its foot."""
    if 0 < start < last:
        axes.axvline(start, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            text,
            (start, 0.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(3, 2),
            textcoords="offset points",
            va="bottom",
            fontsize=8,
            color=MUTED,
        )


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.075) -> None:
    """Write the names of lines right of the axes, at the height where each ends, apart from one another.

    Args:
        ends: last y value, text and colour of each line; the limits of the y axis must be final. A line whose value is
            NaN, which is not drawn there, gets no name.
        gap: least distance between two labels, in heights of the axes.
    """
    low, high = axes.get_ylim()
    ordered = sorted((end for end in ends if not math.isnan(end[0])), key=lambda end: end[0])
    wanted = [(value - low) / (high - low) for value, _, _ in ordered]
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + gap) if places else place)
    # What was pushed out above comes back in, as does the crowd below it.
    ceiling = 1.0
    for number in reversed(range(len(places))):
        places[number] = min(places[number], ceiling)
        ceiling = places[number] - gap
    for place, (_, text, colour) in zip(places, ordered, strict=True):
        axes.annotate(
            text,
            (1.0, place),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )
