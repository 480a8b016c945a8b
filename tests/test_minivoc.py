"""The synthetic dataset: layout, truth of the annotations, and the statistics the method is meant to struggle with."""

import hashlib
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa_fast.data.minivoc import generate
from cosa_fast.data.minivoc.designs import DESIGNS
from cosa_fast.data.minivoc.render import render
from cosa_fast.data.minivoc.scenes import CLASSES, COEXISTENCE, Scene, sample_scene
from cosa_fast.data.minivoc.shapes import rasterise

VOID = 255
SIZE = 64
COUNTS = {"train": 24, "val": 6, "test": 6}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minivoc") / "set"
    generate(root, **COUNTS, size=SIZE, workers=1, progress=False)
    return root


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(np.random.default_rng([0, 0, index])) for index in range(1500)]


def _digests(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _mask(root: Path, image_id: str) -> np.ndarray:
    return np.asarray(Image.open(root / "SegmentationClass" / f"{image_id}.png"))


def _objects(root: Path) -> Iterator[tuple[np.ndarray, list[tuple[str, list[int]]]]]:
    """Per image: mask, and the annotated (name, [xmin, ymin, xmax, ymax])."""
    for path in sorted((root / "Annotations").iterdir()):
        boxes = [
            (element.findtext("name", ""), [int(edge.text or "") for edge in element.find("bndbox") or ()])
            for element in ET.parse(path).iter("object")
        ]
        yield _mask(root, path.stem), boxes


def test_worker_count_and_repetition_do_not_change_a_byte(dataset: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again", **COUNTS, size=SIZE, workers=2, progress=False)
    assert _digests(tmp_path / "again") == _digests(dataset)


def test_larger_set_begins_with_the_smaller_one_and_seeds_differ(dataset: Path, tmp_path: Path) -> None:
    generate(tmp_path / "small", train=3, val=1, test=0, size=SIZE, workers=1, progress=False)
    generate(tmp_path / "other", train=3, val=1, test=0, size=SIZE, seed=1, workers=1, progress=False)
    small, other, whole = _digests(tmp_path / "small"), _digests(tmp_path / "other"), _digests(dataset)
    images = [name for name in small if name.startswith(("JPEGImages", "Annotations", "SegmentationClass"))]
    assert len(images) == 12
    assert all(small[name] == whole[name] for name in images)
    assert all(small[name] != other[name] for name in images if name.startswith("JPEGImages"))


def test_splits_share_no_image(dataset: Path) -> None:
    digests = [digest for name, digest in _digests(dataset).items() if name.startswith("JPEGImages")]
    assert len(set(digests)) == sum(COUNTS.values())


def test_layout_is_that_of_voc2012(dataset: Path) -> None:
    for split, count in COUNTS.items():
        ids = (dataset / "ImageSets/Segmentation" / f"{split}.txt").read_text().splitlines()
        assert len(set(ids)) == count
        for image_id in ids:
            image = Image.open(dataset / "JPEGImages" / f"{image_id}.jpg")
            mask = Image.open(dataset / "SegmentationClass" / f"{image_id}.png")
            assert (image.mode, mask.mode) == ("RGB", "P")
            assert image.size == mask.size == (SIZE, SIZE)
            annotation = ET.parse(dataset / "Annotations" / f"{image_id}.xml")
            assert annotation.findtext("filename") == f"{image_id}.jpg"
            assert annotation.findtext("source/database") == "MiniVOC (synthetic)"
            assert [annotation.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == ["64", "64", "3"]
    palette = np.array(mask.getpalette()).reshape(256, 3)
    # Background, the first three, the last and the void of VOC's own colour map.
    assert palette[[0, 1, 2, 3, 20, VOID]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 64, 128], [224, 224, 192]
    ]  # fmt: skip
    names = "aeroplane bird boat bus cat cow person pottedplant train tvmonitor"
    assert (dataset / "classes.txt").read_text() == names.replace(" ", "\n") + "\n"
    description = json.loads((dataset / "dataset.json").read_text())
    assert description["synthetic"] is True
    assert description["counts"] == COUNTS
    assert description["coexistence"] == COEXISTENCE
    assert {path.name for path in dataset.parent.iterdir()} == {dataset.name}, "scratch directory left behind"


def test_annotated_names_are_the_mask_ids(dataset: Path) -> None:
    for mask, boxes in _objects(dataset):
        assert {CLASSES.index(name) + 1 for name, _ in boxes} == set(np.unique(mask)) - {0, VOID}


def test_boxes_bound_the_mask(dataset: Path) -> None:
    for mask, boxes in _objects(dataset):
        for name in {name for name, _ in boxes}:
            own = np.array([box for other, box in boxes if other == name])
            rows, columns = np.nonzero(mask == CLASSES.index(name) + 1)
            bounds = [*own[:, :2].min(axis=0), *own[:, 2:].max(axis=0)]
            assert bounds == [columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1]


def test_void_separates_different_ids_and_is_thin(dataset: Path) -> None:
    for mask, _ in _objects(dataset):
        for one, two in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert not np.any((one != two) & (one != VOID) & (two != VOID))
        void = mask == VOID
        assert void.any()
        # No 5x5 square of void anywhere: at this size the border of one object is one pixel wide.
        squares = np.lib.stride_tricks.sliding_window_view(void, (5, 5))
        assert not squares.all(axis=(2, 3)).any()


def test_coexistence_is_strong_but_not_perfect(scenes: list[Scene]) -> None:
    names = [{item.name for item in scene.items} for scene in scenes]
    both = {
        c: sum(c in n and s.context == COEXISTENCE[c] for n, s in zip(names, scenes, strict=True)) for c in COEXISTENCE
    }
    of_class = {c: sum(c in n for n in names) for c in COEXISTENCE}
    of_context = {c: sum(s.context == COEXISTENCE[c] for s in scenes) for c in COEXISTENCE}
    assert sum(both.values()) / sum(of_class.values()) == pytest.approx(0.77, abs=0.04)
    assert sum(both.values()) / sum(of_context.values()) == pytest.approx(0.56, abs=0.04)
    for name in COEXISTENCE:
        assert both[name] / of_class[name] == pytest.approx(0.77, abs=0.1)
        assert both[name] / of_context[name] == pytest.approx(0.56, abs=0.1)


def test_label_statistics(scenes: list[Scene]) -> None:
    labels = [{item.name for item in scene.items} for scene in scenes]
    assert all(labels)
    assert np.mean([len(names) for names in labels]) == pytest.approx(1.37, abs=0.06)
    for name in CLASSES:
        assert np.mean([name in names for names in labels]) == pytest.approx(0.137, abs=0.04)


def test_foreground_share(scenes: list[Scene]) -> None:
    shares = [np.mean(render(scene, 32).instances > 0) for scene in scenes[:250]]
    assert 0.24 < np.mean(shares) < 0.31
    assert max(shares) < 0.75


def test_objects_are_mostly_visible_even_in_the_smallest_images(scenes: list[Scene]) -> None:
    for scene in [scene for scene in scenes if len(scene.items) > 1][:60]:
        instances = render(scene, 32).instances
        for number, item in enumerate(scene.items, start=1):
            alone = render(replace(scene, items=(item,)), 32).instances
            assert (instances == number).sum() > 0.5 * (alone > 0).sum()


@pytest.mark.parametrize("name", CLASSES)
def test_most_of_a_design_carries_its_own_texture(name: str) -> None:
    shared = {part.texture for other in CLASSES if other != name for part in DESIGNS[other].parts}
    own = {part.texture for part in DESIGNS[name].parts} - shared
    assert len(own) == 1
    silhouette, typical = np.zeros((2, 200, 200), dtype=bool)
    for part in DESIGNS[name].parts:
        area = rasterise([0.1 + 0.8 * outline for outline in part.outlines], 200) > 0
        silhouette |= area
        typical = np.where(area, part.texture in own, typical)
    assert 0.66 < typical.sum() / silhouette.sum() < 0.87


def test_resolution_keeps_the_composition(scenes: list[Scene]) -> None:
    for scene in scenes[:6]:
        small, large = render(scene, 112), render(scene, 448)
        assert np.mean(large.instances[2::4, 2::4] == small.instances) > 0.98
        reduced = np.asarray(Image.fromarray(large.image).resize((112, 112), Image.Resampling.BOX), dtype=float)
        error = np.abs(reduced - small.image)
        assert error.mean() < 9, "the texture or the colour of something changes with the size"


def test_existing_set_is_kept_and_anything_else_refused(dataset: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    generate(dataset, **COUNTS, size=SIZE, workers=2, progress=False)
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    with pytest.raises(ValueError, match=r"set holds a dataset with other parameters.*delete it or choose another"):
        generate(dataset, **COUNTS, size=SIZE, seed=7, progress=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is no complete MiniVOC dataset: delete it or choose another"):
        generate(tmp_path, train=1, val=0, test=0, progress=False)
    root = tmp_path / "set"
    generate(root, train=2, val=0, test=0, size=SIZE, workers=1, progress=False)
    (root / "JPEGImages/train_000001.jpg").unlink()
    with pytest.raises(ValueError, match=r"JPEGImages holds 1 of 2 files: delete it or choose another"):
        generate(root, train=2, val=0, test=0, size=SIZE, workers=1, progress=False)


@pytest.mark.parametrize(
    ("name", "value"), [("train", -1), ("val", -2), ("test", -3), ("size", 31), ("seed", -4), ("workers", 0)]
)
def test_values_out_of_range_are_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be at least \d+.*got {value}"):
        generate(tmp_path / "set", progress=False, **{name: value})
    assert not list(tmp_path.iterdir())


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("cosa_fast.data.minivoc.writer.render", broken)
    with pytest.raises(OSError, match="disk full"):
        generate(tmp_path / "set", train=1, val=0, test=0, workers=1, progress=False)
    assert not list(tmp_path.iterdir())
