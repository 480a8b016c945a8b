"""Procedural textures of MiniVOC: functions from coordinates to colours.

Coordinates are in design pixels (1/112 of the image side), so that a period reads like pixels of the default image size
and every texture looks the same at any resolution. Edges are hard; the renderer antialiases by supersampling.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Rng = np.random.Generator
Texture = Callable[[Floats, Floats, Rng, Floats], Floats]
"""(x (n,), y (n,), random stream, inks (2, 3) RGB 0..255) -> colours (3, n)."""

_LATTICE = 64
"""Side of the periodic table of random values behind `noise` and `cells`; a power of two."""


def noise(x: Floats, y: Floats, rng: Rng, cell: float) -> Floats:
    """Smooth value noise in [0, 1] with features of `cell` design pixels, for points (n,), (n,)."""
    side = _LATTICE + 1
    table = np.pad(rng.random((_LATTICE, _LATTICE), dtype=np.float32), (0, 1), mode="wrap").ravel()
    u, v = x / np.float32(cell), y / np.float32(cell)
    column, row = np.floor(u), np.floor(v)
    u -= column
    v -= row
    u *= u * (3 - 2 * u)
    v *= v * (3 - 2 * v)
    corner = (row.astype(np.int64) & (_LATTICE - 1)) * side + (column.astype(np.int64) & (_LATTICE - 1))
    # In place: fresh memory for every step would take longer than the arithmetic.
    upper: Floats = table[corner]
    lower: Floats = table[side:][corner]
    upper += (table[1:][corner] - upper) * u
    lower += (table[side + 1 :][corner] - lower) * u
    lower -= upper
    lower *= v
    lower += upper
    return lower


def cells(x: Floats, y: Floats, rng: Rng, width: float, height: float) -> Floats:
    """One uniform random value in [0, 1] per width x height rectangle of the plane, for points (n,), (n,)."""
    table = rng.random((_LATTICE, _LATTICE), dtype=np.float32)
    values: Floats = table[_index(y / height) & (_LATTICE - 1), _index(x / width) & (_LATTICE - 1)]
    return values


def mix(inks: Floats, amount: npt.NDArray[np.generic]) -> Floats:
    """Blend from the first ink (amount 0) to the second (amount 1): inks (2, 3), amount (n,) -> (3, n)."""
    colours: Floats = np.multiply.outer(inks[1] - inks[0], amount.astype(np.float32))
    colours += inks[0][:, None]
    return colours


def _index(t: Floats) -> npt.NDArray[np.int32]:
    return np.floor(t).astype(np.int32)


def _phase(t: Floats) -> Floats:
    return t - np.floor(t)


def _ramp(t: Floats, low: float, high: float) -> Floats:
    ramp: Floats = np.clip((t - low) / (high - low), 0, 1)
    return ramp


# Shared by several classes: legs, heads, windows, wheels, pots and frames carry no evidence for any one class.


def plain(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Nearly flat paint, skin or fur."""
    return mix(inks, 0.15 * noise(x, y, rng, 7))


