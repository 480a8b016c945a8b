"""Small smooth images, and an index of any list of image files, for the tests of the loaders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cosa_fast.data import index as dataset

SIZES = [(96, 128), (128, 96), (60, 150), (101, 67), (120, 120), (75, 200), (90, 90), (64, 110)]
"""Height and width of the synthetic images; the last one is greyscale."""


def write_photo(path: Path, height: int, width: int, seed: int, mode: str = "RGB") -> Path:
    """A JPEG with smooth colours, a hard-edged rectangle and a little noise: like a photograph, and repeatable."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    pixels[height // 4 : height // 2, width // 3 : 2 * width // 3] = rng.integers(0, 256, 3)
    pixels += rng.integers(-8, 9, pixels.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(path, "JPEG", quality=92)
    return path


def write_photos(folder: Path) -> list[Path]:
    """One image of each of `SIZES`."""
    last = len(SIZES) - 1
    return [
        write_photo(folder / f"{number}.jpg", *size, seed=number, mode="L" if number == last else "RGB")
        for number, size in enumerate(SIZES)
    ]


def index_of(files: Sequence[Path], classes: int = 3) -> dataset.Index:
    """An index with these files as training split; image k has the classes k and k + 1 (modulo `classes`)."""
    images = []
    for number, file in enumerate(files):
        with Image.open(file) as image:
            labels = tuple(sorted({number % classes, (number + 1) % classes}))
            images.append(dataset.Image(file.stem, str(file), image.width, image.height, labels))
    return dataset.Index(
        name="tiny",
        format="voc",
        synthetic=True,
        root="/",
        classes=tuple(f"class{number}" for number in range(classes)),
        train_split="train",
        eval_splits=(),
        splits={"train": tuple(images)},
    )
