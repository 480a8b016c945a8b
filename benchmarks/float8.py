"""What float8 layers in the assignment network change: `python -m benchmarks.float8 --help`.

Pseudo-labels of the evaluation split from the network in float32, in bf16 autocast and in float8 (emulated on a CPU),
single images at the training's scales: the share of pixels with float32's label, and the mIoU of each. It says nothing
of speed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from benchmarks import common
from cosa_fast.config import RuntimeConfig
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import load_masks, read_mask
from cosa_fast.inference import cam_label_map, label_maps, mask_values, normalise, predict, read_rgb, square
from cosa_fast.metrics import confusion_matrix, iou_per_class
from cosa_fast.models.checkpoint import CosaCheckpoint, load_cosa
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.fp8 import use_float8
from cosa_fast.runtime import Runtime, resolve

PRECISIONS: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare precisions of the assignment network."""

    checkpoint: Path
    """Of the `train` stage."""
    index: Path
    """With an evaluation split."""
    masks: Path
    """Its list of masks."""
    size: int = 112
    """Side of the square that images are resized to, in pixels."""
    device: str = "cpu"
    threads: int = 1
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/float8.csv."""


def run(options: Options) -> list[dict[str, Any]]:
    """Measure, print and append; returns the rows."""
    exact = load_cosa(options.checkpoint, "assignment", options.device)
    index = Index.load(options.index)
    masks, split = load_masks(options.masks, options.index), index.eval_splits[0]
    rough = copy.deepcopy(exact.net)
    use_float8(rough)
    full, half = (
        resolve(RuntimeConfig(device=options.device, precision=precision), options.threads) for precision in PRECISIONS
    )
    networks = {
        "fp32": (exact.net, full),
        "bf16": (exact.net, half),
        "fp8 in fp32": (rough, full),
        "fp8 in bf16": (rough, half),
    }
    counts = len(index.classes) + 1
    same: dict[tuple[str, str], list[float]] = {}
    confusion: dict[tuple[str, str], Tensor] = {}
    for image in tqdm(index.splits[split], disable=None):
        truth = torch.from_numpy(read_mask(masks.path(split, image.id), (image.width, image.height)))
        labels = {name: dict(_labels(options, exact, *network, index, image)) for name, network in networks.items()}
        for name, kinds in labels.items():
            for kind, label in kinds.items():
                same.setdefault((kind, name), []).append(float((label == labels["fp32"][kind]).double().mean()))
                matrix = confusion_matrix(truth, label.cpu(), counts)
                confusion[kind, name] = confusion.get((kind, name), torch.zeros_like(matrix)) + matrix
    about = common.record(options.device) | {"checkpoint": exact.sha256[:12], "images": len(index.splits[split])}
    rows = [
        {
            **about,
            "kind": kind,
            "precision": name,
            "agreement": f"{100 * sum(values) / len(values):.3f}",
            "miou": f"{100 * float(iou_per_class(confusion[kind, name]).nanmean()):.2f}",
        }
        for (kind, name), values in same.items()
    ]
    for row in rows:
        print(f"{row['kind']:8} {row['precision']:12} same label {row['agreement']} %, mIoU {row['miou']}")
    default = common.ROOT / "benchmarks/results" / common.folder_name(options.device) / "float8.csv"
    common.append_csv(options.csv or default, rows)
    return rows


def _labels(
    options: Options, exact: CosaCheckpoint, net: CosaNet, machine: Runtime, index: Index, image: Image
) -> Iterator[tuple[str, Tensor]]:
    """(H, W) labels by main and auxiliary CAMs and by the segmentation, free of and filtered by the image's labels."""
    pixels = square(read_rgb(index, image), options.size)[None]
    images = normalise(pixels, exact.mean, exact.std, machine.device)
    present = torch.from_numpy(index.multi_hot((image,))).to(machine.device)
    cosa = exact.config["cosa"]
    prediction = predict(net, images, present, cosa["scales"], cosa["flip"], machine)
    size, kept = (image.height, image.width), mask_values(image, machine.device)
    for (name, threshold), maps in zip(
        (("cam", exact.threshold), ("aux_cam", exact.aux_threshold)), prediction.cams_of(0, kept), strict=True
    ):
        yield name, cam_label_map(maps, threshold, size, kept)
    free, filtered = label_maps(prediction.seg_bands(0, size), size, kept)
    yield from (("seg", free), ("seg filtered", filtered))


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
