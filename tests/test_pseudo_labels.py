"""The pseudo-label stage against a slow transcription of Eq. 3, and the PNG export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PilImage
from tiny_results import CLASSES, read_values, write_checkpoint, write_dataset

from cosa_fast import pseudo_labels
from cosa_fast.config import PseudoConfig, RuntimeConfig
from cosa_fast.data.index import Index
from cosa_fast.data.store import PseudoLabels
from cosa_fast.inference import normalise, read_rgb, to_tensor
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.pseudo_labels import export_png, write_pseudo_labels

PSEUDO = PseudoConfig(scales=(1.0, 0.5), flip=True, size=48, batch_size=4, shard=4)
CPU = RuntimeConfig(device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pseudo")
    write_dataset(root, train=6, val=0)
    write_checkpoint(root / "cosa.safetensors")
    write_pseudo_labels(
        root / "index.json", root / "cosa.safetensors", root / "store.zarr", pseudo=PSEUDO, runtime=CPU, threads=2
    )
    return root


def slow(root: Path, position: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One image, one view and one class at a time; the network is the only thing shared with the stage."""
    index = Index.load(root / "index.json")
    image = index.train[position]
    network = load_cosa(root / "cosa.safetensors", "assignment")
    small = read_rgb(index, image).resize((48, 48), PilImage.Resampling.BILINEAR)
    pixels = normalise(to_tensor(small)[None], network.mean, network.std, torch.device("cpu"))
    cams, seg = torch.zeros(3, 48, 48), torch.zeros(4, 48, 48)

    def up(maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps, size=(48, 48), mode="bilinear")[0]

    with torch.inference_mode():
        for side in (48, 24):
            view = F.interpolate(pixels, size=(side, side), mode="bilinear")
            straight, mirrored = network.net(view), network.net(view.flip(-1))
            cams += torch.maximum(up(straight.cams), up(mirrored.cams.flip(-1))).clamp(min=0)
            seg += up(straight.seg) + up(mirrored.seg.flip(-1))
    for number in range(3):
        low, high = cams[number].min(), cams[number].max()
        cams[number] = (cams[number] - low) / (high - low + 1e-5) if number in image.labels else 0
        if number not in image.labels:
            seg[number + 1] = -1e5
    size = (image.height, image.width)
    full = F.interpolate(cams[None], size=size, mode="bilinear")[0].numpy()
    labels = np.zeros(size, dtype=np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            if full[:, y, x].max() >= network.threshold:
                labels[y, x] = 1 + full[:, y, x].argmax()
    own = F.interpolate(seg[None], size=size, mode="bilinear")[0].argmax(0)
    return labels, full.max(axis=0), own.numpy().astype(np.uint8)


@pytest.mark.parametrize("position", range(6))
def test_equals_the_slow_transcription(made: Path, position: int) -> None:
    store = PseudoLabels(made / "store.zarr")
    labels, confidence, segmentation = slow(made, position)
    # Rounding of a batched convolution may move a pixel that lies on the threshold.
    assert (store.labels(position) != labels).mean() < 0.002
    assert np.abs(store.confidence(position) / 255 - confidence).max() < 0.5 / 255 + 1e-4
    assert (store.segmentation(position) != segmentation).mean() < 0.002


def test_store_says_where_it_comes_from(made: Path) -> None:
    store = PseudoLabels(made / "store.zarr")
    checkpoint = load_cosa(made / "cosa.safetensors")
    index = Index.load(made / "index.json")
    store.require_match(index)
    assert store.info.classes == CLASSES
    assert store.info.checkpoint_sha256 == checkpoint.sha256
    assert store.info.threshold == 0.45
    assert store.info.iteration == 7
    assert store.info.synthetic
    assert store.info.config["pseudo"] == PSEUDO.model_dump(mode="json")
    assert store.info.config["cosa"]["csc"] is False
    assert set(store.info.versions) == {"cosa-fast", "python", "torch", "timm", "zarr"}
    for position, image in enumerate(index.train):
        allowed = {0, *(label + 1 for label in image.labels)}
        assert set(np.unique(store.labels(position))) <= allowed
        assert set(np.unique(store.segmentation(position))) <= allowed


def test_again_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    write_pseudo_labels(
        made / "index.json", made / "cosa.safetensors", tmp_path / "again.zarr", pseudo=PSEUDO, runtime=CPU, threads=2
    )
    assert PseudoLabels(tmp_path / "again.zarr").digest() == PseudoLabels(made / "store.zarr").digest()


def test_refuses_a_checkpoint_of_other_classes(made: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", classes=("bird", "dog"))
    with pytest.raises(ValueError, match=r"other.safetensors was trained for 2 classes \(bird, dog ...\), but .*has 3"):
        write_pseudo_labels(made / "index.json", other, tmp_path / "store.zarr", pseudo=PSEUDO, runtime=CPU, threads=1)


def test_a_broken_image_leaves_nothing_behind(made: Path, tmp_path: Path) -> None:
    index = Index.load(made / "index.json")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    images = (*index.train[:5], replace(index.train[5], path=str(tmp_path / "broken.jpg")))
    replace(index, splits={"train": images}).save(tmp_path / "index.json")
    target = tmp_path / "results" / "store.zarr"
    with pytest.raises(ValueError, match=r"cannot decode .*broken\.jpg"):
        write_pseudo_labels(
            tmp_path / "index.json", made / "cosa.safetensors", target, pseudo=PSEUDO, runtime=CPU, threads=2
        )
    assert list((tmp_path / "results").iterdir()) == []


def test_too_little_space_is_said_first(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pseudo_labels, "BYTES_PER_PIXEL", 1e12)
    with pytest.raises(ValueError, match="MiB free but the pseudo-label store needs"):
        write_pseudo_labels(
            made / "index.json", made / "cosa.safetensors", tmp_path / "s", pseudo=PSEUDO, runtime=CPU, threads=1
        )


def test_export(made: Path, tmp_path: Path) -> None:
    store = PseudoLabels(made / "store.zarr")
    export_png(made / "store.zarr", tmp_path / "png", confidence=True)
    export_png(made / "store.zarr", tmp_path / "png", confidence=True)  # replaces its own earlier result
    assert sorted(path.name for path in tmp_path.iterdir()) == ["png"]
    for position, name in enumerate(store.info.ids):
        path = tmp_path / "png" / "SegmentationClass" / f"{name}.png"
        np.testing.assert_array_equal(read_values(path), store.labels(position))
        np.testing.assert_array_equal(
            read_values(tmp_path / "png" / "Confidence" / f"{name}.png"), store.confidence(position)
        )
    with PilImage.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette()[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]  # VOC's first four colours


def test_export_spares_what_is_not_its_own(made: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="exists and is not an earlier export"):
        export_png(made / "store.zarr", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
