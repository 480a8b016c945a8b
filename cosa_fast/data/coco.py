"""MS COCO from its `instances_*.json` files.

Image-level labels are the categories that have an annotation in the image. Crowds count: the category is in the
picture. Images without any annotation are left out (COCO 2014: 82,081 of 82,783 train and 40,137 of 40,504 val images
stay).
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cosa_fast.data.classes import MAX_CLASSES
from cosa_fast.data.verify import Listed, Listing, duplicates

logger = logging.getLogger(__name__)

_FIELDS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id"),
}


def list_coco(root: Path, year: int, splits: Sequence[str]) -> Listing:
    """Read the images and image-level labels of `splits`; classes are the JSON's categories by ascending id.

    Raises:
        ValueError: a file or folder is missing, a file is not COCO instance JSON, the splits disagree on the
            categories, or a split is empty.
    """
    if not root.is_dir():
        raise ValueError(f"coco.root = {root} is not a folder: it must hold annotations/ and train{year}/")
    root = root.resolve()
    classes: tuple[str, ...] | None = None
    listed: dict[str, tuple[Listed, ...]] = {}
    problems: list[str] = []
    for split in splits:
        folder = f"{split}{year}"
        path = annotation_path(root, folder)
        instances = read_instances(path, polygons=False)
        if not (root / folder).is_dir():
            raise ValueError(f"{root / folder} is missing: the images of the split {split!r} belong there")
        names = class_names(instances)
        if classes is not None and names != classes:
            raise ValueError(f"{path} has other categories than the files of the splits before {split!r}")
        classes = names
        listed[split] = _list_split(instances, folder, path, problems)
        total = len(instances["images"])
        logger.info(
            "%s: %d of %d images have annotations, %d are left out",
            folder,
            len(listed[split]),
            total,
            total - len(listed[split]),
        )
        if not listed[split]:
            raise ValueError(f"the split {split!r} is empty: {path} has {total} images, none with an annotation")
    return Listing(f"COCO{year}", "coco", False, root, classes or (), listed, tuple(problems))


def annotation_path(root: Path, folder: str) -> Path:
    """The instance JSON of an image folder such as `train2014`."""
    return root / "annotations" / f"instances_{folder}.json"


def read_instances(path: Path, *, polygons: bool) -> dict[str, Any]:
    """A COCO instance JSON. Its polygons, nearly all of its size, are packed into arrays of doubles or left out.

    Raises:
        ValueError: the file is missing, is not JSON, or lacks a list or a field that is needed.
    """

    def slim(record: dict[str, Any]) -> dict[str, Any]:
        segmentation = record.get("segmentation")
        if segmentation is not None and not polygons:
            del record["segmentation"]
        elif isinstance(segmentation, list):
            record["segmentation"] = [array("d", polygon) for polygon in segmentation]
        return record

    try:
        content = json.loads(path.read_bytes(), object_hook=slim)
    except OSError as error:
        raise ValueError(
            f"cannot read {path} ({error.strerror}): coco.download: true fetches the annotations"
        ) from None
    except TypeError:
        raise ValueError(f"{path} holds a segmentation that is neither polygons nor run lengths") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a COCO instance file: it must hold a JSON object")
    for key, fields in _FIELDS.items():
        if not isinstance(content.get(key), list):
            raise ValueError(f"{path} is not a COCO instance file: it has no list {key!r}")
        for position, record in enumerate(content[key]):
            missing = [name for name in fields if not isinstance(record, dict) or name not in record]
            if missing:
                raise ValueError(f"{path}: {key}[{position}] has no {' and no '.join(map(repr, missing))}")
    return content


def class_numbers(instances: dict[str, Any]) -> dict[int, int]:
    """Category id -> class number: the position among the sorted ids, 0 first."""
    return {number: position for position, number in enumerate(sorted(item["id"] for item in instances["categories"]))}


def class_names(instances: dict[str, Any]) -> tuple[str, ...]:
    """Category names by ascending id.

    Raises:
        ValueError: there are none, too many for an 8-bit mask, or two share an id.
    """
    categories = sorted(instances["categories"], key=lambda item: item["id"])
    if not 1 <= len(categories) <= MAX_CLASSES:
        raise ValueError(f"{len(categories)} COCO categories: between 1 and {MAX_CLASSES} fit an 8-bit mask")
    if repeated := duplicates(str(item["id"]) for item in categories):
        raise ValueError(f"two COCO categories share the id {repeated[0]}")
    return tuple(item["name"] for item in categories)


def id_of(file_name: str) -> str:
    """The id of an image in the index: its file name without folder and suffix."""
    return PurePosixPath(file_name).stem


def _list_split(instances: dict[str, Any], folder: str, path: Path, problems: list[str]) -> tuple[Listed, ...]:
    numbers = class_numbers(instances)
    labels: dict[int, set[int]] = {image["id"]: set() for image in instances["images"]}
    if len(labels) < len(instances["images"]):
        problems.append(f"{path}: {len(instances['images']) - len(labels)} images share the id of another one")
    for annotation in instances["annotations"]:
        name = f"{path}: the annotation {annotation.get('id', '(without id)')} is"
        if annotation["image_id"] not in labels:
            problems.append(f"{name} of an unknown image, {annotation['image_id']}")
        elif annotation["category_id"] not in numbers:
            problems.append(f"{name} of an unknown category, {annotation['category_id']}")
        else:
            labels[annotation["image_id"]].add(numbers[annotation["category_id"]])
    listed = tuple(
        Listed(
            id_of(image["file_name"]),
            f"{folder}/{image['file_name']}",
            tuple(sorted(labels[image["id"]])),
            (image["width"], image["height"]),
        )
        for image in instances["images"]
        if labels[image["id"]]
    )
    problems.extend(f"{path}: two images are called {name}" for name in duplicates(image.id for image in listed))
    return listed
