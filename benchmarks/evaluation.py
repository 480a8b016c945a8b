"""Memory and time of `cosa-fast evaluate`: `python -m benchmarks.evaluation --images DIR --side 64`.

Two measurements. `split`: the real stage on as many images as COCO's val split has, by repeating the photographs of a
folder, with 80 classes and a small network of random weights; the resident set is read again and again on the way.
`maps`: how long one image's label maps (all classes, and those of its labels) take, and how much memory, from maps that
are made whole and from bands of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor

from benchmarks import common
from cosa_fast import evaluate as stage
from cosa_fast.config import AugmentConfig, CosaConfig, EvalConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import SCHEMA
from cosa_fast.files import sha256
from cosa_fast.inference import Prediction, label_map, label_maps, resize
from cosa_fast.models.checkpoint import save_safetensors
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.multi_scale import MultiScale
from cosa_fast.systems import Outcome, Systems

COCO_VAL = 40137
CLASSES = tuple(f"class {number}" for number in range(80))
CASES = {"VOC": (20, (375, 500)), "COCO": (80, (480, 640))}
"""Classes, and height and width of the image."""

Write = Callable[[str, str, int, float, float], None]
"""Takes a case, a method, a number of images, seconds and MiB."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the evaluation."""

    images: Path | None = None
    """Folder of JPEG files for `split`; without it only `maps` is measured."""
    masks: Path | None = None
    """Folder of PNG masks of the same names, values up to 80 and 255; without it they are drawn."""
    side: int | None = None
    """Scale photographs and masks to this longest side first."""
    size: int = 32
    """Side of the squares that CoSA gets; 448 in earnest."""
    scales: tuple[float, ...] = (1.0,)
    count: int = COCO_VAL
    batch_size: int = 8
    crf: Annotated[str, tyro.conf.arg(help="none, release or standard.")] = "none"
    samples: int = 40
    """Rows of the resident set."""
    turns: int = 5
    """Of each way to make the maps."""
    threads: int = 1
    csv: Path = Path("benchmarks/results/cpu/evaluation.csv")
    """Results are appended here."""


def run(options: Options) -> None:
    """Measure; each result is printed and appended to the CSV as soon as it is there."""
    torch.set_num_threads(options.threads)
    about = common.record("cpu")

    def write(case: str, method: str, images: int, seconds: float, mib: float) -> None:
        values = {"images": images, "seconds": round(seconds, 5), "mib": round(mib, 1)}
        common.append_csv(options.csv, [about | {"case": case, "method": method} | values])
        print(f"{f'{case}, {method}':<24}{images:>6} images {seconds:>10.4f} s {mib:>8.1f} MiB", flush=True)

    if options.images is None:
        _maps(options, write)
    else:
        _split(options, write)


# A whole split.


