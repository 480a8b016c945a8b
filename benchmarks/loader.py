"""The loading backends, per core and with all cores: `python -m benchmarks.loader --images DIR`.

Every method delivers the same weak and strong views, normalised. `release` prepares them the way the authors' code
does, in one loader process: whole image resized, mirrored, padded and cropped, then normalised in numpy. The methods
take turns, so that other users of the machine disturb all of them alike; CPU time per image is steadier than images per
second. With `--consume` a step of fixed length follows each batch, and the share of the time spent waiting for the next
is measured.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks import common
from cosa_fast.config import AugmentConfig, LoaderConfig
from cosa_fast.data import index as dataset
from cosa_fast.data import minivoc
from cosa_fast.data.augment import Plan
from cosa_fast.data.loader import batches
from cosa_fast.data.photometric import blur, strengthen

WARM_UP = 4
"""Batches that are not timed."""


PARTS: dict[str, dict[str, float]] = {
    "all": {},
    "none": {"blur": 0, "strong": 0},
    "blur": {"strong": 0},
    "operations": {"blur": 0},
}
"""Photometry that is left, and the settings that leave it."""

Part = Literal["all", "none", "blur", "operations"]
Method = tuple[Literal["release", "torch", "dali"], int, Part]
"""Backend, DALI threads or loader processes, photometry."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the loading backends."""

    images: Path | None = None
    """Folder of JPEG files; without it MiniVOC images are drawn."""
    count: int = 2000
    """Images of the training split, the files repeated as often as needed; each method loads so many."""
    crop: int = 448
    batch_size: int = 8
    workers: tuple[int, ...] = tuple(sorted({1, os.cpu_count() or 1}))
    """Numbers of DALI threads and of torch loader processes to compare."""
    parts: tuple[Part, ...] = ("all",)
    """Photometry to compare: everything; nothing; only the blur, in half of the images; only the nine operations."""
    consume: float | None = None
    """Images per second of the training's step, for the time spent waiting."""
    rounds: int = 5
    """Turns each method's images are split into."""
    device: Literal["cpu", "cuda"] = "cpu"
    tiny: bool = False
    """A few small images, to see that it works; the numbers mean nothing."""
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/loader.csv."""


@dataclass(frozen=True)
class _ReleaseWay(Dataset[tuple[NDArray[np.float32], NDArray[np.float32]]]):
    """Batch t of `plan`, each step applied to the whole image."""

    plan: Plan

    def __getitem__(self, iteration: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        draws = self.plan.draws(iteration)
        geometry, side = draws.geometry, draws.geometry.crop
        weak, strong = [], []
        for slot, position in enumerate(draws.positions):
            image = Image.open(self.plan.paths[position]).convert("RGB")
            height, width = (int(extent) for extent in geometry.resized[slot])
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            if geometry.flip[slot]:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            y, x = (int(offset) for offset in geometry.anchor[slot])
            canvas = np.zeros((max(height, side), max(width, side), 3), np.float32)
            top, left = max(0, -y), max(0, -x)
            canvas[top : top + height, left : left + width] = np.asarray(image, np.float32)
            y, x = max(0, y), max(0, x)
            view = Image.fromarray(canvas[y : y + side, x : x + side].astype(np.uint8))
            view = blur(view, float(draws.blur[slot]))
            weak.append(self._normalise(view))
            strong.append(self._normalise(strengthen(view, int(draws.operation[slot]), int(draws.magnitude[slot]))))
        return np.stack(weak), np.stack(strong)

    def _normalise(self, image: Image.Image) -> NDArray[np.float32]:
        pixels = np.asarray(image, np.float32) / 255
        mean, std = (np.array(value, np.float32) for value in (self.plan.config.mean, self.plan.config.std))
        return np.asarray(((pixels - mean) / std).transpose(2, 0, 1), np.float32)


def run(options: Options) -> None:
    """Time every method, print the table and append the CSV."""
    torch.set_num_threads(1)
    if options.tiny:
        options = replace(options, count=8, crop=32, batch_size=2, rounds=2, workers=(1,))
    timed = options.count // (options.batch_size * options.rounds)
    if timed == 0:
        raise SystemExit(f"--count {options.count} is less than a batch of {options.batch_size} per round")
    methods: list[Method] = []
    for part in options.parts:
        methods.append(("release", 1, part))
        methods += [(name, workers, part) for workers in options.workers for name in ("torch", "dali")]
    rows = []
    with _images(options) as index:
        about = _about(options)
        turns = [(turn, method) for turn in range(options.rounds) for method in methods]
        for turn, (name, workers, part) in tqdm(turns, disable=None):
            iterator = _start(index, options, name, workers, part, turn * timed)
            seconds, cpu, waiting = _time(iterator, timed, options)
            images = timed * options.batch_size
            rows.append(
                about
                | {
                    "load_average": round(os.getloadavg()[0], 1),
                    "method": name,
                    "workers": workers,
                    "photometry": part,
                    "turn": turn,
                    "images_per_s": round(images / seconds, 2),
                    "cpu_ms_per_image": round(1000 * cpu / images, 3),
                    "kb_handed_over": round(_handed_over(name, options) / 1000, 1),
                    "consume": options.consume,
                    "waiting_percent": waiting and round(waiting, 2),
                }
            )
    path = options.csv or common.results_folder(options.device, options.tiny) / "loader.csv"
    common.append_csv(path, rows)
    print(table(rows))


def _start(
    index: dataset.Index, options: Options, name: Any, workers: int, part: Part, iteration: int
) -> Iterator[Any]:
    augment = AugmentConfig.model_validate({"crop": options.crop, **PARTS[part]})
    if name == "release":
        return _release(index, augment, options, iteration)
    return batches(
        index,
        augment=augment,
        loader=LoaderConfig(backend=name, workers=workers),
        batch_size=options.batch_size,
        seed=0,
        start=iteration,
        device=torch.device(options.device),
    )


def _release(index: dataset.Index, augment: AugmentConfig, options: Options, iteration: int) -> Iterator[Any]:
    plan = Plan(
        config=augment,
        paths=tuple(str(index.image_path(image)) for image in index.train),
        sizes=np.array([(image.height, image.width) for image in index.train]),
        batch_size=options.batch_size,
        seed=0,
    )
    for views in DataLoader(_ReleaseWay(plan), sampler=itertools.count(iteration), batch_size=None, num_workers=1):
        yield tuple(view.to(options.device) for view in views)


def _handed_over(name: str, options: Options) -> int:
    """Bytes per image of both views as the workers leave them; none where DALI decodes on the GPU."""
    if name == "dali" and options.device == "cuda":
        return 0
    return 2 * 3 * options.crop**2 * (1 if name == "torch" else 4)


def _time(iterator: Iterator[Any], timed: int, options: Options) -> tuple[float, float, float | None]:
    """Wall-clock and CPU seconds of `timed` batches in the steady state, and the percentage of a training's time spent
    waiting for as many more."""
    with closing(iterator):  # type: ignore[type-var]  # a generator
        for _ in range(WARM_UP):
            next(iterator)
        wall, cpu = time.perf_counter(), _cpu_seconds()
        for _ in range(timed):
            next(iterator)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
        if options.consume is None:
            return seconds, cpu, None
        step, waited = options.batch_size / options.consume, 0.0
        for _ in range(timed):
            time.sleep(step)  # as a step on a GPU, it leaves the cores to the loader
            wall = time.perf_counter()
            next(iterator)
            waited += time.perf_counter() - wall
        return seconds, cpu, 100 * waited / (waited + timed * step)


def _cpu_seconds() -> float:
    """CPU time of this process and of its live children, which the operating system adds up only when they end."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _images(options: Options) -> Iterator[dataset.Index]:
    """An index of the JPEG files in the folder, or of freshly drawn MiniVOC images."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.images
        if folder is None:
            minivoc.generate(Path(temporary) / "minivoc", train=min(200, options.count), val=1, test=1)
            folder = Path(temporary) / "minivoc" / "JPEGImages"
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise SystemExit(f"{folder} has no .jpg files: pass --images a folder of photographs")
        sizes = []
        for file in files:
            with Image.open(file) as image:
                sizes.append(image.size)
        entries = [
            dataset.Image(f"{file.stem}_{number}", file.name, width, height, labels=(0,))
            for number, (file, (width, height)) in zip(
                range(options.count), itertools.cycle(zip(files, sizes, strict=True)), strict=False
            )
        ]
        yield dataset.Index(
            name=folder.name,
            format="voc",
            synthetic=options.images is None,
            root=str(folder.resolve()),
            classes=("any",),
            train_split="train",
            eval_splits=(),
            splits={"train": tuple(entries)},
        )


def _about(options: Options) -> dict[str, Any]:
    return common.record(options.device) | {
        "cores": os.cpu_count(),
        **{package: common.package_version(package) for package in ("pillow", "nvidia-dali-cuda130")},
        "images": options.images or "minivoc",
        "count": options.count,
        "crop": options.crop,
        "batch_size": options.batch_size,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of the newest run: medians over the turns, and the range of the images per second."""
    rows = [row for row in rows if row["date"] == rows[-1]["date"]]
    first = rows[0]
    lines = [
        f"{first['machine']}, {first['cores']} cores, load {first['load_average']}, {first['crop']} px, "
        f"{first['count']} entries, Pillow {first['pillow']}, DALI {first['nvidia-dali-cuda130']}, "
        f"torch {first['torch']}, {first['date'][:10]}.",
        "",
        "| method | workers | photometry | images/s (min to max) | CPU ms/image | images/s per core | kB handed over "
        "| waiting % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = dict.fromkeys((row["method"], row["workers"], row["photometry"]) for row in rows)
    for name, workers, part in methods:
        turns = [row for row in rows if (row["method"], row["workers"], row["photometry"]) == (name, workers, part)]
        rate = sorted(float(row["images_per_s"]) for row in turns)
        cpu = statistics.median(float(row["cpu_ms_per_image"]) for row in turns)
        waiting = [float(row["waiting_percent"]) for row in turns if row["waiting_percent"] not in (None, "")]
        lines.append(
            f"| {name} | {workers} | {part} | {statistics.median(rate):.1f} ({rate[0]:.1f} to {rate[-1]:.1f}) "
            f"| {cpu:.2f} | {1000 / cpu:.0f} | {float(turns[0]['kb_handed_over']):.0f} "
            f"| {f'{statistics.median(waiting):.1f}' if waiting else ''} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
