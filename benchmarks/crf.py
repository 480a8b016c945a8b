"""Images per second of the dense CRF: `python -m benchmarks.crf --images ../shared/photos/voc`.

`CrfPool` with one and two processes, beside `dense_crf` called in a loop, on photographs and smooth random
probabilities. The methods take turns, so that what disturbs the machine disturbs all alike. Efficiency: what two
processes do over twice what one does, each at its best turn; other work on the cores lowers it. By CPU time: the CPU
time per image with one process over that with two, which leaves out the waits for others but keeps what the processes
cost each other (caches, memory, this process's share).
"""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from cosa_fast.crf import CRF_PRESETS, CrfItem, CrfPool, dense_crf

# benchmarks.common imports torch, and the pool's workers import this module: hence inside the functions.


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the CRF's process pool."""

    images: Path
    """Folder of photographs (.jpg), searched with its subfolders."""
    count: int = 8
    """Timed images per method and turn."""
    turns: int = 3
    presets: tuple[Literal["release", "standard"], ...] = ("release", "standard")
    classes: tuple[int, ...] = (21, 81)
    possible: tuple[int, ...] = (0, 4)
    """So many of the classes have a probability that is not negligible; 0: all."""
    processes: tuple[int, ...] = (0, 1, 2)
    csv: Path = Path("benchmarks/results/cpu/crf.csv")
    """Results are appended here."""


def run(options: Options) -> None:
    """Time every method, print the table and append the CSV."""
    from benchmarks import common

    photos = _photos(options.images)
    about = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "machine": common.machine_name("cpu"),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: common.package_version(package) for package in ("numpy", "pydensecrf2")},
        "commit": common.commit(),
        "images": str(options.images),
        "count": options.count,
    }
    rows: list[dict[str, Any]] = []
    cases = list(itertools.product(options.classes, options.possible, options.presets))
    for classes, possible, preset in tqdm(cases, desc="dense CRF", disable=None):
        scores = _probabilities(classes, possible or classes, max(max(photo.shape) for photo in photos))
        with ExitStack() as stack:
            pools = {
                processes: stack.enter_context(CrfPool(processes, CRF_PRESETS[preset])) if processes else None
                for processes in options.processes
            }
            for pool in pools.values():  # the workers start
                _time(pool, preset, photos, scores, 1, max(pools))
            measured = []
            for turn in range(options.turns):
                for processes, pool in pools.items():
                    seconds, cpu = _time(pool, preset, photos, scores, options.count, processes)
                    measured.append(
                        {
                            "preset": preset,
                            "classes": classes,
                            "possible": possible or classes,
                            "processes": processes,
                            "turn": turn,
                            "images_per_s": round(options.count / seconds, 3),
                            "cpu_ms_per_image": round(1000 * cpu / options.count, 1),
                            "load_average": round(os.getloadavg()[0], 1),
                        }
                    )
        common.append_csv(options.csv, [about | row for row in measured])
        rows += measured
    print(_table(rows))


def _time(
    pool: CrfPool | None,
    preset: Literal["release", "standard"],
    photos: Sequence[NDArray[np.uint8]],
    scores: NDArray[np.float32],
    count: int,
    around: int,
) -> tuple[float, float]:
    """Wall-clock and CPU seconds for `count` images, from their arrays here to their labels here.

    In the steady state: `around` images go before them and come after, which keep the processes busy.
    """

    def items() -> Iterator[CrfItem]:
        for number in range(-around, count + around):
            photo = photos[number % len(photos)]
            height, width = photo.shape[:2]
            yield CrfItem(str(number), photo, scores[:, :height, :width])

    parameters = CRF_PRESETS[preset]
    serial = (dense_crf(item.image, item.probabilities, parameters) for item in items())
    stamps = [(time.perf_counter(), _cpu_seconds())]
    stamps += [(time.perf_counter(), _cpu_seconds()) for _ in (serial if pool is None else pool.map(items()))]
    (start, cpu_before), (end, cpu_after) = stamps[around], stamps[around + count]
    return end - start, cpu_after - cpu_before


def _cpu_seconds() -> float:
    """CPU time of this process and of its live children, which the operating system adds up only when they end."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _photos(folder: Path) -> list[NDArray[np.uint8]]:
    """Eight photographs, evenly spaced through the folder."""
    files = sorted(folder.rglob("*.jpg"))
    if not files:
        raise SystemExit(f"{folder} has no .jpg files: pass --images a folder of photographs")
    photos = []
    for file in files[:: max(1, len(files) // 8)][:8]:
        with Image.open(file) as image:
            photos.append(np.asarray(image.convert("RGB")))
    return photos


def _probabilities(classes: int, possible: int, side: int) -> NDArray[np.float32]:
    """(classes, side, side), smooth, the first `possible` classes between some 1e-4 and 1, the others 0."""
    rng = np.random.default_rng(0)
    cells = rng.normal(0, 2, (possible, side // 32 + 1, side // 32 + 1)).astype(np.float32)
    scores = np.exp([np.asarray(Image.fromarray(plane).resize((side, side))) for plane in cells])
    probabilities = np.zeros((classes, side, side), np.float32)
    probabilities[:possible] = scores / scores.sum(axis=0)
    return probabilities


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown: best turn of each method, and the efficiency of two processes."""
    lines = [
        "| preset | classes (possible) | processes | images/s, best | CPU ms/image, least | efficiency | by CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys((row["preset"], row["classes"], row["possible"]) for row in rows):
        turns = [row for row in rows if (row["preset"], row["classes"], row["possible"]) == case]
        processes = list(dict.fromkeys(row["processes"] for row in turns))
        rate = {n: max(row["images_per_s"] for row in turns if row["processes"] == n) for n in processes}
        cpu = {n: min(row["cpu_ms_per_image"] for row in turns if row["processes"] == n) for n in processes}
        for n in processes:
            scaled = n > 1 and 1 in rate
            efficiency = f"{rate[n] / (n * rate[1]):.0%} | {cpu[1] / cpu[n]:.0%}" if scaled else " | "
            name = n or "no pool"
            lines.append(
                f"| {case[0]} | {case[1]} ({case[2]}) | {name} | {rate[n]:.2f} | {cpu[n]:.0f} | {efficiency} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
