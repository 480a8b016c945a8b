"""Pictures inside the page: small, whatever their size in the results folder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cosa_fast.report.sources import data_uri

LOSSLESS = 256 * 256
"""Photographs of at most so many pixels stay exact; larger ones become JPEG, 50 kB at VOC's size."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One embedded picture."""

    uri: str
    width: int
    """In pixels, after shrinking."""
    height: int
    colours: frozenset[str]
    """Of a picture of at most 256 colours, each "#rrggbb"; empty for a photograph."""


def embed(path: Path, side: int, fix: str) -> Picture:
    """Read a picture and shrink it so that no side exceeds `side` pixels.

    Drawings of at most 256 colours (class maps, tables) keep their exact colours.

    Raises:
        ValueError: the file is missing or no whole picture.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
            picture = opened.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no picture {path}: {fix}") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise ValueError(f"{path} is not a whole picture ({error}): {fix}") from None
    drawing = picture.getcolors(256) is not None
    scale = min(1.0, side / max(picture.size))
    if scale < 1:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        # Between two classes there is no colour in the middle.
        picture = picture.resize(size, Image.Resampling.NEAREST if drawing else Image.Resampling.LANCZOS)
    colours: frozenset[str] = frozenset()
    file = io.BytesIO()
    if drawing:
        indexed, colours = _indexed(picture)
        indexed.save(file, "PNG", optimize=True)
    elif picture.width * picture.height <= LOSSLESS:
        picture.save(file, "PNG")
    else:
        picture.save(file, "JPEG", quality=80, subsampling=0)  # the error's red on grey needs its whole colour
        return Picture(data_uri(file.getvalue(), "image/jpeg"), *picture.size, colours)
    return Picture(data_uri(file.getvalue(), "image/png"), *picture.size, colours)


def _indexed(picture: Image.Image) -> tuple[Image.Image, frozenset[str]]:
    """The same pixels through a palette (Pillow's `quantize` may change them), and its colours."""
    numbers = np.asarray(picture) @ np.array([1 << 16, 1 << 8, 1])
    palette = np.array(sorted(set(numbers.ravel().tolist())))
    colours = [f"{number:06x}" for number in palette.tolist()]
    indexed = Image.fromarray(np.searchsorted(palette, numbers).astype(np.uint8))
    indexed.putpalette(bytes.fromhex("".join(colours)))
    return indexed, frozenset(f"#{colour}" for colour in colours)
