"""What a finished training left: its configuration and the quality it measured on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from cosa_fast.config import CosaConfig, TrainConfig, config_from_mapping
from cosa_fast.studies.stats import Counts, Floats, bin_centres, iou, mean_iou, perplexity
from cosa_fast.studies.variants import variant as expected

HEADER = "cosa-fast"
"""Key of the checkpoint metadata; `cosa_fast.models.checkpoint.HEADER`, which cannot be had without torch."""
Kind = Literal["cosa", "segmenter"]
"""What a checkpoint may hold: CoSA or CoSA-MS."""
STAGES = {"cosa": "train", "segmenter": "multistage"}
"""The stages that write them."""
FIELDS: dict[Kind, tuple[str, ...]] = {
    "cosa": ("dataset", "iteration", "config.model.name", "config.cosa", "config.train"),
    "segmenter": ("config.architecture", "config.encoder"),
}
"""What their metadata must have for the studies."""
QUANTITIES = (
    "seg_free",
    "seg_filtered",
    "cam",
    "aux_cam",
    "ensemble",
    "cam_confident",
    "aux_cam_confident",
)
"""Keys of the pixel counts of a validation."""


@dataclass(frozen=True, slots=True)
class Validation:
    """One network at one moment of the training."""

    iteration: int
    network: str
    split: str
    images: int
    classes: tuple[str, ...]
    """With "background" first."""
    xi: float
    mean_average_precision: float
    """In percent."""
    iou: dict[str, Floats]
    """Quantity to (K,) IoU in percent."""
    pixels: dict[str, int]
    """Quantity to the number of pixels that were counted."""
    right: Counts
    """(bins,) pixels by their largest CAM whose CAM pseudo-label is right."""
    wrong: Counts
    """(bins,) the same for wrong ones."""
    per_image: tuple[Floats, Floats] | None
    """(N,) IoU in percent and (N,) mean perplexity of each image's CAM pseudo-label; only in the last validation."""

    def miou(self, quantity: str) -> float:
        """mIoU in percent; NaN where no class occurs."""
        return mean_iou(self.iou[quantity])


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    variant: str
    seed: int
    path: Path
    """Of its validation log."""
    dataset: str
    cosa: CosaConfig
    train: TrainConfig
    validations: tuple[Validation, ...]

    def curve(self, network: str = "assignment") -> tuple[Validation, ...]:
        """The validations of one network, in order; empty if it has none."""
        return tuple(record for record in self.validations if record.network == network)

    def last(self, network: str = "assignment") -> Validation:
        """The network at the end of the training."""
        return self.curve(network)[-1]

    def perplexity(self, record: Validation) -> Floats:
        """(bins,) perplexity at the bin centres of a validation's confidence histogram (Eq. 4)."""
        return perplexity(bin_centres(len(record.right)), record.xi, self.cosa.lambda_alpha, self.cosa.lambda_beta)

    def mean_perplexity(self, record: Validation) -> float:
        """Mean over the pixels of the confidence histogram."""
        pixels = record.right + record.wrong
        return float((pixels * self.perplexity(record)).sum() / pixels.sum())


