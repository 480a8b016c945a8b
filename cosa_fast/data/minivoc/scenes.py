"""Random scene descriptions: what is where in a MiniVOC image, independent of its resolution."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import textures
from .designs import DESIGNS, Colour, Design, Palette
from .shapes import Outline, poly, rasterise
from .textures import Rng, Texture

CLASSES = tuple(DESIGNS)
"""Class names; the mask id of a class is its position + 1."""
COEXISTENCE = {"aeroplane": "sky", "bird": "branch", "boat": "sea", "train": "rails"}
"""The unlabelled context that usually, but not always, surrounds a class."""

_WITH_CONTEXT = 0.82
"""Chance that an object's context surrounds it. An image has one context only, so P(context | class) is lower, 0.77."""
_ALONE = 0.55
"""Chance of a context without its class in an image that got none; makes P(class | context) about 0.56. With 0.74 the
context was so good a cue that CAMs covered all of it in the runs that were tried."""
_OBJECT_COUNTS = (0.65, 0.28, 0.07)
"""Chances of one, two and three objects."""
_SIZES_ALONE, _SIZES_TOGETHER = (0.55, 0.85), (0.38, 0.56)
"""Object sizes in image sides."""
_HORIZON = 0.4
_MARGIN = 0.04
"""How far an object's unit box may stick out of the image, in image sides."""
_MIN_VISIBLE = 0.6
"""Visible share below which an object is placed elsewhere; the labels promise more than one half."""
_PLACEMENTS = 25
_GRID = 64
"""Cells per image side when visibility is measured."""
_MIN_CONTRAST = 110.0
"""Least RGB distance between the two inks of a textured part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """A background area: its texture, inks (2, 3) RGB, texture turn in radians and magnification."""

    texture: Texture
    inks: textures.Floats
    turn: float
    zoom: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Affine map from a design's unit box to the image, whose side is 1."""

    centre: tuple[float, float]
    size: float
    angle: float
    flip: bool
    stretch: float
    shear: float

    def rotation(self) -> npt.NDArray[np.float64]:
        """Rotation and mirroring (2, 2), which textures follow as well."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return np.array([[c, -s], [s, c]]) @ np.diag([-1.0 if self.flip else 1.0, 1.0])

    def place(self, outline: Outline) -> Outline:
        """Map outline corners (n, 2) from the unit box to image sides."""
        deform = np.array([[self.stretch, self.shear], [0.0, 1 / self.stretch]])
        placed: Outline = (outline - 0.5) @ (self.size * self.rotation() @ deform).T + self.centre
        return placed


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One object: class name, pose, an RGB colour per ink of its design, texture magnification."""

    name: str
    pose: Pose
    inks: Mapping[str, Colour]
    zoom: float

    def outlines(self) -> tuple[Outline, ...]:
        """All outlines of the object in image sides."""
        return tuple(self.pose.place(outline) for part in DESIGNS[self.name].parts for outline in part.outlines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Light:
    """Photometric state: gain, contrast, shading across the image (x, y) and sensor noise in grey levels."""

    gain: float
    contrast: float
    shading: tuple[float, float]
    noise: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything that determines an image at any resolution."""

    grounds: tuple[Ground, ...]
    """One, or the one above and the one below the horizon."""
    horizon: tuple[float, float]
    """Its height at the left and the right border, in image sides."""
    context: str | None
    branches: tuple[Outline, ...]
    items: tuple[Item, ...]
    """Later items are in front."""
    light: Light
    seed: int
    """Of the textures' and the sensor's noise."""


_NEUTRAL: dict[str, tuple[Texture, Palette]] = {
    "grass": (textures.grass, ((52, 96, 40), (128, 168, 84))),
    "road": (textures.road, ((86, 88, 92), (138, 138, 140))),
    "wall": (textures.wall, ((176, 104, 82), (206, 196, 182))),
    "sand": (textures.sand, ((190, 162, 112), (232, 212, 168))),
    "floor": (textures.floor, ((176, 122, 76), (96, 62, 40))),
    "forest": (textures.forest, ((24, 50, 32), (84, 128, 66))),
}
_CONTEXT: dict[str, tuple[Texture, Palette]] = {
    "sea": (textures.sea, ((28, 78, 132), (140, 196, 222))),
    "rails": (textures.rails, ((92, 80, 72), (160, 148, 134))),
    "sky": (textures.sky, ((92, 150, 214), (238, 242, 248))),
}
BARK: Palette = ((70, 48, 34), (128, 96, 68))


def sample_scene(rng: Rng) -> Scene:
    """Draw a scene description; every item of it is at least half visible."""
    count = 1 + int(rng.choice(len(_OBJECT_COUNTS), p=_OBJECT_COUNTS))
    names = [CLASSES[i] for i in rng.integers(len(CLASSES), size=count)]
    context = _sample_context(names, rng)
    grounds = _sample_grounds(context, rng)
    height, tilt = rng.uniform(0.3, 0.6), rng.uniform(-0.05, 0.05)
    return Scene(
        grounds=grounds,
        horizon=(height - tilt, height + tilt),
        context=context,
        branches=_sample_branches(rng) if context == "branch" else (),
        items=_sample_items(names, rng),
        light=Light(
            gain=rng.uniform(0.82, 1.15),
            contrast=rng.uniform(0.8, 1.15),
            shading=(rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)),
            noise=rng.uniform(1.0, 7.0),
        ),
        seed=int(rng.integers(2**32)),
    )


def _sample_context(names: list[str], rng: Rng) -> str | None:
    for name in names:
        if name in COEXISTENCE and rng.random() < _WITH_CONTEXT:
            return COEXISTENCE[name]
    absent = [context for name, context in COEXISTENCE.items() if name not in names]
    return str(rng.choice(absent)) if rng.random() < _ALONE else None


def _sample_grounds(context: str | None, rng: Rng) -> tuple[Ground, ...]:
    if context in _CONTEXT:
        kinds = [_CONTEXT[context]]
    else:
        count = 2 if rng.random() < _HORIZON else 1
        kinds = [list(_NEUTRAL.values())[i] for i in rng.choice(len(_NEUTRAL), size=count, replace=False)]
    return tuple(
        Ground(
            texture=texture,
            inks=np.array([_jitter(ink, rng, 14) for ink in inks], dtype=np.float32),
            turn=np.radians(rng.uniform(-8, 8)),
            zoom=rng.uniform(0.85, 1.25),
        )
        for texture, inks in kinds
    )


def _sample_branches(rng: Rng) -> tuple[Outline, ...]:
    """Three to five tapering limbs across the image, each with side twigs."""
    outlines = []
    for _ in range(rng.integers(3, 6)):
        start = np.array([-0.05 if rng.random() < 0.5 else 1.05, rng.uniform(0.0, 1.0)])
        end = np.array([1.05 - start[0] + rng.uniform(-0.2, 0.2), rng.uniform(0.0, 1.0)])
        width = rng.uniform(0.035, 0.065)
        outlines.append(_limb(start, end, width))
        for where in rng.uniform(0.15, 0.85, size=4):
            fork = start + where * (end - start)
            reach = rng.uniform(0.15, 0.35) * np.array([np.sign(end[0] - start[0]), rng.choice([-1.0, 1.0])])
            outlines.append(_limb(fork, fork + reach, 0.5 * width))
    return tuple(outlines)


def _limb(start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], width: float) -> Outline:
    along = (end - start) / np.hypot(*(end - start))
    aside = 0.5 * width * np.array([-along[1], along[0]])
    corners = (start + aside, end + 0.3 * aside, end - 0.3 * aside, start - aside)
    return poly(*((float(x), float(y)) for x, y in corners))


def _sample_items(names: list[str], rng: Rng) -> tuple[Item, ...]:
    """Place one object per name; one that finds no place that leaves all of them visible is dropped."""
    sizes = _SIZES_ALONE if len(names) == 1 else _SIZES_TOGETHER
    items: list[Item] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for name in names:
        for _ in range(_PLACEMENTS):
            item = _sample_item(name, rng.uniform(*sizes), rng)
            mask = _silhouette(item)
            if _visible([*masks, mask]) >= _MIN_VISIBLE:
                items.append(item)
                masks.append(mask)
                break
    return tuple(items)


def _sample_item(name: str, size: float, rng: Rng) -> Item:
    size *= DESIGNS[name].scale
    inset = min(0.5, 0.5 * size - _MARGIN)
    pose = Pose(
        centre=(rng.uniform(inset, 1 - inset), rng.uniform(inset, 1 - inset)),
        size=size,
        angle=np.radians(rng.uniform(-10, 10)),
        flip=bool(rng.random() < 0.5),
        stretch=rng.uniform(0.92, 1.09),
        shear=rng.uniform(-0.1, 0.1),
    )
    return Item(name=name, pose=pose, inks=_sample_inks(DESIGNS[name], rng), zoom=rng.uniform(0.85, 1.2))


def _sample_inks(design: Design, rng: Rng) -> dict[str, Colour]:
    """One colour per ink; the inks of a part are drawn until they contrast, as texture must stay legible."""
    partners = {part.inks[1]: part.inks[0] for part in design.parts if part.texture is not textures.plain}
    inks: dict[str, Colour] = {}
    for ink, palette in design.inks.items():
        for _ in range(20):
            inks[ink] = _jitter(palette[rng.integers(len(palette))], rng, 16)
            partner = inks.get(partners.get(ink, ""))
            if partner is None or np.hypot.reduce(np.subtract(partner, inks[ink])) >= _MIN_CONTRAST:
                break
    return inks


def _jitter(colour: Colour, rng: Rng, amount: float) -> Colour:
    shifted = np.array(colour) + rng.uniform(-amount, amount) + rng.uniform(-0.6 * amount, 0.6 * amount, size=3)
    red, green, blue = np.clip(shifted, 0, 255).astype(int).tolist()
    return red, green, blue


def _silhouette(item: Item) -> npt.NDArray[np.bool_]:
    """Mask on a canvas twice as wide as the image, which is in its middle, so that what the borders cut off counts."""
    return rasterise([(outline + 0.5) / 2 for outline in item.outlines()], 2 * _GRID) > 0


def _visible(masks: list[npt.NDArray[np.bool_]]) -> float:
    """Smallest visible share of any of the silhouettes, later ones in front."""
    hidden = np.ones((2 * _GRID, 2 * _GRID), dtype=bool)
    hidden[_GRID // 2 : -_GRID // 2, _GRID // 2 : -_GRID // 2] = False
    smallest = 1.0
    for mask in reversed(masks):
        smallest = min(smallest, float((mask & ~hidden).sum() / mask.sum()))
        hidden |= mask
    return smallest
