"""The table of `benchmarks.fps`: the newest run of each network, beside the paper's Table 4c and the goals."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

Row = Mapping[str, str]
CASE = ("device", "machine", "threads", "network", "views", "size")
NAMES = {"voc": "CoSA, 20 classes", "coco": "CoSA, 80 classes", "resnet101": "CoSA-MS R101, 20 classes"}
VIEWS = {"five": "five scales with mirror images", "single": "one scale"}
PAPER = {"voc": (4.11, 1.82), "resnet101": (9.60, 2.36)}
"""Images per second without and with CRF of the paper's Table 4c: on an RTX 3090, which is another machine; the scales
are not stated, and the copy of the table that we have is garbled in CoSA-ViT's row."""
GOALS = {("voc", "five"): 100, ("voc", "single"): 1500}
"""Images per second on one H200, without CRF."""


def read(path: Path) -> list[dict[str, str]]:
    """All rows.

    Raises:
        SystemExit: there is no such file.
    """
    if not path.exists():
        raise SystemExit(f"there is no {path} yet: run `python -m benchmarks.fps` first")
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def table(rows: Iterable[Row]) -> str:
    """Markdown: per network and views the newest run."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        of_case = cases.setdefault(tuple(row[column] for column in CASE), [])
        if of_case and of_case[0]["date"] != row["date"]:
            of_case.clear()
        of_case.append(row)
    return "\n\n".join(_case(of_case) for of_case in cases.values())


def _case(rows: list[Row]) -> str:
    """One run's methods; ratios are to the release's way with the same CRF, of the medians over the same turns."""
    first = rows[0]
    release = {row["crf"]: row for row in rows if row["provider"] == "release"}
    lines = [
        f"**{NAMES.get(first['network'], first['network'])}, {VIEWS[first['views']]}**, "
        f"{float(first['gflop_per_image']):,.4g} GFLOP an image; {first['machine']}, {first['threads']} threads, torch "
        f"{first['torch']}, {first['commit']}, {first['date'][:10]}, load {first['load_average']}",
        "",
        "| | batch | precision | compiled | CRF | images/s (slowest to fastest) | CPU s/image | TFLOP/s | x release "
        "| by CPU time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate, decoding = float(row["images_per_s"]), row["provider"] == "decoding"
        base = release.get(row["crf"])
        work = "" if decoding or row["crf"] != "none" else f"{rate * float(row['gflop_per_image']) / 1000:.3g}"
        ratio = by_cpu = ""
        if base is not None and not decoding:
            ratio = f"{rate / float(base['images_per_s']):.2f}"
            if row["device"] == "cpu" and row["crf"] == "none":  # the CRF's processes have times of their own
                by_cpu = f"{float(base['cpu_s_per_image']) / float(row['cpu_s_per_image']):.2f}"
        how = ("", "", "", "") if decoding else (row["batch"], row["precision"], row["compile"], row["crf"])
        cells = (
            "decoding and resizing, apart" if decoding else row["provider"],
            *how,
            f"{rate:.4g} ({row['slowest']} to {row['fastest']})",
            row["cpu_s_per_image"],
            work,
            ratio,
            by_cpu,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += _beside(first)
    return "\n".join(lines)


def _beside(row: Row) -> list[str]:
    """The paper's numbers and the goal."""
    lines = []
    if row["views"] == "five" and row["network"] in PAPER:
        without, with_crf = PAPER[row["network"]]
        for crf, rate in (("none", without), ("yes", with_crf)):
            lines.append(f"| paper, RTX 3090 (another machine) | | | | {crf} | {rate} | | | | |")
    goal = GOALS.get((row["network"], row["views"]))
    if goal is not None:
        lines.append(f"| goal, one H200 | | | | none | {goal:,} | | | | |")
    return lines
