"""The dataset index: what is listed, and what each kind of bad input says."""

from __future__ import annotations

import json
import logging
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PilImage
from tiny_datasets import annotation, box, coco_json, small_voc, write_coco, write_jpeg, write_voc, xml

from cosa_fast.config import CocoConfig, DataConfig, MiniVocConfig, VocConfig
from cosa_fast.data.classes import COCO_CLASSES, VOC_CLASSES, voc_palette
from cosa_fast.data.index import Image, Index
from cosa_fast.data.prepare import prepare_index
from cosa_fast.data.voc import read_split

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/photos is not here")


def index_voc(tmp_path: Path, root: Path | None, verify: str = "decode", threads: int = 2, **voc: Any) -> Index:
    settings = VocConfig(root=root, **({"train_split": "train"} | voc))
    return prepare_index(
        tmp_path / "index.json",
        tmp_path / "cache",
        data=DataConfig.model_validate({"verify": verify}),
        voc=settings,
        coco=CocoConfig(),
        minivoc=MiniVocConfig(train=3, val=2, test=1, size=32),
        threads=threads,
    )


def index_coco(tmp_path: Path, root: Path | None, **coco: Any) -> Index:
    return prepare_index(
        tmp_path / "index.json",
        tmp_path / "cache",
        data=DataConfig(dataset="coco"),
        voc=VocConfig(),
        coco=CocoConfig(root=root, **coco),
        minivoc=MiniVocConfig(),
    )


# What is listed


def test_palette_is_the_published_voc_colour_map() -> None:
    palette = np.array(voc_palette()).reshape(256, 3).tolist()
    assert palette[:4] == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[15] == [192, 128, 128]
    assert palette[20] == [0, 64, 128]
    assert palette[255] == [224, 224, 192]


def test_voc_labels_come_from_all_objects_of_the_xml(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "Annotations/b.xml").write_text(
        "<annotation><size><width>12</width><height>8</height></size>"
        "<object><name> person </name><part><name>head</name></part></object>"
        "<object><name>bus</name><difficult>1</difficult><truncated>1</truncated></object></annotation>"
    )
    index = index_voc(tmp_path, root)
    assert index.classes == VOC_CLASSES
    assert index.train == (
        Image("a", "JPEGImages/a.jpg", 12, 8, (7, 11)),
        Image("b", "JPEGImages/b.jpg", 12, 8, (5, 14)),
    )
    assert index.splits["val"] == (Image("c", "JPEGImages/c.jpg", 12, 8, (11,)),)
    assert (index.name, index.format, index.synthetic, index.eval_splits) == ("voc", "voc", False, ("val",))
    assert index.root == str(root.resolve())
    assert Index.load(tmp_path / "index.json") == index
    hot = index.multi_hot(index.train)
    assert hot.shape == (2, 20)
    assert np.argwhere(hot).tolist() == [[0, 7], [0, 11], [1, 5], [1, 14]]


def test_index_neither_needs_nor_names_masks(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    without = index_voc(tmp_path, root)
    (root / "SegmentationClass").mkdir()
    (root / "SegmentationClass/a.png").write_bytes(b"not even an image")
    assert index_voc(tmp_path, root) == without
    assert "Segmentation" not in (tmp_path / "index.json").read_text()
    assert "png" not in (tmp_path / "index.json").read_text()


def test_size_is_the_stored_one_whatever_xml_and_exif_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "Annotations/b.xml").write_text(xml(["person"], width=99, height=8))
    exif = PilImage.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    PilImage.new("RGB", (12, 8)).save(root / "JPEGImages/c.jpg", exif=exif)
    with caplog.at_level(logging.WARNING):
        index = index_voc(tmp_path, root)
    assert [(image.width, image.height) for split in index.splits.values() for image in split] == [(12, 8)] * 3
    assert "in the XML of 1 images is wrong and ignored" in caplog.text
    assert "(99, 8)" in caplog.text


