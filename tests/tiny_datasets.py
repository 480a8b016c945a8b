"""Hand-made datasets of a few 12x8 images, for the tests of the data stage."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 12, 8


def write_jpeg(path: Path, width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB") -> None:
    """A JPEG of noise, so that cutting it short loses pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path, "JPEG", quality=95)


def xml(names: Sequence[str], width: int = WIDTH, height: int = HEIGHT) -> str:
    objects = "".join(f"<object><name>{name}</name><difficult>0</difficult></object>" for name in names)
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"


def write_voc(root: Path, images: Mapping[str, Sequence[str]], splits: Mapping[str, Iterable[str]]) -> Path:
    """A dataset in VOC layout without masks; `images` maps ids to the class names of their objects."""
    for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image_id, names in images.items():
        write_jpeg(root / "JPEGImages" / f"{image_id}.jpg")
        (root / "Annotations" / f"{image_id}.xml").write_text(xml(names))
    for split, ids in splits.items():
        (root / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in ids))
    return root


def small_voc(root: Path) -> Path:
    """Images a, b (train) and c (val): cat and dog, person, dog."""
    images = {"a": ["dog", "cat", "dog"], "b": ["person"], "c": ["dog"]}
    return write_voc(root, images, {"train": ["a", "b"], "val": ["c"]})


def write_mask(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette(list(range(256)) * 3)
    image.save(path)


def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """The polygon of a rectangle."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(number: int, image: int, category: int, segmentation: Any, *, iscrowd: int = 0) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": iscrowd}


def coco_json(images: Sequence[int], annotations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Categories 7 zebra, 2 apple, 90 brush, in this order in the file."""
    return {
        "images": [
            {"id": number, "file_name": f"{number:012d}.jpg", "width": WIDTH, "height": HEIGHT} for number in images
        ],
        "annotations": list(annotations),
        "categories": [{"id": 7, "name": "zebra"}, {"id": 2, "name": "apple"}, {"id": 90, "name": "brush"}],
    }


def write_coco(root: Path, folder: str, content: dict[str, Any]) -> Path:
    """Instance JSON and its images."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{folder}.json").write_text(json.dumps(content))
    (root / folder).mkdir(exist_ok=True)
    for image in content["images"]:
        write_jpeg(root / folder / image["file_name"])
    return root
