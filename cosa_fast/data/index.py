"""The dataset index: what every later stage knows of a dataset, without opening it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cosa_fast.files import read_json, write_atomically

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a split."""

    id: str
    path: str
    """Relative to the index's root."""
    width: int
    height: int
    labels: tuple[int, ...]
    """Sorted class numbers of the image-level labels, 0 for the first entry of `classes`."""


@dataclass(frozen=True, slots=True)
class Index:
    """A dataset: its classes and its splits. Holds no mask and no path to one."""

    name: str
    """For people: VOC2012, COCO2014, MiniVOC."""
    format: str
    """voc or coco: how masks are found (`cosa_fast.data.masks`)."""
    synthetic: bool
    root: str
    """Absolute folder that image paths are relative to."""
    classes: tuple[str, ...]
    """Foreground class names; mask value c + 1 is class c, 0 is background, 255 is ignored."""
    train_split: str
    eval_splits: tuple[str, ...]
    splits: dict[str, tuple[Image, ...]]

    @property
    def train(self) -> tuple[Image, ...]:
        """The images of the training split."""
        return self.splits[self.train_split]

    def image_path(self, image: Image) -> Path:
        """Absolute path of an image file."""
        return Path(self.root) / image.path

    def multi_hot(self, images: tuple[Image, ...]) -> NDArray[np.float32]:
        """(len(images), C) float32 image-level labels."""
        table = np.zeros((len(images), len(self.classes)), dtype=np.float32)
        for row, image in enumerate(images):
            table[row, list(image.labels)] = 1.0
        return table

    def save(self, path: Path) -> None:
        """Write the index as JSON, atomically."""
        write_atomically(path, json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Index:
        """Read an index.

        Raises:
            ValueError: the file is missing, not JSON or of another schema.
        """
        content = read_json(path, "dataset index", "run `cosa-fast data index`")
        if content.pop("schema", None) != SCHEMA:
            raise ValueError(
                f"{path} is not a dataset index of schema {SCHEMA}: make it again with `cosa-fast data index`"
            )
        content["classes"] = tuple(content["classes"])
        content["eval_splits"] = tuple(content["eval_splits"])
        content["splits"] = {
            split: tuple(Image(**{**image, "labels": tuple(image["labels"])}) for image in images)
            for split, images in content["splits"].items()
        }
        return cls(**content)