def test_training_on_evaluation_images_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index_voc(tmp_path, small_voc(tmp_path / "voc"), train_split="trainval")
    assert "1 images of the evaluation split val are also trained on" in caplog.text


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_jpeg_colour_spaces_are_fine(tmp_path: Path, mode: str) -> None:
    root = small_voc(tmp_path / "voc")
    write_jpeg(root / "JPEGImages/a.jpg", mode=mode)
    assert index_voc(tmp_path, root).train[0].width == 12


def test_custom_classes_and_png_images(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "mine", {"x": ["wheel"], "y": ["door"]}, {"train": ["x"], "val": ["y"]})
    (root / "classes.txt").write_text("door\n\nwheel\n")
    (root / "JPEGImages/x.jpg").unlink()
    PilImage.new("RGB", (5, 6)).save(root / "JPEGImages/x.png")
    index = index_voc(tmp_path, root)
    assert index.classes == ("door", "wheel")
    assert index.train == (Image("x", "JPEGImages/x.png", 5, 6, (1,)),)


def test_lists_may_hold_paths_or_flags_and_lie_in_main(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "ImageSets/Main").mkdir()
    (root / "ImageSets/Main/main.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\n\nb  1\n")
    assert read_split(root, "main") == ["a", "b"]
    assert read_split(root, "trainval") == ["a", "b", "c"]


def test_train_aug_list_comes_before_any_derivation(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "SegmentationClassAug").mkdir()
    for name in ("a", "b", "c"):
        (root / f"SegmentationClassAug/{name}.png").write_bytes(b"never opened")
    assert read_split(root, "train_aug") == ["a", "b"]
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("b\n")
    assert read_split(root, "train_aug") == ["b"]
    (root / "ImageSets/Segmentation/train_aug.txt").write_text("a\n")
    assert read_split(root, "train_aug") == ["a"]