def glass(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Window pane with slanted reflections."""
    return mix(inks, 0.7 * (_phase((x + y) / 13 + rng.random(dtype=np.float32)) < 0.3))


# One per class.


def rivets(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """aeroplane: staggered rivets on sheet metal."""
    row = np.floor(y / 3)
    across, down = _phase(x / 5 + 0.5 * (row % 2)) * 5 - 2.5, y - 3 * row - 1.5
    return mix(inks, across * across + down * down < 1.3)


def feathers(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """bird: rows of overlapping round feathers, light in the middle."""
    row = np.floor(y / 4)
    across, down = _phase(x / 6 + 0.5 * (row % 2)) * 6 - 3, y - 4 * row
    return mix(inks, _ramp(np.hypot(across, down), 1.8, 4.4))


def sailcloth(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """boat: broad upright stripes."""
    return mix(inks, _phase(x / 8) < 0.5)


def tiles(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """bus: square tiles with joints."""
    return mix(inks, (_phase(x / 5) < 0.25) | (_phase(y / 5) < 0.25))


def tabby(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """cat: wavering stripes of fur."""
    bend = 14 * noise(x, y, rng, 11)
    return mix(inks, _phase((x + 0.4 * y + bend) / 6) < 0.45)


def patches(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """cow: small irregular patches; larger ones would leave most of the body without any evidence."""
    return mix(inks, noise(x, y, rng, 5.5) + 0.15 * noise(x, y, rng, 3) > 0.575)


def checks(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """person: chequered cloth."""
    return mix(inks, (_index(x / 4) + _index(y / 4)) & 1)


def foliage(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """pottedplant: small leaves, each turned its own way, with a bright rim and dark gaps."""
    row = np.floor(y / 6)
    x = x + 3.5 * (row % 2)
    turn = np.pi * cells(x, y, rng, 7, 6)
    across, down = _phase(x / 7) * 7 - 3.5, y - 6 * row - 3
    along, aside = across * np.cos(turn) + down * np.sin(turn), down * np.cos(turn) - across * np.sin(turn)
    reach = np.abs(aside) / 2.8 + (along / 4.4) ** 2
    return mix(inks, np.where(np.abs(aside) < 0.3, 0.35, _ramp(reach, 0.25, 1.1)))


def ribs(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """train: level corrugation."""
    return mix(inks, _phase(y / 5) < 0.45)


def mosaic(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """tvmonitor: coarse glowing picture elements."""
    return mix(inks, 0.25 * _ramp(noise(x, y, rng, 16), 0.2, 0.8) + 0.75 * cells(x, y, rng, 3.5, 3.5))


# Backgrounds.


def grass(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Upright blades over lighter and darker ground."""
    return mix(inks, 0.6 * noise(x, 0.25 * y, rng, 1.3) + 0.4 * noise(x, y, rng, 18))


def road(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Asphalt with dashed white lane lines."""
    colours = mix(inks, 0.55 * noise(x, y, rng, 1.2) + 0.45 * noise(x, y, rng, 22))
    offset = rng.uniform(0, 64, 2)
    colours[:, (_phase((x + offset[0]) / 64) < 0.04) & (_phase((y + offset[1]) / 30) < 0.55)] = 220
    return colours


def wall(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Bricks with mortar joints."""
    row = np.floor(y / 7)
    shifted = x + 8 * (row % 2)
    joint = (y - 7 * row < 1) | (_phase(shifted / 16) < 0.07)
    return mix(inks, np.where(joint, 1, 0.45 * cells(shifted, y, rng, 16, 7) + 0.15 * noise(x, y, rng, 1.5)))


def sand(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Grains and wind ripples."""
    ripple = np.sin((y + 9 * noise(x, y, rng, 24)) * np.float32(0.55))
    return mix(inks, 0.5 * noise(x, y, rng, 1.1) + 0.25 + 0.2 * ripple)


def floor(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Wooden boards with grain."""
    row = np.floor(y / 10)
    shifted = x + 47 * (row * 0.618 % 1)
    joint = (y - 10 * row < 0.8) | (_phase(shifted / 47) < 0.018)
    board = 0.4 * cells(shifted, y, rng, 47, 10) + 0.35 * noise(0.1 * x, y, rng, 1.4)
    return mix(inks, np.where(joint, 1, board))


def forest(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Tree crowns in three depths of shade."""
    crown = 0.6 * noise(x, y, rng, 12) + 0.4 * noise(x, y, rng, 4)
    return mix(inks, 0.3 * (crown > 0.42) + 0.3 * (crown > 0.56) + 0.35 * noise(x, y, rng, 1.6))


def sea(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Rolling waves with bright crests."""
    wave = np.sin((y + 5 * np.sin((x + 20 * rng.random(dtype=np.float32)) / 11) + 12 * noise(x, y, rng, 20)) * 0.75)
    return mix(inks, 0.32 + 0.3 * wave + 0.35 * (wave > 0.93) + 0.1 * noise(x, y, rng, 2))


def rails(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Tracks on wooden sleepers in ballast."""
    colours = mix(inks, 0.8 * noise(x, y, rng, 1.6))
    across = _phase((y + rng.uniform(0, 38)) / 38) * 38
    colours[:, (_phase(x / 9) < 0.45) & (across > 4) & (across < 30)] *= np.float32(0.5)
    colours[:, (np.abs(across - 10) < 1.2) | (np.abs(across - 24) < 1.2)] = 190
    return colours


def sky(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Clouds."""
    cloud = 0.55 * noise(0.7 * x, y, rng, 24) + 0.3 * noise(x, y, rng, 10) + 0.15 * noise(x, y, rng, 4)
    return mix(inks, _ramp(cloud, 0.42, 0.72))


def bark(x: Floats, y: Floats, rng: Rng, inks: Floats) -> Floats:
    """Rough streaks of a branch."""
    return mix(inks, noise(x, y, rng, 1.8))
