"""The `pseudo-labels` stage: what the trained assignment network says of the training images, for CoSA-MS."""

from __future__ import annotations

import logging
import math
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PilImage
from torch import Tensor
from tqdm import tqdm

from cosa_fast import __version__
from cosa_fast.config import PseudoConfig, RuntimeConfig
from cosa_fast.data.classes import voc_palette
from cosa_fast.data.index import Image, Index
from cosa_fast.data.store import Pixels, PseudoLabel, PseudoLabels, StoreInfo, write_store
from cosa_fast.files import describe_os_error, require_space
from cosa_fast.inference import (
    Prediction,
    ahead,
    cam_label_map,
    chunks,
    for_inference,
    label_maps,
    mask_values,
    normalise,
    predict,
    prefetch,
    read_rgb,
    resize,
    square,
    worth_compiling,
)
from cosa_fast.models.checkpoint import CosaCheckpoint, load_cosa
from cosa_fast.runtime import Runtime, resolve
from cosa_fast.transfer import to_device, to_host

log = logging.getLogger(__name__)

BYTES_PER_PIXEL = 0.5
"""Of the three arrays, compressed; measured 0.3 on photographs, nearly all of it the confidence."""


def write_pseudo_labels(
    index: Path, checkpoint: Path, output: Path, *, pseudo: PseudoConfig, runtime: RuntimeConfig, threads: int
) -> None:
    """Write CAM pseudo-labels, their confidence and the segmentation of the training images to a Zarr store.

    The labels follow Eq. 3 at the threshold the training ended with; every pixel gets one, as in the paper. What is
    unsure can be left out later by its confidence (`multistage.min_confidence`).

    Processes of torchrun share the shards, and write the bytes that one process writes. A process takes as many shards
    together as it takes for no batch to be divided: one, if `pseudo.shard` is a multiple of `pseudo.batch_size`.

    Args:
        index: the dataset index.
        checkpoint: of the `train` stage.
        output: the store, a folder; replaced as a whole at the end.

    Raises:
        ValueError: the checkpoint is of other classes, an image cannot be read, or the disk is full.
    """
    machine = resolve(runtime, threads)
    dataset = Index.load(index)
    network = load_cosa(checkpoint, "assignment", machine.device)
    require_same_classes(network.classes, checkpoint, dataset, index)
    images = dataset.train
    compiled = worth_compiling(runtime, machine, len(images))
    for_inference(network.net, machine, compiled)
    pixels = sum(image.width * image.height for image in images)
    require_space(output.parent, int(BYTES_PER_PIXEL * pixels), "the pseudo-label store")
    log.info(
        "pseudo-labels of %s %s: %d images, threshold %.3f, %s",
        dataset.name, dataset.train_split, len(images), network.threshold, machine.device,
    )  # fmt: skip
    info = StoreInfo(
        dataset=dataset.name,
        synthetic=dataset.synthetic,
        split=dataset.train_split,
        classes=dataset.classes,
        ids=tuple(image.id for image in images),
        threshold=network.threshold,
        checkpoint_sha256=network.sha256,
        iteration=network.iteration,
        config={**network.config, "pseudo": pseudo.model_dump(mode="json")},
        versions={
            "cosa-fast": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "timm": version("timm"),
            "zarr": version("zarr"),
        },
    )
    sizes = [(image.height, image.width) for image in images]
    positions = machine.world.share(range(len(images)), whole=math.lcm(pseudo.shard, pseudo.batch_size))
    rows = _rows(dataset, [images[position] for position in positions], network, pseudo, machine, threads, compiled)
    write_store(output, info, sizes, rows, pseudo.shard, positions, machine.world)


def require_same_classes(classes: tuple[str, ...], checkpoint: Path, dataset: Index, index: Path) -> None:
    """Check that a checkpoint was trained for the classes of an index.

    Raises:
        ValueError: it was not.
    """
    if classes != dataset.classes:
        raise ValueError(
            f"{checkpoint} was trained for {len(classes)} classes ({', '.join(classes[:3])} ...), but {index} has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes[:3])} ...): train on this index"
        )


