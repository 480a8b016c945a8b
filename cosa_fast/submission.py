"""The `submission` stage: label-free predictions as an archive for PASCAL VOC's evaluation server, and its check.

VOC2012's test split has neither masks nor image-level labels; the server alone can score it. The devkit has two
competitions, by training data: comp5 allows VOC's own trainval data and nothing else, comp6 anything but the test
images. Weights pretrained on ImageNet and SBD's labels make a result one of comp6, so that is the default.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import shutil
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from PIL import Image as PilImage
from torch import Tensor
from tqdm import tqdm

from cosa_fast.config import EvalConfig, RuntimeConfig
from cosa_fast.crf import CRF_PRESETS, CrfPool
from cosa_fast.data.classes import VOC_CLASSES, voc_palette
from cosa_fast.data.store import Pixels
from cosa_fast.data.torch_loader import read_image
from cosa_fast.data.verify import measure_images, raise_problems
from cosa_fast.data.voc import read_split
from cosa_fast.files import describe_os_error, exclusive, require_space, write_atomically
from cosa_fast.inference import chunks, for_inference, prefetch
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.models.segmenter import load_segmenter
from cosa_fast.predictors import (
    Batch,
    Cosa,
    CosaMs,
    Named,
    Picture,
    System,
    Views,
    label_maps,
    refined_label_maps,
)
from cosa_fast.runtime import resolve

log = logging.getLogger(__name__)

Competition = Literal["comp5", "comp6"]
FOLDERS = {name: PurePosixPath(f"results/VOC2012/Segmentation/{name}_test_cls") for name in ("comp5", "comp6")}
TEST_IMAGES = 1456
"""Of the official list ImageSets/Segmentation/test.txt."""
PALETTE = voc_palette()


@dataclass(frozen=True, slots=True)
class Listed:
    """One image of the list."""

    id: str
    path: Path
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Predictor:
    """The network whose predictions are packed, and how it is used."""

    system: System
    config: EvalConfig
    threads: int

    @property
    def batch_size(self) -> int:
        """CoSA-MS takes images at their own sizes, so one by one."""
        return self.config.batch_size if isinstance(self.system, Cosa) else 1

    @property
    def views(self) -> Views:
        """Of the evaluation."""
        return Views(self.config.scales, self.config.flip)


def write_submission(
    root: Path,
    image_list: str,
    checkpoint: Path | None,
    segmenter: Path | None,
    output: Path,
    *,
    competition: Competition = "comp6",
    evaluation: EvalConfig,
    runtime: RuntimeConfig,
    threads: int,
) -> None:
    """Predict every image of a list without any label, and write the results archive that the server takes.

    Finished predictions wait in a hidden folder beside `output`; a killed run continues from them if checkpoint and
    settings are the same, and the archive is the same bytes as without the interruption.

    Args:
        root: the VOC2012 folder with JPEGImages/ and ImageSets/Segmentation/.
        image_list: name of a list in ImageSets/Segmentation, `test` for the server.
        checkpoint: CoSA's, of the `train` stage; or
        segmenter: CoSA-MS's, of the `multistage` stage.
        output: the archive, .tgz.

    Raises:
        ValueError: not exactly one network, it is not one of VOC's 20 classes, the list or images are missing or
            damaged, or the disk is full.
    """
    if (checkpoint is None) == (segmenter is None):
        raise ValueError("give either the checkpoint of CoSA or the segmenter of CoSA-MS: an archive holds one result")
    if not output.name.endswith((".tgz", ".tar.gz")):
        raise ValueError(f"{output} must be a .tgz file: the server takes no other")
    images = list_images(root, image_list, threads)
    machine = resolve(runtime, threads)
    system: Cosa | CosaMs
    if checkpoint is not None:
        system = Cosa(load_cosa(checkpoint, evaluation.network, machine.device), evaluation.size, machine)
    else:
        assert segmenter is not None
        system = CosaMs(load_segmenter(segmenter, machine.device), machine)
    network = system.network
    if network.classes != VOC_CLASSES:
        raise ValueError(
            f"{checkpoint or segmenter} was trained for {len(network.classes)} classes of {network.dataset} "
            f"({', '.join(network.classes[:3])} ...), but the server scores VOC's 20 in their order: train on VOC"
        )
    name = "CoSA" if checkpoint is not None else "CoSA-MS"
    log.info("%s of %s on %d images of %s, label-free, CRF %s, %s",
             competition, name, len(images), image_list, evaluation.crf, machine.device)  # fmt: skip
    if image_list == "test" and len(images) != TEST_IMAGES:
        log.warning("VOC2012's official test list has %d images, this one %d", TEST_IMAGES, len(images))
    require_space(output.parent, 30_000 * len(images), "the submission")
    work = output.with_name(f".{output.name}.partial")
    for_inference(network.net, machine)
    predictor = Predictor(system, evaluation, threads)
    settings = evaluation.model_dump(mode="json", exclude={"threshold", "panel_images"})
    try:
        with exclusive(work):
            _forget_others(work, {"root": str(root.resolve()), "network": network.sha256, "evaluation": settings})
            _predict_all(predictor, images, work)

            def pack(path: Path) -> None:
                _pack(path, FOLDERS[competition], images, work)
                try:
                    check_submission(path, root, image_list, threads=threads)
                except ValueError:
                    _forget(work)  # else the next run would pack the same
                    raise

            write_atomically(output, pack)
        shutil.rmtree(work)
    except OSError as error:
        raise ValueError(describe_os_error(error, output)) from error
    log.info("%s is written", output)


def check_submission(archive: Path, root: Path, image_list: str, classes: int = 21, *, threads: int = 2) -> None:
    """Check that an archive is what the server takes for a list of images.

    That is one 8-bit palette PNG per image, of the image's size, with values below `classes`, all in the folder of one
    competition, and nothing else.

    Raises:
        ValueError: it is not; the first ten problems and how many there are.
    """
    wanted = {image.id: image for image in list_images(root, image_list, threads)}
    problems: list[str] = []
    seen: set[str] = set()
    competitions: set[str] = set()
    progress = tqdm(total=len(wanted), desc="check", unit="image", disable=None)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isdir() and any(path == folder or path in folder.parents for folder in FOLDERS.values()):
                    continue
                content = tar.extractfile(member) if member.isfile() else None
                image = wanted.get(path.stem) if path.suffix == ".png" else None
                if content is None or image is None:
                    problems.append(f"{member.name} does not belong there: no image of {image_list} has this name")
                    continue
                if image.id in seen:
                    problems.append(f"{member.name}: {image.id} is there twice")
                seen.add(image.id)
                if path.parent in FOLDERS.values():
                    competitions.add(path.parent.name)
                else:
                    problems.append(f"{member.name} is in the wrong folder: wanted {FOLDERS['comp6']} (or comp5's)")
                problems += _check_png(member.name, content.read(), image, classes)
                progress.update()
    except FileNotFoundError:
        raise ValueError(f"there is no archive {archive}") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        problems.append(f"the archive cannot be read beyond its first {len(seen)} predictions: {error}")
    progress.close()
    if len(competitions) > 1:
        problems.append(f"predictions are in {' and in '.join(sorted(competitions))}: an archive is for one of them")
    problems += [f"{image_id} is missing" for image_id in wanted if image_id not in seen]
    raise_problems(problems, f"the submission {archive}", "write it again with `cosa-fast submission`")
    log.info("the archive is as the server wants it: %d predictions in %s", len(seen), competitions.pop())


def list_images(root: Path, image_list: str, threads: int) -> tuple[Listed, ...]:
    """The images of a segmentation list, with their sizes.

    Raises:
        ValueError: there is no such list, it is empty or repeats an image, or images are missing or unreadable.
    """
    path = root / "ImageSets" / "Segmentation" / f"{image_list}.txt"
    if not path.is_file():  # ImageSets/Main/test.txt would be another test set
        raise ValueError(
            f"{path} does not exist: root must be the VOC2012 folder; the test images and their list are in "
            "VOC2012test.tar, which the evaluation server's site gives to registered users"
        )
    ids = read_split(root, image_list)
    paths = [root / "JPEGImages" / f"{image_id}.jpg" for image_id in ids]
    sizes = measure_images(paths, decode=False, threads=threads)
    raise_problems([size for size in sizes if isinstance(size, str)], f"the images of {path}", "restore the files")
    return tuple(
        Listed(image_id, file, height=size[1], width=size[0])
        for image_id, file, size in zip(ids, paths, sizes, strict=True)
        if not isinstance(size, str)
    )


def _forget_others(work: Path, fingerprint: dict[str, Any]) -> None:
    """Delete the predictions that another network or other settings left in `work`."""
    note = work / "fingerprint.json"
    if not note.exists() or json.loads(note.read_text()) != fingerprint:
        _forget(work)
    write_atomically(note, json.dumps(fingerprint).encode())


def _forget(work: Path) -> None:
    for file in work.glob("*.png"):
        file.unlink()


def _predict_all(predictor: Predictor, images: Sequence[Listed], work: Path) -> None:
    """Write `work`/<id>.png of every image that has none.

    A batch that is done in part is done again: batches are those of an uninterrupted run, and so is the rounding.
    """
    batches = chunks(images, predictor.batch_size)
    todo = [image for batch in batches if not all(_png(work, image).exists() for image in batch) for image in batch]
    if len(todo) < len(images):
        log.info("%d predictions are there from an interrupted run", len(images) - len(todo))
    done = len(images) - len(todo)
    with (
        closing(_label_maps(predictor, todo)) as maps,  # its processes end with it
        tqdm(initial=done, total=len(images), desc="predict", unit="image", disable=None) as progress,
    ):
        for image, labels in zip(todo, maps, strict=True):
            picture = PilImage.fromarray(labels)
            picture.putpalette(PALETTE)
            content = io.BytesIO()
            picture.save(content, "PNG", bits=8)
            write_atomically(_png(work, image), content.getvalue())
            progress.update()


def _label_maps(predictor: Predictor, images: Sequence[Listed]) -> Generator[Pixels, None, None]:
    """(height, width) uint8 of each image, in order."""
    crf, system, batches = predictor.config.crf, predictor.system, _batches(predictor, images)
    if crf == "none":
        yield from label_maps(system, (batch for batch, _ in batches), predictor.views)
        return
    with CrfPool(predictor.threads, CRF_PRESETS[crf]) as pool:
        yield from refined_label_maps(system, batches, predictor.views, pool)


def _batches(predictor: Predictor, images: Sequence[Listed]) -> Iterator[tuple[Batch, list[Named]]]:
    """Decoded by threads, ahead of the network."""

    def load(image: Listed) -> tuple[Picture, Tensor]:
        picture = read_image(str(image.path), (image.height, image.width))
        return picture, predictor.system.pixels(picture)

    loaded = prefetch(load, images, predictor.threads, ahead=2 * predictor.batch_size)
    for batch in chunks(zip(images, loaded, strict=True), predictor.batch_size):
        sizes = [(image.height, image.width) for image, _ in batch]
        named = [(image.id, picture) for image, (picture, _) in batch]
        yield predictor.system.prepare([pixels for _, (_, pixels) in batch], sizes), named


def _pack(path: Path, folder: PurePosixPath, images: Sequence[Listed], work: Path) -> None:
    """The archive; the same predictions give the same bytes."""
    with (
        open(path, "wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for image in sorted(images, key=lambda image: image.id):
            content = _png(work, image).read_bytes()
            member = tarfile.TarInfo(str(folder / f"{image.id}.png"))  # owner 0, time 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _check_png(name: str, content: bytes, image: Listed, classes: int) -> list[str]:
    """What is wrong with one prediction."""
    try:
        with PilImage.open(io.BytesIO(content), formats=("PNG",)) as picture:
            depth, colour = content[24], content[25]  # of the header: 3 is a palette
            if (depth, colour) != (8, 3):
                return [f"{name} is a PNG of mode {picture.mode} with {depth} bits: wanted a palette of 8 bits"]
            if picture.size != (image.width, image.height):
                return [f"{name} is {picture.width}x{picture.height}, but its image {image.width}x{image.height}"]
            highest = int(np.asarray(picture).max())
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error ...
        return [f"{name} cannot be read as PNG: {error}"]
    return [f"{name} holds the value {highest}: wanted 0 to {classes - 1}"] if highest >= classes else []


def _png(work: Path, image: Listed) -> Path:
    return work / f"{image.id}.png"