def test_train_aug_from_the_lists_of_sbd(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    folder = root / "benchmark_RELEASE/dataset"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("d\nc\n")
    (folder / "val.txt").write_text("e\n")
    assert read_split(root, "train_aug") == ["a", "b", "d", "e"]


def test_minivoc_is_the_default_and_says_it_is_synthetic(tmp_path: Path) -> None:
    index = index_voc(tmp_path, None, threads=1)
    assert index.synthetic
    assert index.name == "MiniVOC"
    assert {split: len(images) for split, images in index.splits.items()} == {"train": 3, "val": 2, "test": 1}
    assert index.root == str((tmp_path / "cache/minivoc-32-0-3-2-1").resolve())
    assert index.classes[0] == "aeroplane"
    assert len(index.classes) == 10
    assert all(image.labels for images in index.splits.values() for image in images)
    assert index_voc(tmp_path, None, eval_splits=()).eval_splits == ()


def small_coco(root: Path) -> Path:
    """Image 1: zebra twice and a crowd of brushes; image 2: nothing; image 3: apple."""
    crowd = {"size": [8, 12], "counts": [0, 96]}
    train = [
        annotation(1, 1, 7, [box(0, 0, 4, 4)]),
        annotation(2, 1, 7, [box(4, 4, 8, 8)]),
        annotation(3, 1, 90, crowd, iscrowd=1),
        annotation(4, 3, 2, [box(0, 0, 2, 2)]),
    ]
    write_coco(root, "train2014", coco_json([1, 2, 3], train))
    return write_coco(root, "val2014", coco_json([4], [annotation(5, 4, 2, [box(0, 0, 2, 2)])]))


def test_coco_labels_are_positions_of_sorted_category_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        index = index_coco(tmp_path, small_coco(tmp_path / "coco"))
    assert index.classes == ("apple", "zebra", "brush")
    assert index.train == (
        Image("000000000001", "train2014/000000000001.jpg", 12, 8, (1, 2)),
        Image("000000000003", "train2014/000000000003.jpg", 12, 8, (0,)),
    )
    assert index.splits["val"][0].labels == (0,)
    assert (index.name, index.format) == ("COCO2014", "coco")
    assert "train2014: 2 of 3 images have annotations, 1 are left out" in caplog.text


def test_only_the_coco_files_of_the_used_splits_are_read(tmp_path: Path) -> None:
    root = small_coco(tmp_path / "coco")
    (root / "annotations/instances_val2014.json").unlink()
    assert list(index_coco(tmp_path, root, eval_splits=()).splits) == ["train"]


@needs_photos
def test_photographs_in_voc_layout(tmp_path: Path) -> None:
    index = index_voc(tmp_path, PHOTOS / "voc/VOC2012")
    assert (index.name, len(index.train), len(index.splits["val"])) == ("VOC2012", 32, 15)
    counted = sum(index.multi_hot((*index.train, *index.splits["val"])).sum(axis=0))
    annotations = (PHOTOS / "voc/VOC2012/Annotations").glob("*.xml")
    assert counted == sum(len({item.text for item in ET.parse(path).iter("name")}) for path in annotations)


@needs_photos
def test_photographs_of_coco(tmp_path: Path) -> None:
    index = index_coco(tmp_path, PHOTOS / "coco", year=2017, eval_splits=("train",))
    assert index.classes == COCO_CLASSES
    assert len(index.train) == 62
    assert index.eval_splits == ("train",)


# Bad input


def bad_voc(tmp_path: Path, message: str, root: Path, **settings: Any) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        index_voc(tmp_path, root, **settings)
    assert not (tmp_path / "index.json").exists()
    return str(caught.value)


def test_root_missing_or_one_folder_off(tmp_path: Path) -> None:
    bad_voc(tmp_path, r"voc\.root = .*nowhere is not a folder", tmp_path / "nowhere")
    small_voc(tmp_path / "VOCdevkit/VOC2012")
    bad_voc(tmp_path, r"has no JPEGImages.*did you mean .*VOCdevkit/VOC2012\?", tmp_path)


def test_split_without_a_list(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    message = bad_voc(tmp_path, "no image list for the split 'trian'", root, train_split="trian")
    assert "did you mean 'train'?" in message
    assert "train, val" in message


def test_train_aug_without_sbd(tmp_path: Path) -> None:
    message = bad_voc(tmp_path, "no train_aug in", small_voc(tmp_path / "voc"), train_split="train_aug")
    for hint in (
        "train_aug.txt",
        "SegmentationClassAug",
        "benchmark_RELEASE",
        "voc.download",
        "voc.train_split: train",
    ):
        assert hint in message


def test_empty_split(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "ImageSets/Segmentation/val.txt").write_text("\n\n")
    bad_voc(tmp_path, "the split 'val' is empty: .*val.txt names no image", root)


def test_image_named_twice(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "ImageSets/Segmentation/val.txt").write_text("c\na\nc\n")
    bad_voc(tmp_path, r"val.txt names 1 images more than once \(c\)", root)


def test_missing_image(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "JPEGImages/b.jpg").unlink()
    bad_voc(tmp_path, "(?s)1 problem in .*JPEGImages/b.jpg is missing", root, verify="header")


def test_truncated_jpeg(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    write_jpeg(root / "JPEGImages/a.jpg", 200, 150)
    content = (root / "JPEGImages/a.jpg").read_bytes()
    (root / "JPEGImages/a.jpg").write_bytes(content[: len(content) * 3 // 4])
    bad_voc(tmp_path, "JPEGImages/a.jpg cannot be read: .*truncated", root)
    index_voc(tmp_path, root, verify="header")  # as documented: a header check does not see it


def test_jpeg_with_damaged_content(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    path = root / "JPEGImages/a.jpg"
    write_jpeg(path, 200, 150)
    content = bytearray(path.read_bytes())
    content[5000:6000] = np.random.default_rng(0).bytes(1000)
    path.write_bytes(content)
    bad_voc(tmp_path, "JPEGImages/a.jpg cannot be read: broken data stream", root)


@pytest.mark.parametrize("verify", ["decode", "header"])
def test_empty_and_foreign_files(tmp_path: Path, verify: str) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "JPEGImages/a.jpg").write_bytes(b"")
    (root / "JPEGImages/b.jpg").write_bytes(b"<html>404</html>" * 100)
    message = bad_voc(tmp_path, "2 problems", root, verify=verify)
    assert "a.jpg is empty (0 bytes)" in message
    assert "b.jpg is not an image" in message


def test_unknown_class_names_file_class_and_closest(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "Annotations/b.xml").write_text(xml(["persn", "cat"]))
    message = bad_voc(tmp_path, "Annotations/b.xml: unknown class 'persn'", root)
    assert "did you mean 'person'?" in message
    assert "known classes: aeroplane, bicycle" in message


def test_malformed_and_missing_xml_and_no_object(tmp_path: Path) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "Annotations/a.xml").write_text("<annotation><object>")
    (root / "Annotations/b.xml").unlink()
    (root / "Annotations/c.xml").write_text(xml([]))
    message = bad_voc(tmp_path, "3 problems", root)
    assert "a.xml is not valid XML: no element found" in message
    assert "b.xml is missing" in message
    assert "c.xml: no <object>, so the image has no image-level label" in message


def test_all_problems_are_counted_and_the_first_ten_shown(tmp_path: Path) -> None:
    ids = [f"i{number:02d}" for number in range(14)]
    root = write_voc(tmp_path / "voc", {image_id: ["cat"] for image_id in ids}, {"train": ids, "val": ids[:1]})
    shutil.rmtree(root / "JPEGImages")
    (root / "JPEGImages").mkdir()
    (root / "Annotations/i13.xml").write_text(xml(["caat"]))
    message = bad_voc(tmp_path, "15 problems", root)
    assert message.count("\n") == 11
    assert message.endswith("... and 5 more")
    assert "'caat'" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [("\n", "holds 0 classes"), ("a\nb\na\n", "more than once: a"), ("background\ncat\n", "leave it out")],
)
def test_unusable_classes_txt(tmp_path: Path, content: str, message: str) -> None:
    root = small_voc(tmp_path / "voc")
    (root / "classes.txt").write_text(content)
    bad_voc(tmp_path, message, root)


def bad_coco(tmp_path: Path, message: str, root: Path | None, **settings: Any) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        index_coco(tmp_path, root, **settings)
    return str(caught.value)


def test_coco_without_data(tmp_path: Path) -> None:
    bad_coco(tmp_path, r"data.dataset = coco needs coco.root.*coco.download: true", None)
    bad_coco(tmp_path, "coco.root = .* is not a folder", tmp_path / "nowhere")
    root = small_coco(tmp_path / "coco")
    bad_coco(tmp_path, "cannot read .*instances_train2017.json", root, year=2017)
    shutil.rmtree(root / "val2014")
    bad_coco(tmp_path, "val2014 is missing: the images of the split 'val'", root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"images": []}', "no list 'categories'"),
        ('{"categories": [{"id": 1}], "images": [], "annotations": []}', r"categories\[0\] has no 'name'"),
    ],
)
def test_files_that_are_not_coco_instances(tmp_path: Path, content: str, message: str) -> None:
    root = small_coco(tmp_path / "coco")
    (root / "annotations/instances_train2014.json").write_text(content)
    bad_coco(tmp_path, message, root)


def test_coco_annotations_that_fit_nothing(tmp_path: Path) -> None:
    root = small_coco(tmp_path / "coco")
    path = root / "annotations/instances_train2014.json"
    content = json.loads(path.read_text())
    content["annotations"] += [annotation(8, 99, 2, []), annotation(9, 1, 55, [])]
    content["images"][0]["width"] = 13
    path.write_text(json.dumps(content))
    (root / "train2014/000000000003.jpg").unlink()
    message = bad_coco(tmp_path, "4 problems", root)
    assert "the annotation 8 is of an unknown image, 99" in message
    assert "the annotation 9 is of an unknown category, 55" in message
    assert "000000000001.jpg is (12, 8), its annotation says (13, 8)" in message
    assert "000000000003.jpg is missing" in message


def test_coco_split_without_annotations_and_other_categories(tmp_path: Path) -> None:
    root = small_coco(tmp_path / "coco")
    write_coco(root, "val2014", coco_json([4], []))
    bad_coco(tmp_path, "the split 'val' is empty: .* has 1 images, none with an annotation", root)
    content = coco_json([4], [annotation(1, 4, 2, [])])
    content["categories"].pop()
    write_coco(root, "val2014", content)
    bad_coco(tmp_path, "has other categories", root)
