"""A few images and what every system makes of them, as files: what the report shows one layer at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PilImage

from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Index
from cosa_fast.figures import PALETTE, PanelRow, Pixels, overlay
from cosa_fast.files import describe_os_error
from cosa_fast.systems import COSA, TRUTH

DESCRIPTION = "gallery.json"
ERROR = "error"
WRONG = (214, 39, 40)
"""Red, like matplotlib's."""
DIMMED = 0.45


def write_gallery(
    path: Path, dataset: Index, split: str, rows: Sequence[PanelRow], iou: Sequence[float | None]
) -> None:
    """Write the folder `path`: `gallery.json` and the layers of each image; replaces a former gallery as a whole.

    The layers are the image (JPEG), the CAM over it, the maps of the rows (palette images) and, last, the errors of the
    map `CoSA` beside the one called `truth`: the image dimmed where it is right, red where wrong, white where nothing
    is known. `config/README.md` lists the fields of `gallery.json`.

    Args:
        split: that the images are of.
        iou: per row, the mean IoU in [0, 1] of its map `CoSA` over the classes in that or in the truth; None without.

    Raises:
        ValueError: `path` is something else, the disk is full or the folder cannot be written.
    """
    require_gallery(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        images = []
        for number, (row, value) in enumerate(zip(rows, iou, strict=True)):
            files = {}
            for layer, picture in _layers(row).items():
                suffix = "jpg" if layer == "image" else "png"
                name = files[layer] = f"{number:04d}_{layer.lower().replace(' ', '_').replace('-', '_')}.{suffix}"
                _save(temporary / name, picture)
            height, width = row.image.shape[:2]
            labels = [dataset.classes[label] for label in row.labels]
            images.append(
                {"id": row.id, "labels": labels, "width": width, "height": height, "iou": value, "files": files}
            )
        content = {
            "dataset": dataset.name,
            "split": split,
            "synthetic": dataset.synthetic,
            "classes": dataset.classes,
            "palette": {
                name: "#{:02x}{:02x}{:02x}".format(*PALETTE[number].tolist())
                for number, name in enumerate(("background", *dataset.classes))
            },
            "layers": list(_layers(rows[0])),
            "images": images,
        }
        (temporary / DESCRIPTION).write_text(json.dumps(content, indent=1))
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise ValueError(describe_os_error(error, path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_gallery(path: Path) -> None:
    """Check that writing a gallery to `path` deletes nothing else.

    Raises:
        ValueError: it would.
    """
    if path.exists() and not (path / DESCRIPTION).is_file() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an earlier gallery: give a new folder")


def _layers(row: PanelRow) -> dict[str, Pixels]:
    """(H, W, 3) colours or (H, W) class values of each layer."""
    truth, prediction = row.maps[TRUTH], row.maps[COSA]
    error = (row.image * DIMMED).astype(np.uint8)
    error[prediction != truth] = WRONG
    error[truth == IGNORED] = 255
    return {"image": row.image, "CAM": overlay(row.image, row.cam), **row.maps, ERROR: error}


def _save(path: Path, picture: Pixels) -> None:
    image = PilImage.fromarray(np.ascontiguousarray(picture))
    if picture.ndim == 2:
        image.putpalette(PALETTE.ravel().tolist())
    image.save(path, quality=90)  # which only JPEG knows
