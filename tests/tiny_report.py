"""A small results folder with every kind of file that the report reads."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from cosa_fast.config import Config

CLASSES = ["bird", "cat", "cow"]
PALETTE = {"bird": "#808000", "cat": "#400000", "cow": "#408000"}
LAYERS = ["image", "CAM", "CAM pseudo-label", "CoSA", "CoSA-MS", "truth", "error"]
SYSTEMS = [("CoSA", "label-free"), ("CoSA", "label-filtered"), ("CoSA-MS", "label-free"), ("CoSA-MS", "label-filtered")]
VALUES = {"background": "80.00", "bird": "9.50", "cat": "", "cow": "61.25", "mIoU": "50.25"}
"""Text order would put 9.50 above 80.00; cat does not occur."""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="576pt" height="72pt"><rect width="9" height="9"/></svg>'


def write_results(folder: Path, sizes: tuple[tuple[int, int], ...] = ((40, 56), (64, 48), (33, 71))) -> Path:
    """Everything that the workflow leaves, small; the folder."""
    folder.mkdir(parents=True)
    rows = [
        ["MiniVOC", split, system, setting, name, value]
        for split in ("val", "test")
        for system, setting in SYSTEMS
        for name, value in VALUES.items()
    ]
    write_csv(folder / "per_class_iou.csv", [["dataset", "split", "system", "setting", "class", "iou"], *rows])
    (folder / "voc_val_miou.txt").write_text("MiniVOC (synthetic; not comparable)\n\nCAM threshold  0.421\n")
    write_lines(
        folder / "cosa.metrics.jsonl",
        [
            {"iteration": step, "loss": 1 / step, "cls": 0.5, "cls_aux": 0.6, "threshold": 0.4}
            | ({"c2s": 0.25} if step > 20 else {})
            for step in range(10, 60, 10)
        ],
    )
    counts = {"hits": [30, 10, 0], "truth": [50, 20, 0], "predicted": [40, 40, 0]}  # 1/2, 1/5, neither: 35 %
    write_lines(
        folder / "cosa.validation.jsonl",
        [
            {"iteration": step, "network": network, "split": "val", "images": 3, "seg_free": counts}
            for step in (25, 50)
            for network in ("online", "assignment")
        ],
    )
    write_checkpoint(folder / "cosa.safetensors")
    store = folder / "pseudo_labels.zarr"
    store.mkdir()
    versions = {"cosa-fast": "0.0.7", "torch": "2.11.0"}
    attributes = {"dataset": "MiniVOC", "synthetic": True, "versions": versions, "config": {"pseudo": {"shard": 16}}}
    (store / "zarr.json").write_text(json.dumps({"attributes": attributes}))
    for number, stage in enumerate(("train", "index", "evaluate"), start=1):
        path = folder / "benchmarks" / f"{stage}.tsv"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"s\th:m:s\tmax_rss\n{100 * number - 30}\t0:00:00\t{'-' if number == 2 else 1536}\n")
    (folder / "logs").mkdir()
    (folder / "logs/train.log").write_text("09:00:00 CoSA on MiniVOC: 6 images, 3 classes, 0.3 M parameters, cpu\n")
    (folder / "studies").mkdir()
    (folder / "studies/ladder.svg").write_text(SVG)
    write_csv(folder / "studies/ladder.csv", [["variant", "miou"], ["baseline", "41.20"], ["+ GC", "49.9 ± 0.5"]])
    Image.new("RGB", (80, 60), "navy").save(folder / "studies/qualitative.png")
    write_gallery(folder / "gallery", sizes)
    return folder


def write_checkpoint(path: Path, **changes: Any) -> None:
    """A checkpoint's header over one weight."""
    config = Config().model_dump(mode="json")
    recorded = {name: config[name] for name in ("cosa", "train")}
    recorded["train"] |= {"iterations": 50, "c2s_start": 20, "guidance_start": 40}
    metadata = {"schema": 1, "kind": "cosa", "dataset": "MiniVOC", "config": recorded} | changes
    save_file({"w": np.zeros(1, np.float32)}, str(path), metadata={"cosa-fast": json.dumps(metadata)})


def write_gallery(folder: Path, sizes: tuple[tuple[int, int], ...]) -> None:
    """Noise for photographs, rectangles for maps; image k is tagged with class k."""
    folder.mkdir()
    images = []
    for number, (height, width) in enumerate(sizes):
        rng = np.random.default_rng(number)
        files = {}
        for layer in LAYERS:
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            if layer not in ("image", "CAM", "error"):
                pixels[:] = 0
                colour = tuple(bytes.fromhex(PALETTE[CLASSES[number % 3]][1:]))
                pixels[4 : height // 2, 4 + LAYERS.index(layer) : width // 2] = colour
            files[layer] = f"{number:04d}_{layer.lower().replace(' ', '_')}.{'jpg' if layer == 'image' else 'png'}"
            Image.fromarray(pixels).save(folder / files[layer])
        tags = [CLASSES[number % 3]]
        size = {"width": width, "height": height}
        images.append({"id": f"val_{number}", "labels": tags, **size, "iou": 0.5 if number else None, "files": files})
    content = {"dataset": "MiniVOC", "split": "val", "synthetic": True, "classes": CLASSES, "palette": PALETTE}
    (folder / "gallery.json").write_text(json.dumps(content | {"layers": LAYERS, "images": images}))


def write_csv(path: Path, rows: list[list[str]]) -> None:
    with open(path, "w", newline="") as handle:
        csv.writer(handle).writerows(rows)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
