"""Figs. 4, 6 and 7: CAMs with and without contrastive separation, pseudo-labels and predictions, image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image as PilImage
from PIL import UnidentifiedImageError

from cosa_fast.files import read_json
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.style import INK, MUTED, WIDTH
from cosa_fast.studies.tables import Row, percent

COEXISTING_ROWS, OTHER_ROWS = 5, 3
"""At most so many images with and without coexisting classes."""
WITHOUT_CSC = "CAM without CSC"
TWO_TRAININGS = f"{WITHOUT_CSC}: of a second training, which may have another seed"
COLUMNS = {
    "image": "image",
    WITHOUT_CSC: WITHOUT_CSC,
    "CAM": "CAM of CoSA",
    "CAM pseudo-label": "its pseudo-label",
    "CoSA": "CoSA",
    "truth": "truth",
}
"""Layers, left to right, and their titles."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image of a gallery."""

    id: str
    labels: tuple[str, ...]
    width: int
    height: int
    iou: float | None
    """Of CoSA's label-free prediction, in percent."""
    files: dict[str, Path]
    """By layer."""


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table of the images shown, and the panel. Without the gallery "no_csc" its column is left out."""
    if "main" not in inputs.galleries:
        raise ValueError("this study needs the gallery 'main': give --gallery main:FOLDER")
    content, pictures = _read(inputs.galleries["main"])
    if content["dataset"] != inputs.index.name:
        raise ValueError(f"{inputs.galleries['main']} is of {content['dataset']}, the index of {inputs.index.name}")
    other = inputs.galleries.get("no_csc")
    if other is not None:
        without = {picture.id: picture for picture in _read(other)[1]}
        missing = [picture.id for picture in pictures if picture.id not in without]
        if missing:
            raise ValueError(
                f"{other} lacks the image {missing[0]} of {inputs.galleries['main']}: evaluate both with the same "
                "eval.panel_images"
            )
        for picture in pictures:
            picture.files[WITHOUT_CSC] = without[picture.id].files["CAM"]
    coexisting = set(inputs.studies.coexisting)
    chosen = choose(pictures, inputs.studies.coexisting)
    rows: list[Row] = [
        {
            "dataset": inputs.dataset,
            "split": content["split"],
            "row": str(number),
            "image": picture.id,
            "labels": " ".join(picture.labels),
            "coexisting": "yes" if coexisting & set(picture.labels) else "no",
            "miou_label_free": percent(picture.iou),
            "note": "" if other is None else TWO_TRAININGS,
        }
        for number, picture in enumerate(chosen, start=1)
    ]
    columns = [layer for layer in COLUMNS if layer in chosen[0].files]
    return rows, _draw(inputs, content, chosen, columns)


def choose(pictures: Sequence[Picture], coexisting: Sequence[str]) -> list[Picture]:
    """Images by a rule that does not look at results: class after class, the gallery's next image that holds it."""
    chosen: list[Picture] = []
    queues = {name: [picture for picture in pictures if name in picture.labels] for name in coexisting}
    while len(chosen) < COEXISTING_ROWS and any(queues.values()):
        for queue in queues.values():
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < COEXISTING_ROWS:
                chosen.append(queue.pop(0))
    others = [picture for picture in pictures if not set(coexisting) & set(picture.labels)]
    return [*chosen, *others[:OTHER_ROWS]]


def _read(folder: Path) -> tuple[dict[str, Any], list[Picture]]:
    path = folder / "gallery.json"
    remedy = "make it again with `snakemake --cores all`"
    content = read_json(path, "gallery", remedy)
    try:
        pictures = [
            Picture(
                id=str(entry["id"]),
                labels=tuple(entry["labels"]),
                width=int(entry["width"]),
                height=int(entry["height"]),
                iou=None if entry["iou"] is None else 100.0 * float(entry["iou"]),
                files={layer: folder / name for layer, name in entry["files"].items()},
            )
            for entry in content["images"]
        ]
        lacking = [layer for layer in COLUMNS if layer != WITHOUT_CSC and layer not in content["layers"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the gallery {path} is damaged ({error!r}): {remedy}") from None
    if lacking or not pictures:
        raise ValueError(f"the gallery {path} has no {lacking[0] if lacking else 'image'!r}: {remedy}")
    return content, pictures


def _draw(inputs: Inputs, content: dict[str, Any], chosen: Sequence[Picture], columns: Sequence[str]) -> Figure:
    about = [
        f"{inputs.dataset}, {content['split']}; the gallery's first images of the coexisting classes "
        f"({', '.join(inputs.studies.coexisting)}), then of others"
    ]
    if WITHOUT_CSC in columns:
        about.append(TWO_TRAININGS)
    side, gap, head, foot, words = 0.1, 0.05, 0.62 + 0.16 * len(about), 0.45, 0.24
    width = (WIDTH - 2 * side + gap) / len(columns) - gap
    heights = [width * picture.height / picture.width for picture in chosen]
    total = head + sum(heights) + words * len(chosen) + foot
    figure = Figure(figsize=(WIDTH, total), facecolor="white")
    title = "CAMs, pseudo-labels and predictions (Figs. 4, 6, 7)"
    figure.text(side / WIDTH, 1 - 0.09 / total, title, va="top", fontsize=12.5, fontweight="bold")
    figure.text(
        side / WIDTH,
        1 - 0.36 / total,
        "\n".join(about),
        va="top",
        fontsize=8.5,
        color=MUTED,
    )
    upper = total - head
    shown: set[str] = set()
    for picture, height in zip(chosen, heights, strict=True):
        shown.update(picture.labels)
        for column, layer in enumerate(columns):
            left = side + column * (width + gap)
            axes = figure.add_axes((left / WIDTH, (upper - height) / total, width / WIDTH, height / total))
            axes.imshow(_pixels(picture.files[layer]), interpolation="nearest", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set(visible=True, linewidth=0.5, color="#c8c8c8")
            if picture is chosen[0]:
                figure.text(
                    (left + width / 2) / WIDTH, (upper + 0.04) / total, COLUMNS[layer], ha="center", fontsize=9.5
                )
        below = (upper - height - 0.03) / total
        figure.text(side / WIDTH, below, ", ".join(picture.labels), va="top", fontsize=8.5, color=INK)
        score = "" if picture.iou is None else f"CoSA's IoU {picture.iou:.0f} %   "
        figure.text(1 - side / WIDTH, below, f"{score}{picture.id}", va="top", ha="right", fontsize=8, color=MUTED)
        upper -= height + words
    names = [name for name in content["palette"] if name in shown or name == "background"]
    handles = [
        Patch(facecolor=content["palette"][name], edgecolor="#8c8c8c", linewidth=0.5, label=name) for name in names
    ]
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 9), handlelength=1.1, columnspacing=1.2)
    return figure


def _pixels(path: Path) -> PilImage.Image:
    try:
        with PilImage.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read {path} ({error}): make the gallery again with `snakemake --cores all`") from None
