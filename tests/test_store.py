"""The pseudo-label store: round trip, atomicity, reproducibility, and its refusals."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr

from cosa_fast.data.index import Image, Index
from cosa_fast.data.store import PseudoLabel, PseudoLabels, StoreInfo, write_store

SIZES = [(7, 11), (13, 5), (10, 10), (1, 1), (12, 9)]
INFO = StoreInfo(
    dataset="Test",
    synthetic=True,
    split="train",
    classes=("bird", "cat"),
    ids=tuple(f"image_{number}" for number in range(5)),
    threshold=0.4,
    checkpoint_sha256="ab" * 32,
    iteration=12,
    config={"pseudo": {"scales": [1.0]}},
    versions={"torch": "0"},
)


def rows(count: int = 5) -> Iterator[PseudoLabel]:
    for number, size in enumerate(SIZES[:count]):
        rng = np.random.default_rng(number)
        yield PseudoLabel(*(rng.integers(0, high, size, dtype=np.uint8) for high in (3, 256, 3)))


def make_index() -> Index:
    images = tuple(
        Image(name, f"{name}.jpg", width, height, (0,)) for name, (height, width) in zip(INFO.ids, SIZES, strict=True)
    )
    return Index("Test", "voc", True, "/nowhere", INFO.classes, "train", (), {"train": images})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_store(tmp_path / "store.zarr", INFO, SIZES, rows(), shard=2)
    return tmp_path / "store.zarr"


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_round_trip(path: Path) -> None:
    store = PseudoLabels(path)
    assert store.info == INFO
    for position, row in enumerate(rows()):
        np.testing.assert_array_equal(store.labels(position), row.labels)
        np.testing.assert_array_equal(store.confidence(position), row.confidence)
        np.testing.assert_array_equal(store.segmentation(position), row.segmentation)
    store.require_match(make_index())


def test_canvas_padding_shards_and_format(path: Path) -> None:
    array = zarr.open_array(path / "labels", mode="r")
    assert array.metadata.zarr_format == 3
    assert array.shape == (5, 13, 11)
    assert array.chunks == (1, 13, 11)
    assert array.shards == (2, 13, 11)
    assert (array[0, 7:] == 255).all()
    assert (array[1, :, 5:] == 255).all()
    assert len(list((path / "labels" / "c").rglob("0"))) >= 1
    assert sum(file.is_file() for file in (path / "labels" / "c").rglob("*")) == 3  # 5 images, 2 per shard


def test_reliability_is_the_distance_from_the_threshold(tmp_path: Path) -> None:
    confidence = np.array([[0, 51, 102, 255, 178]], dtype=np.uint8)  # 0, .2, .4 = threshold, 1, about .7
    write_store(
        tmp_path / "s", replace(INFO, ids=("a",)), [(1, 5)], [PseudoLabel(confidence, confidence, confidence)], 1
    )
    np.testing.assert_allclose(PseudoLabels(tmp_path / "s").reliability(0), [[1, 0.5, 0, 1, 0.497]], atol=1e-3)


def test_same_input_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "again.zarr", INFO, SIZES, rows(), shard=2)
    assert files(path) == files(tmp_path / "again.zarr")
    assert PseudoLabels(path).digest() == PseudoLabels(tmp_path / "again.zarr").digest()
    write_store(tmp_path / "other.zarr", replace(INFO, threshold=0.5), SIZES, rows(), shard=2)
    assert PseudoLabels(path).digest() != PseudoLabels(tmp_path / "other.zarr").digest()


def test_an_interrupted_write_leaves_the_former_store(path: Path) -> None:
    before = files(path)

    def interrupted() -> Iterator[PseudoLabel]:
        yield from rows(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(path, replace(INFO, threshold=0.6), SIZES, interrupted(), shard=2)
    assert files(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == ["store.zarr"]


def test_a_killed_write_is_not_a_store_and_is_cleaned_up(tmp_path: Path) -> None:
    path = tmp_path / "store.zarr"
    pid = os.fork()
    if pid == 0:  # dies without any clean-up, as with kill -9

        def killed() -> Iterator[PseudoLabel]:
            yield from rows(3)
            os._exit(9)

        write_store(path, INFO, SIZES, killed(), shard=2)
    os.waitpid(pid, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == [".store.zarr.partial"]
    with pytest.raises(ValueError, match="there is no pseudo-label store"):
        PseudoLabels(path)
    write_store(path, INFO, SIZES, rows(), shard=2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["store.zarr"]


def test_threads_and_forks_read_the_same(path: Path) -> None:
    store = PseudoLabels(path)
    expected = [row.labels for row in rows()]
    with ThreadPoolExecutor(4) as pool:
        for position, got in enumerate(pool.map(store.labels, [0, 1, 2, 3, 4])):
            np.testing.assert_array_equal(got, expected[position])
    pid = os.fork()
    if pid == 0:
        same = all(np.array_equal(store.labels(position), expected[position]) for position in range(5))
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_in_memory_is_the_same(path: Path) -> None:
    for limit, kept in [(10**9, True), (2 * 5 * 13 * 11, True), (2 * 5 * 13 * 11 - 1, False)]:
        store = PseudoLabels(path)
        store.load(limit)
        for position, row in enumerate(rows()):
            np.testing.assert_array_equal(store.labels(position), row.labels)
            np.testing.assert_array_equal(store.confidence(position), row.confidence)
        shutil.move(path / "labels" / "c", path / "hidden")
        assert np.array_equal(store.labels(4), list(rows())[4].labels) == kept
        shutil.move(path / "hidden", path / "labels" / "c")


def test_refuses_wrong_rows(tmp_path: Path) -> None:
    target = tmp_path / "store.zarr"
    with pytest.raises(ValueError, match="4 rows for 5 images"):
        write_store(target, INFO, SIZES, rows(4), shard=2)
    with pytest.raises(ValueError, match="more rows than the 4 images"):
        write_store(target, replace(INFO, ids=INFO.ids[:4]), SIZES[:4], rows(5), shard=2)
    with pytest.raises(ValueError, match=r"labels of image_0 has \(7, 11\) pixels, wanted \(8, 11\)"):
        write_store(target, INFO, [(8, 11), *SIZES[1:]], rows(), shard=2)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(ValueError, match=r"no space left to write .*store\.zarr: free some"):
        write_store(tmp_path / "store.zarr", INFO, SIZES, rows(), shard=2)
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_no_store(path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is not a Zarr v3 group.*again with `cosa-fast pseudo-labels`"):
        PseudoLabels(tmp_path / "folder")
    zarr.create_group(tmp_path / "other.zarr", zarr_format=3)
    with pytest.raises(ValueError, match="not a pseudo-label store of schema 1"):
        PseudoLabels(tmp_path / "other.zarr")


def test_refuses_a_damaged_store(path: Path) -> None:
    attributes = json.loads((path / "zarr.json").read_text())
    attributes["attributes"]["schema"] = 99
    (path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(ValueError, match="schema 1"):
        PseudoLabels(path)
    attributes["attributes"]["schema"] = 1
    del attributes["attributes"]["threshold"]
    (path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(ValueError, match="lacks 'threshold'"):
        PseudoLabels(path)


def test_refuses_a_missing_array_or_a_truncated_shard(path: Path) -> None:
    shard = path / "labels" / "c" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ValueError, match="labels of image image_1 cannot be read"):
        PseudoLabels(path).labels(1)
    shard.unlink()  # Zarr itself would read it as all ignored
    with pytest.raises(ValueError, match="labels has 5 images in 2 files, wanted 5 in 3"):
        PseudoLabels(path)
    shutil.rmtree(path / "confidence")
    with pytest.raises(ValueError, match="lacks 'confidence'"):
        PseudoLabels(path)


def test_refuses_another_index(path: Path) -> None:
    store, index = PseudoLabels(path), make_index()
    with pytest.raises(ValueError, match="has the classes bird, cat, the index bird, dog"):
        store.require_match(replace(index, classes=("bird", "dog")))
    with pytest.raises(ValueError, match="holds 5 images of Test train, not the 4"):
        store.require_match(replace(index, splits={"train": index.train[:4]}))
    moved = (replace(index.train[0], width=12), *index.train[1:])
    with pytest.raises(ValueError, match="image_0 is 11x7, in the index 12x7"):
        store.require_match(replace(index, splits={"train": moved}))
