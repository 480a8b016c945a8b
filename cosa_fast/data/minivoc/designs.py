"""The ten object designs of MiniVOC.

A design is a table of parts in hundredths of the unit box (x to the right, y down, objects look right). A part is drawn
over the earlier ones: a texture, the names of the two inks that colour it, and its outlines.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from . import textures
from .shapes import Outline, ellipse, leaf, poly, rect, smooth
from .textures import Texture

Colour = tuple[int, int, int]
Palette = tuple[Colour, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Outlines of one texture and two inks, named as in `Design.inks`."""

    texture: Texture
    inks: tuple[str, str]
    outlines: tuple[Outline, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Design:
    """How objects of one class may look."""

    parts: tuple[Part, ...]
    inks: Mapping[str, Palette]
    scale: float = 1.0
    """Enlargement that gives slender classes a foreground share like the others'."""


LIGHT: Palette = ((240, 240, 235), (245, 230, 190), (205, 222, 238), (215, 215, 218))
DARK: Palette = ((38, 38, 48), (66, 46, 38), (38, 54, 84), (82, 32, 36), (34, 66, 48))
PAINT: Palette = (
    (200, 48, 42), (232, 125, 38), (240, 200, 55), (70, 155, 80),
    (48, 155, 165), (50, 98, 190), (128, 78, 165), (120, 132, 145),
)  # fmt: skip
FUR: Palette = ((205, 132, 64), (132, 92, 62), (92, 88, 88), (228, 216, 200), (172, 160, 150))
SKIN: Palette = ((240, 200, 170), (208, 152, 116), (142, 96, 68), (232, 166, 152))
LEAF: Palette = ((84, 168, 72), (140, 180, 70), (60, 140, 100), (150, 130, 60))
BLACK: Palette = ((34, 34, 38), (52, 50, 52))
PANE: Palette = ((128, 178, 205), (105, 145, 178), (88, 118, 150))


def _part(texture: Texture, inks: str, *outlines: Outline) -> Part:
    first, second = inks.split()
    return Part(texture=texture, inks=(first, second), outlines=outlines)


DESIGNS: dict[str, Design] = {
    "aeroplane": Design(
        scale=1.15,
        inks={"hull": LIGHT + PAINT[-1:], "rivet": PAINT[5:] + DARK[2:3], "engine": PAINT + BLACK, "pane": PANE,
              "shine": LIGHT},
        parts=(
            _part(
                textures.rivets, "hull rivet",
                poly((46, 40), (36, 12), (48, 12), (70, 42)),
                smooth((1, 46), (20, 38), (55, 36), (82, 39), (98, 50), (88, 60), (50, 63), (20, 58)),
            ),
            _part(
                textures.plain, "engine pane",
                poly((3, 44), (0, 12), (12, 12), (28, 41)),
                smooth((44, 66), (58, 64), (62, 70), (58, 76), (44, 74)),
            ),
            _part(
                textures.rivets, "hull rivet",
                poly((40, 53), (70, 55), (38, 90), (24, 90)),
                poly((4, 49), (22, 51), (4, 68), (-4, 68)),
            ),
            _part(
                textures.glass, "pane shine",
                *(ellipse(x, 46, 2.1, 3) for x in range(26, 80, 8)),
                smooth((85, 42), (90, 43), (94, 48), (87, 49)),
            ),
        ),
    ),
    "bird": Design(
        inks={"down": PAINT[3:6] + PAINT[1:2], "edge": DARK, "head": FUR + PAINT,
              "limb": PAINT[1:3] + BLACK, "black": BLACK},
        parts=(
            _part(
                textures.plain, "limb black",
                rect(46, 80, 49.5, 98), rect(58, 80, 61.5, 98),
                poly((40, 98.5), (48, 94), (56, 98.5)), poly((52, 98.5), (60, 94), (68, 98.5)),
                poly((91, 17), (102, 25), (90, 30)),
            ),
            _part(textures.plain, "head edge", ellipse(80, 24, 15, 14.5)),
            _part(
                textures.feathers, "down edge",
                poly((28, 50), (-4, 62), (-2, 72), (6, 80), (34, 70)),
                smooth((20, 56), (42, 36), (66, 28), (84, 34), (90, 52), (78, 76), (52, 87), (28, 76)),
            ),
            _part(
                textures.feathers, "edge down",
                smooth((12, 66), (34, 48), (58, 42), (68, 52), (56, 68), (36, 74)),
            ),
            _part(textures.plain, "black edge", ellipse(84, 20, 2.6, 2.6)),
        ),
    ),
    "boat": Design(
        inks={"sail": LIGHT, "stripe": PAINT[:3] + PAINT[5:6], "hull": PAINT + DARK + FUR, "dark": DARK,
              "pane": PANE, "shine": LIGHT},
        parts=(
            _part(textures.plain, "dark hull", rect(47.5, 0, 50.5, 80)),
            _part(
                textures.sailcloth, "sail stripe",
                poly((50.5, 0), (68, 14), (82, 34), (92, 54), (98, 77), (50.5, 78.5)),
                poly((47.5, 5), (36, 18), (21, 40), (9, 60), (1, 77.5), (47.5, 78.5)),
            ),
            _part(textures.plain, "hull dark", poly((0, 77), (50, 78), (102, 75.5), (88, 96), (15, 96))),
            _part(textures.glass, "pane shine", *(ellipse(x, 87.5, 2.5, 2.5) for x in (30, 45, 60, 75))),
        ),
    ),
    "bus": Design(
        scale=0.92,
        inks={"body": PAINT[:3], "joint": DARK, "pane": PANE, "shine": LIGHT, "black": BLACK, "hub": LIGHT},
        parts=(
            _part(
                textures.tiles, "body joint",
                smooth((1, 16), (4, 12), (50, 11), (94, 12), (98, 18), (100, 50), (100, 76), (97, 79), (50, 79),
                       (3, 79), (0, 76), (0, 48)),
            ),
            _part(
                textures.glass, "pane shine",
                *(rect(x, 20, x + 12.5, 36) for x in (6, 23, 40, 57)), rect(75, 20, 82, 70),
                poly((88, 20), (95, 20), (98, 40), (88, 40)),
            ),
            _part(textures.plain, "black joint", ellipse(22, 79, 9.5, 9.5), ellipse(64, 79, 9.5, 9.5)),
            _part(textures.plain, "hub body", ellipse(22, 79, 4, 4), ellipse(64, 79, 4, 4)),
        ),
    ),
    "cat": Design(
        inks={"coat": FUR + PAINT[1:2], "stripe": DARK, "face": FUR, "nose": SKIN, "black": BLACK},
        parts=(
            _part(
                textures.tabby, "coat stripe",
                smooth((34, 95), (10, 92), (0, 68), (5, 42), (12, 38), (17, 44), (14, 64), (22, 78)),
                smooth((24, 96), (18, 76), (26, 52), (44, 36), (66, 36), (78, 54), (82, 96), (54, 98)),
            ),
            _part(
                textures.plain, "face coat",
                ellipse(62, 25, 19, 15.5), poly((44, 22), (44, 0), (58, 12)), poly((66, 12), (80, 0), (80, 22)),
                ellipse(68, 94.5, 9, 4.5), ellipse(86, 94.5, 8, 4.5),
            ),
            _part(
                textures.plain, "nose face",
                poly((59, 28.5), (67, 28.5), (63, 32.5)), poly((47, 14), (47, 6), (53, 11)),
            ),
            _part(textures.plain, "black stripe", ellipse(55, 23, 3, 3.4), ellipse(71, 23, 3, 3.4)),
        ),
    ),
    "cow": Design(
        inks={"coat": LIGHT[:2] + FUR, "patch": BLACK + FUR[1:3], "leg": FUR, "muzzle": SKIN, "black": BLACK},
        parts=(
            _part(
                textures.plain, "leg black",
                *(rect(x, 58, x + 8.5, 93) for x in (12, 26, 56, 69)), poly((6, 30), (10, 32), (4, 64), (0, 64)),
            ),
            _part(textures.plain, "muzzle leg", ellipse(44, 74, 8, 5)),
            _part(
                textures.patches, "coat patch",
                smooth((5, 30), (20, 22), (50, 24), (72, 17), (86, 26), (84, 52), (80, 72), (50, 74), (16, 75),
                       (5, 60)),
            ),
            _part(
                textures.plain, "leg coat",
                smooth((80, 12), (90, 10), (98, 26), (102, 40), (94, 46), (82, 36)),
                poly((82, 14), (70, 13), (74, 21)), poly((83, 12), (80, 2), (88, 10)),
            ),
            _part(textures.plain, "muzzle leg", ellipse(97, 41, 6.5, 5.5)),
            _part(
                textures.plain, "black coat",
                ellipse(90, 21, 2, 2.4), *(rect(x, 90, x + 8.5, 95) for x in (12, 26, 56, 69)),
            ),
        ),
    ),
    "person": Design(
        scale=1.15,
        inks={"shirt": PAINT[3:7], "check": LIGHT, "trousers": DARK, "weave": PAINT[3:7] + LIGHT,
              "skin": SKIN, "hair": FUR + BLACK},
        parts=(
            _part(textures.plain, "hair skin", ellipse(42, 97, 8.5, 3), ellipse(60, 97, 8.5, 3)),
            _part(
                textures.checks, "trousers weave",
                poly((35, 54), (65, 54), (68, 75), (67, 96), (54, 96), (50, 70), (47, 96), (34, 96), (32, 75)),
            ),
            _part(
                textures.plain, "skin hair",
                ellipse(26, 60.5, 4.2, 4.8), ellipse(74, 60.5, 4.2, 4.8), rect(45, 14, 55, 26),
            ),
            _part(
                textures.checks, "shirt check",
                smooth((45, 20.5), (55, 20.5), (65, 23), (72, 34), (79, 55), (75, 59.5), (69, 57.5), (64, 43),
                       (64.5, 58), (50, 59.5), (35.5, 58), (36, 43), (31, 57.5), (25, 59.5), (21, 55), (28, 34),
                       (35, 23)),
            ),
            _part(textures.plain, "hair skin", ellipse(50, 9, 10.5, 9.5)),
            _part(
                textures.plain, "skin hair",
                smooth((42, 8), (50, 6), (58, 8), (58.5, 14), (54.5, 20.5), (45.5, 20.5), (41.5, 14)),
            ),
        ),
    ),
    "pottedplant": Design(
        inks={"leaf": LEAF, "gap": ((28, 62, 40), (40, 52, 34), (54, 40, 44)), "rim": DARK,
              "pot": PAINT + SKIN[1:3] + LIGHT},
        parts=(
            _part(
                textures.foliage, "leaf gap",
                ellipse(50, 52, 22, 22),
                *(leaf(50, 58, angle, 60 if angle % 60 == 30 else 50, 22) for angle in range(-30, 211, 30)),
                *(leaf(50, 45, angle, 42, 20) for angle in range(15, 166, 30)),
            ),
            _part(textures.plain, "pot rim", poly((28, 71), (72, 71), (65, 100), (35, 100)), rect(25, 66, 75, 75)),
            _part(textures.plain, "rim pot", rect(29, 75, 71, 76.8)),
        ),
    ),
    "train": Design(
        inks={"body": PAINT[5:7] + PAINT[:1], "rib": LIGHT, "pane": PANE, "shine": LIGHT, "black": BLACK,
              "hub": LIGHT},
        parts=(
            _part(
                textures.plain, "black rib",
                *(ellipse(x, 78, 6, 6) for x in (8, 20, 34, 57, 69, 86)), rect(40, 28, 50, 71),
            ),
            _part(
                textures.ribs, "body rib",
                rect(0, 22, 43, 75),
                smooth((47, 23), (49, 21), (70, 21), (84, 25), (94, 42), (101, 64), (99, 74), (75, 76), (49, 76),
                       (46, 72)),
            ),
            _part(
                textures.glass, "pane shine",
                *(rect(x, 31, x + 10, 46) for x in (4, 17, 30, 51, 64)),
                poly((78, 30), (84, 30), (91, 47), (78, 47)),
            ),
            _part(textures.plain, "hub rib", ellipse(94, 63, 2.5, 2.5), rect(0, 18.5, 43, 22)),
        ),
    ),
    "tvmonitor": Design(
        scale=0.9,
        inks={"frame": BLACK + LIGHT + FUR, "edge": DARK, "glow": PAINT[4:7], "picture": DARK},
        parts=(
            _part(
                textures.plain, "frame edge",
                poly((44, 72), (56, 72), (59, 90), (41, 90)),
                smooth((24, 93), (34, 88), (66, 88), (76, 93), (50, 95)),
                rect(0, 6, 100, 78),
            ),
            _part(textures.mosaic, "glow picture", rect(5, 11, 95, 71)),
        ),
    ),
}  # fmt: skip
"""Every class in the order of its mask id (1 = first).

Most of an object carries its class's texture, and parts shared with others cover the rest, 16-31 %: a small part with a
texture of its own would attract the whole activation. Colours are typical of a class, but none is unique to it.
"""
