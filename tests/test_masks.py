"""Ground-truth masks: found, rendered, checked; never needed by anything but evaluation."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from pycocotools import mask as rle
from tiny_datasets import HEIGHT, WIDTH, annotation, box, coco_json, small_voc, write_coco, write_mask

from cosa_fast.config import CocoConfig, DataConfig, MiniVocConfig, VocConfig
from cosa_fast.data.classes import voc_palette
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import load_masks, prepare_masks, read_mask, render
from cosa_fast.data.prepare import prepare_index

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/photos is not here")

BLANK = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)


def make_index(tmp_path: Path, *, voc: dict[str, Any] | None = None, coco: dict[str, Any] | None = None) -> Index:
    return prepare_index(
        tmp_path / "index.json",
        tmp_path / "cache",
        data=DataConfig(dataset="voc" if coco is None else "coco"),
        voc=VocConfig(**{"train_split": "train"} | (voc or {})),
        coco=CocoConfig(**(coco or {})),
        minivoc=MiniVocConfig(),
    )


def make_masks(tmp_path: Path, threads: int = 2) -> None:
    prepare_masks(tmp_path / "index.json", tmp_path / "masks.json", tmp_path / "cache", threads=threads)


def voc_with_masks(root: Path, *ids: str) -> Path:
    for image_id in ids:
        write_mask(root / f"SegmentationClass/{image_id}.png", BLANK + 12)
    return small_voc(root)


# VOC


def test_evaluation_masks_are_required_and_training_masks_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = voc_with_masks(tmp_path / "voc", "b", "c")
    make_index(tmp_path, voc={"root": root})
    with caplog.at_level(logging.INFO):
        make_masks(tmp_path)
    assert "1 of the 2 training images have a mask" in caplog.text
    content = json.loads((tmp_path / "masks.json").read_text())
    mask = str(root / "SegmentationClass/c.png")
    assert content["masks"] == {"train": {"b": str(root / "SegmentationClass/b.png")}, "val": {"c": mask}}
    masks = load_masks(tmp_path / "masks.json", tmp_path / "index.json")
    assert (masks.has("val"), masks.has("train"), masks.has("other")) == (True, False, False)
    assert masks.path("val", "c") == Path(mask)
    assert (read_mask(masks.path("val", "c"), (WIDTH, HEIGHT)) == 12).all()
    with pytest.raises(ValueError, match="image a of the split 'train' has no mask"):
        masks.path("train", "a")


def test_no_mask_at_all_is_needed_without_evaluation(tmp_path: Path) -> None:
    make_index(tmp_path, voc={"root": small_voc(tmp_path / "voc"), "eval_splits": ()})
    make_masks(tmp_path)
    masks = load_masks(tmp_path / "masks.json")
    assert masks.paths == {"train": {}}
    assert masks.complete == ()


def test_train_aug_prefers_the_augmented_masks(tmp_path: Path) -> None:
    root = voc_with_masks(tmp_path / "voc", "a", "b", "c")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("a\nb\n")
    for image_id in ("a", "c"):
        write_mask(root / f"SegmentationClassAug/{image_id}.png", BLANK + 1)
    make_index(tmp_path, voc={"root": root, "train_split": "train_aug"})
    make_masks(tmp_path)
    masks = load_masks(tmp_path / "masks.json")
    folders = [masks.path(*key).parent.name for key in (("train_aug", "a"), ("train_aug", "b"), ("val", "c"))]
    assert folders == ["SegmentationClassAug", "SegmentationClass", "SegmentationClass"]
    assert masks.has("train_aug")


def bad_masks(tmp_path: Path, message: str, values: np.ndarray | bytes | None = None, image: str = "c") -> str:
    """The error for a VOC dataset in which the mask of `image` is replaced, or deleted."""
    root = voc_with_masks(tmp_path / "voc", "a", "b", "c")
    path = root / f"SegmentationClass/{image}.png"
    path.unlink()
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif values is not None:
        PilImage.fromarray(values).save(path)
    make_index(tmp_path, voc={"root": root})
    with pytest.raises(ValueError, match=message) as caught:
        make_masks(tmp_path)
    assert not (tmp_path / "masks.json").exists()
    return str(caught.value)


def test_missing_evaluation_mask(tmp_path: Path) -> None:
    message = bad_masks(tmp_path, "SegmentationClass/c.png is missing")
    assert "1 problem in the masks of voc" in message
    assert "eval_splits: [] trains without any" in message


def test_mask_of_another_size(tmp_path: Path) -> None:
    bad_masks(tmp_path, "c.png is 8x12, but its image is 12x8", np.zeros((12, 8), dtype=np.uint8))


def test_mask_with_unknown_values(tmp_path: Path) -> None:
    values = BLANK.copy()
    values[0, :5] = 0, 20, 21, 254, 255
    bad_masks(tmp_path, "c.png holds the values 21, 254: classes are 1..20, 255 is ignored", values)


def test_mask_in_colour(tmp_path: Path) -> None:
    bad_masks(tmp_path, "c.png has mode RGB: a mask holds class values", np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8))


def test_unreadable_mask(tmp_path: Path) -> None:
    bad_masks(tmp_path, "c.png cannot be read", b"\x89PNG\r\n\x1a\n broken")


def test_training_masks_that_exist_are_checked_too(tmp_path: Path) -> None:
    bad_masks(tmp_path, "a.png holds the value 99", BLANK + np.uint8(99), image="a")


def test_mask_list_of_another_index(tmp_path: Path) -> None:
    root = voc_with_masks(tmp_path / "voc", "a", "b", "c")
    make_index(tmp_path, voc={"root": root})
    make_masks(tmp_path)
    make_index(tmp_path, voc={"root": root, "eval_splits": ()})
    load_masks(tmp_path / "masks.json")
    with pytest.raises(ValueError, match="was made for another index"):
        load_masks(tmp_path / "masks.json", tmp_path / "index.json")
    with pytest.raises(ValueError, match=r"cannot read the mask list .*run `cosa-fast data masks`"):
        load_masks(tmp_path / "absent.json")
    (tmp_path / "masks.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="not a mask list of schema 1"):
        load_masks(tmp_path / "masks.json")


# COCO


def test_rendering_by_hand() -> None:
    everything = {"size": [4, 6], "counts": [0, 24]}
    left_column = {"size": [4, 6], "counts": [0, 4, 20]}  # run lengths go down the columns
    small, large = [box(1, 1, 3, 3)], [box(0, 0, 5, 4)]
    expected = [
        [2, 2, 2, 2, 2, 0],
        [2, 1, 1, 2, 2, 0],
        [2, 1, 1, 2, 2, 0],
        [2, 2, 2, 2, 2, 0],
    ]
    assert render(4, 6, [(1, False, small), (2, False, large)]).tolist() == expected
    assert render(4, 6, [(2, False, large), (1, False, small)]).tolist() == expected
    with_crowd = np.array(expected)
    with_crowd[:, 5] = 255
    assert (render(4, 6, [(1, False, small), (3, True, everything), (2, False, large)]) == with_crowd).all()
    compressed = rle.frPyObjects(left_column, 4, 6)
    assert render(4, 6, [(7, False, compressed)]).tolist() == [[7, 0, 0, 0, 0, 0]] * 4
    two_parts = render(2, 6, [(1, False, [box(0, 0, 1, 2), box(4, 0, 6, 2)])])
    assert two_parts.tolist() == [[1, 0, 0, 0, 1, 1]] * 2
    assert not render(4, 6, [(1, False, []), (2, False, [[0, 0, 5, 5]])]).any()


@pytest.mark.parametrize("counts", [[0, 24], [0, 23]])
def test_run_lengths_of_another_size(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="run lengths"):
        render(4, 6, [(1, False, {"size": [6, 4] if sum(counts) == 24 else [4, 6], "counts": counts})])


def small_coco(root: Path) -> Path:
    crowd = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT, (WIDTH - 1) * HEIGHT]}  # the left column
    train = [annotation(1, 1, 7, [box(0, 0, 4, 4)]), annotation(2, 1, 90, crowd, iscrowd=1), annotation(3, 3, 2, [])]
    write_coco(root, "train2014", coco_json([1, 3], train))
    return write_coco(root, "val2014", coco_json([4], [annotation(4, 4, 90, [box(0, 0, 2, 2)])]))


def test_coco_masks_are_rendered_once(tmp_path: Path) -> None:
    root = small_coco(tmp_path / "coco")
    make_index(tmp_path, coco={"root": root})
    make_masks(tmp_path)
    masks = load_masks(tmp_path / "masks.json", tmp_path / "index.json")
    assert masks.has("train")
    assert masks.has("val")
    path = masks.path("train", "000000000001")
    expected = BLANK.copy()
    expected[:, 0] = 255
    expected[:4, :4] = 2  # categories 2, 7, 90 are classes 0, 1, 2: mask values 1, 2, 3
    assert (read_mask(path, (WIDTH, HEIGHT)) == expected).all()
    assert not read_mask(masks.path("train", "000000000003"), (WIDTH, HEIGHT)).any()
    assert np.unique(read_mask(masks.path("val", "000000000004"), (WIDTH, HEIGHT))).tolist() == [0, 3]
    with PilImage.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette() == voc_palette()

    (path.parent / ".000000000009.png.1.tmp").write_bytes(b"left by a killed process")
    masks.path("train", "000000000003").unlink()
    times = path.stat().st_mtime_ns
    make_masks(tmp_path, threads=1)
    assert path.stat().st_mtime_ns == times
    assert masks.path("train", "000000000003").exists()
    assert not list(path.parent.glob(".*.tmp"))


def test_other_annotations_give_other_files(tmp_path: Path) -> None:
    root = small_coco(tmp_path / "coco")
    make_index(tmp_path, coco={"root": root})
    make_masks(tmp_path)
    before = load_masks(tmp_path / "masks.json").path("val", "000000000004")
    write_coco(root, "val2014", coco_json([4], [annotation(4, 4, 2, [box(0, 0, 2, 2)])]))
    make_index(tmp_path, coco={"root": root})
    make_masks(tmp_path)
    after = load_masks(tmp_path / "masks.json").path("val", "000000000004")
    assert after != before
    assert np.unique(read_mask(after, (WIDTH, HEIGHT))).tolist() == [0, 1]


def test_bad_outlines_name_the_image(tmp_path: Path) -> None:
    root = small_coco(tmp_path / "coco")
    crowd = {"size": [3, 3], "counts": [0, 9]}
    write_coco(root, "val2014", coco_json([4], [annotation(4, 4, 90, crowd, iscrowd=1)]))
    make_index(tmp_path, coco={"root": root})
    with pytest.raises(ValueError, match=r"(?s)annotations of val2014 .*000000000004 cannot be rendered: run lengths"):
        make_masks(tmp_path)


def test_killed_rendering_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    numbers = range(1, 1001)
    regions = [annotation(number, number, 7, [box(0, 0, 4, 4)]) for number in numbers]
    content = coco_json(numbers, regions)
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_train2014.json").write_text(json.dumps(content))
    images = tuple(Image(f"{number:012d}", f"train2014/{number:012d}.jpg", WIDTH, HEIGHT, (1,)) for number in numbers)
    classes = ("apple", "zebra", "brush")
    root = str(tmp_path / "coco")
    index = Index("COCO2014", "coco", False, root, classes, "train", ("train",), {"train": images})
    index.save(tmp_path / "index.json")
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom cosa_fast.data.masks import prepare_masks\n"
        f"if __name__ == '__main__':\n    folder = Path({str(tmp_path)!r})\n"
        "    prepare_masks(folder / 'index.json', folder / 'masks.json', folder / 'cache')\n"
    )
    process = subprocess.Popen([sys.executable, script], stderr=subprocess.DEVNULL, start_new_session=True)

    def rendered() -> int:
        return len(list((tmp_path / "cache/masks").glob("*/*.png")))

    try:
        deadline = time.monotonic() + 60
        while not rendered() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        gone = time.monotonic() + 30
        while _group_is_alive(process.pid) and time.monotonic() < gone:
            time.sleep(0.05)
    assert not _group_is_alive(process.pid)
    assert 0 < rendered() < 1000
    make_masks(tmp_path)
    assert rendered() == 1000
    assert load_masks(tmp_path / "masks.json").has("train")


def _group_is_alive(group: int) -> bool:
    """Whether a process of the group runs (one that has ended but was not waited for does not)."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, members = path.read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):
            continue
        if int(members) == group and state != "Z":
            return True
    return False


