"""The panels: what each stage makes of the same images, one image at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cosa_fast.files import read_json
from cosa_fast.report.images import Picture, embed
from cosa_fast.report.markup import Html, Missing, Section, element, join
from cosa_fast.report.sources import number

FIX = "make it again with `cosa-fast evaluate` (in the workflow: `snakemake --cores all --forcerun evaluate`)"
IMAGES = 24
"""Images shown at most, evenly spaced through the gallery."""
SIDE = 560
"""Longest side of a picture in pixels."""
EXPLANATIONS = {
    "image": "The image; its tags are marked below.",
    "CAM": "Largest class activation map of the tagged classes, over the image in grey.",
    "CAM pseudo-label": "The CAMs against the threshold ξ (Eq. 3); they know the image's tags.",
    "CoSA": "CoSA's segmentation, label-free: from the image alone.",
    "CoSA-MS": "The segmentation of CoSA-MS, label-free: from the image alone.",
    "truth": "The mask. White: not scored.",
    "error": "CoSA's label-free segmentation against the truth. Dimmed: right. Red: wrong. White: not scored.",
}
"""One line for each layer that is known."""
PHOTOGRAPHS = ("image", "CAM", "error")
"""Layers whose colours stand for no class."""
LEFT, RIGHT = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
BACKGROUND, VOID = "background", "not scored"
EXTRA = {BACKGROUND: "#000000", VOID: "#ffffff"}
"""Colours of masks that belong to no class."""


def gallery(results: Path, how: str) -> Section | Missing:
    """The viewer over `gallery/gallery.json` and its pictures.

    Without its script the page shows every image as a strip of its layers; the script takes them from there.

    Raises:
        ValueError: the description or a picture is damaged.
    """
    path = results / "gallery" / "gallery.json"
    if not path.exists():
        return Missing("panels", how)
    content = read_json(path, "gallery's description", FIX)
    try:
        layers: list[str] = [str(layer) for layer in content["layers"]]
        palette = {str(name): str(colour).lower() for name, colour in content["palette"].items()}
        where = f"{content['dataset']} {content['split']}"
        images = list(content["images"])
        step = max(1.0, len(images) / IMAGES)
        shown = [images[round(place * step)] for place in range(min(IMAGES, len(images)))]
        samples = [_sample(path, image, layers, palette) for image in shown]
        tags = sorted({str(tag) for image in shown for tag in image["labels"]})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no description of a gallery ({type(error).__name__}: {error}): {FIX}") from None
    if not samples or not layers:
        return Missing("panels (the gallery is empty)", how)
    count = f"{len(samples)} of {len(images)} images" if len(samples) < len(images) else f"{len(images)} images"
    intro = element(
        "p", f"{where}, {count} at even distances. Choose a layer, or compare them all below.", class_="muted"
    )
    return Section("panels", "Panels", join(intro, _viewer(layers, tags), element("div", *samples, class_="samples")))


def _viewer(layers: list[str], tags: list[str]) -> Html:
    """What the script fills: the large picture, its buttons; it stays hidden without the script."""
    buttons = [
        element(
            "button",
            element("span", layer),
            element("kbd", str(place), aria_hidden="true") if place <= 9 else Html(),
            type="button",
            aria_pressed="true" if place == 1 else "false",
            data_layer=layer,
            data_about=EXPLANATIONS.get(layer, ""),
        )
        for place, layer in enumerate(layers, start=1)
    ]
    options = [element("option", "all classes", value=""), *(element("option", tag, value=tag) for tag in tags)]
    steps = element(
        "div",
        element(
            "button", LEFT, element("span", " Previous"), type="button", class_="previous", aria_label="Previous image"
        ),
        element("output", class_="place"),
        element("button", element("span", "Next "), RIGHT, type="button", class_="next", aria_label="Next image"),
        class_="steps",
    )
    keys = (element("kbd", key) for key in (LEFT, RIGHT, "1", str(min(9, len(layers)))))
    return element(
        "div",
        element("div", element("img", alt="", class_="picture"), class_="stage"),
        element(
            "div",
            element("div", *buttons, class_="layers", role="group", aria_label="Layer"),
            element("p", class_="about muted", aria_live="polite"),
            steps,
            element("p", element("label", "Images with ", element("select", *options, id="tag")), class_="controls"),
            element("p", *_between(keys, ("", " ", " image, ", " to ", " layer")), class_="muted keys"),
            class_="side",
        ),
        class_="viewer needs-script",
    )


def _between(items: Iterable[Html], words: Sequence[str]) -> Iterator[str]:
    """words[0], item, words[1], item, ..., last word."""
    yield words[0]
    for item, word in zip(items, words[1:], strict=True):
        yield item
        yield word


def _sample(path: Path, image: Mapping[str, Any], layers: list[str], palette: Mapping[str, str]) -> Html:
    """One image: a strip of all its layers, its tags, and the colours that occur in its masks."""
    name, tags = str(image["id"]), [str(tag) for tag in image["labels"]]
    pictures = {layer: _picture(path, image["files"][layer]) for layer in layers if layer in image["files"]}
    iou = image.get("iou")
    if iou is not None and number(str(iou)) is None:
        raise ValueError(f"{path}: the IoU of {name} is {iou!r}, no number: {FIX}")
    thumbnails = [
        element(
            "li",
            element(
                "img",
                src=picture.uri,
                alt=f"{layer} of {name}",
                width=picture.width,
                height=picture.height,
                class_="map" if picture.colours else None,
                data_layer=layer,
            ),
            element("span", layer),
        )
        for layer, picture in pictures.items()
    ]
    colours = {colour for layer, picture in pictures.items() if layer not in PHOTOGRAPHS for colour in picture.colours}
    named = {**EXTRA, **palette}
    present = [label for label in named if named[label] in colours or label in tags]
    chips = [
        element(
            "li",
            element("span", class_="chip", style=f"--chip:{_colour(path, named[label])}", aria_hidden="true"),
            label,
            element("span", "tag", class_="tag") if label in tags else Html(),
        )
        for label in sorted(present, key=lambda label: (label in EXTRA, label not in tags, label))
    ]
    facts = [element("b", name)]
    if iou is not None:
        facts.append(join(" · mIoU of this image ", element("b", f"{100 * float(iou):.1f}\N{NO-BREAK SPACE}%")))
    return element(
        "article",
        element("h3", *facts),
        element("ul", *chips, class_="chips", aria_label="Classes"),
        element("ul", *thumbnails, class_="strip", aria_label="All layers"),
        class_="sample",
        data_id=name,
        data_tags="\n".join(tags),
    )


def _picture(path: Path, file: object) -> Picture:
    name = str(file)
    if Path(name).name != name:
        raise ValueError(f"{path}: the picture {name!r} must be a file of that folder: {FIX}")
    return embed(path.with_name(name), SIDE, FIX)


def _colour(path: Path, colour: str) -> str:
    digits = colour.removeprefix("#")
    if len(digits) != 6 or set(digits) - set("0123456789abcdef"):
        raise ValueError(f"{path}: {colour!r} is no colour like #a0b1c2: {FIX}")
    return colour
