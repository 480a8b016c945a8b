"""The pseudo-label store: round trip, atomicity, reproducibility, and its refusals."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image as PilImage

from benchmarks import store as benchmark
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


def test_a_terminated_write_leaves_the_former_store(path: Path) -> None:
    """As torchrun does it when another process failed."""
    before, handler = files(path), signal.getsignal(signal.SIGTERM)

    def terminated() -> Iterator[PseudoLabel]:
        yield from rows(3)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from rows(5)

    with pytest.raises(SystemExit, match="143"):
        write_store(path, replace(INFO, threshold=0.6), SIZES, terminated(), shard=2)
    assert files(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == ["store.zarr"]
    assert signal.getsignal(signal.SIGTERM) is handler


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
    pixels = sum(height * width for height, width in SIZES)
    for limit, kept in [(10**9, True), (2 * pixels, True), (2 * pixels - 1, False)]:
        store = PseudoLabels(path)
        store.load(limit)
        for position, row in enumerate(rows()):
            np.testing.assert_array_equal(store.labels(position), row.labels)
            np.testing.assert_array_equal(store.confidence(position), row.confidence)
            np.testing.assert_array_equal(store.segmentation(position), row.segmentation)
        shutil.move(path / "labels" / "c", path / "hidden")
        if kept:
            np.testing.assert_array_equal(store.labels(4), list(rows())[4].labels)
        else:
            with pytest.raises(ValueError, match=r"labels of image image_4 cannot be read .*No such file"):
                store.labels(4)
        shutil.move(path / "hidden", path / "labels" / "c")


@pytest.mark.parametrize("shard", [1, 2, 5, 64])
def test_plain_zarr_reads_the_same(tmp_path: Path, shard: int) -> None:
    write_store(tmp_path / "s", INFO, SIZES, rows(), shard)
    store = PseudoLabels(tmp_path / "s")
    for name in ("labels", "confidence", "segmentation"):
        array = zarr.open_array(tmp_path / "s" / name, mode="r")
        for position, (height, width) in enumerate(SIZES):
            ours = getattr(store, name)(position)
            assert ours.shape == (height, width)
            assert ours.flags.writeable  # torch.from_numpy warns of others
            np.testing.assert_array_equal(ours, array[position, :height, :width])


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
    with pytest.raises(ValueError, match="not a pseudo-label store of schema 2"):
        PseudoLabels(tmp_path / "other.zarr")


def test_refuses_a_damaged_store(path: Path) -> None:
    attributes = json.loads((path / "zarr.json").read_text())
    attributes["attributes"]["schema"] = 99
    (path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(ValueError, match=r"store\.zarr is not a pseudo-label store of schema 2: make it again"):
        PseudoLabels(path)
    attributes["attributes"]["schema"] = 2
    del attributes["attributes"]["threshold"]
    (path / "zarr.json").write_text(json.dumps(attributes))
    with pytest.raises(ValueError, match="lacks 'threshold'"):
        PseudoLabels(path)


def shard_of(path: Path, name: str = "labels", number: int = 0) -> Path:
    return path / name / "c" / str(number) / "0" / "0"


def test_refuses_a_truncated_or_missing_shard(path: Path) -> None:
    shard = shard_of(path, "confidence", 1)
    content = shard.read_bytes()
    for length in (0, 20, len(content) // 2, len(content) - 1):
        shard.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"confidence/c/1/0/0 is truncated or damaged .*: make it again with"):
            PseudoLabels(path)
    shard.unlink()  # Zarr itself would read it as all ignored
    with pytest.raises(ValueError, match="confidence/c/1/0/0 is missing: make it again with"):
        PseudoLabels(path)


@pytest.mark.parametrize("name", ["labels", "confidence", "segmentation", "size"])
def test_refuses_a_missing_array(path: Path, name: str) -> None:
    shutil.rmtree(path / name)
    with pytest.raises(ValueError, match=f"store.zarr lacks '{name}'"):
        PseudoLabels(path)


def test_every_changed_byte_is_an_error(path: Path) -> None:
    shard = shard_of(path)
    content = shard.read_bytes()
    index = len(content) - 36  # two chunks of 16 bytes and the checksum
    wanted = [row.labels for row in rows(2)]
    for place in range(len(content)):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :])
        if place >= index:
            with pytest.raises(ValueError, match="c/0/0/0 is truncated or damaged"):
                PseudoLabels(path)
            continue
        store, refused = PseudoLabels(path), []
        for position in range(2):
            try:
                np.testing.assert_array_equal(store.labels(position), wanted[position])
            except ValueError as error:
                refused.append(str(error))
        assert len(refused) == 1
        assert "labels of image image_" in refused[0]
        assert "cannot be read" in refused[0]


def test_refuses_lost_sizes(path: Path) -> None:
    shutil.rmtree(path / "size" / "c")  # Zarr reads zeros
    with pytest.raises(ValueError, match="the sizes of the images are lost or damaged: make it again"):
        PseudoLabels(path)


def test_refuses_another_number_of_images(path: Path) -> None:
    content = json.loads((path / "zarr.json").read_text())
    content["attributes"]["ids"] = content["attributes"]["ids"][:4]
    (path / "zarr.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="size has 5 images, the list of ids 4"):
        PseudoLabels(path)


def test_refuses_an_array_that_other_software_rewrote(path: Path) -> None:
    pixels = zarr.open_array(path / "labels", mode="r")[:]
    shutil.rmtree(path / "labels")
    zarr.open_group(path).create_array("labels", data=pixels, chunks=(1, 13, 11))
    with pytest.raises(ValueError, match=r"labels was not written by cosa-fast \(other chunks or compression\)"):
        PseudoLabels(path)


def test_refuses_an_image_that_was_never_written(path: Path) -> None:
    zarr.open_array(path / "labels", mode="r+")[1] = 255  # Zarr leaves out what is all fill value
    with pytest.raises(ValueError, match="labels of image image_1 cannot be read"):
        PseudoLabels(path).labels(1)


def test_refuses_another_checkpoint(path: Path) -> None:
    store = PseudoLabels(path)
    store.require_checkpoint(INFO.checkpoint_sha256, Path("cosa.safetensors"))
    message = (
        r"store.zarr was made from the checkpoint abababababab, but cosa.safetensors is cdcdcdcdcdcd: make it again"
    )
    with pytest.raises(ValueError, match=message):
        store.require_checkpoint("cd" * 32, Path("cosa.safetensors"))


def test_refuses_another_index(path: Path) -> None:
    store, index = PseudoLabels(path), make_index()
    with pytest.raises(ValueError, match="has the classes bird, cat, the index bird, dog"):
        store.require_match(replace(index, classes=("bird", "dog")))
    with pytest.raises(ValueError, match="holds 5 images of Test train, not the 4"):
        store.require_match(replace(index, splits={"train": index.train[:4]}))
    moved = (replace(index.train[0], width=12), *index.train[1:])
    with pytest.raises(ValueError, match="image_0 is 11x7, in the index 12x7"):
        store.require_match(replace(index, splits={"train": moved}))


def test_the_benchmark_measures_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        mask = np.zeros((40, 50 + number), dtype=np.uint8)
        mask[10:20, 5:30] = 3
        mask[20, 5:30] = 255
        PilImage.fromarray(mask).save(tmp_path / f"{number}.png")
        PilImage.fromarray(mask).convert("RGB").save(tmp_path / f"{number}.jpg")
    csv_path = tmp_path / "store.csv"
    benchmark.run(benchmark.Options(masks=tmp_path, images=tmp_path, count=8, rounds=2, shard=2, crop=32, csv=csv_path))
    with open(csv_path, newline="") as handle:
        measured = list(csv.DictReader(handle))
    formats, reads = ("zarr", "zarr loaded", "zarr-python", "png", "npz"), tuple(benchmark.READS)
    wanted = {(name, operation) for name in formats[:1] + formats[3:] for operation in ("write", "size")}
    wanted |= {(name, operation) for name in formats for operation in reads} | {("loader", reads[0])}
    for turn in "01":
        assert {(row["format"], row["operation"]) for row in measured if row["turn"] == turn} == wanted
    sizes = {row["format"]: row for row in measured if row["operation"] == "size"}
    assert {name: int(row["files"]) for name, row in sizes.items()} == {"zarr": 12, "png": 12, "npz": 4}
    assert all(float(row["images_per_s"]) > 0 for row in measured if row["operation"] != "size")
    table = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:8]] == [
        f"| {name}" for name in ("zarr", "png", "npz", "zarr loaded", "zarr-python", "loader")
    ]


def test_the_benchmark_refuses_masks_of_colours(tmp_path: Path) -> None:
    PilImage.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=r"a\.png is no 8-bit mask with one channel"):
        benchmark.run(benchmark.Options(masks=tmp_path, csv=tmp_path / "x.csv"))
    with pytest.raises(SystemExit, match=r"has no \.png files: pass --masks a folder of class masks"):
        benchmark.run(benchmark.Options(masks=tmp_path / "none", csv=tmp_path / "x.csv"))
