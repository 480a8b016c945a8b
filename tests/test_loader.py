"""Both backends through the one entry point: content, resumption, errors, resources."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_photos import SIZES, index_of, write_photo, write_photos

from cosa_fast.config import AugmentConfig, LoaderConfig
from cosa_fast.data.augment import draw
from cosa_fast.data.batch import Batch
from cosa_fast.data.index import Index
from cosa_fast.data.loader import batches

CPU = torch.device("cpu")
CROP = 64
BACKENDS = [LoaderConfig(backend="torch", workers=0), LoaderConfig(backend="dali", workers=1)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return index_of(write_photos(tmp_path_factory.mktemp("photos")))


@pytest.fixture(params=BACKENDS, ids=lambda config: config.backend)
def loader(request: pytest.FixtureRequest) -> LoaderConfig:
    if request.param.backend == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def load(index: Index, loader: LoaderConfig, start: int = 0, batch_size: int = 3, **augment: object) -> Iterator[Batch]:
    config = AugmentConfig.model_validate({"crop": CROP, **augment})
    return batches(index, augment=config, loader=loader, batch_size=batch_size, seed=5, start=start, device=CPU)


def take(iterator: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(iterator, count))


def assert_same(one: Batch, two: Batch) -> None:
    for field in fields(Batch):
        left, right = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def pixels(view: torch.Tensor) -> torch.Tensor:
    """Normalised (B, 3, S, S) back to 0 to 255."""
    config = AugmentConfig()
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    return 255 * (view * std + mean)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_contract(index: Index, loader: LoaderConfig) -> None:
    table = index.multi_hot(index.train)
    seen = []
    for batch in take(load(index, loader), 2):
        assert batch.weak.shape == batch.strong.shape == (3, 3, CROP, CROP)
        assert batch.weak.dtype == batch.strong.dtype == batch.labels.dtype == torch.float32
        assert batch.weak.is_contiguous()
        assert batch.strong.is_contiguous()
        assert batch.valid_box.dtype == batch.index.dtype == torch.int64
        assert batch.valid_box.shape == (3, 4)
        np.testing.assert_array_equal(batch.labels, table[batch.index])
        seen += batch.index.tolist()
    assert len(set(seen)) == 6  # no image twice in an epoch


def test_backends_agree_on_everything_but_rounding(index: Index) -> None:
    pytest.importorskip("nvidia.dali")
    for one, two in zip(*(take(load(index, loader), 5) for loader in BACKENDS), strict=True):
        for name in ("labels", "valid_box", "index"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_views_come_from_the_draws(index: Index, loader: LoaderConfig) -> None:
    """The normalised padding is black, everything inside the valid box of a white image is white."""
    batch = take(load(index, loader, strong=0, blur=0, scale=(0.3, 0.9)), 1)[0]
    for view, (y0, y1, x0, x1) in zip(pixels(batch.weak).abs(), batch.valid_box.tolist(), strict=True):
        view[:, y0:y1, x0:x1] = 0
        assert view.max() < 1e-3
    assert torch.equal(batch.weak, batch.strong)


def test_valid_box_is_where_a_white_image_shows(tmp_path: Path, loader: LoaderConfig) -> None:
    path = tmp_path / "white.jpg"
    Image.new("RGB", (90, 60), "white").save(path)
    for batch in take(load(index_of([path]), loader, strong=0, blur=0, scale=(0.3, 1.5), batch_size=8), 2):
        for view, (y0, y1, x0, x1) in zip(pixels(batch.weak), batch.valid_box.tolist(), strict=True):
            wanted = torch.zeros(3, CROP, CROP)
            wanted[:, y0:y1, x0:x1] = 255
            torch.testing.assert_close(view, wanted, atol=1e-3, rtol=0)


def test_blur_reaches_into_the_padding(tmp_path: Path, loader: LoaderConfig) -> None:
    """The release pads before it blurs."""
    path = tmp_path / "white.jpg"
    Image.new("RGB", (40, 40), "white").save(path)
    index = index_of([path])
    batch = take(load(index, loader, strong=0, blur=1, blur_radius=(2, 2), scale=(1, 1), batch_size=1), 1)[0]
    y0, _, x0, x1 = batch.valid_box[0].tolist()
    assert y0 > 0, "choose another seed: there is no padding above"
    column = pixels(batch.weak)[0, 0, :, (x0 + x1) // 2]
    assert 20 < column[y0 - 1] < 127 < column[y0] < 235


def test_resume_and_repeat_bit_for_bit(index: Index, loader: LoaderConfig) -> None:
    whole = take(load(index, loader), 7)
    for batch, again in zip(whole, take(load(index, loader), 7), strict=True):
        assert_same(batch, again)
    for batch, resumed in zip(whole[3:], take(load(index, loader, start=3), 4), strict=True):
        assert_same(batch, resumed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_batches_survive_the_next_ones(index: Index, loader: LoaderConfig) -> None:
    """The tensors are not views of buffers that the loader fills again; and a run repeats itself."""
    augment, device = AugmentConfig(crop=CROP), torch.device("cuda")
    first, again = (
        take(batches(index, augment=augment, loader=loader, batch_size=3, seed=5, start=0, device=device), 6)
        for _ in range(2)
    )
    torch.cuda.synchronize()
    for one, two in zip(first, again, strict=True):
        assert_same(one, two)
    assert not torch.equal(first[0].weak, first[1].weak)


def test_global_random_states_stay_untouched(index: Index, loader: LoaderConfig) -> None:
    """A resumed run starts the loader once more than an uninterrupted one."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    take(load(index, loader), 2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_workers_and_prefetch_change_nothing(index: Index, backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    runs = [
        take(load(index, LoaderConfig(backend=backend, workers=workers, prefetch=prefetch)), 5)
        for workers, prefetch in ((0, 2), (1, 1), (3, 4))
    ]
    for one, two, three in zip(*runs, strict=True):
        assert_same(one, two)
        assert_same(one, three)


