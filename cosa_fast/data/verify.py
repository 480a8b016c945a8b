"""Every file is checked before training starts, and all that is wrong is reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm.contrib.concurrent import thread_map

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")
"""What both loaders decode."""

SHOWN = 10
"""Problems quoted in full; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One image as the annotations describe it, before its file has been opened."""

    id: str
    path: str
    """Relative to the dataset's root."""
    labels: tuple[int, ...]
    declared_size: tuple[int, int] | None
    """(width, height) in pixels according to the annotation, where it tells."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A dataset as its annotations describe it."""

    name: str
    format: str
    synthetic: bool
    root: Path
    classes: tuple[str, ...]
    splits: dict[str, tuple[Listed, ...]]
    problems: tuple[str, ...]
    """What is wrong with the annotations, one sentence each."""


def measure_images(paths: Sequence[Path], *, decode: bool, threads: int) -> list[tuple[int, int] | str]:
    """(width, height) in pixels of every file as stored, EXIF orientation not applied, or what is wrong with it.

    `decode` reads each file to its end, which finds truncated ones; otherwise only the header is read. Pillow decodes
    outside the interpreter lock, so threads are enough.
    """
    inspect = partial(_inspect, decode=decode)
    description = "decoding images" if decode else "opening images"
    return thread_map(inspect, paths, max_workers=threads, desc=description, unit="image", disable=None)


def raise_problems(problems: Sequence[str], place: str, fix: str) -> None:
    """Nothing if there are none.

    Raises:
        ValueError: the number of problems in `place`, the first of them, and `fix`.
    """
    if not problems:
        return
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"{count} in {place} ({fix}):", *(f"  {problem}" for problem in problems[:SHOWN])]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    raise ValueError("\n".join(lines))


def duplicates(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in order."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [name for name, count in counts.items() if count > 1]


def _inspect(path: Path, decode: bool) -> tuple[int, int] | str:
    try:
        if path.stat().st_size == 0:
            return f"{path} is empty (0 bytes)"
        with Image.open(path, formats=FORMATS) as image:
            size = image.size
            if decode:
                # libjpeg reads all of a JPEG but only reconstructs its brightness at an eighth of the size.
                image.draft("L", (1, 1))
                image.load()
    except FileNotFoundError:
        return f"{path} is missing"
    except UnidentifiedImageError:
        return f"{path} is not an image ({', '.join(FORMATS)})"
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error ...
        return f"{path} cannot be read: {error}"
    return size
