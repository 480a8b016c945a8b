"""The dense CRF: what it computes, that the pool gives the same in order, and that no process outlives it."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from tiny_photos import write_photo

from cosa_fast import crf
from cosa_fast.crf import CRF_PRESETS, CrfItem, CrfParameters, CrfPool, _wait_for, dense_crf, require_crf

pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared/photos/voc/VOC2012"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/photos is not here")
STANDARD = CRF_PRESETS["standard"]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the first axis, float32."""
    scores = np.exp(scores - scores.max(axis=0))
    return (scores / scores.sum(axis=0)).astype(np.float32)


def random_item(key: str, height: int, width: int, classes: int = 5, seed: int = 0) -> CrfItem:
    """Smooth colours and smooth scores."""
    rng = np.random.default_rng(seed)
    colours = PilImage.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    scores = [
        np.asarray(PilImage.fromarray(rng.normal(0, 3, (4, 4)).astype(np.float32)).resize((width, height)))
        for _ in range(classes)
    ]
    return CrfItem(key, np.array(colours), softmax(np.stack(scores)))


def jagged_halves(side: int = 48) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A red and a blue half, probabilities whose boundary misses the edge by up to 6 pixels, and the true halves."""
    truth = np.zeros((side, side), np.uint8)
    truth[:, side // 2 :] = 1
    image = np.where(truth[..., None] == 1, [30, 40, 200], [200, 40, 30]).astype(np.uint8)
    boundary = side // 2 + np.random.default_rng(0).integers(-6, 7, side)
    right = np.where(np.arange(side) >= boundary[:, None], 0.8, 0.2).astype(np.float32)
    return image, np.stack([1 - right, right]), truth


# What it computes.


@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_a_noisy_boundary_snaps_to_the_edge_of_the_image(preset: str) -> None:
    image, probabilities, truth = jagged_halves()
    before = probabilities.argmax(axis=0)
    assert (before != truth).sum() > 100
    labels = dense_crf(image, probabilities, CRF_PRESETS[preset])  # type: ignore[index]
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, truth)


def test_it_is_mean_field_inference_with_two_gaussian_kernels() -> None:
    """Against the update written out (Kraehenbuehl & Koltun, Alg. 1, symmetric normalisation), without its lattice."""
    item = random_item("a", 20, 24, classes=3, seed=4)
    parameters = CrfParameters(3, 2, 2, 12, 40, 3)
    rows, columns = np.mgrid[:20, :24].reshape(2, -1).astype(np.float64)
    place = np.stack([rows, columns], axis=1)
    colour = item.image.reshape(-1, 3).astype(np.float64)

    def kernel(*features: np.ndarray) -> np.ndarray:
        points = np.concatenate(features, axis=1)
        weights = np.exp(-((points[:, None] - points[None]) ** 2).sum(axis=2) / 2)
        norm = 1 / np.sqrt(weights.sum(axis=1))
        return norm[:, None] * weights * norm

    messages = 2 * kernel(place / 2) + 3 * kernel(place / 12, colour / 40)
    unary = -np.log(item.probabilities.reshape(3, -1).astype(np.float64))
    belief = softmax(-unary).astype(np.float64)
    for _ in range(parameters.iterations):
        belief = softmax(-unary + belief @ messages).astype(np.float64)
    labels = dense_crf(item.image, item.probabilities, parameters).ravel()
    assert (belief.argmax(axis=0) != item.probabilities.reshape(3, -1).argmax(axis=0)).sum() > 10
    clear = np.diff(np.sort(belief, axis=0), axis=0)[-1] > 0.3  # the lattice is an approximation
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(labels[clear], belief.argmax(axis=0)[clear])


def test_an_absent_class_is_never_chosen() -> None:
    image, probabilities, _ = jagged_halves()
    absent = np.zeros_like(probabilities[:1])
    labels = dense_crf(image, np.concatenate([probabilities[:1], absent, probabilities[1:]]), STANDARD)
    assert set(np.unique(labels)) == {0, 2}
    alone = np.concatenate([absent, np.ones_like(absent)])
    assert (dense_crf(image, alone, STANDARD) == 1).all()


@pytest.mark.parametrize("preset", CRF_PRESETS)
@pytest.mark.parametrize("seed", range(3))
def test_leaving_out_negligible_classes_changes_no_label(preset: str, seed: int) -> None:
    item = random_item("a", 90, 120, seed=seed)
    rest = np.random.default_rng(seed).random((76, 90, 120), np.float32) * 0.99 * crf.NEGLIGIBLE
    probabilities = np.concatenate([item.probabilities, rest])
    parameters = CRF_PRESETS[preset]  # type: ignore[index]
    assert crf._possible_classes(item.image, probabilities) == list(range(5))
    everything = crf._infer(item.image, probabilities.copy(), range(81), parameters)
    np.testing.assert_array_equal(dense_crf(item.image, probabilities, parameters), everything)


def test_it_takes_read_only_views() -> None:
    item = random_item("a", 30, 40)
    wide = np.repeat(item.probabilities, 2, axis=2)[:, :, ::2]
    image = np.asfortranarray(item.image)
    for array in (image, wide):
        array.flags.writeable = False
    expected = dense_crf(item.image, item.probabilities, STANDARD)
    np.testing.assert_array_equal(dense_crf(image, wide, STANDARD), expected)
    with CrfPool(1, STANDARD) as pool:
        np.testing.assert_array_equal(next(pool.map([CrfItem("a", image, wide)])), expected)


@needs_photos
@pytest.mark.parametrize("preset", CRF_PRESETS)
def test_on_photographs_coarse_noisy_scores_get_better(preset: str) -> None:
    rng = np.random.default_rng(0)
    before, after = [], []
    for path in sorted((PHOTOS / "SegmentationClass").glob("*.png"))[::12]:
        with PilImage.open(PHOTOS / f"JPEGImages/{path.stem}.jpg") as photo, PilImage.open(path) as mask:
            size = (mask.width // 2, mask.height // 2)
            image = np.array(photo.convert("RGB").resize(size))
            truth = np.array(mask.resize(size, PilImage.Resampling.NEAREST))
        scores = np.stack([_coarse_noisy(truth == number, rng) for number in range(21)])
        probabilities = softmax(scores)
        before.append(_mean_iou(probabilities.argmax(axis=0), truth))
        after.append(_mean_iou(dense_crf(image, probabilities, CRF_PRESETS[preset]), truth))  # type: ignore[index]
    assert np.mean(after) > np.mean(before) + 0.05
    assert all(np.array(after) >= before)


def _coarse_noisy(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scores as of a network whose features have a stride of 8, and which is often wrong."""
    height, width = region.shape
    image = PilImage.fromarray(region.astype(np.float32))
    cells = 4 * np.asarray(image.resize((width // 8, height // 8), PilImage.Resampling.BOX))
    noisy = (cells + rng.normal(0, 2, cells.shape)).astype(np.float32)
    return np.array(PilImage.fromarray(noisy).resize((width, height), PilImage.Resampling.BILINEAR))


def _mean_iou(labels: np.ndarray, truth: np.ndarray) -> float:
    known = truth != 255
    both = [
        ((labels == c) & (truth == c)).sum() / ((labels == c) | (truth == c))[known].sum() for c in set(truth[known])
    ]
    return float(np.mean(both))


# Bad input.


def arrays(image: object = None, probabilities: object = None) -> tuple[np.ndarray, np.ndarray]:
    plain = random_item("a", 8, 6, classes=2)
    return (
        plain.image if image is None else image,  # type: ignore[return-value]
        plain.probabilities if probabilities is None else probabilities,
    )


def with_value(value: float) -> np.ndarray:
    probabilities = np.full((2, 8, 6), 0.5, np.float32)
    probabilities[1, 2, 3] = value
    return probabilities


@pytest.mark.parametrize(
    ("image", "probabilities", "message"),
    [
        (np.zeros((9, 6, 3), np.uint8), None, "the image has height and width (9, 6) but its probabilities (8, 6)"),
        (np.zeros((8, 6, 3), np.float32), None, "the image is float32 of shape (8, 6, 3): the CRF takes"),
        (np.zeros((8, 6), np.uint8), None, "the image is uint8 of shape (8, 6): the CRF takes (height, width, 3)"),
        (np.zeros((8, 6, 4), np.uint8), None, "the image is uint8 of shape (8, 6, 4)"),
        (None, np.zeros((8, 6), np.float32), "the probabilities are float32 of shape (8, 6): the CRF takes (classes, "),
        (None, np.zeros((2, 8, 6), np.float64), "the probabilities are float64 of shape (2, 8, 6)"),
        (None, np.zeros((257, 8, 6), np.float32), "of 256 classes at most"),
        (None, np.zeros((0, 8, 6), np.float32), "the probabilities are float32 of shape (0, 8, 6)"),
        (None, with_value(np.nan), "the probabilities hold NaN"),
        (None, with_value(-0.5), "the probabilities range from -0.5 to 0.5: the CRF takes values from 0 to 1"),
        (None, with_value(3.25), "the probabilities range from 0.5 to 3.25"),
        (None, np.zeros((2, 8, 6), np.float32), "every probability is below 1e-05"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(image: np.ndarray | None, probabilities: np.ndarray | None, message: str) -> None:
    image, probabilities = arrays(image, probabilities)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}|{re.escape(message)}$"):
        dense_crf(image, probabilities, STANDARD)
    with (
        pytest.raises(ValueError, match=rf"^dense CRF of 2007_000032: .*{re.escape(message)}"),
        CrfPool(1, STANDARD) as pool,
    ):
        list(pool.map([CrfItem("2007_000032", image, probabilities)]))


def test_a_missing_package_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    fix = r"the dense CRF needs pydensecrf \(.*\): `pip install .*pydensecrf2`, or go without"
    with pytest.raises(ValueError, match=fix):
        require_crf()
    with pytest.raises(ValueError, match=fix):
        CrfPool(2, STANDARD)
    with pytest.raises(ValueError, match=fix):
        dense_crf(*arrays(), STANDARD)


# The pool.


def test_the_pool_gives_what_dense_crf_gives_in_order() -> None:
    sizes = [(150, 200), (8, 9), (31, 33), (160, 210), (5, 7), (90, 20), (150, 200), (12, 12), (1, 1), (40, 40)]
    items = [random_item(str(n), *size, classes=2 + 3 * (n % 3), seed=n) for n, size in enumerate(sizes)]
    with CrfPool(2, STANDARD, ahead=2) as pool:
        results = list(pool.map(items))
        again = list(pool.map(reversed(items)))
        assert len(pool._blocks) == 4  # as many as images in hand
    for item, labels in zip(items, results, strict=True):
        np.testing.assert_array_equal(labels, dense_crf(item.image, item.probabilities, STANDARD))
    for forth, back in zip(results, reversed(again), strict=True):
        np.testing.assert_array_equal(forth, back)


def test_items_are_taken_as_results_are_asked_for() -> None:
    taken = 0

    def items() -> Iterator[CrfItem]:
        nonlocal taken
        for number in range(30):
            taken += 1
            yield random_item(str(number), 10, 10)

    with CrfPool(1, STANDARD, ahead=3) as pool:
        for number, _ in enumerate(pool.map(items()), start=1):
            assert taken <= number + 3
    assert taken == 30


def test_no_image_is_no_work() -> None:
    with CrfPool(2, STANDARD) as pool:
        assert list(pool.map([])) == []
    assert not multiprocessing.active_children()


def test_memory_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    item = random_item("a", 30, 40)
    with CrfPool(1, STANDARD) as pool:
        (labels,) = pool.map([item])
        path = Path(pool._blocks[0].path)
        assert path.is_file()
    np.testing.assert_array_equal(labels, dense_crf(item.image, item.probabilities, STANDARD))
    assert not path.exists()


def test_no_labels_go_through_the_pipe() -> None:
    """Only a short message is written whole or not at all; half of one, by a worker that ends, stopped us for ever."""
    with CrfPool(1, STANDARD) as pool:
        assert pool._submit(random_item("a", 60, 60)).done.result() is None


def test_an_exception_in_between_leaves_no_process() -> None:
    items = [random_item(str(number), 200, 200) for number in range(6)]

    def interrupted() -> None:
        with CrfPool(2, STANDARD) as pool:
            next(pool.map(items))
            assert len(multiprocessing.active_children()) == 2
            raise RuntimeError("of the caller")

    with pytest.raises(RuntimeError, match="of the caller"):
        interrupted()
    assert not multiprocessing.active_children()


def test_an_iteration_that_is_given_up_leaves_the_pool_usable() -> None:
    items = [random_item(str(number), 60 - number, 60, seed=number) for number in range(6)]
    with CrfPool(2, STANDARD) as pool:
        for labels in pool.map(items):
            np.testing.assert_array_equal(labels, dense_crf(items[0].image, items[0].probabilities, STANDARD))
            break
        shapes = [labels.shape for labels in pool.map(items)]
    assert shapes == [(60 - number, 60) for number in range(6)]
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_reported_with_the_image() -> None:
    def items() -> Iterator[CrfItem]:
        yield random_item("first", 20, 20)
        yield random_item("second", 20, 20)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join()
        yield random_item("third", 20, 20)

    with (
        pytest.raises(ValueError, match=r"^dense CRF of (first|second|third): a worker process was killed"),
        CrfPool(1, STANDARD) as pool,
    ):
        list(pool.map(items()))
    assert not multiprocessing.active_children()


def test_an_error_in_a_worker_is_reported_with_the_image() -> None:
    failed: Future[np.ndarray] = Future()
    failed.set_exception(MemoryError("bad_alloc"))
    with pytest.raises(ValueError, match=r"^dense CRF of 000000000139: MemoryError: bad_alloc$"):
        _wait_for("000000000139", failed)


def test_workers_need_no_torch() -> None:
    code = "import sys, cosa_fast.crf; assert not {'torch', 'pydensecrf'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads CPU times in /proc")
def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import crf as benchmark

    for number in range(2):
        write_photo(tmp_path / f"photos/{number}.jpg", 60, 40 + number, seed=number)
    table = tmp_path / "crf.csv"
    benchmark.run(benchmark.Options(images=tmp_path, count=3, turns=2, classes=(3,), possible=(0, 2), csv=table))
    with table.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    found = {(row["preset"], int(row["possible"]), int(row["processes"]), int(row["turn"])) for row in rows}
    assert found == set(itertools.product(("release", "standard"), (3, 2), (0, 1, 2), (0, 1)))
    assert len(rows) == len(found)
    assert all(float(row["images_per_s"]) > 0 for row in rows)
    assert capsys.readouterr().out.count("| 2 |") == 4


# Says "go" when a worker is still importing, or when the first image is done.
SCRIPT = """
import time
if __name__ == "__mp_main__" and {starting}:
    print("go", flush=True)
    time.sleep(0.5)
from test_crf import random_item
from cosa_fast.crf import CRF_PRESETS, CrfPool

if __name__ == "__main__":
    with CrfPool(1 if {starting} else 2, CRF_PRESETS["standard"]) as pool:
        for _ in pool.map(random_item(str(n), 200, 200) for n in range(1000)):
            print("go", flush=True)
"""


@pytest.mark.parametrize("starting", [True, False])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_killed_parent(sent: signal.Signals, starting: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(starting=starting))
    process = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        text=True,
        # What runs in the background of a script is started with Ctrl-C ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # Ctrl-C goes to the workers too
    else:
        process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -sent
    assert errors.count("Traceback") == (sent == signal.SIGINT)  # the parent's own, none of a worker
    deadline = time.monotonic() + 10
    while _group_is_alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _group_is_alive(process.pid)


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
