"""The portable loading backend: PIL in torch's loader processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cosa_fast.config import LoaderConfig
from cosa_fast.data.augment import Plan, apply_geometry
from cosa_fast.data.photometric import blur, strengthen


def views(plan: Plan, config: LoaderConfig, start: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Weak and strong views, each (B, 3, S, S) float32, normalised, of batch `start`, `start + 1`, ... for ever.

    The loader processes deliver 8-bit pixels, a quarter of the bytes, and `device` normalises them.

    Raises:
        ValueError: a file cannot be decoded or has another size than when it was indexed.
    """
    loader = DataLoader(
        _Batches(plan),
        sampler=itertools.count(start),
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else starting the loader advances the global one, which a resumed run restored
    )
    mean = 255 * torch.tensor(plan.config.mean, device=device).view(3, 1, 1)
    std = 255 * torch.tensor(plan.config.std, device=device).view(3, 1, 1)
    for batch in loader:
        if isinstance(batch, ValueError):
            raise batch
        weak, strong = (
            pixels.to(device, non_blocking=True)
            .permute(0, 3, 1, 2)
            .to(torch.float32, memory_format=torch.contiguous_format)
            .sub_(mean)
            .div_(std)
            for pixels in batch
        )
        yield weak, strong


def read_image(path: str, size: tuple[int, int]) -> Image.Image:
    """Decode an image file as RGB, in the orientation it is stored in.

    Raises:
        ValueError: it cannot be decoded, or its (height, width) is not `size`.
    """
    try:
        with Image.open(path) as image:
            found = (image.height, image.width)
            if found == size:
                return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # PIL reports some damaged files as SyntaxError
        raise ValueError(f"cannot decode {path} ({error}): restore the file, then run again to resume") from None
    raise ValueError(
        f"{path} has height and width {found} but {size} in the index: make it again with `cosa-fast data index`"
    )


@dataclass(frozen=True)
class _Batches(Dataset[tuple[NDArray[np.uint8], NDArray[np.uint8]] | ValueError]):
    """Batch t as 8-bit (B, S, S, 3) weak and strong views.

    An unreadable file is handed over as a value, because torch wraps what a worker raises in that worker's traceback.
    """

    plan: Plan

    def __getitem__(self, iteration: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | ValueError:
        draws = self.plan.draws(iteration)
        weak, strong = [], []
        for slot, position in enumerate(draws.positions):
            height, width = self.plan.sizes[position]
            try:
                image = read_image(self.plan.paths[position], (int(height), int(width)))
            except ValueError as error:
                return error
            view = blur(Image.fromarray(apply_geometry(image, draws.geometry, slot)), float(draws.blur[slot]))
            weak.append(np.asarray(view))
            strong.append(np.asarray(strengthen(view, int(draws.operation[slot]), int(draws.magnitude[slot]))))
        return np.stack(weak), np.stack(strong)
