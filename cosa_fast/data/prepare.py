"""The data stage: choose the dataset, list it, verify every image, write the index."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cosa_fast.config import CocoConfig, DataConfig, MiniVocConfig, VocConfig
from cosa_fast.data.coco import list_coco
from cosa_fast.data.download import download_coco, download_voc
from cosa_fast.data.index import Image, Index
from cosa_fast.data.verify import Listing, measure_images, raise_problems
from cosa_fast.data.voc import list_voc

logger = logging.getLogger(__name__)


def prepare_index(
    output: Path,
    cache: Path,
    *,
    data: DataConfig,
    voc: VocConfig,
    coco: CocoConfig,
    minivoc: MiniVocConfig,
    threads: int = 2,
) -> Index:
    """Index the configured dataset and write the index to `output`; what is generated or downloaded goes to `cache`.

    With `data.dataset` voc and neither `voc.root` nor `voc.download`, MiniVOC is generated; it has its own splits,
    train for training and val and test for evaluation.

    Raises:
        ValueError: the dataset is missing or incomplete, or anything is wrong with any of its files (all are checked
            before the error is raised).
    """
    if data.dataset == "coco":
        train_split, eval_splits = coco.train_split, coco.eval_splits
        listing = _list_coco(cache, coco, _used(train_split, eval_splits))
    elif voc.root is None and not voc.download:
        train_split, eval_splits = "train", ("val", "test") if voc.eval_splits else ()
        listing = list_voc(_generate_minivoc(cache, minivoc, threads), _used(train_split, eval_splits))
    else:
        train_split, eval_splits = voc.train_split, voc.eval_splits
        root = voc.root or cache / "VOC2012"
        if voc.download:
            download_voc(root, train_aug="train_aug" in _used(train_split, eval_splits))
        listing = list_voc(root, _used(train_split, eval_splits))
    splits = _verify(listing, decode=data.verify == "decode", threads=threads)
    index = Index(
        name=listing.name,
        format=listing.format,
        synthetic=listing.synthetic,
        root=str(listing.root),
        classes=listing.classes,
        train_split=train_split,
        eval_splits=tuple(dict.fromkeys(eval_splits)),
        splits=splits,
    )
    _warn_of_overlap(index)
    index.save(output)
    counts = ", ".join(f"{split} {len(images)}" for split, images in splits.items())
    logger.info("%s: %d classes; images: %s", index.name, len(index.classes), counts)
    return index


def _used(train_split: str, eval_splits: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((train_split, *eval_splits)))


def _list_coco(cache: Path, coco: CocoConfig, splits: Sequence[str]) -> Listing:
    if coco.root is None and not coco.download:
        raise ValueError(
            "data.dataset = coco needs coco.root, the folder with annotations/ and "
            f"train{coco.year}/, or coco.download: true"
        )
    root = coco.root or cache / "coco"
    if coco.download:
        download_coco(root, coco.year, splits)
    return list_coco(root, coco.year, splits)


def _generate_minivoc(cache: Path, minivoc: MiniVocConfig, threads: int) -> Path:
    from cosa_fast.data.minivoc import generate

    counts = f"{minivoc.train}-{minivoc.val}-{minivoc.test}"
    root = cache / f"minivoc-{minivoc.size}-{minivoc.seed}-{counts}"
    logger.info("no voc.root: using the synthetic MiniVOC in %s", root)
    generate(root, **minivoc.model_dump(), workers=threads, progress=True)
    return root


def _verify(listing: Listing, *, decode: bool, threads: int) -> dict[str, tuple[Image, ...]]:
    """Open every image and give it its true size."""
    paths = list(dict.fromkeys(image.path for images in listing.splits.values() for image in images))
    measured = measure_images([listing.root / path for path in paths], decode=decode, threads=threads)
    sizes = dict(zip(paths, measured, strict=True))
    problems = [*listing.problems, *(problem for problem in measured if isinstance(problem, str))]
    differing = []
    splits: dict[str, list[Image]] = {split: [] for split in listing.splits}
    for split, images in listing.splits.items():
        for image in images:
            size = sizes[image.path]
            if isinstance(size, str):
                continue
            if image.declared_size not in (None, size):
                differing.append(f"{listing.root / image.path} is {size}, its annotation says {image.declared_size}")
            splits[split].append(Image(image.id, image.path, *size, image.labels))
    if listing.format == "coco":  # polygons are in pixels of the declared size, so they would not fit the image
        problems.extend(dict.fromkeys(differing))
    elif differing:
        logger.warning(
            "the (width, height) in the XML of %d images is wrong and ignored; the first: %s",
            len(differing),
            differing[0],
        )
    raise_problems(problems, str(listing.root), "mend or replace these files, or take the images out of the split")
    return {split: tuple(images) for split, images in splits.items()}


def _warn_of_overlap(index: Index) -> None:
    trained = {image.path for image in index.train}
    for split in index.eval_splits:
        shared = sum(image.path in trained for image in index.splits[split])
        if shared and split != index.train_split:
            logger.warning("%d images of the evaluation split %s are also trained on", shared, split)
