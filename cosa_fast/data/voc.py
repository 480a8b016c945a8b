"""PASCAL VOC 2012 and datasets in its layout: JPEGImages/, Annotations/, ImageSets/.

Image-level labels come from the XML annotations alone: a class is present if any <object> has its name, the ones
marked `difficult` or `truncated` included. No mask is opened.
"""

from __future__ import annotations

import difflib
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

from cosa_fast.data.classes import MAX_CLASSES, VOC_CLASSES
from cosa_fast.data.verify import Listed, Listing, duplicates
from cosa_fast.files import read_json

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png")
LIST_FOLDERS = ("ImageSets/Segmentation", "ImageSets/SegmentationAug", "ImageSets/Main")
AUG_MASKS = "SegmentationClassAug"
SBD_FOLDERS = ("benchmark_RELEASE/dataset", "SBD", "sbd")


def list_voc(root: Path, splits: Sequence[str]) -> Listing:
    """Read the image lists and XML annotations of `splits`.

    The classes are VOC's 20, or the lines of `root`/classes.txt. What is wrong with single annotations is collected in
    `problems`; an image with such an annotation is listed without labels.

    Raises:
        ValueError: the root or a folder of it is missing, a split's list is missing, empty or names an image twice,
            or classes.txt is unusable.
    """
    _require_layout(root)
    root = root.resolve()
    classes = _read_classes(root / "classes.txt")
    about: dict[str, object] = {}
    if (root / "dataset.json").exists():
        about = read_json(root / "dataset.json", "dataset description", "delete it or generate the dataset again")
    ids = {split: read_split(root, split) for split in splits}
    numbers = {name: number for number, name in enumerate(classes)}
    listed: dict[str, Listed] = {}
    problems: list[str] = []
    for image_id in dict.fromkeys(image_id for members in ids.values() for image_id in members):
        labels, size = _read_annotation(root / "Annotations" / f"{image_id}.xml", numbers, problems)
        listed[image_id] = Listed(image_id, _image_path(root, image_id), labels, size)
    return Listing(
        name=str(about.get("name", root.name)),
        format="voc",
        synthetic=bool(about.get("synthetic", False)),
        root=root,
        classes=classes,
        splits={split: tuple(listed[image_id] for image_id in members) for split, members in ids.items()},
        problems=tuple(problems),
    )


def read_split(root: Path, split: str) -> list[str]:
    """The image ids of a split, in the order of its list.

    A split is a list in ImageSets (Segmentation first, then Main). Without one, `trainval` is train + val, and
    `train_aug` is every mask name in SegmentationClassAug, or SBD's own train and val lists with VOC's train, less val.

    Raises:
        ValueError: there is no such list, it is empty, or it names an image twice.
    """
    path = find_list(root, split)
    if path is not None:
        ids = _read_list(path)
        source = str(path)
    elif split == "trainval" and find_list(root, "train") and find_list(root, "val"):
        ids = list(dict.fromkeys([*read_split(root, "train"), *read_split(root, "val")]))
        source = f"the lists train and val of {root}"
    elif split == "train_aug":
        ids, source = _derive_train_aug(root)
        logger.info("train_aug: %d images, derived from %s", len(ids), source)
    else:
        known = sorted({path.stem for folder in LIST_FOLDERS for path in (root / folder).glob("*.txt")})
        raise ValueError(
            f"no image list for the split {split!r}: {root / LIST_FOLDERS[0] / f'{split}.txt'} and "
            f"{root / LIST_FOLDERS[-1] / f'{split}.txt'} do not exist"
            + _closest(split, known, "; the lists there are: ")
        )
    if not ids:
        raise ValueError(f"the split {split!r} is empty: {source} names no image")
    if repeated := duplicates(ids):
        raise ValueError(
            f"{source} names {len(repeated)} images more than once ({', '.join(repeated[:5])}): remove the repetitions"
        )
    return ids


def find_list(root: Path, split: str) -> Path | None:
    """The list file of a split, if there is one."""
    names = ("train_aug", "trainaug") if split == "train_aug" else (split,)
    candidates = [root / folder / f"{name}.txt" for folder in LIST_FOLDERS for name in names]
    return next((path for path in candidates if path.is_file()), None)


