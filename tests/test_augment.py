"""Draws and geometry against the slow way of doing it, operations against PIL and hand-computed values."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cosa_fast.config import AugmentConfig
from cosa_fast.data.augment import (
    Draws,
    Geometry,
    Operation,
    Plan,
    apply_geometry,
    draw,
    draw_geometry,
    epoch_positions,
)
from cosa_fast.data.photometric import (
    blur,
    blur_kernel,
    enhance_factor,
    posterize_bits,
    sharpness_kernel,
    solarize_threshold,
    strengthen,
)

BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


def many_draws(config: AugmentConfig, count: int = 4000) -> Draws:
    """One large batch of images 80 high and 120 wide."""
    return draw(config, np.array([[80, 120]]), np.zeros(count, np.int64), seed=0, iteration=0)


def geometry(source: tuple[int, int], resized: tuple[int, int], anchor: tuple[int, int], flip: bool) -> Geometry:
    return Geometry(
        crop=64,
        source=np.array([source]),
        resized=np.array([resized]),
        flip=np.array([flip]),
        anchor=np.array([anchor]),
    )


def slow_crop(image: Image.Image, drawn: Geometry, slot: int, resampling: Image.Resampling, fill: int) -> np.ndarray:
    """The release's order: resize the whole image, mirror, pad the canvas, cut."""
    height, width = drawn.resized[slot].tolist()
    y, x = drawn.anchor[slot].tolist()
    image = image.resize((width, height), resampling)
    if drawn.flip[slot]:
        image = ImageOps.mirror(image)
    pixels = np.asarray(image)
    canvas = np.full((max(height, drawn.crop), max(width, drawn.crop), *pixels.shape[2:]), fill, np.uint8)
    canvas[max(0, -y) :, max(0, -x) :][:height, :width] = pixels
    return canvas[max(0, y) :, max(0, x) :][: drawn.crop, : drawn.crop]


def test_epochs_are_permutations_without_the_incomplete_batch() -> None:
    epochs = [np.concatenate([epoch_positions(7, 11, 3, 3 * epoch + t) for t in range(3)]) for epoch in range(3)]
    for positions in epochs:
        assert len(set(positions.tolist())) == 9
        assert set(positions.tolist()) < set(range(11))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    assert not np.array_equal(epochs[0][:3], epoch_positions(8, 11, 3, 0))


def test_fewer_images_than_the_batch_size() -> None:
    stream = np.concatenate([epoch_positions(7, 3, 8, t) for t in range(3)])
    assert [sorted(stream[first : first + 3].tolist()) for first in range(0, 24, 3)] == [[0, 1, 2]] * 8
    assert len({tuple(stream[first : first + 3]) for first in range(0, 24, 3)}) > 1


def test_draws_depend_on_seed_and_iteration_alone() -> None:
    plan = Plan(AugmentConfig(), ("a",) * 20, np.full((20, 2), 500), batch_size=4, seed=5)
    before = [plan.draws(iteration) for iteration in (0, 3, 7)]
    again = [Plan(AugmentConfig(), ("a",) * 20, np.full((20, 2), 500), 4, 5).draws(t) for t in (7, 3, 0)][::-1]
    for one, two in zip(before, again, strict=True):
        np.testing.assert_equal(astuple(one), astuple(two))
    assert not np.array_equal(before[0].geometry.resized, before[1].geometry.resized)


def test_a_sample_does_not_depend_on_the_batch_size() -> None:
    few, many = many_draws(AugmentConfig(), 3), many_draws(AugmentConfig(), 50)
    np.testing.assert_array_equal(few.geometry.resized, many.geometry.resized[:3])
    np.testing.assert_array_equal(few.geometry.anchor, many.geometry.anchor[:3])
    np.testing.assert_array_equal(few.operation, many.operation[:3])
    np.testing.assert_array_equal(few.blur, many.blur[:3])


def test_oracle_and_multistage_draw_the_same_geometry() -> None:
    config = AugmentConfig(crop=96)
    drawn = draw(config, np.array([[80, 120], [60, 50]]), np.array([1, 0]), seed=3, iteration=9).geometry
    alone = draw_geometry(
        np.array([[60, 50], [80, 120]]), crop=96, scale=config.scale, flip=config.flip, seed=3, iteration=9
    )
    np.testing.assert_equal(astuple(drawn), astuple(alone))


