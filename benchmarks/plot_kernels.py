"""What a CSV of `benchmarks.kernels` says: table, and figure of a sweep (`python -m benchmarks.plot_kernels CSV`)."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHERE = ("device", "machine", "threads", "python", "torch", "triton", "dtype")
WHAT = ("op", "shape", "batch", "classes", "pixels", "provider", "mode")
AXES = {"pixels": "pixels of an image", "classes": "classes", "batch": "images in a batch"}
STYLES = {
    "eager": ("#0072b2", "o", "eager: the formula in plain torch"),
    "compile": ("#009e73", "^", "torch.compile of it"),
    "ours": ("#d55e00", "s", "cosa_kernels"),
    "release": ("#6b6b6b", "D", "the release's way"),
}

Point = tuple[str, ...]
Rows = Mapping[Point, Mapping[str, Mapping[str, str]]]
"""By the columns of WHAT, then by metric."""


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV that the benchmark wrote.

    Raises:
        SystemExit: there is none.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no results there; measure first, or pass --csv")
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def newest(rows: Iterable[Mapping[str, str]]) -> dict[Point, dict[Point, dict[str, Mapping[str, str]]]]:
    """Per machine with its versions: of what was measured repeatedly the last result."""
    groups: dict[Point, dict[Point, dict[str, Mapping[str, str]]]] = {}
    for row in rows:
        group = groups.setdefault(tuple(row[name] for name in WHERE), {})
        group.setdefault(tuple(row[name] for name in WHAT), {})[row["metric"]] = row
    return groups


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Markdown: a table for each machine and set of versions."""
    return "\n\n".join(_one_table(dict(zip(WHERE, where, strict=True)), group) for where, group in newest(rows).items())


def _one_table(where: Mapping[str, str], rows: Rows) -> str:
    ceilings = next(metrics for what, metrics in rows.items() if what[0] == "machine")
    copy, exps = (_value(ceilings, metric) for metric in ("gb_per_s", "gexp_per_s"))
    lines = [
        f"{where['machine']} ({where['device']}, {where['threads']} threads), Python {where['python']}, torch "
        f"{where['torch']}, triton {where['triton']}, {where['dtype']}. Ceilings: {copy:.3g} GB/s, {exps:.3g} Gexp/s.",
        "",
        "| operation | shape | mode | provider | ms (20 % to 80 %) | graph ms | speed-up over eager "
        "| extra MiB (of eager's) | GB/s (of ceiling) | Gexp/s (of ceiling) | floor ms | time / floor |",
        "|" + "---|" * 12,
    ]
    for what, metrics in rows.items():
        if what[0] == "machine":
            continue
        named = dict(zip(WHAT, what, strict=True))
        eager = rows.get(tuple({**named, "provider": "eager"}.values()), {})
        time = _value(metrics, "time_ms")
        shape = named["shape"]
        cells = [
            named["op"],
            f"{named[shape]} {AXES[shape]}" if shape in AXES else shape,
            named["mode"],
            named["provider"],
            f"{_cell(time)} ({' to '.join(_cell(_value(metrics, 'time_ms', part)) for part in ('p20', 'p80'))})",
            _cell(_value(metrics, "graph_ms")),
            _cell(_value(eager, "time_ms") / time),
            _share(_value(metrics, "memory_mib"), _value(eager, "memory_mib")),
            _share(_value(metrics, "gb_per_s"), copy),
            _share(_value(metrics, "gexp_per_s"), exps),
            _cell(floor := _value(metrics, "floor_ms")),
            _cell(time / floor),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(metrics: Mapping[str, Mapping[str, str]], metric: str, column: str = "value") -> float:
    return float(metrics[metric][column]) if metric in metrics else math.nan


def _cell(value: float) -> str:
    """Three digits, without an exponent where that is readable."""
    return "" if math.isnan(value) else f"{value:,.0f}" if 100 <= value < 1e7 else f"{value:.3g}"


def _share(value: float, whole: float) -> str:
    return f"{_cell(value)} ({_cell(100 * value / whole)} %)" if value > 0.0 and whole > 0.0 else _cell(value)


def draw(path: Path) -> None:
    """Time and memory of the newest sweep in the CSV against what grows; SVG and PNG beside it."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = read(path)
    where, group = list(newest([row for row in rows if row["date"] == rows[-1]["date"]]).items())[-1]
    figure = Figure(figsize=(9.5, 5.6), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(2, len(AXES), sharex="col", sharey="row")
    for column, (axis, label) in enumerate(AXES.items()):
        for panel, metric in zip(panels[:, column], ("time_ms", "memory_mib"), strict=True):
            _panel(panel, group, axis, metric)
        panels[1, column].set_xlabel(label)
        panels[0, column].set_title(_fixed(group, axis), fontsize=9)
    panels[0, 0].set_ylabel("CPU time, ms" if where[0] == "cpu" else "time, ms")
    panels[1, 0].set_ylabel("extra memory, MiB")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    about = dict(zip(WHERE, where, strict=True))
    figure.suptitle(
        f"raw_cross_entropy, forward and backward, {about['dtype']}: {about['machine']}, torch {about['torch']}",
        fontsize=10,
    )
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def _panel(panel: Axes, rows: Rows, axis: str, metric: str) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set(xscale="log", yscale="log")
    for provider, (color, marker, label) in STYLES.items():
        points = sorted(
            (float(named[axis]), *(_value(metrics, metric, part) for part in ("value", "p20", "p80")))
            for what, metrics in rows.items()
            if (named := dict(zip(WHAT, what, strict=True)))["shape"] == axis
            and (named["provider"], named["mode"]) == (provider, "full")
        )
        if not points:
            continue
        x, middle, low, high = zip(*points, strict=True)
        panel.plot(x, middle, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
        if metric == "time_ms":
            panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        panel.set_xticks(x, [f"{round(value**0.5)}²" if axis == "pixels" else f"{value:g}" for value in x])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _fixed(rows: Rows, axis: str) -> str:
    """What stays the same along an axis."""
    named = next(named for what in rows if (named := dict(zip(WHAT, what, strict=True)))["shape"] == axis)
    texts = {
        "pixels": f"{round(float(named['pixels']) ** 0.5)}² pixels",
        "classes": f"{named['classes']} classes",
        "batch": f"batch {named['batch']}",
    }
    return ", ".join(text for key, text in texts.items() if key != axis)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
