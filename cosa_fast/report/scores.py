"""The head of the page, the result table and the per-class table, from `per_class_iou.csv` and the text result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosa_fast.report.markup import Html, Missing, Section, element, join, scroller, table_figure
from cosa_fast.report.sources import number, read_table, read_text

COLUMNS = ["dataset", "split", "system", "setting", "class", "iou"]
MEAN = "mIoU"
FREE, FILTERED = "label-free", "label-filtered"
FIX = "make it again with `cosa-fast evaluate` (in the workflow: `snakemake --cores all --forcerun evaluate`)"
CARDS = 4
"""Systems shown in the head; the table has them all."""
EXPLANATION = (
    "Label-free is the network on its own: compare other methods' numbers with that one. Label-filtered may only "
    "predict classes that the image's ground-truth tags name, as in the paper's 76.2 mIoU on VOC val."
)


@dataclass(frozen=True, slots=True)
class Scores:
    """`per_class_iou.csv`; lists are in the order of the file."""

    dataset: str
    splits: list[str]
    systems: list[str]
    classes: list[str]
    values: dict[tuple[str, str, str, str], float | None]
    """IoU in percent by (split, system, setting, class); None where the class does not occur."""

    def columns(self, split: str) -> list[tuple[str, str]]:
        """(system, setting) pairs of a split, in order."""
        return list(dict.fromkeys(key[1:3] for key in self.values if key[0] == split))

    def mean(self, split: str, system: str, setting: str) -> float | None:
        """mIoU in percent."""
        return self.values.get((split, system, setting, MEAN))


def read_scores(path: Path) -> Scores:
    """Read `per_class_iou.csv`.

    Raises:
        ValueError: other columns, an IoU that is no percentage, or the same row twice.
    """
    header, rows = read_table(path, FIX)
    if header != COLUMNS:
        raise ValueError(f"{path} has the columns {','.join(header)}, wanted {','.join(COLUMNS)}: {FIX}")
    values: dict[tuple[str, str, str, str], float | None] = {}
    for line, (_, split, system, setting, name, text) in enumerate(rows, start=2):
        value = number(text)
        if text and (value is None or not 0 <= value <= 100):
            raise ValueError(f"{path} row {line}: {text!r} is no IoU in percent: {FIX}")
        if (split, system, setting, name) in values:
            raise ValueError(f"{path} row {line}: {system}, {setting}, {name} of {split} comes twice: {FIX}")
        values[split, system, setting, name] = value
    splits, systems, classes = (list(dict.fromkeys(key[part] for key in values)) for part in (0, 1, 3))
    return Scores(rows[0][0], splits, systems, [name for name in classes if name != MEAN], values)


def read_text_result(results: Path) -> str | None:
    """The text result (`voc_val_miou.txt` or the like), the newest if there are several."""
    files = sorted(results.glob("*_miou.txt"), key=lambda file: file.stat().st_mtime)
    return read_text(files[-1], FIX) if files else None


def headline(scores: Scores | None) -> Html:
    """Large label-free mIoU of each system on the first split, label-filtered beside it."""
    if scores is None:
        return element("p", "No result has been scored yet.", class_="lead")
    split = scores.splits[0]
    systems = [system for system in scores.systems if scores.mean(split, system, FREE) is not None][:CARDS]
    cards = [_card(scores, split, system) for system in systems]
    return join(element("div", *cards, class_="cards"), element("p", EXPLANATION, class_="lead"))


def _card(scores: Scores, split: str, system: str) -> Html:
    return element(
        "div",
        element("p", system, element("span", f" on {split}", class_="muted"), class_="card-name"),
        element(
            "p",
            element("span", _percent(scores.mean(split, system, FREE), 1), class_="big"),
            element("span", "% mIoU", element("br"), "label-free", class_="unit"),
            class_="card-number",
        ),
        element(
            "p", element("b", _percent(scores.mean(split, system, FILTERED), 1)), " label-filtered", class_="beside"
        ),
        class_="card",
    )


def result_table(scores: Scores | None, text: str | None, how: str) -> Section | Missing:
    """Systems by splits by settings; the text result, which says how they were measured, below."""
    if scores is None and text is None:
        return Missing("result table", how)
    parts: list[Html] = []
    if scores is not None:
        columns = {split: _settings(scores, split) for split in scores.splits}
        upper = [element("th", split, colspan=len(settings), scope="colgroup") for split, settings in columns.items()]
        lower = [element("th", setting, scope="col") for settings in columns.values() for setting in settings]
        body = []
        for system in scores.systems:
            keys = [(split, system, setting) for split, settings in columns.items() for setting in settings]
            cells = [element("td", _percent(scores.mean(*key)), class_="number") for key in keys]
            body.append(element("tr", element("th", system, scope="row"), *cells))
        table = table_figure(
            f"mIoU in percent, {scores.dataset}. A dash: not measured, or not defined.",
            element(
                "thead",
                element("tr", element("th", "System", rowspan=2, scope="col"), *upper),
                element("tr", *lower),
            ),
            element("tbody", *body),
            class_="results",
        )
        parts.append(table)
    if text is not None:
        inner = scroller("Text result", text, name="pre")
        parts.append(element("details", element("summary", "How it was measured"), inner, open=scores is None))
    return Section("results", "Results", join(*parts))


def _settings(scores: Scores, split: str) -> list[str]:
    """Settings of a split, label-free first."""
    found = {setting for _, setting in scores.columns(split)}
    return [setting for setting in (FREE, FILTERED) if setting in found] + sorted(found - {FREE, FILTERED})


def per_class(scores: Scores | None, how: str) -> Section | Missing:
    """One sortable table per split; the page shows one of them at a time."""
    if scores is None:
        return Missing("per-class table", how)
    options = [element("option", split, value=str(place)) for place, split in enumerate(scores.splits)]
    choice = element(
        "p",
        element("label", "Split ", element("select", *options, id="split")),
        class_="controls needs-script",
    )
    tables = [
        element("div", _class_table(scores, split), class_="split", data_split=place)
        for place, split in enumerate(scores.splits)
    ]
    note = element(
        "p", "Click a column's title to sort by it. Empty: neither in the truth nor predicted.", class_="muted"
    )
    return Section("classes", "Per class", join(choice if len(options) > 1 else Html(), note, *tables))


def _class_table(scores: Scores, split: str) -> Html:
    columns = scores.columns(split)
    heads = [_sortable("Class", "")] + [_sortable(system, setting) for system, setting in columns]

    def row(name: str, label: str) -> Html:
        values = [scores.values.get((split, *column, name)) for column in columns]
        cells = [
            element("td", class_="number")
            if value is None
            else element("td", _percent(value), class_="number bar", style=f"--value:{value:.2f}")
            for value in values
        ]
        return element("tr", element("th", label, scope="row"), *cells)

    return table_figure(
        f"IoU in percent per class, {scores.dataset} {split}",
        element("thead", element("tr", *heads)),
        element("tbody", row(MEAN, "Mean"), class_="pinned"),
        element("tbody", *(row(name, name) for name in scores.classes), class_="rows"),
        class_="sortable classes",
    )


def _sortable(title: str, subtitle: str) -> Html:
    below = element("span", subtitle, class_="sub") if subtitle else Html()
    label = element("button", element("span", title), below, type="button", class_="sort")
    return element("th", label, scope="col", aria_sort="none")


def _percent(value: float | None, digits: int = 2) -> str:
    return "\N{EN DASH}" if value is None else f"{value:.{digits}f}"
