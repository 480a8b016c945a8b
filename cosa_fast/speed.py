"""The `speed` stage: images per second of CoSA and CoSA-MS with and without the dense CRF (paper Table 4c)."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cosa_fast.config import EvalConfig, RuntimeConfig
from cosa_fast.crf import CRF_PRESETS, CrfPool
from cosa_fast.data.index import Index
from cosa_fast.files import write_atomically
from cosa_fast.inference import chunks, for_inference, prefetch, read_rgb
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.models.segmenter import load_segmenter
from cosa_fast.predictors import (
    Cosa,
    CosaMs,
    Labels,
    Picture,
    System,
    Views,
    label_maps,
    prepared,
    refined_label_maps,
)
from cosa_fast.pseudo_labels import require_same_classes
from cosa_fast.runtime import resolve

log = logging.getLogger(__name__)

ROUNDS = 3
"""Timed passes of each variant."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table, and the seconds of its passes."""

    name: str
    views: Views
    batch: int
    crf: str
    seconds: list[float] = field(default_factory=list)


def measure_speed(
    index: Path,
    checkpoint: Path,
    segmenter: Path | None,
    output: Path,
    *,
    evaluation: EvalConfig,
    runtime: RuntimeConfig,
    threads: int,
    images: int,
) -> None:
    """Time label-free inference at `evaluation`'s scales and at one, singly and in batches, with and without CRF.

    From decoded images in memory to label maps on the host: resizing, normalising, the network, up-sampling to each
    image's own size, and where it is on the CRF (10 iterations) in `threads` processes beside the network. No file is
    read. The variants take turns, after an untimed pass each, so that what disturbs the machine disturbs all alike.

    Args:
        index: the dataset index.
        checkpoint: CoSA's, of the `train` stage.
        segmenter: CoSA-MS's, of the `multistage` stage; None: only CoSA is timed.
        output: CSV: per variant the images per second of its passes, their median, the slowest and the fastest.
        images: so many, evenly spaced through the first evaluation split (all of it, if it has fewer).

    Raises:
        ValueError: no evaluation split, a checkpoint of other classes, an unreadable image, or no pydensecrf.
    """
    machine = resolve(runtime, threads)
    dataset = Index.load(index)
    if not dataset.eval_splits or not dataset.splits[dataset.eval_splits[0]]:
        raise ValueError(f"{index} has no evaluation split with images: name one in eval_splits and make it again")
    with CrfPool(threads, CRF_PRESETS["standard"], ahead=2 * max(evaluation.batch_size, threads)) as pool:
        cosa = load_cosa(checkpoint, evaluation.network, machine.device)
        require_same_classes(cosa.classes, checkpoint, dataset, index)
        for_inference(cosa.net, machine)
        systems: dict[str, System] = {"CoSA": Cosa(cosa, evaluation.size, machine)}
        if segmenter is not None:
            standalone = load_segmenter(segmenter, machine.device)
            require_same_classes(standalone.classes, segmenter, dataset, index)
            for_inference(standalone.net, machine)
            systems["CoSA-MS"] = CosaMs(standalone, machine)
        split = dataset.splits[dataset.eval_splits[0]]
        places = np.linspace(0, len(split) - 1, min(images, len(split))).round().astype(int)
        pictures = list(prefetch(lambda place: read_rgb(dataset, split[place]), places, threads, ahead=2 * threads))
        log.info(
            "speed on %d images of %s %s, %s, %d threads",
            len(pictures), dataset.name, dataset.eval_splits[0], machine.device, threads,
        )  # fmt: skip
        variants = _variants(systems, evaluation)
        for turn, variant in tqdm(
            list(itertools.product(range(-1, ROUNDS), variants)), desc="speed", unit="pass", disable=None
        ):
            # Untimed, a batch is enough; and one image for each of the CRF's processes, which start with it.
            some = pictures if turn >= 0 else pictures[: max(variant.batch, threads)]
            seconds = _seconds(variant, systems[variant.name], some, pool, machine.device)
            if turn >= 0:
                variant.seconds.append(seconds)
    text = _table(variants, len(pictures), machine.device, threads)
    write_atomically(output, text.encode())
    log.info("%s\n%s", output, text)


def _variants(systems: dict[str, System], evaluation: EvalConfig) -> list[Variant]:
    views = dict.fromkeys((Views(evaluation.scales, evaluation.flip), Views((1.0,), False)))
    batches = dict.fromkeys((1, evaluation.batch_size))
    return [Variant(*choice) for choice in itertools.product(systems, views, batches, ("none", "standard"))]


def _seconds(
    variant: Variant, system: System, pictures: Sequence[Picture], pool: CrfPool, device: torch.device
) -> float:
    """Wall-clock time of one pass. The label maps are on the host at its end, so nothing is left on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.inference_mode():
        shapes = [labels.shape for labels in _label_maps(variant, system, pictures, pool)]
    seconds = time.perf_counter() - start
    assert shapes == [(picture.height, picture.width) for picture in pictures]
    return seconds


def _label_maps(variant: Variant, system: System, pictures: Sequence[Picture], pool: CrfPool) -> Iterator[Labels]:
    """(H, W) uint8 of each picture, in order."""
    named = ((f"image {number}", picture) for number, picture in enumerate(pictures))
    batches = (prepared(system, batch) for batch in chunks(named, variant.batch))
    if variant.crf == "none":
        return label_maps(system, (batch for batch, _ in batches), variant.views)
    return refined_label_maps(system, batches, variant.views, pool)


def _table(variants: Sequence[Variant], images: int, device: torch.device, threads: int) -> str:
    """CSV."""
    rows = []
    for variant in variants:
        rates = [images / seconds for seconds in variant.seconds]
        rows.append(
            {
                "system": variant.name,
                "scales": " ".join(map(str, variant.views.scales)),
                "flip": variant.views.flip,
                "batch": variant.batch,
                "crf": variant.crf,
                "images_per_second": f"{statistics.median(rates):.4g}",
                "slowest": f"{min(rates):.4g}",
                "fastest": f"{max(rates):.4g}",
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": threads,
                "torch": torch.__version__,
                "date": datetime.date.today().isoformat(),
                "images": images,
            }
        )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
