"""Trained networks on whole images: CAMs and segmentation over scales and mirror images (release; fidelity 1.6)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from cosa_kernels import merge_cams
from torch import Tensor

from cosa_fast.data.index import Image, Index
from cosa_fast.data.torch_loader import read_image
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.multi_scale import MultiScale, multi_scale
from cosa_fast.models.segmenter import Segmenter
from cosa_fast.runtime import Runtime

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What CoSA's network says of a batch of square images of side S."""

    cams: Tensor
    """(B, C, S, S) float32 merged CAMs in [0, 1]; zero for classes that are not in the image-level labels."""
    aux_cams: Tensor
    """(B, C, S, S) the same of the auxiliary CAMs."""
    seg: Tensor
    """(B, C + 1, S, S) float32 segmentation logits added over scales and mirror images; channel 0 is background."""
    logits: Tensor
    """(B, C) class logits, the mean of the views'."""


@torch.inference_mode()
def predict(
    net: CosaNet, images: Tensor, class_labels: Tensor, scales: Sequence[float], flip: bool, runtime: Runtime
) -> Prediction:
    """Run CoSA's network on (B, 3, S, S) normalised images with their (B, C) image-level labels.

    The labels only mask and normalise the CAMs; the segmentation logits know nothing of them.
    """
    size = (images.shape[-2], images.shape[-1])
    with runtime.autocast():
        views = multi_scale(net, images, scales, flip)
    views = MultiScale(*(tuple(view.float() for view in getattr(views, name)) for name in MultiScale.__slots__))
    return Prediction(
        cams=merge_cams(views.cams, views.mirrored_cams, class_labels=class_labels, size=size),
        aux_cams=merge_cams(views.aux_cams, views.mirrored_aux_cams, class_labels=class_labels, size=size),
        seg=views.summed_seg(size),
        logits=torch.stack(views.logits).mean(dim=0),
    )


@torch.inference_mode()
def predict_segmenter(net: Segmenter, images: Tensor, scales: Sequence[float], flip: bool, runtime: Runtime) -> Tensor:
    """(B, K, H, W) float32 class probabilities of CoSA-MS, added over scales and mirror images, at the images' size."""
    size = images.shape[-2:]
    total = torch.zeros((), device=images.device)
    for scale in scales:
        scaled = images
        if scale != 1.0:
            scaled_size = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, size=scaled_size, mode="bilinear", align_corners=False)
        with runtime.autocast():
            logits = net(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled).float()
        for view in [logits[: len(images)], logits[len(images) :].flip(-1)] if flip else [logits]:
            total = total + F.interpolate(view, size=size, mode="bilinear", align_corners=False).softmax(dim=1)
    return total


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) scores, not labels, to (C, *size), bilinear."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def label_map(scores: Tensor, present: Tensor | None = None) -> Tensor:
    """The best class of each pixel.

    Args:
        scores: (C + 1, H, W) logits or probabilities, channel 0 the background.
        present: (C,) 1 for the classes in the image-level labels: only they and the background may be chosen, which
            is what the paper's 76.2 measures. None: the prediction is free of labels.

    Returns:
        (H, W) uint8.
    """
    if present is not None:
        absent = F.pad(present == 0, (1, 0), value=False)
        scores = scores.masked_fill(absent[:, None, None], float("-inf"))
    # Not argmax, which is three to five times slower on a CPU.
    return scores.max(dim=0).indices.to(torch.uint8)


def read_rgb(dataset: Index, image: Image) -> PIL.Image.Image:
    """Decode an image of an index to RGB.

    Raises:
        ValueError: the file is missing, damaged, or of another size than when it was indexed.
    """
    return read_image(str(dataset.image_path(image)), (image.height, image.width))


def to_tensor(image: PIL.Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def square(image: PIL.Image.Image, size: int) -> Tensor:
    """(3, size, size) uint8, resized bilinearly without keeping the aspect ratio, as the release evaluates."""
    return to_tensor(image.resize((size, size), PIL.Image.Resampling.BILINEAR))


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """(B, 3, H, W) uint8 to float32 on `device` with the given channel means and deviations (in [0, 1])."""
    centre, spread = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (mean, std))
    return (images.to(device, non_blocking=True).float() / 255 - centre) / spread


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """`map(function, items)` in order, computed by `threads` threads at most `ahead` items early.

    Threads rather than processes: decoding and resizing leave Python's lock, and an error stays the error it is.
    """
    pool = ThreadPoolExecutor(threads)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def chunks(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """Lists of `count` consecutive items, the last one shorter."""
    source = iter(items)
    while chunk := list(islice(source, count)):
        yield chunk