def _rows(
    dataset: Index,
    images: Sequence[Image],
    network: CosaCheckpoint,
    pseudo: PseudoConfig,
    machine: Runtime,
    threads: int,
    compiled: bool,
) -> Iterator[PseudoLabel]:
    """Rows of the store, image by image; a GPU is at the next batch while those of one are compressed."""
    early = pseudo.batch_size if machine.device.type == "cuda" else 0
    for arriving in ahead(_arriving_rows(dataset, images, network, pseudo, machine, threads, compiled), early):
        yield PseudoLabel(*(arrived().numpy() for arrived in arriving))


def _arriving_rows(
    dataset: Index,
    images: Sequence[Image],
    network: CosaCheckpoint,
    pseudo: PseudoConfig,
    machine: Runtime,
    threads: int,
    compiled: bool,
) -> Iterator[list[Callable[[], Tensor]]]:
    """The three maps of each image, on their way to the host."""

    def load(image: Image) -> Tensor:
        return square(read_rgb(dataset, image), pseudo.size)

    squares = prefetch(load, images, threads, ahead=2 * pseudo.batch_size)
    fill = pseudo.batch_size if compiled else None
    progress = tqdm(total=len(images), desc="pseudo-labels", unit="image", disable=machine.world.quiet)
    for group in chunks(images, pseudo.batch_size):
        pixels = torch.stack(list(islice(squares, len(group))))
        normalised = normalise(pixels, network.mean, network.std, machine.device)
        present = to_device(torch.from_numpy(dataset.multi_hot(tuple(group))), machine.device)
        prediction = predict(network.net, normalised, present, pseudo.scales, pseudo.flip, machine, fill)
        for slot, image in enumerate(group):
            yield _row(prediction, slot, image, network.threshold)
        progress.update(len(group))
    progress.close()


@torch.inference_mode()
def _row(prediction: Prediction, slot: int, image: Image, threshold: float) -> list[Callable[[], Tensor]]:
    size, kept = (image.height, image.width), mask_values(image, prediction.class_labels.device)
    cams, _ = prediction.cams_of(slot, kept)
    confidence = (resize(cams, size).amax(dim=0) * 255).round().to(torch.uint8)
    _, segmentation = label_maps(prediction.seg_bands(slot, size), size, kept)
    maps = (cam_label_map(cams, threshold, size, kept), confidence, segmentation)
    return [to_host(values) for values in maps]


def export_png(store: Path, output: Path, *, confidence: bool = False) -> None:
    """Write a store as images, for tools that read the PASCAL VOC layout.

    `output/SegmentationClass/<id>.png` are palette images with VOC's colours; with `confidence` there are greyscale
    `output/Confidence/<id>.png` too. `output` appears at the end, whole, and replaces a former one.

    Raises:
        ValueError: the store cannot be read, `output` is something else, or the disk is full.
    """
    labels = PseudoLabels(store)
    if output.exists() and not (output / "SegmentationClass").is_dir():
        raise ValueError(f"{output} exists and is not an earlier export: give a new folder")
    temporary = output.with_name(f".{output.name}.partial")
    palette = voc_palette()

    def save(folder: str, position: int, pixels: Pixels, colours: list[int] | None) -> None:
        image = PilImage.fromarray(np.ascontiguousarray(pixels))
        if colours is not None:
            image.putpalette(colours)
        path = temporary / folder / f"{labels.info.ids[position]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)  # COCO-like ids may hold folders
        image.save(path)

    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for position in tqdm(range(len(labels)), desc="export", unit="image", disable=None):
            save("SegmentationClass", position, labels.labels(position), palette)
            if confidence:
                save("Confidence", position, labels.confidence(position), None)
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except OSError as error:
        raise ValueError(describe_os_error(error, output)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
