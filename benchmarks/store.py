"""The pseudo-label store against files per image: `python -m benchmarks.store --masks DIR --images DIR --count 1000`.

Each format holds the same three 8-bit maps per image: labels, confidence and segmentation. `zarr` is our store,
`zarr loaded` after `PseudoLabels.load`, `zarr-python` the same files through that library's own indexing, `png` palette
and grey files as `cosa-fast export` writes them, `npz` one `numpy.savez_compressed` per image. `loader` is CoSA-MS's
training loader with one thread, which decodes JPEG files, reads the store and crops: what the store must outrun.

The formats take turns, so that other users of the machine disturb all of them alike. What is read was written a moment
ago: it comes from the page cache, which only root could empty, and a disk or a network drive is slower for all of them.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
import zarr
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks import common
from cosa_fast.config import MultistageConfig
from cosa_fast.data import index as dataset
from cosa_fast.data import minivoc
from cosa_fast.data.classes import IGNORED, VOC_CLASSES, voc_palette
from cosa_fast.data.store import ARRAYS, Pixels, PseudoLabel, PseudoLabels, StoreInfo, write_store
from cosa_fast.training.multi_stage import batches

Reader = Callable[[str, int], Pixels]
PATCHES = 28
"""CAMs are so many positions wide and high before they are enlarged to the image."""
TRAINING, CONFIDENT, EXPORT = "labels, shuffled", "labels and confidence, shuffled", "all three, in order"
READS: dict[str, tuple[str, ...]] = {TRAINING: ARRAYS[:1], CONFIDENT: ARRAYS[:2], EXPORT: ARRAYS}
"""What CoSA-MS's training reads, what it reads with `multistage.min_confidence`, what `evaluate` and `export` read."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare ways to keep pseudo-labels."""

    masks: Path | None = None
    """Folder of class masks (8-bit PNG) the pseudo-labels are made from; without it those of MiniVOC images."""
    images: Path | None = None
    """Folder of the masks' JPEG images, of the same names: also measures the training loader."""
    count: int = 1000
    """Images, repeating the masks as often as needed."""
    rounds: int = 5
    """Turns; each writes and reads its share of the images."""
    shard: int = 64
    """Images per Zarr shard."""
    crop: int = 512
    """Side of the training loader's crops."""
    csv: Path = Path("benchmarks/results/cpu/store.csv")
    """Results are appended here."""


