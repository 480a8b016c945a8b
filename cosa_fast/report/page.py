"""`make_report`: every part of a results folder on one page."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from string import Template

from cosa_fast import __version__
from cosa_fast.files import read_json, write_atomically
from cosa_fast.report.gallery import gallery
from cosa_fast.report.learning import has_validation, learning_curves
from cosa_fast.report.markup import Html, Missing, Section, code, element, join
from cosa_fast.report.run import Origin, configuration, read_origin, times, versions_table
from cosa_fast.report.scores import headline, per_class, read_scores, read_text_result, result_table
from cosa_fast.report.studies import studies

RUN = "`snakemake --cores all`"


def make_report(results: Path, output: Path) -> None:
    """Write one HTML page that needs no other file and no network.

    Only files of `results` are read. Parts without files are left out, and named on the page with the command that
    makes them.

    Args:
        results: the workflow's results folder.
        output: the page to write, atomically.

    Raises:
        ValueError: the folder is missing or holds no result, a file in it is damaged, or the page cannot be written.
    """
    if not results.is_dir():
        raise ValueError(f"there is no results folder {results}: make it with {RUN}")
    table = results / "per_class_iou.csv"
    scores = read_scores(table) if table.exists() else None
    text = read_text_result(results)
    if scores is None and text is None and not any(results.glob("*.metrics.jsonl")):
        raise ValueError(f"{results} holds no result and no training log yet: run {RUN} first")
    origin = read_origin(results)
    parts: list[Section | Missing] = [
        result_table(scores, text, RUN),
        gallery(results, RUN),
        per_class(scores, RUN),
        learning_curves(results, origin.config, RUN),
        *studies(results, "`snakemake --cores all studies`"),
        configuration(origin, RUN),
        times(results, RUN),
        versions_table(origin),
    ]
    if any(results.glob("*.metrics.jsonl")) and not has_validation(results):
        parts.append(Missing("validation during the training", f"`validation.every` above 0, then {RUN}"))
    dataset = scores.dataset if scores else origin.dataset
    name, synthetic = _dataset(results, dataset, text, origin)
    write_atomically(output, _page(name, synthetic, headline(scores), parts).encode())


def _dataset(results: Path, name: str | None, text: str | None, origin: Origin) -> tuple[str, bool]:
    """Name of the dataset, and whether it is synthetic; the index, large with COCO, is the last to be asked."""
    synthetic = origin.synthetic
    if synthetic is None and text is not None:
        synthetic = "synthetic" in text.partition("\n")[0]
    index = results / "data" / "index.json"
    if (name is None or synthetic is None) and index.exists():
        content = read_json(index, "index", "make it again with `cosa-fast data index`")
        name = name or str(content.get("name", ""))
        synthetic = bool(content.get("synthetic")) if synthetic is None else synthetic
    return name or "an unnamed dataset", bool(synthetic)


def _page(dataset: str, synthetic: bool, head: Html, parts: list[Section | Missing]) -> str:
    """Fill the template."""
    sections = [part for part in parts if isinstance(part, Section)]
    missing = [part for part in parts if isinstance(part, Missing)]
    package = files("cosa_fast.report")
    script = package.joinpath("script.js").read_text(encoding="utf-8")
    banner = element(
        "p",
        element("b", f"{dataset} is synthetic: "),
        "compare these numbers with each other only, not with those of PASCAL VOC or MS COCO.",
        class_="banner",
        role="note",
    )
    absent = [element("li", join(part.what, ": "), code(part.how)) for part in missing]
    return Template(package.joinpath("template.html").read_text(encoding="utf-8")).substitute(
        title=join(f"CoSA on {dataset}"),
        style=package.joinpath("style.css").read_text(encoding="utf-8"),
        script=script,
        # Only this very script may run, whatever a class or a file is called.
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        banner=banner if synthetic else "",
        headline=head,
        links=join(*(element("li", element("a", section.title, href=f"#{section.id}")) for section in sections)),
        sections=join(*(_section(section) for section in sections)),
        missing=join(element("h2", "Not in this report"), element("ul", *absent)) if absent else "",
        version=join(__version__),
    )


def _section(section: Section) -> Html:
    heading = element("h2", section.title, id=f"{section.id}-title")
    return element(
        "section", heading, section.body, id=section.id, aria_labelledby=f"{section.id}-title", tabindex="-1"
    )