def test_greyscale_becomes_three_equal_channels(tmp_path: Path, loader: LoaderConfig) -> None:
    index = index_of([write_photo(tmp_path / "grey.jpg", 80, 90, seed=1, mode="L")])
    batch = take(load(index, loader, batch_size=2, blur=1), 1)[0]
    for view in (pixels(batch.weak), pixels(batch.strong)):
        torch.testing.assert_close(view, view[:, :1].expand(-1, 3, -1, -1), atol=1e-3, rtol=0)
    assert pixels(batch.weak).std() > 10


def test_orientation_tag_is_ignored(tmp_path: Path, loader: LoaderConfig) -> None:
    """Masks and boxes of the datasets refer to the pixels as they are stored."""
    image = Image.open(write_photo(tmp_path / "photo.jpg", 70, 100, seed=2))
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown rotated
    plain, tagged = tmp_path / "plain.jpg", tmp_path / "tagged.jpg"
    image.save(plain, quality=90)
    image.save(tagged, quality=90, exif=exif)
    one, two = (take(load(index_of([path]), loader, batch_size=2), 1)[0] for path in (plain, tagged))
    assert_same(one, two)


def test_paths_with_spaces_and_umlauts(tmp_path: Path, loader: LoaderConfig) -> None:
    index = index_of([write_photo(tmp_path / "größe 1.jpg", 70, 100, seed=2)])
    assert take(load(index, loader, batch_size=2), 1)[0].weak.std() > 0.1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:900]), r"cannot decode .*/3\.jpg \(.*truncated"),
        (lambda path: path.write_bytes(b"not an image" * 50), r"cannot decode .*/3\.jpg \(cannot identify"),
        (lambda path: path.write_bytes(b""), r"cannot decode .*/3\.jpg"),
        (lambda path: path.unlink(), r"cannot decode .*/3\.jpg \(.*No such file"),
        (lambda path: write_photo(path, 300, 300, seed=0), r"3\.jpg has height and width \(300, 300\) but \(101, 67\)"),
        (lambda path: write_photo(path, 30, 30, seed=0), r"3\.jpg has height and width \(30, 30\) but \(101, 67\)"),
    ],
    ids=["truncated", "garbage", "empty", "missing", "larger", "smaller"],
)
def test_a_file_that_breaks_while_training(
    tmp_path: Path, loader: LoaderConfig, workers: int, damage: object, message: str
) -> None:
    files = write_photos(tmp_path)
    index = index_of(files)
    damage(files[3])  # type: ignore[operator]
    iterator = load(index, loader.model_copy(update={"workers": workers}), scale=(0.5, 0.6))
    with pytest.raises(ValueError, match=message) as caught:
        take(iterator, 3)
    assert len(str(caught.value).splitlines()) == 1


def test_errors_before_the_first_batch(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="training split 'train' of tiny has no images"):
        load(index_of([]), BACKENDS[0])
    for module in [name for name in sys.modules if name.startswith(("nvidia.dali", "cosa_fast.data.dali"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"set loader\.backend: torch or install cosa-fast\[pipeline\]"):
        load(index, BACKENDS[1])
    assert take(load(index, BACKENDS[0]), 1)


@pytest.mark.parametrize("how", ["close", "drop"])
def test_workers_end_with_the_iterator(index: Index, loader: LoaderConfig, how: str) -> None:
    take(load(index, loader), 1)  # whatever the libraries start once
    gc.collect()
    before = threads()
    iterator = load(index, loader.model_copy(update={"workers": 2}))
    kept = next(iterator)
    assert threads() > before or multiprocessing.active_children()
    if how == "close":
        iterator.close()  # type: ignore[attr-defined]
    else:
        del iterator
    gc.collect()
    deadline = time.monotonic() + 20
    while (threads() > before or multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() <= before
    assert not multiprocessing.active_children()
    assert torch.isfinite(kept.weak).all()  # the batch outlives its loader


def test_memory_stays_flat(tmp_path: Path, loader: LoaderConfig) -> None:
    """500 batches of 0.4 MB views: a batch in twenty that stayed behind would show."""

    def resident() -> float:
        """MiB, of this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    index = index_of([write_photo(tmp_path / f"{seed}.jpg", 40, 40, seed=seed) for seed in range(2)])
    iterator = load(index, loader, batch_size=4)
    for _ in range(100):
        next(iterator)
    gc.collect()
    before = resident()
    for _ in range(500):
        next(iterator)
    gc.collect()
    assert resident() - before < 10


def test_draws_are_made_for_the_right_images(index: Index, loader: LoaderConfig) -> None:
    """valid_box follows from the size of each image."""
    batch = take(load(index, loader, start=1), 1)[0]
    config = AugmentConfig(crop=CROP)
    drawn = draw(config, np.array(SIZES), batch.index.numpy(), seed=5, iteration=1)
    np.testing.assert_array_equal(batch.valid_box, drawn.geometry.valid_box)