def _split(options: Options, write: Write) -> None:
    case = f"{options.side or 'original'} px" + ("" if options.crf == "none" else f", {options.crf} CRF")

    def counted(systems: Systems, split: str, images: Sequence[Image]) -> Iterator[Outcome]:
        start, step = time.perf_counter(), max(1, options.count // options.samples)
        for number, outcome in enumerate(outcomes(systems, split, images), start=1):
            yield outcome
            if number % step == 0 or number == options.count:
                write(case, "evaluate", number, time.perf_counter() - start, _resident())

    outcomes = stage.outcomes
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(stage, "outcomes", counted):
        folder = Path(temporary)
        index, masks = _dataset(options, folder)
        stage.evaluate(
            index,
            masks,
            _checkpoint(folder / "cosa.safetensors", options.size),
            None,
            None,
            folder / "miou.txt",
            folder / "iou.csv",
            folder / "panel.png",
            folder / "gallery",
            evaluation=EvalConfig.model_validate(
                {"scales": options.scales, "size": options.size, "batch_size": options.batch_size, "crf": options.crf}
            ),
            runtime=RuntimeConfig(device="cpu"),
            threads=options.threads,
        )
        print((folder / "miou.txt").read_text())


def _resident() -> float:
    """MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / common.MIB


def _dataset(options: Options, folder: Path) -> tuple[Path, Path]:
    """An index and a list of masks of `options.count` images, on few files."""
    assert options.images is not None
    files = sorted(options.images.glob("*.jpg"))
    if not files:
        raise SystemExit(f"{options.images} has no .jpg files: pass --images a folder of photographs")
    generator = np.random.default_rng(0)
    entries = []
    for file in files:
        with PilImage.open(file) as opened:
            image = opened.convert("RGB")
        if options.masks is None:
            mask = PilImage.fromarray(_drawn(generator, image.height, image.width))
        else:
            with PilImage.open(options.masks / f"{file.stem}.png") as opened:
                mask = PilImage.fromarray(np.asarray(opened))
        if options.side is not None:
            scale = options.side / max(image.size)
            size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
            image, mask = image.resize(size), mask.resize(size, PilImage.Resampling.NEAREST)
        image.save(folder / file.name, quality=90)
        mask.save(folder / f"{file.stem}.png")
        labels = np.setdiff1d(np.asarray(mask), [0, IGNORED]) - 1
        entries.append((file.name, image.width, image.height, tuple(labels.tolist())))
    images = tuple(Image(f"{number:06d}", *entries[number % len(entries)]) for number in range(options.count))
    index = Index(
        "Repeated photographs", "coco", True, str(folder), CLASSES, "train", ("val",), {"train": (), "val": images}
    )
    index.save(folder / "index.json")
    paths = {image.id: str(folder / image.path.replace(".jpg", ".png")) for image in images}
    content = {
        "schema": SCHEMA,
        "index_sha256": sha256(folder / "index.json"),
        "complete": ["val"],
        "masks": {"val": paths},
    }
    (folder / "masks.json").write_text(json.dumps(content))
    return folder / "index.json", folder / "masks.json"


def _drawn(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """Background with one to five rectangles of random classes in void borders."""
    mask = np.zeros((height, width), dtype=np.uint8)
    for value in generator.integers(1, len(CLASSES) + 1, size=generator.integers(1, 6)):
        y, x = generator.integers(height // 2), generator.integers(width // 2)
        mask[y : y + height // 2, x : x + width // 2] = IGNORED
        mask[y + 3 : y + height // 2 - 3, x + 3 : x + width // 2 - 3] = value
    return mask


def _checkpoint(path: Path, size: int) -> Path:
    """What the train stage writes, with random weights."""
    torch.manual_seed(0)
    model = ModelConfig(
        name="mini_vit", pretrained=False, aux_block=0, aux_norm=True, decoder_dim=8, decoder_dilation=2
    )
    augment = AugmentConfig(crop=size)
    net = CosaNet(model, len(CLASSES), size, pretrained=False)
    sections = {
        "augment": augment,
        "model": model,
        "cosa": CosaConfig(),
        "optim": OptimConfig(),
        "train": TrainConfig(),
    }
    metadata = {
        "kind": "cosa",
        "classes": CLASSES,
        "dataset": "Repeated photographs",
        "threshold": 0.5,
        "iteration": 0,
        "config": {name: section.model_dump(mode="json") for name, section in sections.items()},
    }
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tensors = {f"online.{name}": tensor for name, tensor in net.state_dict().items()}
    tensors |= {f"assignment.{name}": tensor for name, tensor in weights.items()}
    save_safetensors(path, tensors, metadata)
    return path


# One image's maps.


def _maps(options: Options, write: Write) -> None:
    # Memory in a process of its own: it is counted from what the system has to give, and that is slower.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        for case in CASES:
            times = common.cpu_times(_ways(case), None, options.turns, 0.0)
            memory = other.submit(_memory, case).result()
            for method, modes in times.items():
                write(case, method, 1, modes["forward"].median / 1000, memory[method])


def _memory(case: str) -> dict[str, float]:
    """MiB that each way takes at its peak."""
    torch.set_num_threads(1)
    common.return_freed_memory()
    calls = _ways(case)
    return {name: common.peak_memory(call, None, "cpu")["forward"] for name, call in calls.items()}


def _ways(case: str) -> dict[str, Callable[[], Tensor]]:
    """From the logits of the default five scales, mirrored too, at a side of 448 pixels and a stride of 16."""
    classes, size = CASES[case]
    generator = torch.Generator().manual_seed(0)
    sides = (28, 14, 42, 21, 35)
    seg = tuple(torch.randn(1, classes + 1, side, side, generator=generator) for side in sides * 2)
    cams = tuple(torch.zeros(1, 0, side, side) for side in sides)
    views = MultiScale(cams, cams, cams, cams, seg, ())
    labels = torch.zeros(1, classes)
    labels[0, [2, 5]] = 1
    kept = torch.tensor([0, 3, 6], dtype=torch.uint8)

    def whole() -> Tensor:
        scores = resize(Prediction(views, labels, (448, 448)).seg[0], size)
        return torch.stack([label_map(scores), label_map(scores, labels[0])])

    def bands() -> Tensor:
        return torch.stack(label_maps(Prediction(views, labels, (448, 448)).seg_bands(0, size), size, kept))

    if (disagreeing := int((whole() != bands()).sum())) > 10:  # up to rounding
        raise SystemExit(f"bands are wrong, so nothing is measured: {disagreeing} pixels differ from whole maps")
    return {"whole": whole, "bands": bands}


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
