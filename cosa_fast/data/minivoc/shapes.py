"""Outlines that objects are made of, and their rasterisation.

The constructors take hundredths of the unit box (angles in degrees) and return corners in the unit box.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Outline = npt.NDArray[np.float64]
"""Corners (n, 2) of a closed polygon, x then y, y pointing down."""


def poly(*corners: tuple[float, float]) -> Outline:
    """Straight-edged outline."""
    return np.array(corners) / 100


def rect(left: float, top: float, right: float, bottom: float) -> Outline:
    """Upright rectangle."""
    return poly((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, rx: float, ry: float) -> Outline:
    """Upright ellipse about (x, y)."""
    angle = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1) / 100


def smooth(*knots: tuple[float, float]) -> Outline:
    """Closed Catmull-Rom curve through the knots."""
    p1 = np.array(knots) / 100
    p0, p2, p3 = np.roll(p1, 1, 0), np.roll(p1, -1, 0), np.roll(p1, -2, 0)
    t = np.linspace(0, 1, 8, endpoint=False)[None, :, None]
    p0, p1, p2, p3 = (p[:, None] for p in (p0, p1, p2, p3))
    curve: Outline = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    return curve.reshape(-1, 2)


def leaf(x: float, y: float, angle: float, length: float, width: float) -> Outline:
    """Pointed blade that starts at (x, y) and points `angle` degrees counter-clockwise from the right."""
    along = np.array([np.cos(np.radians(angle)), -np.sin(np.radians(angle))])
    aside = np.array([along[1], -along[0]])
    profile = [(0, 0), (0.25, 0.7), (0.5, 1), (0.75, 0.75), (1, 0), (0.75, -0.75), (0.5, -1), (0.25, -0.7)]
    return np.array([(x, y) + length * s * along + 0.5 * width * d * aside for s, d in profile]) / 100


def rasterise(outlines: Iterable[Outline], size: int, stroke: int = 0) -> npt.NDArray[np.uint8]:
    """Draw outlines, given in image sides 0..1, over each other: (size, size), 0 outside, 1 inside, 2 on their rims.

    The rims are `stroke` pixels wide and lie inside; 0 draws none.
    """
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for outline in outlines:
        # Pillow counts pixel centres at whole numbers.
        corners = (outline * size - 0.5).ravel().tolist()
        draw.polygon(corners, fill=1, outline=2 if stroke else 1, width=max(stroke, 1))
    return np.asarray(canvas)
