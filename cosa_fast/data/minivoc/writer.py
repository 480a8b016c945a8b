"""Write MiniVOC to disk in VOC2012 layout."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from tqdm import tqdm

from cosa_fast.processes import mapped

from .render import render
from .scenes import CLASSES, COEXISTENCE, sample_scene

VERSION = 1
"""Raised whenever the same parameters give other images."""
VOID = 255
"""Mask value of the border around objects."""
_FOLDERS = {"JPEGImages": ".jpg", "Annotations": ".xml", "SegmentationClass": ".png"}
_SPLIT_NUMBERS = {"train": 0, "val": 1, "test": 2}
_JPEG_QUALITY = 90
_MIN_SIZE = 32


def generate(
    root: Path,
    *,
    train: int = 2000,
    val: int = 200,
    test: int = 200,
    size: int = 112,
    seed: int = 0,
    workers: int = 2,
    progress: bool = True,
) -> None:
    """Draw the dataset and write it under `root` in VOC2012 layout.

    The files depend on the arguments only, not on `workers`; a larger split begins with the images of a smaller one,
    and another `size` (pixels per side) shows the same scenes. `root` appears only once it is complete. If it holds the
    same dataset already, nothing is done.

    Raises:
        ValueError: An argument is out of range, or `root` holds something else.
    """
    counts = {"train": train, "val": val, "test": test}
    least = {"train": 0, "val": 0, "test": 0, "seed": 0, "size": _MIN_SIZE, "workers": 1}
    for name, value in {**counts, "seed": seed, "size": size, "workers": workers}.items():
        if value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
    description = {
        "name": "MiniVOC",
        "synthetic": True,
        "version": VERSION,
        "size": size,
        "seed": seed,
        "counts": counts,
        "coexistence": COEXISTENCE,
    }
    root = Path(root).absolute()
    if _is_kept(root, description):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        staging = Path(scratch) / root.name
        for folder in (*_FOLDERS, "ImageSets/Segmentation"):
            (staging / folder).mkdir(parents=True)
        tasks = [(split, index) for split, count in counts.items() for index in range(count)]
        draw = partial(_write_image, staging, size, seed)
        _run(draw, tasks, workers, progress)
        for split, count in counts.items():
            lines = [f"{_image_id(split, index)}\n" for index in range(count)]
            (staging / "ImageSets/Segmentation" / f"{split}.txt").write_text("".join(lines))
        (staging / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        (staging / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
        try:
            staging.rename(root)
        except OSError:
            # Another process may have finished the same dataset in the meantime.
            if not _is_kept(root, description):
                raise


def _is_kept(root: Path, description: dict[str, Any]) -> bool:
    """Whether `root` already is the described dataset; ValueError if it is anything else."""
    if not root.exists():
        return False
    fix = "delete it or choose another directory"
    try:
        found = json.loads((root / "dataset.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{root} exists but is no complete MiniVOC dataset: {fix}") from None
    if found != description:
        raise ValueError(f"{root} holds a dataset with other parameters ({found}, wanted {description}): {fix}")
    total = sum(description["counts"].values())
    for folder, suffix in _FOLDERS.items():
        present = len(list((root / folder).glob(f"*{suffix}")))
        if present != total:
            raise ValueError(f"{root / folder} holds {present} of {total} files: {fix}")
    return True


def _run(draw: "partial[None]", tasks: list[tuple[str, int]], workers: int, progress: bool) -> None:
    # disable=None shows the bar on terminals only.
    bar = partial(tqdm, total=len(tasks), desc="MiniVOC", unit="image", disable=None if progress else True)
    if workers == 1:
        _exhaust(bar(map(draw, tasks)))
        return
    with mapped(draw, tasks, workers, chunk=16) as written:
        _exhaust(bar(written))


def _exhaust(results: Iterable[None]) -> None:
    for _ in results:
        pass


def _image_id(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _write_image(root: Path, size: int, seed: int, task: tuple[str, int]) -> None:
    """Draw image `index` of `split` and write its three files."""
    split, index = task
    image_id = _image_id(split, index)
    scene = sample_scene(np.random.default_rng([seed, _SPLIT_NUMBERS[split], index]))
    rendering = render(scene, size)
    void = _void(rendering.instances)
    Image.fromarray(rendering.image).save(root / "JPEGImages" / f"{image_id}.jpg", quality=_JPEG_QUALITY)
    visible = np.where(void, 0, rendering.instances)
    class_ids = np.array([0, *(1 + CLASSES.index(item.name) for item in scene.items)], dtype=np.uint8)
    mask = Image.fromarray(np.where(void, np.uint8(VOID), class_ids[visible]))
    mask.putpalette(_voc_palette())
    mask.save(root / "SegmentationClass" / f"{image_id}.png")
    boxes = [(item.name, _box(visible == number)) for number, item in enumerate(scene.items, start=1)]
    annotation = _annotation(image_id, size, boxes)
    ET.indent(annotation)
    ET.ElementTree(annotation).write(root / "Annotations" / f"{image_id}.xml")


def _void(instances: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Border (size, size) just outside each instance, one pixel wide, or two from 224 pixels on."""
    width = 1 if len(instances) < 224 else 2
    grown = Image.fromarray(instances).filter(ImageFilter.MaxFilter(2 * width + 1))
    border: npt.NDArray[np.bool_] = np.asarray(grown) != instances
    return border


def _box(pixels: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the true pixels (size, size), both ends included, counted from 1 as in VOC."""
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    return int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1


def _annotation(image_id: str, size: int, boxes: list[tuple[str, tuple[int, int, int, int]]]) -> ET.Element:
    annotation = ET.Element("annotation")
    for tag, text in (("folder", "MiniVOC"), ("filename", f"{image_id}.jpg")):
        ET.SubElement(annotation, tag).text = text
    ET.SubElement(ET.SubElement(annotation, "source"), "database").text = "MiniVOC (synthetic)"
    extent = ET.SubElement(annotation, "size")
    for tag, value in zip(("width", "height", "depth"), (size, size, 3), strict=True):
        ET.SubElement(extent, tag).text = str(value)
    ET.SubElement(annotation, "segmented").text = "1"
    for name, box in boxes:
        element = ET.SubElement(annotation, "object")
        ET.SubElement(element, "name").text = name
        ET.SubElement(element, "difficult").text = "0"
        bounds = ET.SubElement(element, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ET.SubElement(bounds, tag).text = str(value)
    return annotation


def _voc_palette() -> bytes:
    """The 256 RGB colours of VOC: index bits go to red, green and blue in turn, from the highest colour bit down."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette.tobytes()