def _derive_train_aug(root: Path) -> tuple[list[str], str]:
    """The ids of train_aug and what they were derived from."""
    masks = root / AUG_MASKS
    lists = [root / folder / name for folder in SBD_FOLDERS for name in ("train.txt", "val.txt")]
    found = [path for path in lists if path.is_file()]
    if masks.is_dir():
        ids, source = {path.stem for path in masks.glob("*.png")}, str(masks)
    elif found:
        ids, source = {image_id for path in found for image_id in _read_list(path)}, ", ".join(map(str, found))
        ids |= set(read_split(root, "train"))
    else:
        raise ValueError(
            f"no train_aug in {root}: looked for ImageSets/Segmentation/train_aug.txt (or trainaug.txt, also in "
            f"ImageSets/SegmentationAug and ImageSets/Main), for masks in {AUG_MASKS}/, and for SBD's train.txt and "
            f"val.txt in {SBD_FOLDERS[0]}/. `voc.download: true` fetches SBD; `voc.train_split: train` does without"
        )
    return sorted(ids - set(read_split(root, "val"))), f"{source} less val"


def _require_layout(root: Path) -> None:
    if not root.is_dir():
        raise ValueError(f"voc.root = {root} is not a folder: give the VOC2012 folder, or set voc.download: true")
    missing = [name for name in ("JPEGImages", "Annotations", "ImageSets") if not (root / name).is_dir()]
    if missing:
        inside = [child for child in (root / "VOCdevkit/VOC2012", root / "VOC2012") if (child / "JPEGImages").is_dir()]
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise ValueError(f"voc.root = {root} has no {', '.join(missing)}{hint}")


def _read_classes(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return VOC_CLASSES
    classes = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not 1 <= len(classes) <= MAX_CLASSES:
        raise ValueError(f"{path} holds {len(classes)} classes: between 1 and {MAX_CLASSES} fit an 8-bit mask")
    if repeated := duplicates(classes):
        raise ValueError(f"{path} holds a class more than once: {', '.join(repeated)}")
    if "background" in classes:
        raise ValueError(f"{path} lists background: leave it out, it is mask value 0 and never an image-level label")
    return classes


def _read_list(path: Path) -> list[str]:
    """Ids of a list whose lines are `id`, `id flag` or `image-path mask-path`."""
    try:
        words = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the image list {path}: {error}") from None
    names = [Path(word).name for word in words]
    return [Path(name).stem if name.lower().endswith(SUFFIXES) else name for name in names]


def _image_path(root: Path, image_id: str) -> str:
    paths = [f"JPEGImages/{image_id}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if (root / path).exists()), paths[0])


def _read_annotation(
    path: Path, numbers: dict[str, int], problems: list[str]
) -> tuple[tuple[int, ...], tuple[int, int] | None]:
    """Class numbers and (width, height) from an XML file; what is wrong with it is added to `problems`."""
    try:
        annotation = ET.parse(path).getroot()
    except FileNotFoundError:
        problems.append(f"{path} is missing: the image has no image-level labels")
        return (), None
    except (ET.ParseError, OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} is not valid XML: {error}")
        return (), None
    # Only direct children: VOC nests the parts of persons (head, hand) in their objects.
    names = {(item.findtext("name") or "").strip() for item in annotation.findall("object")}
    for name in sorted(names - numbers.keys()):
        problems.append(f"{path}: unknown class {name!r}{_closest(name, numbers, '; known classes: ')}")
    if not names:
        problems.append(f"{path}: no <object>, so the image has no image-level label; take it out of the split's list")
    size = annotation.findtext("size/width"), annotation.findtext("size/height")
    try:
        declared = int(float(size[0] or "")), int(float(size[1] or ""))
    except ValueError:
        return _numbers_of(names, numbers), None
    return _numbers_of(names, numbers), declared


def _numbers_of(names: Iterable[str], numbers: dict[str, int]) -> tuple[int, ...]:
    return tuple(sorted(numbers[name] for name in names if name in numbers))


def _closest(name: str, known: Iterable[str], introduction: str) -> str:
    """The end of a sentence about an unknown name."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f" (did you mean {close[0]!r}?)" if close else "") + introduction + (", ".join(known) or "none")
