"""What finished runs leave behind, made up: learning curves, IoU tables, speeds, galleries; for the studies' tests."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image as PilImage
from safetensors.numpy import save_file

from cosa_fast.config import AugmentConfig, Config, CosaConfig, ModelConfig, OptimConfig, StudiesConfig, TrainConfig
from cosa_fast.data.classes import voc_palette
from cosa_fast.data.index import Image, Index
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import Needs, needs
from cosa_fast.studies.style import style
from cosa_fast.studies.variants import variant as variant_config

CLASSES = ("aeroplane", "bird", "boat", "cat", "person", "train")
QUALITY = {
    "baseline": 0.30, "gc": 0.38, "gc_sa": 0.42, "gc_sa_raw": 0.47, "gc_sa_csc": 0.50, "gc_sa_raw_csc": 0.55,
    "cosa": 0.60, "no_csc": 0.50, "no_raw": 0.54, "no_sa": 0.52, "no_gc": 0.44, "noise": 0.16, "gt": 0.72,
    "detach_feat": 0.46, "detach_cls": 0.58,
}  # fmt: skip
"""Final IoU of the CAM pseudo-labels, roughly."""
COEXISTING = ("aeroplane", "bird", "boat", "train")
SETTINGS = StudiesConfig(seeds=(0, 1), thresholds=(0.3, 0.5), coexisting=COEXISTING)
SHIFTS = {
    "seg_free": -0.04, "seg_filtered": 0.02, "cam": 0.0, "aux_cam": -0.09, "ensemble": 0.01, "cam_confident": 0.10,
    "aux_cam_confident": 0.13,
}  # fmt: skip
EVERY, ITERATIONS, START = 100, 1000, 300


def write_index(folder: Path, *, synthetic: bool = True, name: str = "MiniVOC") -> Path:
    """An index with classes and splits but no image file."""
    image = Image("000", "JPEGImages/000.jpg", 8, 8, (0,))
    splits = dict.fromkeys(("train", "val", "test"), (image,))
    index = Index(name, "voc", synthetic, str(folder), CLASSES, "train", ("val", "test"), splits)
    index.save(folder / "index.json")
    return folder / "index.json"


def write_run(
    folder: Path, variant: str, seed: int = 0, *, dataset: str = "MiniVOC", iterations: int = ITERATIONS
) -> Path:
    """Checkpoint metadata and validation log of a run; the prefix of their paths."""
    prefix = folder / variant / str(seed) / "cosa"
    prefix.parent.mkdir(parents=True, exist_ok=True)
    config = variant_config(
        Config(
            train=TrainConfig(iterations=iterations, c2s_start=100, guidance_start=START),
            cosa=CosaConfig(threshold=0.4),
        ),
        variant,
        seed,
    )
    write_checkpoint(prefix, config, dataset)
    rng = np.random.default_rng([seed, len(variant), *variant.encode()])
    lines = [
        json.dumps(record(rng, variant, network, iteration, iterations))
        for iteration in range(EVERY, iterations + 1, EVERY)
        for network in ("online", "assignment")
    ]
    prefix.with_name("cosa.validation.jsonl").write_text("\n".join(lines) + "\n")
    return prefix


def write_checkpoint(prefix: Path, config: Config, dataset: str = "MiniVOC") -> None:
    """A checkpoint without weights to speak of."""
    sections = {
        "augment": AugmentConfig(),
        "model": ModelConfig(name="mini_vit", pretrained=False, detach=config.model.detach),
        "optim": OptimConfig(),
    }
    sections |= {"cosa": config.cosa, "train": config.train}
    metadata = {
        "schema": 1,
        "kind": "cosa",
        "classes": CLASSES,
        "dataset": dataset,
        "iteration": config.train.iterations,
        "config": {name: section.model_dump(mode="json") for name, section in sections.items()},
    }
    save_file(
        {"weight": np.zeros(1, dtype=np.float32)},
        prefix.with_name("cosa.safetensors"),
        metadata={"cosa-fast": json.dumps(metadata)},
    )


def record(rng: np.random.Generator, variant: str, network: str, iteration: int, last: int) -> dict[str, Any]:
    """A line of a validation log."""
    fixed = float(variant.removeprefix("threshold_")) if variant.startswith("threshold_") else None
    final = QUALITY[variant] if fixed is None else 0.58 - 0.8 * abs(0.45 - fixed)
    progress = 1 - np.exp(-3.5 * iteration / last)
    started = iteration > START
    level = (0.32 if not started else 0.32 + (final - 0.32) * (iteration - START) / (last - START)) * (
        0.55 + 0.45 * progress
    )
    level += -0.02 if network == "online" else 0.0
    level += 0.008 * rng.standard_normal()
    dynamic = variant not in ("baseline", "gc", "gc_sa", "gc_sa_raw", "gc_sa_csc", "gc_sa_raw_csc")
    xi = 0.4 + (0.12 * (1 - np.exp(-(iteration - START) / 150)) if dynamic and started else 0.0)
    xi = fixed or xi
    centres = (np.arange(256) + 0.5) / 256
    sharp = 1.5 + 3 * level + (1.0 if variant != "no_raw" else 0.0) * progress
    density = 0.7 * (1 - centres) ** (2 * sharp) + 0.12 * centres ** (2 * sharp) + 0.01
    pixels = (2_000_000 * density / density.sum()).astype(int)
    distance = np.where(centres >= xi, (centres - xi) / (1 - xi), (xi - centres) / xi)
    accuracy = 0.5 + (0.25 + 0.22 * progress) * distance**0.6
    confidence = {"right": (pixels * accuracy).astype(int).tolist()}
    confidence["wrong"] = (pixels - np.array(confidence["right"])).tolist()
    fields: dict[str, Any] = {
        "iteration": iteration,
        "network": network,
        "split": "val",
        "images": 40,
        "xi": round(float(xi), 6),
        "aux_xi": round(float(xi), 6),
        "classes": ["background", *CLASSES],
        "mean_average_precision": round(
            float(0.97 - 0.5 * np.exp(-6 * iteration / last) + 0.003 * rng.standard_normal()), 6
        ),
        "confidence": confidence,
        "aux_confidence": confidence,
    }
    truth = np.array([1_200_000, *rng.integers(80_000, 160_000, len(CLASSES))])
    for quantity, shift in SHIFTS.items():
        quality = np.clip(level + shift + 0.03 * rng.standard_normal(len(truth)), 0.02, 0.97)
        quality[0] = np.clip(0.6 + 0.5 * level, 0, 0.97)
        if variant == "no_csc":
            quality[1 + np.array([CLASSES.index(name) for name in COEXISTING])] *= 0.8
        fields[quantity] = pixel_counts(truth, np.sqrt(quality), 0.35 if "confident" in quantity else 1.0)
    if iteration == last:
        iou = np.clip(level + 0.18 * rng.standard_normal(40), 0.02, 0.98)
        perplexity = 0.25 + 0.9 * (1 - iou) * (1.3 if variant == "no_raw" else 1.0) + 0.06 * rng.random(40)
        fields["per_image"] = {
            "id": [f"{number:03d}" for number in range(40)],
            "iou": iou.round(6).tolist(),
            "perplexity": perplexity.round(6).tolist(),
        }
    return fields


def pixel_counts(truth: np.ndarray, recall: np.ndarray, share: float) -> dict[str, list[int]]:
    """Counts with this recall and an equal precision, of a share of the pixels."""
    truth = (truth * share).astype(int)
    hits = (truth * recall).astype(int)
    return {"hits": hits.tolist(), "truth": truth.tolist(), "predicted": (hits / recall).astype(int).tolist()}


def write_runs(folder: Path, runs: Iterable[tuple[str, int]]) -> dict[str, dict[int, Path]]:
    """The runs that a study needs."""
    paths: dict[str, dict[int, Path]] = {}
    for variant, seed in runs:
        paths.setdefault(variant, {})[seed] = write_run(folder, variant, seed)
    return paths


def write_iou_table(path: Path, miou: Mapping[tuple[str, str, str], float], dataset: str = "MiniVOC") -> Path:
    """A table of IoU per class of which only the means matter; keys are (split, system, setting)."""
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["dataset", "split", "system", "setting", "class", "iou"])
        for (split, system, setting), value in miou.items():
            writer.writerow([dataset, split, system, setting, "background", "90.00"])
            writer.writerow([dataset, split, system, setting, "bird", ""])
            writer.writerow([dataset, split, system, setting, "mIoU", f"{value:.2f}"])
    return path


def write_tables(folder: Path) -> dict[str, Path]:
    """The four tables that the studies read."""
    systems = {"CoSA": 58.3, "CoSA-MS": 60.1}
    settings = {"label-free": 0.0, "label-filtered": 4.2}
    plain = {
        (split, system, setting): value + add - (0.7 if split == "test" else 0.0)
        for split in ("val", "test")
        for system, value in systems.items()
        for setting, add in settings.items()
    }
    refined = {(split, f"{system} + CRF", setting): value + 0.6 for (split, system, setting), value in plain.items()}
    cams = {
        (split, system, "label-filtered"): value + (2.1 if split == "train" else 0.0)
        for split in ("train", "val")
        for system, value in (
            ("CAM pseudo-labels", 59.2),
            ("auxiliary CAM pseudo-labels", 51.7),
            ("ensemble CAM pseudo-labels", 60.4),
        )
    }
    return {
        "main": write_iou_table(folder / "per_class_iou.csv", plain),
        "cpl": write_iou_table(folder / "cpl_iou.csv", cams),
        "crf_release": write_iou_table(folder / "crf_release.csv", plain | refined),
        "crf_standard": write_iou_table(folder / "crf_standard.csv", plain | refined),
    }


def write_segmenter(path: Path, architecture: str = "DeepLabV3Plus", encoder: str = "tu-test_resnet") -> Path:
    """A CoSA-MS checkpoint without weights to speak of."""
    metadata = {"schema": 1, "kind": "segmenter", "config": {"architecture": architecture, "encoder": encoder}}
    save_file({"weight": np.zeros(1, dtype=np.float32)}, path, metadata={"cosa-fast": json.dumps(metadata)})
    return path


SPEED_COLUMNS = (
    "system", "scales", "flip", "batch", "crf", "images_per_second", "slowest", "fastest", "device", "threads", "torch",
    "date", "images",
)  # fmt: skip


def write_speed(path: Path) -> Path:
    """A table of `cosa-fast speed`."""
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(SPEED_COLUMNS)
        for system, rate in {"CoSA": 60.0, "CoSA-MS": 41.0}.items():
            for scales, flip, factor in (("1.0 0.5", True, 1.0), ("1.0", False, 2.5)):
                for batch in (1, 16):
                    for crf, slower in (("none", 1.0), ("standard", 6.0)):
                        value = rate * factor * (1.4 if batch > 1 else 1.0) / slower
                        rates = [value, 0.7 * value, 1.1 * value]
                        machine = ["cpu", 2, "2.15.0", "2026-11-23", 40]
                        writer.writerow([system, scales, flip, batch, crf, *rates, *machine])
    return path


def write_gallery(folder: Path, *, images: int = 14, blur: int = 0) -> Path:
    """Galleries of rectangles; `blur` pixels of context are in the CAMs."""
    folder.mkdir(parents=True, exist_ok=True)
    palette = np.array(voc_palette(), dtype=np.uint8).reshape(256, 3)
    entries = []
    for number in range(images):
        label = number % len(CLASSES)
        rng = np.random.default_rng(number)
        pixels = rng.integers(90, 160, (64, 80, 3), dtype=np.uint8)
        mask = np.zeros((64, 80), dtype=np.uint8)
        y, x = rng.integers(8, 24, 2)
        mask[y : y + 28, x : x + 36] = label + 1
        pixels[mask > 0] = palette[label + 1] // 2 + 90
        heat = np.zeros_like(mask)
        heat[max(y - blur, 0) : y + 28 + blur, max(x - blur, 0) : x + 36 + blur] = 255
        layers = {"image": pixels, "truth": palette[mask], "CoSA": palette[mask], "CAM pseudo-label": palette[mask]}
        layers |= {"CAM": np.stack([heat, heat // 3, 255 - heat], axis=-1), "error": pixels}
        files = {layer: f"{number:04d}_{layer.lower().replace(' ', '_')}.png" for layer in layers}
        for layer, values in layers.items():
            PilImage.fromarray(values).save(folder / files[layer])
        entries.append(
            {
                "id": f"{number:03d}",
                "labels": [CLASSES[label]],
                "width": 80,
                "height": 64,
                "iou": 0.5 + number / 100,
                "files": files,
            }
        )
    colours = {name: "#{:02x}{:02x}{:02x}".format(*palette[c]) for c, name in enumerate(("background", *CLASSES))}
    content = {
        "dataset": "MiniVOC", "split": "val", "synthetic": True, "classes": CLASSES, "palette": colours,
        "layers": ["image", "CAM", "CAM pseudo-label", "CoSA", "truth", "error"], "images": entries,
    }  # fmt: skip
    (folder / "gallery.json").write_text(json.dumps(content))
    return folder


def write_inputs(folder: Path, need: Needs) -> dict[str, Any]:
    """Everything that a study needs, as keyword arguments of `Inputs` besides the index and the settings."""
    given: dict[str, Any] = {"runs": write_runs(folder / "runs", need.runs)}
    if need.tables:
        given["tables"] = write_tables(folder)
    if need.checkpoints:
        checkpoint = write_run(folder, "cosa").with_name("cosa.safetensors")
        given["checkpoints"] = {"cosa": checkpoint, "segmenter": write_segmenter(folder / "segmenter.safetensors")}
    if need.speed:
        given["speed"] = write_speed(folder / "rates.csv")
    if need.galleries:
        given["galleries"] = {
            "main": write_gallery(folder / "gallery"),
            "no_csc": write_gallery(folder / "gallery_no_csc", blur=12),
        }
    return given


def inputs_of(folder: Path, name: str, **changes: Any) -> Inputs:
    """Everything the study needs, made up; `changes` replace parts."""
    given = write_inputs(folder, needs(name, SETTINGS)) | changes
    return Inputs(index=Index.load(write_index(folder)), studies=SETTINGS, **given)


def drawn(name: str, inputs: Inputs) -> tuple[list[dict[str, str]], Figure]:
    """A study's rows and figure, without the time that saving takes."""
    with style():
        study: tuple[list[dict[str, str]], Figure] = import_module(f"cosa_fast.studies.{name}").study(inputs)
    return study


def table(name: str, inputs: Inputs) -> list[dict[str, str]]:
    """The rows alone."""
    return drawn(name, inputs)[0]


def set_metadata(path: Path, metadata: object) -> None:
    """Exchange what a checkpoint says of itself; text is taken as it is."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file({"weight": np.zeros(1, dtype=np.float32)}, path, metadata={"cosa-fast": text})


def set_last(prefix: Path, quantity: str, percents: float | list[float]) -> None:
    """Give the assignment network's last validation these IoUs, one for all classes or one per class."""
    path = prefix.with_name("cosa.validation.jsonl")
    lines = path.read_text().splitlines()
    content = json.loads(lines[-1])
    values = percents if isinstance(percents, list) else [percents] * len(content["classes"])
    hits = [round(100 * value) for value in values]
    content[quantity] = {"hits": hits, "truth": [10_000] * len(hits), "predicted": hits}
    path.write_text("\n".join([*lines[:-1], json.dumps(content)]) + "\n")


def set_precision(prefix: Path, value: float | None) -> None:
    """Give all validations this mean average precision; None is that of a split in which no class occurs."""
    path = prefix.with_name("cosa.validation.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | {"mean_average_precision": value}) for line in records) + "\n")
