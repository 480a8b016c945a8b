"""Ground-truth masks: the only module that opens them, for evaluation and the oracle experiment alone.

A mask is an 8-bit single-channel image: 0 is background, c + 1 is class c, 255 is ignored.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from pycocotools import mask as rle
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from cosa_fast.data.classes import IGNORED, voc_palette
from cosa_fast.data.coco import annotation_path, class_numbers, id_of, read_instances
from cosa_fast.data.index import Image, Index
from cosa_fast.data.verify import raise_problems
from cosa_fast.data.voc import AUG_MASKS
from cosa_fast.files import describe_os_error, exclusive, read_json, sha256, write_atomically
from cosa_fast.processes import mapped

logger = logging.getLogger(__name__)

SCHEMA = 1

_PALETTE = voc_palette()

Segmentation = Sequence[Any] | Mapping[str, Any]
"""Polygons (x, y, x, y, ... in pixels), or COCO run lengths."""


@dataclass(frozen=True, slots=True)
class Masks:
    """Where the masks of a dataset are."""

    index_sha256: str
    """SHA-256 of the index they belong to."""
    complete: tuple[str, ...]
    paths: dict[str, dict[str, str]]
    """Split -> image id -> absolute path."""

    def has(self, split: str) -> bool:
        """Whether every image of the split has a mask."""
        return split in self.complete

    def path(self, split: str, image_id: str) -> Path:
        """The mask of one image.

        Raises:
            ValueError: it has none.
        """
        try:
            return Path(self.paths[split][image_id])
        except KeyError:
            raise ValueError(f"the image {image_id} of the split {split!r} has no mask") from None


def load_masks(path: Path, index: Path | None = None) -> Masks:
    """Read what `prepare_masks` wrote.

    Raises:
        ValueError: the file is missing, not JSON, of another schema, or made for another index than `index`.
    """
    content = read_json(path, "mask list", "run `cosa-fast data masks`")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a mask list of schema {SCHEMA}: make it again with `cosa-fast data masks`")
    if index is not None and content["index_sha256"] != sha256(index):
        raise ValueError(f"{path} was made for another index than {index}: make it again with `cosa-fast data masks`")
    return Masks(content["index_sha256"], tuple(content["complete"]), content["masks"])


def read_mask(path: Path, expected_size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) uint8 class values of a mask whose image has `expected_size` = (width, height) pixels.

    Raises:
        ValueError: the file is missing or unreadable, is not 8-bit with one channel, or is of another size.
    """
    try:
        with PilImage.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(
                    f"{path} has mode {image.mode}: a mask holds class values (palette or 8-bit greyscale)"
                )
            if image.size != expected_size:
                raise ValueError(
                    f"{path} is {image.width}x{image.height}, but its image is {expected_size[0]}x{expected_size[1]}"
                )
            return np.array(image, dtype=np.uint8)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error ...
        raise ValueError(f"{path} cannot be read: {error}") from None


def prepare_masks(index: Path, output: Path, cache: Path, *, threads: int = 2) -> None:
    """Find (VOC) or render into `cache` (COCO) the masks of an index, check them all, and list them in `output`.

    Every image of the evaluation splits needs a mask. For the training split those that exist are listed: VOC's
    train_aug looks into SegmentationClassAug first, and COCO has all of them.

    Raises:
        ValueError: masks are missing, unreadable, of another size than their image, or hold unknown class values; the
            first of them and their number.
    """
    dataset = Index.load(index)
    masks: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for split, images in dataset.splits.items():
        if dataset.format == "coco":
            paths = _render_split(dataset, images, cache, threads)
        else:
            paths = {image.id: _voc_mask(Path(dataset.root), split, image.id) for image in images}
        if split not in dataset.eval_splits:
            paths = {image_id: path for image_id, path in paths.items() if path.is_file()}
            logger.info("%d of the %d training images have a mask", len(paths), len(images))
        checked = [(paths[image.id], (image.width, image.height)) for image in images if image.id in paths]
        check = partial(_check, classes=len(dataset.classes))
        found = thread_map(
            check, checked, max_workers=threads, desc=f"checking {split} masks", unit="mask", disable=None
        )
        problems.extend(problem for problem in found if problem)
        masks[split] = {image_id: str(path) for image_id, path in paths.items()}
    raise_problems(
        problems,
        f"the masks of {dataset.name}",
        "evaluation needs a mask for every image of the eval_splits; eval_splits: [] trains without any",
    )
    complete = [split for split, images in dataset.splits.items() if len(masks[split]) == len(images)]
    content = {"schema": SCHEMA, "index_sha256": sha256(index), "complete": complete, "masks": masks}
    write_atomically(output, json.dumps(content, indent=1).encode())


def _voc_mask(root: Path, split: str, image_id: str) -> Path:
    augmented = root / AUG_MASKS / f"{image_id}.png"
    return augmented if split == "train_aug" and augmented.is_file() else root / f"SegmentationClass/{image_id}.png"