@dataclass(frozen=True)
class Source:
    """The pseudo-labels that are written, and the images they are of."""

    names: list[str]
    rows: list[PseudoLabel]
    images: Path | None

    def share(self, count: int) -> Source:
        """The first `count`, beginning again at the end."""
        repeats = range(-(-count // len(self.rows)))
        names = [f"{repeat}_{name}" for repeat in repeats for name in self.names][:count]
        return Source(names, [self.rows[position % len(self.rows)] for position in range(count)], self.images)


def run(options: Options) -> None:
    """Measure every format, print the table and append the CSV."""
    torch.set_num_threads(1)
    with _source(options) as source, tempfile.TemporaryDirectory() as temporary:
        source = source.share(max(1, options.count // options.rounds))
        measured: list[dict[str, Any]] = []
        for turn in tqdm(range(options.rounds), disable=None):
            folder = Path(temporary) / str(turn)
            measured += [{"turn": turn} | row for row in _turn(options, source, folder, check=turn == 0)]
    _append(options, source, measured)
    print(_table(measured))


def _turn(options: Options, source: Source, folder: Path, check: bool) -> Iterator[dict[str, Any]]:
    """Write, check and read every format once."""
    count = len(source.rows)
    writers: dict[str, Callable[[Path, Source], None]] = {
        "zarr": partial(_write_zarr, shard=options.shard),
        "png": _write_png,
        "npz": _write_npz,
    }
    for name, write in writers.items():
        yield _timed(name, "write", count, partial(write, folder / name, source))
        files = [file for file in (folder / name).rglob("*") if file.is_file()]
        yield {
            "format": name,
            "operation": "size",
            "bytes_per_image": round(sum(file.stat().st_size for file in files) / count, 1),
            "files": len(files),
        }
    readers = _readers(folder, source.names)
    if check:
        for name, read in readers.items():
            _check(name, read, source.rows)
    shuffled = np.random.default_rng(0).permutation(count).tolist()
    for operation, arrays in READS.items():
        order = range(count) if operation == EXPORT else shuffled
        for name, read in readers.items():
            yield _timed(name, operation, count, partial(_read_all, read, arrays, order))
    if source.images is not None:
        yield _loader(options, source, PseudoLabels(folder / "zarr"))


def _readers(folder: Path, names: Sequence[str]) -> dict[str, Reader]:
    """Every way to read back map `name` of image `position`."""
    store, loaded = PseudoLabels(folder / "zarr"), PseudoLabels(folder / "zarr")
    loaded.load(limit=2**34)
    group = zarr.open_group(folder / "zarr", mode="r")

    def read_zarr_python(name: str, position: int) -> Pixels:
        height, width = store.sizes[position]
        pixels: Pixels = np.asarray(group[name][position])[:height, :width]  # type: ignore[index]
        return pixels

    def read_png(name: str, position: int) -> Pixels:
        with Image.open(folder / "png" / name / f"{names[position]}.png") as image:
            return np.array(image)

    def read_npz(name: str, position: int) -> Pixels:
        with np.load(folder / "npz" / f"{names[position]}.npz") as arrays:
            pixels: Pixels = arrays[name]
            return pixels

    return {
        "zarr": lambda name, position: getattr(store, name)(position),
        "zarr loaded": lambda name, position: getattr(loaded, name)(position),
        "zarr-python": read_zarr_python,
        "png": read_png,
        "npz": read_npz,
    }


def _read_all(read: Reader, arrays: Sequence[str], order: Sequence[int]) -> None:
    for position in order:
        for name in arrays:
            read(name, position)


def _check(name: str, read: Reader, rows: Sequence[PseudoLabel]) -> None:
    """Wrong pixels have no speed."""
    for position, row in enumerate(rows):
        for array in ARRAYS:
            if not np.array_equal(read(array, position), getattr(row, array)):
                raise SystemExit(f"{name} reads {array} of image {position} back as something else")


def _write_zarr(path: Path, source: Source, shard: int) -> None:
    info = StoreInfo(
        dataset="benchmark",
        synthetic=True,
        split="train",
        classes=VOC_CLASSES,
        ids=tuple(source.names),
        threshold=0.5,
        checkpoint_sha256="0" * 64,
        iteration=0,
        config={},
        versions={},
    )
    write_store(path, info, [row.labels.shape for row in source.rows], source.rows, shard)


def _write_png(path: Path, source: Source) -> None:
    palette = voc_palette()
    for array in ARRAYS:
        (path / array).mkdir(parents=True)
    for name, row in zip(source.names, source.rows, strict=True):
        for array in ARRAYS:
            image = Image.fromarray(getattr(row, array))
            if array != "confidence":
                image.putpalette(palette)
            image.save(path / array / f"{name}.png")


def _write_npz(path: Path, source: Source) -> None:
    path.mkdir(parents=True)
    for name, row in zip(source.names, source.rows, strict=True):
        np.savez_compressed(path / f"{name}.npz", **{array: getattr(row, array) for array in ARRAYS})


def _loader(options: Options, source: Source, store: PseudoLabels) -> dict[str, Any]:
    """Images per second of CoSA-MS's training loader on one thread."""
    assert source.images is not None
    images = tuple(
        dataset.Image(name, f"{name.partition('_')[2]}.jpg", row.labels.shape[1], row.labels.shape[0], (0,))
        for name, row in zip(source.names, source.rows, strict=True)
    )
    root = str(source.images.resolve())
    index = dataset.Index("benchmark", "voc", True, root, VOC_CLASSES, "train", (), {"train": images})
    config = MultistageConfig(batch_size=min(16, len(images)), crop=options.crop)
    number = max(1, len(images) // config.batch_size)
    with closing(batches(index, store, config, threads=1, start=0)) as source_of_batches:  # type: ignore[type-var]
        next(source_of_batches)  # starts the thread
        return _timed("loader", TRAINING, number * config.batch_size, lambda: list(islice(source_of_batches, number)))


def _timed(name: str, operation: str, count: int, call: Callable[[], object]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "format": name,
        "operation": operation,
        "images_per_s": round(count / wall, 2),
        "cpu_ms_per_image": round(1000 * cpu / count, 4),
    }


@contextmanager
def _source(options: Options) -> Iterator[Source]:
    """Pseudo-labels made from the masks in a folder, or from those of freshly drawn MiniVOC images."""
    with tempfile.TemporaryDirectory() as temporary:
        masks, images = options.masks, options.images
        if masks is None:
            if images is not None:
                raise SystemExit("--images are the photographs of the masks: pass --masks too")
            minivoc.generate(Path(temporary) / "minivoc", train=60, val=1, test=1, size=375)
            masks, images = (Path(temporary) / "minivoc" / name for name in ("SegmentationClass", "JPEGImages"))
        files = sorted(masks.glob("*.png"))
        if not files:
            raise SystemExit(f"{masks} has no .png files: pass --masks a folder of class masks")
        rows = [_pseudo_label(file, number) for number, file in enumerate(files)]
        yield Source([file.stem for file in files], rows, images)


def _pseudo_label(file: Path, seed: int) -> PseudoLabel:
    """The mask as labels and segmentation, and a confidence as smooth as CAMs are: low and noisy at PATCHES squared
    positions, enlarged bilinearly."""
    with Image.open(file) as image:
        labels: Pixels = np.array(image)
    if labels.dtype != np.uint8 or labels.ndim != 2:
        raise SystemExit(f"{file} is no 8-bit mask with one channel")
    labels[labels == IGNORED] = 0
    foreground = Image.fromarray((labels > 0).astype(np.float32))
    coarse = np.asarray(foreground.resize((PATCHES, PATCHES), Image.Resampling.BOX))
    noise = np.random.default_rng(seed).random(coarse.shape, dtype=np.float32)
    cam: NDArray[np.float32] = 0.8 * coarse + 0.15 * noise
    enlarged = Image.fromarray(cam).resize(labels.shape[::-1], Image.Resampling.BILINEAR)
    return PseudoLabel(labels, (255 * np.asarray(enlarged)).round().astype(np.uint8), labels)


def _append(options: Options, source: Source, measured: Sequence[dict[str, Any]]) -> None:
    pixels = statistics.mean(row.labels.size for row in source.rows)
    about = {
        "date": datetime.date.today().isoformat(),
        "machine": common.machine_name("cpu"),
        "cores": os.cpu_count(),
        "commit": common.commit(),
        "python": platform.python_version(),
        **{package: common.package_version(package) for package in ("zarr", "numcodecs", "numpy", "pillow")},
        "masks": options.masks.name if options.masks else "minivoc",
        "images": options.count,
        "pixels_per_image": round(pixels),
        "shard": options.shard,
        "crop": options.crop,
    }
    empty = dict.fromkeys(
        ("format", "operation", "turn", "images_per_s", "cpu_ms_per_image", "bytes_per_image", "files"), ""
    )
    common.append_csv(options.csv, [about | empty | row for row in measured])


def _table(measured: Sequence[dict[str, Any]]) -> str:
    """Markdown: medians over the turns, and how many times as much the others take as our store."""

    def median(name: str, operation: str, column: str) -> float | None:
        values = [row[column] for row in measured if (row["format"], row["operation"]) == (name, operation)]
        return statistics.median(values) if values else None

    operations = ["write", *READS]
    lines = [
        "| format | bytes/image | files | " + " | ".join(operations) + " |",
        "|---|---|---|" + "---|" * len(operations),
    ]
    for name in dict.fromkeys(row["format"] for row in measured):
        size = median(name, "size", "bytes_per_image")
        files = sum(row.get("files", 0) for row in measured if row["format"] == name)
        cells = [f"{size:,.0f}" if size else "", f"{files:,}" if files else ""]
        for operation in operations:
            cpu, ours = (median(which, operation, "cpu_ms_per_image") for which in (name, "zarr"))
            ratio = f" ({cpu / ours:.2g}x)" if cpu and ours and name != "zarr" else ""
            cells.append(f"{cpu:.3g} ms{ratio}" if cpu is not None else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "CPU time per image; in parentheses how many times that of `zarr`."])


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
