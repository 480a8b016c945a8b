"""Masks for the oracle experiment (Fig. 1), where the truth guides the CAMs; nothing else in training opens a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from cosa_fast.config import AugmentConfig, TrainConfig
from cosa_fast.data.augment import apply_geometry, draw_geometry
from cosa_fast.data.index import Index
from cosa_fast.data.masks import load_masks, read_mask
from cosa_fast.training.guidance import MaskReader


def oracle_masks(masks: Path | None, index: Index, augment: AugmentConfig, train: TrainConfig) -> MaskReader:
    """A reader of training masks in the geometry of each batch's crops.

    Raises:
        ValueError: there is no mask file for the training split, or an image has none.
    """
    if masks is None:
        raise ValueError("cosa.guidance = 'gt' is the oracle experiment and needs the training masks: give --masks")
    known = load_masks(masks)
    paths = [known.path(index.train_split, image.id) for image in index.train]
    sizes = np.array([(image.height, image.width) for image in index.train], dtype=np.int64)

    def read(positions: Tensor, iteration: int, first: int) -> Tensor:
        """(B, S, S) uint8 masks; 255 outside the image and where the truth is undecided."""
        chosen = positions.cpu().numpy()
        geometry = draw_geometry(
            sizes[chosen],
            crop=augment.crop,
            scale=augment.scale,
            flip=augment.flip,
            seed=train.seed,
            iteration=iteration,
            first=first,
        )
        crops = [
            apply_geometry(
                read_mask(paths[position], (index.train[position].width, index.train[position].height)),
                geometry,
                slot,
                PILImage.Resampling.NEAREST,
                fill=255,
            )
            for slot, position in enumerate(chosen)
        ]
        return torch.from_numpy(np.stack(crops))

    return read
