"""Random views of the training images. Every number is drawn on the host and belongs to a batch number.

Batch t is a pure function of (seed, t): any backend, any number of workers and a run resumed at t see the same views.
The geometry and photometry are those of the authors' release (README, Fidelity).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cosa_fast.config import AugmentConfig

# First word of every generator's key, so that no two kinds of draws share a stream.
_ORDER, _GEOMETRY, _PHOTOMETRY = range(3)


class Operation(IntEnum):
    """The photometric operations of the strong view."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    SOLARIZE = 3
    COLOR = 4
    CONTRAST = 5
    BRIGHTNESS = 6
    SHARPNESS = 7
    POSTERIZE = 8


@dataclass(frozen=True, slots=True)
class Geometry:
    """Resize, mirror, then pad and crop of B images, in this order."""

    crop: int
    """S, side of the square result in pixels."""
    source: NDArray[np.int64]
    """(B, 2) height and width of the image files."""
    resized: NDArray[np.int64]
    """(B, 2) height and width after the resize."""
    flip: NDArray[np.bool_]
    """(B,) mirrored left to right."""
    anchor: NDArray[np.int64]
    """(B, 2) y and x of the crop's corner in the resized, mirrored image; negative: the width of the padding."""

    @property
    def valid_box(self) -> NDArray[np.int64]:
        """(B, 4) y0, y1, x0, x1, half open: the pixels of the crop that show the image, not padding."""
        low = np.maximum(0, -self.anchor)
        high = np.minimum(self.crop, self.resized - self.anchor)
        return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)

    @property
    def source_box(self) -> NDArray[np.float64]:
        """(B, 4) y0, y1, x0, x1: the part of the image file, in its pixels, that fills `valid_box`."""
        box = self.valid_box + self.anchor[:, [0, 0, 1, 1]]
        width = self.resized[:, 1]
        box[:, 2:] = np.where(self.flip[:, None], width[:, None] - box[:, [3, 2]], box[:, 2:])
        return box * (self.source / self.resized)[:, [0, 0, 1, 1]]


@dataclass(frozen=True, slots=True)
class Draws:
    """Everything random of one batch of B images."""

    positions: NDArray[np.int64]
    """(B,) positions in the training split."""
    geometry: Geometry
    """Shared by both views."""
    blur: NDArray[np.float64]
    """(B,) standard deviation in pixels of the Gaussian blur of both views, 0 for none."""
    operation: NDArray[np.int64]
    """(B,) the `Operation` of the strong view."""
    magnitude: NDArray[np.int64]
    """(B,) strength of the operation, 1 to 9."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every batch of a training run holds."""

    config: AugmentConfig
    paths: tuple[str, ...]
    """The N image files of the training split."""
    sizes: NDArray[np.int64]
    """(N, 2) their heights and widths."""
    batch_size: int
    """Images of this process."""
    seed: int
    rank: int = 0
    """Of this process among those that share each batch."""
    processes: int = 1

    @property
    def first(self) -> int:
        """This process's first slot of the whole batch."""
        return self.rank * self.batch_size

    def draws(self, iteration: int) -> Draws:
        """This process's draws of batch number `iteration`: those that one process would make for its slots."""
        whole = epoch_positions(self.seed, len(self.paths), self.batch_size * self.processes, iteration)
        positions = whole[self.first : self.first + self.batch_size]
        return draw(self.config, self.sizes, positions, self.seed, iteration, self.first)


