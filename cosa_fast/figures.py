"""The qualitative panel: what every stage makes of the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cosa_fast.data.classes import IGNORED, voc_palette
from cosa_fast.files import write_atomically

Pixels = NDArray[np.uint8]

PALETTE: Pixels = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
PALETTE[IGNORED] = 255  # white, as VOC's borders are usually drawn
INK, MUTED, WARNING = "#1a1a1a", "#6b6b6b", "#b3261e"
COLUMN = 1.75
"""Width of an image in inches."""
FOOT = 0.28
"""Height in inches of the line of text under an image."""


@dataclass(frozen=True, slots=True)
class PanelRow:
    """One image and what was made of it; all maps have its (H, W)."""

    id: str
    labels: tuple[int, ...]
    """Classes of the image-level labels."""
    image: Pixels
    """(H, W, 3)."""
    cam: NDArray[np.float32]
    """(H, W) in [0, 1], the largest CAM of the present classes."""
    maps: dict[str, Pixels]
    """Column title to (H, W) class values; the same titles in all rows."""


def write_panel(
    path: Path, rows: Sequence[PanelRow], classes: Sequence[str], headline: str, caption: str, warning: str | None
) -> None:
    """Draw one row per image to a PNG file, atomically.

    Args:
        classes: foreground class names.
        headline: what is shown.
        caption: in small letters under it.
        warning: in red beside the headline, for data whose results mean nothing elsewhere.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    titles = ["image", "CAM", *rows[0].maps]
    heights = [COLUMN * row.image.shape[0] / row.image.shape[1] + FOOT for row in rows]
    top, bottom, side, gap = 0.86, 0.5, 0.14, 0.06
    width, height = len(titles) * (COLUMN + gap) - gap + 2 * side, top + sum(heights) + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    write = partial(figure.text, va="top")
    write(side / width, 1 - 0.10 / height, headline, fontsize=14, fontweight="bold", color=INK)
    write(side / width, 1 - 0.36 / height, caption, fontsize=8.5, color=MUTED)
    if warning:
        write(1 - side / width, 1 - 0.14 / height, warning, ha="right", fontsize=9.5, color=WARNING)
    upper = height - top
    for row, row_height in zip(rows, heights, strict=True):
        pictures = [row.image, overlay(row.image, row.cam), *(PALETTE[values] for values in row.maps.values())]
        for column, (title, picture) in enumerate(zip(titles, pictures, strict=True)):
            left = side + column * (COLUMN + gap)
            foot = upper - row_height + FOOT
            _show(figure.add_axes((left / width, foot / height, COLUMN / width, (row_height - FOOT) / height)), picture)
            if row is rows[0]:
                middle = (left + COLUMN / 2) / width
                figure.text(middle, (upper + 0.06) / height, title, ha="center", fontsize=10, color=INK)
        names = ", ".join(classes[label] for label in row.labels)
        write(side / width, (foot - 0.04) / height, names, fontsize=8.5, color=INK)
        write((side + 2 * COLUMN + gap) / width, (foot - 0.04) / height, row.id, ha="right", fontsize=7.5, color=MUTED)
        upper -= row_height
    _legend(figure, rows, classes)
    write_atomically(path, partial(figure.savefig, format="png"))


def overlay(image: Pixels, cam: NDArray[np.float32]) -> Pixels:
    """(H, W, 3): the image in grey under a heat map that is transparent where the CAM is 0."""
    grey = image.astype(np.float32).mean(axis=2, keepdims=True) * 0.75 + 40
    heat = colormaps["inferno"](0.15 + 0.85 * cam)[..., :3].astype(np.float32) * 255
    opacity = 0.85 * np.sqrt(cam)[..., None]
    return np.clip(grey * (1 - opacity) + heat * opacity, 0, 255).astype(np.uint8)


def _show(axes: Axes, picture: Pixels) -> None:
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color="#c8c8c8")


def _legend(figure: Figure, rows: Sequence[PanelRow], classes: Sequence[str]) -> None:
    """The colours that occur, in class order."""
    shown = np.unique(np.concatenate([values.ravel() for row in rows for values in row.maps.values()]))
    names = {0: "background", IGNORED: "ignored", **{c + 1: name for c, name in enumerate(classes)}}
    handles = [
        Patch(facecolor=PALETTE[value] / 255, edgecolor="#8c8c8c", linewidth=0.5, label=names[value])
        for value in shown.tolist()
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), 8),
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        labelcolor=INK,
    )
