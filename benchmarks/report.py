"""Writes the tables of measured figures where the documentation shows them: `python -m benchmarks.report`.

A page asks for a table by two comments, `<!-- table: fps cpu -->` and `<!-- end -->`: the benchmark, and the folder of
`benchmarks/results` whose CSV it reads. `summary` puts the headline figures of all of them in one table.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import tyro

from benchmarks import fps_table, loader, plot_kernels, step
from benchmarks.common import ROOT

Row = Mapping[str, str]
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "kernels": plot_kernels.table,
    "step": step.table,
    "loader": loader.table,
    "fps": fps_table.table,
}
PAGES = ("README.md", "benchmarks/README.md")
PLACE = re.compile(r"(<!-- table: (\w+) ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(check: bool = False) -> int:
    """Write the tables into the pages; with `check` only say whether they are what the CSV files say.

    Returns:
        1 if, with `check`, a page is not up to date; else 0.
    """
    stale = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        new = filled(text, ROOT / "benchmarks/results")
        if new != text and check:
            stale.append(name)
        elif new != text:
            path.write_text(new)
            print(f"{name}: written")
    for name in stale:
        print(f"{name} is not what benchmarks/results says: run python -m benchmarks.report", file=sys.stderr)
    return 1 if stale else 0


def filled(text: str, results: Path) -> str:
    """A page with its tables made anew.

    Raises:
        SystemExit: it asks for a table that nothing makes, or whose CSV is not there.
    """

    def fill(place: re.Match[str]) -> str:
        begin, name, folder, end = place.groups()
        if name == "summary":
            return f"{begin}\n{summary(results / folder)}\n\n{end}"
        if name not in TABLES:
            raise SystemExit(f"<!-- table: {name} {folder} -->: there is no such table, only {', '.join(TABLES)}")
        return f"{begin}\n{TABLES[name](plot_kernels.read(results / folder / f'{name}.csv'))}\n\n{end}"

    return PLACE.sub(fill, text)


def summary(folder: Path) -> str:
    """Markdown: ours beside the way of the authors' release, the headline of each benchmark that has been run."""
    lines = ["| | the release's way | here | ratio | measured |", "|---|---|---|---|---|"]
    for name, rows_of in {"step": _steps, "loader": _loaders, "fps": _inference, "kernels": _losses}.items():
        path = folder / f"{name}.csv"
        if path.exists():
            lines += rows_of(plot_kernels.read(path))
    return "\n".join(lines)


def _line(what: str, release: float, ours: float, unit: str, row: Row) -> str:
    where = f"{row['date'][:10]}, torch {row['torch']}"
    return f"| {what} | {release:.4g} {unit} | {ours:.4g} {unit} | **{release / ours:.3g}x** | {where} |"


def _newest(rows: Iterable[Row], *key: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by key; of each key those of its last date."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        group = groups.setdefault(tuple(row[name] for name in key), [])
        if group and group[0]["date"][:10] != row["date"][:10]:
            group.clear()
        group.append(row)
    return groups


def _steps(rows: Sequence[Row]) -> list[str]:
    """A step of each preset and phase: the release's way against the fastest of ours."""
    lines = []
    times = [row for row in rows if row["metric"] == "time_ms"]
    for (preset, phase, batch), group in _newest(times, "preset", "phase", "batch").items():
        commit = group[-1]["commit"]
        medians = {
            variant: statistics.median(float(row["value"]) for row in some if row["commit"] == commit)
            for (variant,), some in _newest((row for row in group if row["commit"] == commit), "variant").items()
        }
        release = medians.pop("release", None)
        if release is not None and medians:
            what = f"training step, {preset}, {phase}, {batch} images"
            lines.append(_line(what, release, min(medians.values()), "ms", group[-1]))
    return lines


def _loaders(rows: Sequence[Row]) -> list[str]:
    """CPU time of an image by one worker."""
    everything = [row for row in rows if row["photometry"] == "all" and row["workers"] == "1"]
    medians = {
        method: (statistics.median(float(row["cpu_ms_per_image"]) for row in some), some[-1])
        for (method,), some in _newest(everything, "method").items()
    }
    if not {"release", "dali"} <= medians.keys():
        return []
    (release, _), (dali, row) = medians["release"], medians["dali"]
    return [_line(f"loading both views, {row['crop']} px, CPU time of an image", release, dali, "ms", row)]


def _inference(rows: Sequence[Row]) -> list[str]:
    """Time of an image without CRF, of each precision the best batch; CPU time on a CPU, which others may share.

    Release and ours are of one run, the newest.
    """
    lines = []
    plain = [row for row in rows if row["crf"] == "none" and row["provider"] in ("release", "ours")]
    for (network, views), group in _newest(plain, "network", "views").items():
        times: dict[str, float] = {}
        for row in (row for row in group if row["date"] == group[-1]["date"]):
            time = float(row["cpu_s_per_image"]) if row["device"] == "cpu" else 1 / float(row["images_per_s"])
            way = "release" if row["provider"] == "release" else row["precision"]
            times[way] = min(time, times.get(way, time))
        release = times.pop("release", None)
        what = f"inference, {fps_table.NAMES.get(network, network)}, {fps_table.VIEWS[views]}"
        if release is not None:
            lines += [_line(f"{what}, {way}", release, ours, "s", group[-1]) for way, ours in times.items()]
    return lines


def _losses(rows: Sequence[Row]) -> list[str]:
    """The segmentation loss of main and auxiliary CAMs, forward and backward."""
    lines = []
    times = [
        row
        for row in rows
        if (row["op"], row["mode"], row["metric"]) == ("raw_cross_entropy", "full", "time_ms")
        and row["shape"].endswith("_aux")
    ]
    for (shape,), group in _newest(times, "shape").items():
        values = {row["provider"]: float(row["value"]) for row in group}
        if {"release", "ours"} <= values.keys():
            lines.append(
                _line(f"CAM-to-segmentation losses, {shape}", values["release"], values["ours"], "ms", group[-1])
            )
    return lines


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