def _check(mask: tuple[Path, tuple[int, int]], classes: int) -> str | None:
    """What is wrong with a mask file, or nothing."""
    path, size = mask
    try:
        values = np.flatnonzero(np.bincount(read_mask(path, size).ravel(), minlength=256))
    except ValueError as error:
        return str(error)
    unknown = values[(values > classes) & (values != IGNORED)]
    if unknown.size:
        return (
            f"{path} holds the value{'s' if unknown.size > 1 else ''} {', '.join(map(str, unknown))}: "
            f"classes are 1..{classes}, {IGNORED} is ignored"
        )
    return None


# COCO


@dataclass(frozen=True, slots=True)
class _Picture:
    """The annotations of one image, to be rendered to `target`."""

    target: Path
    width: int
    height: int
    regions: tuple[tuple[int, bool, Segmentation], ...]
    """Mask value, whether it is a crowd, and its outline."""


def render(height: int, width: int, regions: Sequence[tuple[int, bool, Segmentation]]) -> NDArray[np.uint8]:
    """(height, width) uint8 semantic mask of instances (mask value, whether it is a crowd, segmentation).

    Large instances are painted first, so that small ones stay visible on top of them. Crowds are ignored (255) where
    no instance covers them.

    Raises:
        ValueError: run lengths that are not of the image's size.
    """
    canvas = np.zeros((height, width), dtype=np.uint8)
    encoded = [(value, crowd, _encode(outline, height, width)) for value, crowd, outline in regions]
    drawn = [(value, crowd, code) for value, crowd, code in encoded if code is not None]
    for value, crowd, code in sorted(drawn, key=lambda region: (not region[1], -float(rle.area(region[2])))):
        canvas[rle.decode(code).astype(bool)] = IGNORED if crowd else value
    return canvas


def _encode(outline: Segmentation, height: int, width: int) -> dict[str, Any] | None:
    """Compressed run lengths, or None for an outline without area."""
    if isinstance(outline, Mapping):
        if list(outline["size"]) != [height, width]:
            raise ValueError(f"run lengths for {outline['size']} in an image of [{height}, {width}]")
        if not isinstance(outline["counts"], list):
            return dict(outline)
        if sum(outline["counts"]) != height * width:
            raise ValueError(f"run lengths add up to {sum(outline['counts'])}, not {height} * {width}")
        return rle.frPyObjects(dict(outline), height, width)
    polygons = [list(polygon) for polygon in outline if len(polygon) >= 6]  # pycocotools takes 4 numbers for a box
    return rle.merge(rle.frPyObjects(polygons, height, width)) if polygons else None


def _render_split(dataset: Index, images: Sequence[Image], cache: Path, threads: int) -> dict[str, Path]:
    """Render the masks that `cache` lacks; image id -> path."""
    folder = images[0].path.split("/", 1)[0]
    source = annotation_path(Path(dataset.root), folder)
    if not source.is_file():
        raise ValueError(f"{source} is missing: the masks of {folder} are rendered from it")
    target = cache / "masks" / f"{source.stem}-{sha256(source)[:16]}"
    paths = {image.id: (target / f"{image.id}.png").absolute() for image in images}
    missing = {image_id for image_id, path in paths.items() if not path.exists()}
    if missing:
        with exclusive(target):
            for leftover in target.glob(".*.tmp"):
                leftover.unlink()
            _render_all(_pictures(source, paths, missing), folder, threads)
    return paths


def _pictures(source: Path, paths: Mapping[str, Path], wanted: set[str]) -> list[_Picture]:
    instances = read_instances(source, polygons=True)
    numbers = class_numbers(instances)
    regions: dict[int, list[tuple[int, bool, Segmentation]]] = defaultdict(list)
    for item in instances["annotations"]:
        region = numbers[item["category_id"]] + 1, bool(item.get("iscrowd", 0)), item.get("segmentation") or []
        regions[item["image_id"]].append(region)
    return [
        _Picture(paths[name], image["width"], image["height"], tuple(regions[image["id"]]))
        for image in instances["images"]
        if (name := id_of(image["file_name"])) in wanted
    ]


def _render_all(pictures: Sequence[_Picture], folder: str, threads: int) -> None:
    # pycocotools keeps the interpreter lock, hence processes.
    bar = tqdm(total=len(pictures), desc=f"rendering {folder} masks", unit="mask", disable=None)
    problems = []
    with bar, mapped(_render_file, pictures, threads, chunk=32) as found:
        for problem in found:
            if problem:
                problems.append(problem)
            bar.update()
    raise_problems(problems, f"the annotations of {folder}", "mend them, or take the images out of the JSON")


def _render_file(picture: _Picture) -> str | None:
    """Write one mask, whole or not at all; what is wrong with its annotations, or nothing."""
    temporary = picture.target.with_name(f".{picture.target.name}.{os.getpid()}.tmp")
    try:
        image = PilImage.fromarray(render(picture.height, picture.width, picture.regions))
    except Exception as error:  # pycocotools raises bare Exceptions
        return f"{picture.target.stem} cannot be rendered: {error}"
    image.putpalette(_PALETTE)
    try:
        image.save(temporary, "PNG")
        os.replace(temporary, picture.target)
    except OSError as error:
        raise ValueError(describe_os_error(error, picture.target)) from None
    return None
