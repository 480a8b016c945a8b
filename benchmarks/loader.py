"""Images per second of the loading backends: `python -m benchmarks.loader --images DIR --count 2000 --crop 448`.

Every method delivers the same weak and strong views. `release` prepares them the way the authors' code does, in one
loader process: whole image resized, mirrored, padded and cropped, then normalised in numpy. The methods take turns,
so that other users of the machine disturb all of them alike; CPU time per image is steadier than images per second.
"""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the loading backends."""

    images: Path | None = None
    """Folder of JPEG files; without it MiniVOC images are drawn."""
    count: int = 2000
    """Timed images per method, repeating the files as often as needed."""
    crop: int = 448
    batch_size: int = 8
    workers: tuple[int, ...] = (1, 2)
    """Numbers of DALI threads and of torch loader processes to compare."""
    rounds: int = 5
    """Turns each method's images are split into."""
    device: Literal["cpu", "cuda"] = "cpu"
    csv: Path = Path("benchmarks/results/cpu/loader.csv")
    """Results are appended here."""


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
    with _images(options) as index:
        methods: dict[tuple[str, int], Callable[[], Iterator[Any]]] = {("release", 1): lambda: _release(index, options)}
        for workers in options.workers:
            for backend in ("torch", "dali"):
                methods[backend, workers] = _backend(index, options, backend, workers)
        timed = max(1, options.count // (options.batch_size * options.rounds))
        rows = []
        turns = [(turn, method) for turn in range(options.rounds) for method in methods]
        for turn, (name, workers) in tqdm(turns, disable=None):
            seconds, cpu = _time(methods[name, workers], timed, options.device)
            images = timed * options.batch_size
            rows.append(
                {
                    "method": name,
                    "workers": workers,
                    "turn": turn,
                    "images_per_s": round(images / seconds, 2),
                    "cpu_ms_per_image": round(1000 * cpu / images, 3),
                }
            )
    _append(options, rows)
    print(_table(rows))


def _backend(index: dataset.Index, options: Options, name: Any, workers: int) -> Callable[[], Iterator[Any]]:
    return lambda: batches(
        index,
        augment=AugmentConfig(crop=options.crop),
        loader=LoaderConfig(backend=name, workers=workers),
        batch_size=options.batch_size,
        seed=0,
        start=0,
        device=torch.device(options.device),
    )


def _release(index: dataset.Index, options: Options) -> Iterator[Any]:
    plan = Plan(
        config=AugmentConfig(crop=options.crop),
        paths=tuple(str(index.image_path(image)) for image in index.train),
        sizes=np.array([(image.height, image.width) for image in index.train]),
        batch_size=options.batch_size,
        seed=0,
    )
    for views in DataLoader(_ReleaseWay(plan), sampler=itertools.count(), batch_size=None, num_workers=1):
        yield tuple(view.to(options.device) for view in views)


def _time(start: Callable[[], Iterator[Any]], timed: int, device: str) -> tuple[float, float]:
    """Wall-clock and CPU seconds of `timed` batches in the steady state."""
    with closing(start()) as iterator:  # type: ignore[type-var]  # a generator
        for _ in range(WARM_UP):
            next(iterator)
        wall, cpu = time.perf_counter(), _cpu_seconds()
        for _ in range(timed):
            next(iterator)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, _cpu_seconds() - cpu


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
            minivoc.generate(Path(temporary) / "minivoc", train=200, val=1, test=1)
            folder = Path(temporary) / "minivoc" / "JPEGImages"
        files = sorted(folder.glob("*.jpg"))
        if not files:
            raise SystemExit(f"{folder} has no .jpg files: pass --images a folder of photographs")
        entries = []
        for file in files:
            with Image.open(file) as image:
                entries.append(dataset.Image(file.stem, file.name, image.width, image.height, labels=(0,)))
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


def _append(options: Options, rows: list[dict[str, Any]]) -> None:
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": common.machine_name(options.device),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: common.package_version(package) for package in ("torch", "pillow", "nvidia-dali-cuda130")},
        "images": options.images or "minivoc",
        "crop": options.crop,
        "batch_size": options.batch_size,
        "device": options.device,
    }
    common.append_csv(options.csv, [about | row for row in rows])


def _table(rows: list[dict[str, Any]]) -> str:
    """Markdown: median and range over the turns."""
    lines = [
        "| method | workers | images/s (min to max) | CPU ms/image | images/s per busy core |",
        "|---|---|---|---|---|",
    ]
    for name, workers in dict.fromkeys((row["method"], row["workers"]) for row in rows):
        turns = [row for row in rows if (row["method"], row["workers"]) == (name, workers)]
        rate = sorted(row["images_per_s"] for row in turns)
        cpu = statistics.median(row["cpu_ms_per_image"] for row in turns)
        median = statistics.median(rate)
        lines.append(
            f"| {name} | {workers} | {median:.1f} ({rate[0]:.1f} to {rate[-1]:.1f}) | {cpu:.2f} | {1000 / cpu:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