def epoch_positions(seed: int, count: int, batch_size: int, iteration: int) -> NDArray[np.int64]:
    """(B,) positions of batch `iteration`: each epoch is a new permutation, its incomplete last batch dropped.

    With fewer images than a batch holds, a batch takes several permutations one after the other.
    """
    if count >= batch_size:
        epoch, batch = divmod(iteration, count // batch_size)
        return _permutation(seed, count, epoch)[batch * batch_size : (batch + 1) * batch_size]
    first, last = iteration * batch_size, (iteration + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    joined = np.concatenate([_permutation(seed, count, epoch) for epoch in epochs])
    return joined[first % count :][:batch_size]


def draw_geometry(
    sizes: NDArray[np.int64],
    *,
    crop: int,
    scale: tuple[float, float],
    flip: float,
    seed: int,
    iteration: int,
    first: int = 0,
) -> Geometry:
    """Draw a random resize, mirroring and crop for each image of a batch.

    The resize factor is uniform in `scale` and keeps the aspect up to rounding down. A side shorter than the crop is
    padded at both ends, split at random; a longer one is cropped at a random place.

    Args:
        sizes: (B, 2) heights and widths of the image files.
        crop: side of the crop in pixels.
        scale: range of the resize factor.
        flip: probability of mirroring.
        seed: of the run.
        iteration: batch number.
        first: slot of the first image in the whole batch.
    """
    uniform = _uniform(_GEOMETRY, seed, iteration, first, len(sizes), 4)
    ratio = scale[0] + uniform[:, 0] * (scale[1] - scale[0])
    resized = np.maximum(1, (sizes * ratio[:, None]).astype(np.int64))
    spare = resized - crop
    anchor = np.sign(spare) * (uniform[:, 2:4] * (np.abs(spare) + 1)).astype(np.int64)
    return Geometry(crop=crop, source=sizes, resized=resized, flip=uniform[:, 1] < flip, anchor=anchor)


def draw(
    config: AugmentConfig,
    sizes: NDArray[np.int64],
    positions: NDArray[np.int64],
    seed: int,
    iteration: int,
    first: int = 0,
) -> Draws:
    """Draw both views of batch `iteration`.

    Args:
        config: probabilities and ranges.
        sizes: (N, 2) heights and widths of all images of the split.
        positions: (B,) which of them are in the batch.
        seed: of the run.
        iteration: batch number.
        first: slot of the first of them in the whole batch.
    """
    geometry = draw_geometry(
        sizes[positions],
        crop=config.crop,
        scale=config.scale,
        flip=config.flip,
        seed=seed,
        iteration=iteration,
        first=first,
    )
    uniform = _uniform(_PHOTOMETRY, seed, iteration, first, len(positions), 5)
    low, high = config.blur_radius
    return Draws(
        positions=positions,
        geometry=geometry,
        blur=np.where(uniform[:, 0] < config.blur, low + uniform[:, 1] * (high - low), 0.0),
        operation=np.where(uniform[:, 2] < config.strong, (uniform[:, 3] * len(Operation)).astype(np.int64), 0),
        magnitude=1 + (uniform[:, 4] * 9).astype(np.int64),
    )


def apply_geometry(
    image: Image.Image | NDArray[np.uint8],
    geometry: Geometry,
    slot: int,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
    fill: int = 0,
) -> NDArray[np.uint8]:
    """The crop of one image, or of a map of its size.

    Only the visible part is resampled. The filter reads the pixels around it, so the result is that of resizing the
    whole image, up to the rounding of ties, in a fraction of the time.

    Args:
        image: an 8-bit image (H, W, 3) or map (H, W) of the size in `geometry.source[slot]`.
        geometry: of a batch.
        slot: which sample of the batch.
        resampling: BILINEAR (antialiased) for images, NEAREST for labels.
        fill: value of the padding.

    Returns:
        (S, S, 3) or (S, S) uint8.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    y0, y1, x0, x1 = (int(side) for side in geometry.valid_box[slot])
    top, bottom, left, right = (float(side) for side in geometry.source_box[slot])
    visible = image.resize((x1 - x0, y1 - y0), resampling, box=(left, top, right, bottom))
    if geometry.flip[slot]:
        visible = visible.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = np.asarray(visible)
    crop = np.full((geometry.crop, geometry.crop, *pixels.shape[2:]), fill, dtype=np.uint8)
    crop[y0:y1, x0:x1] = pixels
    return crop


def _uniform(kind: int, seed: int, iteration: int, first: int, rows: int, columns: int) -> NDArray[np.float64]:
    """(rows, columns) in [0, 1): row k belongs to slot first + k, whatever the batch size."""
    return np.random.default_rng([kind, seed, iteration]).random((first + rows, columns))[first:]


@lru_cache(maxsize=8)
def _permutation(seed: int, count: int, epoch: int) -> NDArray[np.int64]:
    order = np.random.default_rng([_ORDER, seed, epoch]).permutation(count)
    order.setflags(write=False)  # the cache hands out the same array again
    return order
