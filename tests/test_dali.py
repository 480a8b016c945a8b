"""The DALI pipeline against PIL: the torch loader's weak views, and each operation of the strong ones."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_photos import index_of, write_photos

from cosa_fast.config import AugmentConfig, LoaderConfig
from cosa_fast.data.augment import Operation, Plan
from cosa_fast.data.batch import Batch
from cosa_fast.data.index import Index
from cosa_fast.data.loader import batches
from cosa_fast.data.photometric import strengthen

pytest.importorskip("nvidia.dali")

from cosa_fast.data.dali import _pipeline, _Source  # after the check that DALI is installed

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared" / "photos"
GREYSCALE = "2012_000086"
SEED, BATCH = 3, 8


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return index_of(write_photos(tmp_path_factory.mktemp("photos")))


@pytest.fixture(scope="module")
def photos() -> Index:
    files = sorted((PHOTOS / "voc" / "VOC2012" / "JPEGImages").glob("*.jpg"))
    if not files:
        pytest.skip("no photographs in ../shared/photos")
    files.sort(key=lambda file: file.stem != GREYSCALE)
    return index_of(files[:BATCH])


def load(index: Index, backend: str, config: AugmentConfig, count: int, device: str = "cpu") -> list[Batch]:
    iterator = batches(
        index,
        augment=config,
        loader=LoaderConfig.model_validate({"backend": backend, "workers": int(backend == "dali")}),
        batch_size=BATCH,
        seed=SEED,
        start=0,
        device=torch.device(device),
    )
    return [next(iterator) for _ in range(count)]


def pixels(views: torch.Tensor) -> np.ndarray:
    """Normalised (B, 3, S, S) to (B, S, S, 3) in 0 to 255, as float64."""
    config = AugmentConfig()
    mean, std = torch.tensor(config.mean).double().view(3, 1, 1), torch.tensor(config.std).double().view(3, 1, 1)
    return (255 * (views.cpu().double() * std + mean)).permute(0, 2, 3, 1).numpy()


def whole(views: np.ndarray) -> np.ndarray:
    """The 8-bit values that were normalised."""
    assert np.abs(views - views.round()).max() < 1e-3
    return views.round().astype(np.uint8)


def weak_difference(index: Index, config: AugmentConfig, count: int) -> np.ndarray:
    """Absolute difference of the weak views in grey levels; the padding must agree exactly."""
    pairs = zip(load(index, "torch", config, count), load(index, "dali", config, count), strict=True)
    return np.concatenate([np.abs(pixels(one.weak) - pixels(two.weak)) for one, two in pairs])


# Decoding agrees bit for bit. What is left of the resize is rounding (PIL rounds to 8 bits between its two passes, DALI
# once at the end): at most one level, except at the border of the image, where PIL leaves missing pixels out of the
# average and DALI repeats the last one. Measured on the photographs at 448 px: mean 0.14, 99.9th percentile 1.
@pytest.mark.parametrize(("source", "crop", "mean"), [("synthetic", 96, 0.25), ("photos", 448, 0.2)])
def test_weak_view_without_blur(source: str, crop: int, mean: float, request: pytest.FixtureRequest) -> None:
    config = AugmentConfig(crop=crop, blur=0, strong=0)
    difference = weak_difference(request.getfixturevalue(source), config, 3)
    assert difference.mean() < mean
    assert np.quantile(difference, 0.999) < 1.001


# The blur adds PIL's rounding after each of its three passes: at most two levels on 99.9 % of the pixels. In the two
# outermost pixels of the crop a box of five pixels reads what PIL repeats and DALI mirrors. Measured on the photographs
# at 448 px: mean 0.30, 99.9th percentile 2.
@pytest.mark.parametrize(("source", "crop"), [("synthetic", 96), ("photos", 448)])
def test_weak_view_with_blur(source: str, crop: int, request: pytest.FixtureRequest) -> None:
    config = AugmentConfig(crop=crop, blur=1, strong=0)
    difference = weak_difference(request.getfixturevalue(source), config, 3)
    assert difference.mean() < 0.4
    assert np.quantile(difference, 0.99) < 2.001
    assert np.quantile(difference[:, 2:-2, 2:-2], 0.999) < 2.001


def test_strong_views(synthetic: Index) -> None:
    """Each operation equals PIL's on the same weak view, to these many levels.

    1: PIL drops the fraction where DALI rounds. Color 2: PIL also rounds the grey image. Equalize: PIL divides by a
    whole number of pixels per level, 1/255 of the image rounded down, so with P pixels its values run ahead by up to
    255 * 255 / P on top. Sharpness: PIL leaves the outermost pixels as they are.
    """
    crop = 96
    levels = {Operation.COLOR: 2, Operation.IDENTITY: 0, Operation.SOLARIZE: 0, Operation.POSTERIZE: 0}
    levels[Operation.EQUALIZE] = 1 + 255 * 255 // crop**2
    config = AugmentConfig(crop=crop)
    plan = Plan(config, ("",) * 8, np.array([(image.height, image.width) for image in synthetic.train]), BATCH, SEED)
    seen = set()
    for iteration, batch in enumerate(load(synthetic, "dali", config, 20)):
        draws = plan.draws(iteration)
        weak, strong = whole(pixels(batch.weak)), whole(pixels(batch.strong))
        for slot in range(BATCH):
            operation, magnitude = Operation(draws.operation[slot]), int(draws.magnitude[slot])
            wanted = np.asarray(strengthen(Image.fromarray(weak[slot]), operation, magnitude)).astype(int)
            difference = np.abs(wanted - strong[slot])
            if operation == Operation.SHARPNESS:
                difference = difference[1:-1, 1:-1]
            assert difference.max() <= levels.get(operation, 1), (operation.name, magnitude)
            seen.add(operation)
    assert seen == set(Operation)


def test_auto_contrast_leaves_flat_channels_alone(tmp_path: Path) -> None:
    path = tmp_path / "flat.jpg"
    Image.new("RGB", (60, 60), (40, 90, 200)).save(path)
    index, config = index_of([path]), AugmentConfig(crop=32, scale=(1, 1))
    plan = Plan(config, ("",), np.full((1, 2), 60), BATCH, SEED)
    seen = 0
    for iteration, batch in enumerate(load(index, "dali", config, 4)):
        chosen = torch.from_numpy(plan.draws(iteration).operation == Operation.AUTO_CONTRAST)
        assert torch.equal(batch.strong[chosen], batch.weak[chosen])
        seen += int(chosen.sum())
    assert seen


def test_all_photographs_load(photos: Index) -> None:
    config = AugmentConfig(crop=224, scale=(0.5, 0.5), flip=0, blur=0, strong=0)
    (batch,) = load(photos, "dali", config, 1)
    assert sorted(batch.index.tolist()) == list(range(BATCH))
    grey = pixels(batch.weak)[batch.index.tolist().index(0)]
    np.testing.assert_allclose(grey, grey[..., :1].repeat(3, axis=-1), atol=1e-3)


def test_padding_is_black_and_the_box_says_where(synthetic: Index) -> None:
    for batch in load(synthetic, "dali", AugmentConfig(crop=160, blur=0, strong=0), 3):
        for view, (y0, y1, x0, x1) in zip(whole(pixels(batch.weak)), batch.valid_box.tolist(), strict=True):
            view[y0:y1, x0:x1] = 0
            assert not view.any()


def test_extreme_scales(synthetic: Index) -> None:
    """Windows of one source pixel, and images of one pixel."""
    for scale in ((30.0, 40.0), (0.001, 0.02)):
        config = AugmentConfig(crop=32, scale=scale, blur=0, strong=0)
        difference = weak_difference(synthetic, config, 2)
        assert difference.mean() < 0.3


def test_gpu_pipeline_is_well_formed(synthetic: Index) -> None:
    """Tracing checks the device of every argument; it needs no GPU, building and running do."""
    plan = Plan(AugmentConfig(), ("",) * 8, np.full((8, 2), 100), BATCH, SEED)
    _pipeline(_Source(plan, 0), plan.config, True, batch_size=BATCH, num_threads=1, device_id=0, prefetch_queue_depth=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", ["synthetic", "photos"])
def test_gpu_agrees_with_cpu(source: str, request: pytest.FixtureRequest) -> None:
    """nvJPEG's inverse transform rounds differently from libjpeg-turbo's: a level or two, which Equalize stretches."""
    index = request.getfixturevalue(source)
    config = AugmentConfig(crop=224)
    for one, two in zip(load(index, "dali", config, 4), load(index, "dali", config, 4, "cuda"), strict=True):
        tensors = {field.name: getattr(two, field.name) for field in fields(Batch)}
        for name, value in tensors.items():
            assert not isinstance(value, torch.Tensor) or value.device.type == "cuda", name
        assert torch.equal(one.index, two.index.cpu())
        assert torch.equal(one.valid_box, two.valid_box.cpu())
        assert np.abs(pixels(one.weak) - pixels(two.weak)).mean() < 1
        assert np.abs(pixels(one.strong) - pixels(two.strong)).mean() < 3