def test_distributions() -> None:
    drawn = many_draws(AugmentConfig(crop=96))
    ratio = drawn.geometry.resized[:, 0] / 80
    assert 0.48 < ratio.min() < 0.53  # rounding down takes at most 1/80 off the range 0.5 to 2
    assert 1.95 < ratio.max() < 2.0
    assert ratio.mean() == pytest.approx(1.25, abs=0.03)
    assert np.abs(drawn.geometry.resized[:, 1] - 1.5 * drawn.geometry.resized[:, 0]).max() <= 1.5  # rounded down
    assert drawn.geometry.flip.mean() == pytest.approx(0.5, abs=0.03)
    assert (drawn.blur > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert 0.1 <= drawn.blur[drawn.blur > 0].min() < 0.13
    assert 1.97 < drawn.blur.max() < 2.0
    np.testing.assert_allclose(np.bincount(drawn.operation, minlength=9) / 4000, 1 / 9, atol=0.02)
    np.testing.assert_allclose(np.bincount(drawn.magnitude)[1:] / 4000, 1 / 9, atol=0.02)
    assert len(np.bincount(drawn.magnitude)) == 10


def test_anchor_covers_every_place_once() -> None:
    longer = draw_geometry(np.full((3000, 2), 10), crop=8, scale=(1, 1), flip=0, seed=0, iteration=0)
    assert np.unique(longer.anchor).tolist() == [0, 1, 2]
    shorter = draw_geometry(np.full((3000, 2), 5), crop=8, scale=(1, 1), flip=0, seed=0, iteration=0)
    assert np.unique(shorter.anchor).tolist() == [-3, -2, -1, 0]
    for anchors in (longer.anchor, shorter.anchor):
        np.testing.assert_allclose(np.bincount(np.abs(anchors[:, 0])) / 3000, 1 / len(np.unique(anchors)), atol=0.03)


def test_switches() -> None:
    off = many_draws(AugmentConfig(flip=0, blur=0, strong=0, scale=(1, 1)), 200)
    assert not off.geometry.flip.any()
    assert not off.blur.any()
    assert not off.operation.any()
    assert (off.geometry.resized == (80, 120)).all()
    on = many_draws(AugmentConfig(flip=1, blur=1), 200)
    assert on.geometry.flip.all()
    assert (on.blur > 0).all()


def test_a_side_never_vanishes() -> None:
    thin = draw_geometry(np.array([[1, 300]] * 50), crop=8, scale=(0.5, 2), flip=0.5, seed=0, iteration=0)
    assert thin.resized.min() == 1
    for slot in range(50):
        crop = apply_geometry(np.full((1, 300), 9, np.uint8), thin, slot)
        assert set(np.unique(crop)) == {0, 9}


def test_boxes_by_hand() -> None:
    # 50x100 resized to 40x80 (0.8), crop 64: 24 rows of padding, 10 of them above; 5 columns cut off on the left.
    plain = geometry((50, 100), (40, 80), (-10, 5), flip=False)
    assert plain.valid_box.tolist() == [[10, 50, 0, 64]]
    np.testing.assert_allclose(plain.source_box, [[0, 50, 6.25, 86.25]])
    # Mirrored, the crop shows columns 5 to 69 of the mirrored image: 11 to 75 of the resized one.
    mirrored = geometry((50, 100), (40, 80), (-10, 5), flip=True)
    assert mirrored.valid_box.tolist() == [[10, 50, 0, 64]]
    np.testing.assert_allclose(mirrored.source_box, [[0, 50, 13.75, 93.75]])


def test_valid_box_is_where_a_white_image_shows() -> None:
    drawn = draw_geometry(np.array([[50, 100]] * 40), crop=64, scale=(0.3, 1.5), flip=0.5, seed=1, iteration=0)
    for slot, (y0, y1, x0, x1) in enumerate(drawn.valid_box):
        crop = apply_geometry(np.full((50, 100, 3), 255, np.uint8), drawn, slot)
        assert (crop[y0:y1, x0:x1] == 255).all()
        assert crop.sum() == 255 * 3 * (y1 - y0) * (x1 - x0)


@pytest.mark.parametrize(("resampling", "levels", "share"), [(BILINEAR, 2, 0.1), (NEAREST, 255, 0.01)])
def test_geometry_equals_resizing_the_whole_image(resampling: Image.Resampling, levels: int, share: float) -> None:
    """Even on noise only ties differ: PIL keeps the box in single precision.

    Bilinear values that fall exactly between two levels round the other way, once per pass; nearest samples that fall
    exactly between two pixels take the other one.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 150, (100, 2))
    drawn = draw_geometry(sizes, crop=64, scale=(0.5, 2.0), flip=0.5, seed=0, iteration=0)
    differences = []
    for slot, size in enumerate(sizes):
        labels = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8))
        photo = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for image, fill in ((labels, 255), (photo, 0)):
            wanted = slow_crop(image, drawn, slot, resampling, fill)
            crop = apply_geometry(image, drawn, slot, resampling, fill)
            assert crop.shape == wanted.shape == (64, 64, *np.asarray(image).shape[2:])
            differences.append(np.abs(crop.astype(int) - wanted).ravel())
    differences = np.concatenate(differences)
    assert differences.max() <= levels
    assert (differences > 0).mean() < share


def test_strengths_are_those_of_the_release() -> None:
    for magnitude in range(1, 10):
        assert solarize_threshold(magnitude) == int(magnitude * 25.6)
        assert posterize_bits(magnitude) == 4 - int(0.4 * magnitude)
    assert [enhance_factor(magnitude) for magnitude in (1, 5, 9)] == pytest.approx([0.28, 1.0, 1.72])


def test_operations_equal_pil() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(30, 200, (40, 50, 3), dtype=np.uint8))
    factor = 0.18 * 7 + 0.1
    wanted = {
        Operation.IDENTITY: image,
        Operation.AUTO_CONTRAST: ImageOps.autocontrast(image),
        Operation.EQUALIZE: ImageOps.equalize(image),
        Operation.SOLARIZE: ImageOps.solarize(image, 179),
        Operation.COLOR: ImageEnhance.Color(image).enhance(factor),
        Operation.CONTRAST: ImageEnhance.Contrast(image).enhance(factor),
        Operation.BRIGHTNESS: ImageEnhance.Brightness(image).enhance(factor),
        Operation.SHARPNESS: ImageEnhance.Sharpness(image).enhance(factor),
        Operation.POSTERIZE: ImageOps.posterize(image, 2),
    }
    assert len(wanted) == len(Operation)
    for operation, result in wanted.items():
        np.testing.assert_array_equal(np.asarray(strengthen(image, operation, 7)), np.asarray(result), operation.name)
        assert (operation == Operation.IDENTITY) == np.array_equal(np.asarray(result), np.asarray(image))


def test_operations_by_hand() -> None:
    values = Image.fromarray(np.array([[0, 127, 128, 255]], np.uint8)).convert("RGB")

    def first_channel(operation: Operation, magnitude: int) -> list[int]:
        return np.asarray(strengthen(values, operation, magnitude))[0, :, 0].tolist()

    assert first_channel(Operation.SOLARIZE, 5) == [0, 127, 127, 0]  # from 128 on: 255 - v
    assert first_channel(Operation.POSTERIZE, 9) == [0, 0, 128, 128]  # one bit
    assert first_channel(Operation.POSTERIZE, 1) == [0, 112, 128, 240]  # four bits
    assert first_channel(Operation.BRIGHTNESS, 5) == [0, 127, 128, 255]  # factor 1
    assert first_channel(Operation.COLOR, 9) == [0, 127, 128, 255]  # grey has no colour


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.4, 2.0])
def test_blur_kernel_is_pils(sigma: float) -> None:
    kernel = blur_kernel(sigma).astype(np.float64)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1, abs=1e-6)
    assert (kernel * offsets**2).sum() == pytest.approx(sigma**2, abs=1e-6)
    line = np.zeros(80)
    line[20:40], line[55] = 200, 255
    image = Image.fromarray(np.tile(line.astype(np.uint8), (30, 1)))
    blurred = np.asarray(blur(image, sigma))[15, 15:65]  # away from the ends
    # PIL rounds to 8 bits after each of its three passes: at most half a level each.
    np.testing.assert_allclose(blurred, np.convolve(line, kernel, "same")[15:65], atol=1.5)


def test_no_blur() -> None:
    assert blur_kernel(0.0).tolist() == [1.0]
    image = Image.new("RGB", (4, 4))
    assert blur(image, 0.0) is image


def test_sharpness_kernel_is_pils() -> None:
    assert sharpness_kernel(1.0).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(sharpness_kernel(0.0) * 13, [[1, 1, 1], [1, 5, 1], [1, 1, 1]], rtol=1e-6)
    rng = np.random.default_rng(0)
    values = rng.integers(60, 180, (20, 20)).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(values).filter(ImageFilter.SMOOTH)).astype(np.float64)
    patch = values[4:7, 4:7]
    assert (sharpness_kernel(1.36) * patch).sum() == pytest.approx(1.36 * values[5, 5] - 0.36 * smooth[5, 5], abs=0.5)
