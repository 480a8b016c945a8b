"""Table 4c: speed and quality with and without CRF."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cosa_fast.studies import paper
from cosa_fast.studies.dots import draw_columns
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.style import BLUE, GRID, ORANGE, new_figure
from cosa_fast.studies.tables import Row, fixed, percent, read_table

RATES = ("images_per_second", "slowest", "fastest")
COLUMNS = ("system", "scales", "flip", "batch", "crf", *RATES, "device", "threads", "torch", "date", "images")
"""Of the table that `cosa-fast speed` writes."""
TABLES = {"none": "main", "release": "crf_release", "standard": "crf_standard"}
NETWORKS = {"CoSA": "ViT-B", "CoSA-MS": "R101"}
"""Those of the paper's Table 4c."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A line of the speed table with the quality of what was timed."""

    cells: dict[str, str]
    rate: float
    """Median images per second."""
    slowest: float
    """Of the repeated measurements."""
    fastest: float
    free: float | None
    """mIoU in percent, label-free; None: not evaluated with these scales."""
    filtered: float | None

    @property
    def crf(self) -> bool:
        """Whether a CRF refines the prediction."""
        return self.cells["crf"] != "none"

    @property
    def name(self) -> str:
        """System and how it was run, without the CRF."""
        batch = "one by one" if self.cells["batch"] == "1" else f"batches of {self.cells['batch']}"
        mirrored = ", mirrored" if self.cells["flip"].lower() == "true" else ""
        return f"{self.cells['system']}, {batch}\nscales {self.cells['scales']}{mirrored}"

    @property
    def published(self) -> tuple[float | None, float | None]:
        """The paper's images per second and mIoU in percent."""
        known = paper.CRF.get(self.cells["system"])
        if known is None:
            return None, None
        return (known.speed_with, known.miou_with) if self.crf else (known.speed_without, known.miou_without)


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure."""
    speeds = _read(inputs)
    split = inputs.index.eval_splits[0]
    machines = dict.fromkeys(
        f"{s.cells['device']}, {s.cells['threads']} threads, torch {s.cells['torch']}" for s in speeds
    )
    dates = dict.fromkeys(speed.cells["date"] for speed in speeds)
    names = list(dict.fromkeys(speed.name for speed in speeds))
    figure = new_figure(
        "Speed with and without CRF (Table 4c)",
        f"{inputs.dataset}, {split}, on {'; '.join(machines)}, {' and '.join(dates)}. Dots: median; bars: from the "
        "slowest to the fastest measurement. Columns: without / with CRF. mIoU label-filtered, where it was measured "
        "with these scales; the paper's is on VOC val, its images per second are of CoSA-MS R101 on an RTX 3090.",
        0.9 + 0.42 * len(names),
    )
    axes = figure.subplots(1, 2, width_ratios=(2.6, 2.2), sharey=True)
    _draw(axes[0], speeds, names)
    draw_columns(axes[1], _columns(speeds, names))
    return [_row(inputs, split, speed) for speed in speeds], figure


def _read(inputs: Inputs) -> list[Speed]:
    if inputs.speed is None:
        raise ValueError("this study needs the table of `cosa-fast speed`: give --speed PATH")
    path, split = inputs.speed, inputs.index.eval_splits[0]
    remedy = f"make it with `snakemake --cores all {path}`"
    lines = read_table(path, COLUMNS, remedy)
    for number, cells in enumerate(lines, start=2):
        if cells["crf"] not in TABLES:
            raise ValueError(f"{path}, line {number}: crf = {cells['crf']!r} is none of {', '.join(TABLES)}: {remedy}")
    tables = {crf: inputs.table(TABLES[crf]) for crf in dict.fromkeys(cells["crf"] for cells in lines)}
    speeds = []
    for number, cells in enumerate(lines, start=2):
        try:
            rate, slowest, fastest = (float(cells[column]) for column in RATES)
            if not 0 < slowest <= rate <= fastest:
                raise ValueError(f"{rate:g} images per second are not between {slowest:g} and {fastest:g}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: {remedy}") from None
        system = cells["system"] if cells["crf"] == "none" else f"{cells['system']} + CRF"
        # The stage times the evaluation's own views first, then a single one, of which there is no mIoU.
        evaluated = (cells["scales"], cells["flip"]) == (lines[0]["scales"], lines[0]["flip"])
        free, filtered = (
            tables[cells["crf"]].get(split, system, setting) if evaluated else None
            for setting in ("label-free", "label-filtered")
        )
        speeds.append(Speed(cells, rate, slowest, fastest, free, filtered))
    return speeds


def _row(inputs: Inputs, split: str, speed: Speed) -> Row:
    cells = speed.cells
    rate, miou = speed.published
    crf = ", the release's CRF of one iteration" if speed.crf else ""
    network = NETWORKS.get(cells["system"], "")
    return {
        "dataset": inputs.dataset,
        "split": split,
        **{column: cells[column] for column in COLUMNS if column not in RATES},
        **{
            column: fixed(value, 2)
            for column, value in zip(RATES, (speed.rate, speed.slowest, speed.fastest), strict=True)
        },
        "miou_label_free": percent(speed.free),
        "miou_label_filtered": percent(speed.filtered),
        "paper_images_per_second": fixed(rate, 2),
        "paper_voc": percent(miou),
        "note": ""
        if miou is None
        else inputs.paper_note(
            f"{network}, VOC 2012 val, label-filtered, RTX 3090{crf}", f"{split}, {cells['device']}, {cells['crf']} CRF"
        ),
    }


def _draw(axes: Axes, speeds: Sequence[Speed], names: Sequence[str]) -> None:
    for row, name in enumerate(names):
        axes.axhline(row, color=GRID, linewidth=0.8, zorder=0)
        mine = [speed for speed in speeds if speed.name == name]
        axes.plot([speed.rate for speed in mine], [row] * len(mine), color="#9aa0a6", linewidth=1.5)
        for speed in mine:
            colour = ORANGE if speed.crf else BLUE
            reach = [[speed.rate - speed.slowest], [speed.fastest - speed.rate]]
            axes.errorbar(speed.rate, row, xerr=reach, color=colour, marker="o", markersize=6, mec="white")
            axes.annotate(
                f"{speed.rate:.3g}",
                (speed.rate, row),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=colour,
            )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("images per second (logarithmic)")
    for place, text, colour in ((0.0, "● with CRF", ORANGE), (0.45, "● without", BLUE)):
        axes.text(place, 1.02, text, color=colour, fontsize=9, transform=axes.transAxes)


def _columns(speeds: Sequence[Speed], names: Sequence[str]) -> dict[str, list[str]]:
    """mIoU and the paper's numbers of each name, without / with CRF; of several CRFs the last one's."""
    columns: dict[str, list[str]] = {"mIoU [%]": [], "paper's\nmIoU [%]": [], "paper's\nimages/s": []}
    for name in names:
        pair = [next((s for s in reversed(speeds) if s.name == name and s.crf is crf), None) for crf in (False, True)]
        evaluated = [speed if speed and speed.filtered is not None else None for speed in pair]
        cells = (
            [percent(speed.filtered) if speed else "" for speed in evaluated],
            [fixed(speed.published[1], 1) if speed else "" for speed in evaluated],
            [fixed(speed.published[0], 2) if speed else "" for speed in evaluated],
        )
        for column, texts in zip(columns.values(), cells, strict=True):
            column.append(" / ".join(texts) if any(texts) else "")
    return columns
