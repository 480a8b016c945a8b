"""The gallery and the panel: what is in their files, and what writing them leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from cosa_fast import gallery
from cosa_fast.data.classes import voc_palette
from cosa_fast.data.index import Index
from cosa_fast.figures import PanelRow, overlay, write_panel
from cosa_fast.gallery import require_gallery, write_gallery

INDEX = Index("Two", "voc", True, "/", ("bird", "cat"), "train", ("val",), {})
TRUTH = np.array([[0, 0, 1, 255], [2, 2, 1, 255]], dtype=np.uint8)
COSA = np.array([[0, 1, 1, 0], [2, 0, 1, 2]], dtype=np.uint8)
IMAGE = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
CAM = np.array([[0, 0, 1, 0.5], [0, 0, 1, 0.5]], dtype=np.float32)


def row(name: str = "2007_000001", **maps: np.ndarray) -> PanelRow:
    columns = {"CAM pseudo-label": TRUTH % 255, "CoSA": COSA, **maps, "truth": TRUTH}
    return PanelRow(name, (0, 1), IMAGE, CAM, columns)


def read(path: Path) -> np.ndarray:
    with PilImage.open(path) as image:
        return np.asarray(image)


def test_every_layer(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "gallery"
    write_gallery(folder, INDEX, "val", [row(), row("second")], [0.5, None])
    content = json.loads((folder / "gallery.json").read_text())
    layers = ["image", "CAM", "CAM pseudo-label", "CoSA", "truth", "error"]
    first, second = content.pop("images")
    assert content == {
        "dataset": "Two",
        "split": "val",
        "synthetic": True,
        "classes": ["bird", "cat"],
        "palette": {"background": "#000000", "bird": "#800000", "cat": "#008000"},
        "layers": layers,
    }
    files = first.pop("files")
    assert first == {"id": "2007_000001", "labels": ["bird", "cat"], "width": 4, "height": 2, "iou": 0.5}
    assert (second["id"], second["iou"]) == ("second", None)
    assert list(files) == layers
    assert files["CAM pseudo-label"] == "0000_cam_pseudo_label.png"
    assert {path.name for path in folder.iterdir()} == {
        "gallery.json", *files.values(), *second["files"].values()
    }  # fmt: skip
    np.testing.assert_array_equal(read(folder / files["truth"]), TRUTH)
    np.testing.assert_array_equal(read(folder / files["CoSA"]), COSA)
    with PilImage.open(folder / files["truth"]) as image:
        assert image.mode == "P"
        assert image.getpalette() == [*voc_palette()[:765], 255, 255, 255]
    np.testing.assert_array_equal(read(folder / files["CAM"]), overlay(IMAGE, CAM))
    with PilImage.open(folder / files["image"]) as image:
        assert (image.format, image.size) == ("JPEG", (4, 2))
    error = read(folder / files["error"])
    red, white = [214, 39, 40], [255, 255, 255]
    dimmed = [[int(0.45 * value) for value in pixel] for pixel in IMAGE.reshape(-1, 3).tolist()]
    assert error.reshape(-1, 3).tolist() == [dimmed[0], red, dimmed[2], white, dimmed[4], red, dimmed[6], white]


def test_replaces_a_former_gallery_and_nothing_else(tmp_path: Path) -> None:
    write_gallery(tmp_path / "gallery", INDEX, "val", [row(), row()], [1.0, 1.0])
    write_gallery(tmp_path / "gallery", INDEX, "val", [row(**{"CoSA-MS": COSA})], [1.0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery"]
    assert "0000_cosa_ms.png" in (names := {path.name for path in (tmp_path / "gallery").iterdir()})
    assert not [name for name in names if name.startswith("0001")]
    (tmp_path / "mine").mkdir()
    require_gallery(tmp_path / "mine")  # empty, as Snakemake makes it
    (tmp_path / "mine" / "thesis.tex").write_text("keep")
    with pytest.raises(ValueError, match="mine exists and is not an earlier gallery: give a new folder"):
        write_gallery(tmp_path / "mine", INDEX, "val", [row()], [1.0])
    with pytest.raises(ValueError, match=r"thesis.tex exists and is not an earlier gallery"):
        write_gallery(tmp_path / "mine" / "thesis.tex", INDEX, "val", [row()], [1.0])
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "keep"


def test_a_full_disk_leaves_the_former_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gallery(tmp_path / "gallery", INDEX, "val", [row()], [1.0])
    before = {path: path.read_bytes() for path in (tmp_path / "gallery").iterdir()}
    save: Callable[..., None] = PilImage.Image.save

    def full(image: PilImage.Image, path: Path, **options: object) -> None:
        if "error" in path.name:
            raise OSError(28, "No space left on device")
        save(image, path, **options)

    monkeypatch.setattr(gallery.PilImage.Image, "save", full)
    with pytest.raises(ValueError, match=r"no space left to write .*gallery: free some"):
        write_gallery(tmp_path / "gallery", INDEX, "val", [row()], [0.0])
    assert {path: path.read_bytes() for path in (tmp_path / "gallery").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["gallery"]


def test_panel_of_one_image_without_cam(tmp_path: Path) -> None:
    image = np.full((20, 30, 3), 120, dtype=np.uint8)
    bare = PanelRow("a", (0,), image, np.zeros((20, 30), np.float32), {"truth": np.full((20, 30), 255, np.uint8)})
    grey = overlay(image, bare.cam)
    assert (grey == grey[0, 0, 0]).all()  # nothing is lit
    write_panel(tmp_path / "panel.png", [bare], ["bird"], "One", "image", None)
    assert [path.name for path in tmp_path.iterdir()] == ["panel.png"]