def load_run(variant: str, seed: int, prefix: Path) -> Run:
    """Read `<prefix>.safetensors` (its metadata only) and `<prefix>.validation.jsonl`.

    Raises:
        ValueError: a file is missing, damaged or incomplete, is of another variant or seed or of CoSA-MS.
    """
    checkpoint = prefix.with_name(f"{prefix.name}.safetensors")
    path = prefix.with_name(f"{prefix.name}.validation.jsonl")
    remedy = f"make it with `snakemake --cores all {checkpoint}` and validation.every above 0"
    metadata = checkpoint_metadata(checkpoint, "cosa", remedy)
    config = config_from_mapping(metadata["config"], source=str(checkpoint))
    if config.train.seed != seed:
        raise ValueError(
            f"{checkpoint} was trained with seed {config.train.seed}, not {seed}: give --run {variant}:{seed}: and the "
            "prefix of another run"
        )
    wanted = expected(config, variant, seed)
    for section in ("cosa", "model"):
        ours, theirs = (getattr(which, section).model_dump() for which in (config, wanted))
        for key, value in theirs.items():
            if ours[key] != value:
                raise ValueError(
                    f"{checkpoint} is not the variant {variant!r}: it was trained with {section}.{key} = "
                    f"{ours[key]!r}, not {value!r}; give --run {variant}:{seed}: and the prefix of another run"
                )
    records = tuple(_validations(path, remedy))
    run = Run(variant, seed, path, metadata["dataset"], config.cosa, config.train, records)
    curve = [record.iteration for record in run.curve()]
    reached = curve[-1] if curve else 0
    if reached != metadata["iteration"]:
        raise ValueError(
            f"{path} ends at iteration {reached} of {metadata['iteration']}: delete it and {checkpoint}, then {remedy}"
        )
    if any(later <= earlier for earlier, later in pairwise(curve)):
        raise ValueError(f"{path}: iterations go back: delete it and {checkpoint}, then {remedy}")
    return run


def checkpoint_metadata(path: Path, kind: Kind, remedy: str) -> dict[str, Any]:
    """The JSON metadata of a checkpoint, without its weights; all `FIELDS` are there.

    Raises:
        ValueError: the file is missing, damaged, of the other kind or of another program.
    """
    try:
        with safe_open(str(path), framework="np") as handle:
            header = handle.metadata() or {}
    except (OSError, SafetensorError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ValueError(f"the checkpoint {path} {problem}: {remedy}") from None
    if HEADER not in header:
        raise ValueError(f"{path} is no checkpoint of cosa-fast: {remedy}")
    try:
        content: dict[str, Any] = json.loads(header[HEADER])
        found = content["kind"]
        absent = [name for name in FIELDS[kind] if not _has(content, name)] if found == kind else []
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"the metadata of {path} is damaged ({error!r}): delete it, then {remedy}") from None
    if found != kind:
        raise ValueError(f"{path} holds a {found!r} model, wanted {kind!r}: give the `{STAGES[kind]}` stage's output")
    if absent:
        raise ValueError(f"the metadata of {path} lacks {', '.join(absent)}: delete it, then {remedy}")
    return content


def _has(content: object, name: str) -> bool:
    """Whether nested mappings have a dotted name."""
    for part in name.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def _validations(path: Path, remedy: str) -> Iterator[Validation]:
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"cannot read the validation log {path} ({error.strerror}): {remedy}") from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield _validation(json.loads(line))
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: {error.args[0]!r} is missing: delete it, then {remedy}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): delete it, then {remedy}") from None


def _validation(record: dict[str, Any]) -> Validation:
    classes = tuple(record["classes"])
    ious, pixels = {}, {}
    for quantity in QUANTITIES:
        hits, truth, predicted = (
            np.array(record[quantity][key], dtype=np.int64) for key in ("hits", "truth", "predicted")
        )
        if not len(hits) == len(truth) == len(predicted) == len(classes):
            raise ValueError(f"{quantity} does not have {len(classes)} classes")
        ious[quantity], pixels[quantity] = iou(hits, truth, predicted), int(truth.sum())
    right, wrong = (np.array(record["confidence"][key], dtype=np.int64) for key in ("right", "wrong"))
    if len(right) != len(wrong) or not (right + wrong).sum():
        raise ValueError("the confidence histograms are empty or unequal")
    images = record.get("per_image")
    precision = record["mean_average_precision"]
    return Validation(
        iteration=int(record["iteration"]),
        network=str(record["network"]),
        split=str(record["split"]),
        images=int(record["images"]),
        classes=classes,
        xi=float(record["xi"]),
        mean_average_precision=math.nan if precision is None else 100.0 * float(precision),
        iou=ious,
        pixels=pixels,
        right=right,
        wrong=wrong,
        per_image=None
        if images is None
        else (100.0 * np.array(images["iou"], dtype=np.float64), np.array(images["perplexity"], dtype=np.float64)),
    )