# Real photographs


@needs_photos
def test_masks_of_the_voc_photographs_hold_exactly_the_labels(tmp_path: Path) -> None:
    index = make_index(tmp_path, voc={"root": PHOTOS / "voc/VOC2012"})
    make_masks(tmp_path)
    masks = load_masks(tmp_path / "masks.json")
    assert masks.has("train")
    for split, images in index.splits.items():
        for image in images:
            values = set(np.unique(read_mask(masks.path(split, image.id), (image.width, image.height))).tolist())
            assert values - {0, 255} == {label + 1 for label in image.labels}, image.id


@needs_photos
def test_rendered_masks_equal_the_voc_ones_but_for_their_borders(tmp_path: Path) -> None:
    to_voc = {"airplane": "aeroplane", "dining table": "diningtable", "motorcycle": "motorbike"}
    to_voc |= {"potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor"}
    content = json.loads((PHOTOS / "coco/annotations/instances_train2017.json").read_text())
    voc = make_index(tmp_path, voc={"root": PHOTOS / "voc/VOC2012"})
    # COCO annotates more classes than VOC, on top of VOC's: leave those out.
    for category in content["categories"]:
        category["name"] = to_voc.get(category["name"], category["name"])
    kept = {category["id"] for category in content["categories"] if category["name"] in voc.classes}
    content["annotations"] = [item for item in content["annotations"] if item["category_id"] in kept]
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_train2017.json").write_text(json.dumps(content))
    (tmp_path / "coco/train2017").symlink_to(PHOTOS / "coco/train2017")
    coco = make_index(tmp_path, coco={"root": tmp_path / "coco", "year": 2017, "eval_splits": ("train",)})
    make_masks(tmp_path)
    masks = load_masks(tmp_path / "masks.json")
    values = np.zeros(256, dtype=np.uint8)
    values[255] = 255
    for number, name in enumerate(coco.classes):
        values[number + 1] = voc.classes.index(name) + 1 if name in voc.classes else 0
    compared = borders = 0
    for image in (image for images in voc.splits.values() for image in images):
        size = image.width, image.height
        theirs = read_mask(PHOTOS / f"voc/VOC2012/SegmentationClass/{image.id}.png", size)
        ours = values[read_mask(masks.path("train", f"{int(image.id.split('_')[1]):012d}"), size)]
        inside = theirs != 255
        assert (ours[inside] == theirs[inside]).all(), image.id
        compared += inside.sum()
        borders += (~inside & (ours != 255)).sum()
    assert borders < 0.03 * compared
