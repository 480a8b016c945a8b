"""Draw a scene description at any resolution."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import textures
from .designs import DESIGNS
from .scenes import BARK, Ground, Item, Scene
from .shapes import rasterise
from .textures import Floats

DESIGN_SIZE = 112
"""Image side in the textures' units."""
_OVERSAMPLING = 2
_STROKE, _RIM = 0.6, 0.72
"""Width of the shaded rims of parts in design pixels, and their brightness."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A drawn scene."""

    image: npt.NDArray[np.uint8]
    """(size, size, 3) RGB."""
    instances: npt.NDArray[np.uint8]
    """(size, size): 0 background, i + 1 the scene's item i."""


def render(scene: Scene, size: int) -> Rendering:
    """Draw a scene on size x size pixels, antialiased; instance edges stay crisp."""
    canvas = _Canvas(size * _OVERSAMPLING, scene.seed)
    for ground, area in _areas(scene, canvas.size):
        c, s = np.cos(ground.turn), np.sin(ground.turn)
        canvas.paint(area, ground.texture, ground.inks, np.array([[c, -s], [s, c]]) * ground.zoom)
    if scene.branches:
        limbs = rasterise(scene.branches, canvas.size) > 0
        canvas.paint(limbs, textures.bark, np.array(BARK, dtype=np.float32), np.eye(2))
    instances = np.zeros((canvas.size, canvas.size), dtype=np.uint8)
    for index, item in enumerate(scene.items):
        instances[_draw(item, canvas)] = index + 1
    image = _expose(np.mean(_samples(canvas.pixels), axis=0).transpose(1, 2, 0), scene, canvas.rng)
    # Upper median: the instance that covers at least half of the pixel.
    return Rendering(image, np.sort(_samples(instances), axis=0)[_OVERSAMPLING**2 // 2])


def _samples(oversampled: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The samples of each pixel side by side: (n, ..., size, size)."""
    offsets = np.ndindex(_OVERSAMPLING, _OVERSAMPLING)
    return np.stack([oversampled[..., row::_OVERSAMPLING, column::_OVERSAMPLING] for row, column in offsets])


class _Canvas:
    """Oversampled RGB picture (3, size, size) in 0..255 that textures are painted on."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.rng = np.random.default_rng(seed)
        self.pixels = np.zeros((3, size, size), dtype=np.float32)
        # Of the pixel centres, in image sides.
        self.y, self.x = (np.indices((size, size), dtype=np.float32) + 0.5) / size

    def paint(
        self,
        area: npt.NDArray[np.bool_],
        texture: textures.Texture,
        inks: Floats,
        frame: npt.NDArray[np.float64],
        centre: tuple[float, float] = (0.5, 0.5),
    ) -> None:
        """Fill an area (size, size); `frame` (2, 2) maps the texture's axes to the image's, about `centre`."""
        inverse = np.linalg.inv(frame).astype(np.float32) * np.float32(DESIGN_SIZE)
        x, y = self.x[area] - np.float32(centre[0]), self.y[area] - np.float32(centre[1])
        shift = self.rng.uniform(0, DESIGN_SIZE, 2).astype(np.float32)
        # A stream per part: the number of values a texture draws must not change what follows.
        own = np.random.default_rng(self.rng.integers(2**32))
        u, v = inverse[0, 0] * x + inverse[0, 1] * y, inverse[1, 0] * x + inverse[1, 1] * y
        for plane, colours in zip(self.pixels, texture(u + shift[0], v + shift[1], own, inks), strict=True):
            plane[area] = colours

    def shade(self, area: npt.NDArray[np.bool_], factor: Floats | np.float32) -> None:
        """Multiply the colours of an area (size, size) by one factor, or by one per pixel."""
        for plane in self.pixels:
            plane[area] *= factor


def _areas(scene: Scene, size: int) -> Iterator[tuple[Ground, npt.NDArray[np.bool_]]]:
    yield scene.grounds[0], np.ones((size, size), dtype=bool)
    if len(scene.grounds) > 1:
        height = np.linspace(*scene.horizon, size)[None, :] * size
        yield scene.grounds[1], np.arange(size)[:, None] > height


def _draw(item: Item, canvas: _Canvas) -> npt.NDArray[np.bool_]:
    """Paint an item and return its silhouette (size, size)."""
    silhouette = np.zeros((canvas.size, canvas.size), dtype=bool)
    frame = item.pose.rotation() * item.zoom
    stroke = max(1, round(_STROKE * canvas.size / DESIGN_SIZE))
    for part in DESIGNS[item.name].parts:
        drawn = rasterise([item.pose.place(outline) for outline in part.outlines], canvas.size, stroke)
        inks = np.array([item.inks[ink] for ink in part.inks], dtype=np.float32)
        canvas.paint(drawn > 0, part.texture, inks, frame, item.pose.centre)
        canvas.shade(drawn == 2, np.float32(_RIM))
        silhouette |= drawn > 0
    # Light from above gives the flat parts some volume.
    depth = (canvas.y[silhouette] - item.pose.centre[1]) / item.pose.size
    canvas.shade(silhouette, 1.02 - 0.3 * depth)
    return silhouette


def _expose(pixels: Floats, scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Apply the scene's light and sensor noise to (size, size, 3) linear colours."""
    light, size = scene.light, len(pixels)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    gain = light.gain * (1 + light.shading[0] * ramp[None, :, None] + light.shading[1] * ramp[:, None, None])
    exposed = (pixels * gain - 128) * light.contrast + 128
    exposed += light.noise * rng.standard_normal((size, size, 1), dtype=np.float32)
    return np.clip(exposed, 0, 255).astype(np.uint8)
