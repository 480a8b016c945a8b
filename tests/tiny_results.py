"""A dataset of coloured rectangles and an untrained CoSA checkpoint, for the tests of the stages after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PilImage

from cosa_fast.config import AugmentConfig, CosaConfig, ModelConfig, OptimConfig, TrainConfig
from cosa_fast.data.classes import voc_palette
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import prepare_masks
from cosa_fast.data.store import PseudoLabel, StoreInfo, write_store
from cosa_fast.models.checkpoint import save_safetensors
from cosa_fast.models.cosa import CosaNet

CLASSES = ("bird", "cat", "cow")
COLOURS = ((220, 40, 40), (40, 200, 60), (60, 80, 230))
SIZES = ((40, 56), (64, 48), (48, 48), (33, 71), (56, 40))
"""Height and width, image by image in turn."""
MODEL = ModelConfig(name="mini_vit", pretrained=False, aux_block=0, aux_norm=True, decoder_dim=8, decoder_dilation=2)
AUGMENT = AugmentConfig(crop=48)


def write_dataset(root: Path, train: int = 6, val: int = 3, *, train_masks: bool = True) -> Path:
    """One or two coloured rectangles on grey noise per image, exact masks with a void border; the index's path."""
    splits = {"train": _images(root, "train", train), "val": _images(root, "val", val)}
    if not train_masks:
        for image in splits["train"]:
            (root / "SegmentationClass" / f"{image.id}.png").unlink()
    index = Index("Rectangles", "voc", True, str(root), CLASSES, "train", ("val",), splits)
    index.save(root / "index.json")
    return root / "index.json"


def write_masks(index: Path) -> Path:
    """The list of masks of an index."""
    prepare_masks(index, index.with_name("masks.json"), index.with_name("cache"), threads=1)
    return index.with_name("masks.json")


def write_checkpoint(path: Path, classes: tuple[str, ...] = CLASSES, threshold: float = 0.45) -> Path:
    """What the train stage writes, with random weights that differ between the two networks."""
    tensors = {}
    for seed, network in enumerate(("online", "assignment")):
        torch.manual_seed(seed)
        net = CosaNet(MODEL, len(classes), AUGMENT.crop, pretrained=False)
        tensors |= {f"{network}.{name}": tensor for name, tensor in net.state_dict().items()}
    sections = {
        "augment": AUGMENT, "model": MODEL, "cosa": CosaConfig(csc=False), "optim": OptimConfig(),
        "train": TrainConfig(),
    }  # fmt: skip
    metadata = {
        "kind": "cosa",
        "classes": classes,
        "dataset": "Rectangles",
        "threshold": threshold,
        "iteration": 7,
        "config": {name: section.model_dump(mode="json") for name, section in sections.items()},
    }
    save_safetensors(path, tensors, metadata)
    return path


def write_true_store(index: Path, path: Path, confidence: int = 255) -> Path:
    """A store whose labels are the masks, so that what is learnt from it can be checked."""
    dataset = Index.load(index)
    info = StoreInfo(
        dataset=dataset.name,
        synthetic=True,
        split="train",
        classes=dataset.classes,
        ids=tuple(image.id for image in dataset.train),
        threshold=0.5,
        checkpoint_sha256="0" * 64,
        iteration=0,
        config={},
        versions={},
    )
    masks = [read_values(Path(dataset.root) / "SegmentationClass" / f"{image.id}.png") for image in dataset.train]
    rows = [PseudoLabel(mask, np.full_like(mask, confidence), mask) for mask in masks]
    write_store(path, info, [mask.shape for mask in masks], rows, shard=4)
    return path


def read_values(path: Path) -> np.ndarray:
    """(H, W) uint8 values of a palette image."""
    with PilImage.open(path) as image:
        return np.array(image)


def _images(root: Path, split: str, count: int) -> tuple[Image, ...]:
    for folder in ("JPEGImages", "SegmentationClass"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    return tuple(_image(root, f"{split}_{number}", number) for number in range(count))


def _image(root: Path, name: str, number: int) -> Image:
    rng = np.random.default_rng([number, len(name)])
    height, width = SIZES[number % len(SIZES)]
    pixels = rng.integers(100, 150, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    labels = {number % 3, (number + number // 3) % 3}
    for place, label in enumerate(sorted(labels)):
        y, x = height // 6, width // 8 + place * width // 2
        area = np.s_[y : y + 2 * height // 3, x : x + width // 3]
        pixels[area] = np.array(COLOURS[label]) + rng.integers(-20, 20, pixels[area].shape)
        mask[area] = 255
        mask[y + 1 : y + 2 * height // 3 - 1, x + 1 : x + width // 3 - 1] = label + 1
    PilImage.fromarray(pixels).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
    palette = PilImage.fromarray(mask)
    palette.putpalette(voc_palette())
    palette.save(root / "SegmentationClass" / f"{name}.png")
    return Image(name, f"JPEGImages/{name}.jpg", width, height, tuple(sorted(labels)))
