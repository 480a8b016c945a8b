"""The studies: the paper's tables and figures made on our data, one figure and one table each."""

from __future__ import annotations

import re
from pathlib import Path

from cosa_fast.report.images import embed
from cosa_fast.report.markup import Html, Missing, Section, element, join, scroller
from cosa_fast.report.sources import embed_svg, read_table

TITLES = {
    "systems": (
        "Table 1 · Systems",
        "The single-stage CoSA and CoSA-MS, a standalone network trained on its pseudo-labels, without and with CRF.",
    ),
    "cpl": (
        "Table 2 · Quality of the CAM pseudo-labels",
        "mIoU of the pseudo-labels that the main CAM, the auxiliary CAM and the mean of both give.",
    ),
    "ladder": (
        "Table 3a · Adding the parts one by one",
        "From the baseline up to the whole of CoSA; differences are to the baseline, seed by seed.",
    ),
    "leave_one_out": (
        "Table 3b · Leaving one part out",
        "The whole of CoSA, and CoSA without one part at a time; differences are to the whole, seed by seed.",
    ),
    "guidance": (
        "Table 4a · What guides the CAMs, and how far the gradient reaches",
        "Guidance by the segmentation's pseudo-labels, with the gradient stopped at features, classifier or both.",
    ),
    "coexistence": (
        "Table 4b · Coexistence",
        "Classes that come with one context, with and without contrastive separation; C-mIoU is their mean.",
    ),
    "speed": (
        "Table 4c · Speed",
        "Speed and quality with and without the dense CRF. Times hold for the machine they were taken on.",
    ),
    "threshold": (
        "Threshold · Fixed values against the dynamic one",
        "The dynamic threshold (Eq. 6) needs no search; fixed ones are one training each.",
    ),
    "oracle": (
        "Fig. 1 · Oracle",
        "Classification and CAMs when true masks, pseudo-labels, nothing or noise guide the CAMs.",
    ),
    "confidence": (
        "Fig. 3 · Confidence and accuracy",
        "How far a pixel's CAM confidence tells whether its pseudo-label is right, and where the threshold falls.",
    ),
    "aux_cam": (
        "Fig. 5 · Main and auxiliary CAM",
        "Quality of both during the training, over all pixels and over those of low perplexity (Eq. 4).",
    ),
    "swap": (
        "Fig. 8 · Online and assignment network",
        "Pseudo-labels of both over the iterations, with and without swapped assignments.",
    ),
    "raw": (
        "Fig. 9 · Reliability-based adaptive weighting",
        "Quality and perplexity (Eq. 4) of the CAM pseudo-labels, trained with and without RAW (Eq. 5).",
    ),
    "qualitative": (
        "Figs. 4, 6, 7 · Qualitative comparison",
        "CAMs with and without contrastive separation, pseudo-labels and predictions, image by image.",
    ),
}
"""Title and caption by name, in the paper's order; other studies follow with their name as title."""

LONG = 12
"""Tables of more rows start closed."""
ROWS = 200
"""Rows of a table shown at most."""
WORDS = 40
"""Cells of more letters may break into lines."""
SIDE = 1600
"""Longest side in pixels of an embedded figure that is no drawing."""
NUMERIC = re.compile(
    r"[-+\N{MINUS SIGN}]?[\d.,]+(e[-+]?\d+)?\s*%?(\s*(±|\+/-|\N{EN DASH}|to)\s*[\d.,]+\s*%?)?", re.IGNORECASE
)


def studies(results: Path, how: str) -> list[Section | Missing]:
    """The section with all studies there are, and the known ones that are missing.

    Raises:
        ValueError: a file is damaged.
    """
    folder = results / "studies"
    found = {path.stem for kind in ("svg", "png") for path in folder.glob(f"*.{kind}")}
    found |= {name for name in TITLES if (folder / f"{name}.csv").exists()}
    names = [name for name in TITLES if name in found] + sorted(found - TITLES.keys())
    if not names:
        return [Missing("studies", how)]
    links = (element("li", element("a", TITLES.get(name, (name,))[0], href=f"#{_anchor(name)}")) for name in names)
    index = element("ul", *links, class_="index")
    shown = Section("studies", "Studies", join(index, *(_study(folder, name, how) for name in names)))
    absent = [name for name in TITLES if name not in found]
    return [shown, Missing(f"the studies {', '.join(absent)}", how)] if absent else [shown]


def _study(folder: Path, name: str, how: str) -> Html:
    title, caption = TITLES.get(name, (name, ""))
    fix = f"make it again with {how}"
    parts = [element("h3", title)]
    if caption:
        parts.append(element("p", caption, class_="muted"))
    svg, png, table = (folder / f"{name}.{kind}" for kind in ("svg", "png", "csv"))
    alternative = f"Figure: {title}. {caption}".strip()
    if svg.exists():
        parts.append(_figure(*embed_svg(svg, fix), alternative))
    elif png.exists():
        picture = embed(png, SIDE, fix)
        parts.append(_figure(picture.uri, picture.width, alternative))
    if table.exists():
        parts.append(_table(table, title, fix))
    return element("article", *parts, class_="study", id=_anchor(name), tabindex="-1")


def _anchor(name: str) -> str:
    return "study-" + re.sub(r"[^A-Za-z0-9_-]", "-", name)


def _figure(uri: str, width: float | None, alternative: str) -> Html:
    """On white paper, as figures are drawn; a narrow screen scrolls it rather than shrink its letters."""
    style = None if width is None else f"--natural:{width:g}px"
    return scroller("Figure", element("img", src=uri, alt=alternative, style=style), class_="paper scroll")


def _table(path: Path, title: str, fix: str) -> Html:
    header, rows = read_table(path, fix)
    numeric = [
        all(not row[place] or NUMERIC.fullmatch(row[place].strip()) for row in rows) for place in range(len(header))
    ]
    kinds = ["number" if flag else None for flag in numeric]
    body = [
        element("tr", *(element("td", cell, class_=_kind(cell, kind)) for cell, kind in zip(row, kinds, strict=True)))
        for row in rows[:ROWS]
    ]
    names = zip(header, kinds, strict=True)
    heads = element("tr", *(element("th", name.replace("_", " "), scope="col", class_=kind) for name, kind in names))
    table = element("table", element("thead", heads), element("tbody", *body))
    rest = len(rows) - ROWS
    note = element("p", f"and {rest} more rows in studies/{path.name}", class_="muted") if rest > 0 else Html()
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    summary = element("summary", "Table ", element("span", f"({count}, studies/{path.name})", class_="muted"))
    return element("details", summary, scroller(f"Table: {title}", table), note, open=len(rows) <= LONG)


def _kind(cell: str, kind: str | None) -> str | None:
    return "prose" if kind is None and len(cell) > WORDS else kind
