"""Trained networks on whole images: CAMs and segmentation over scales and mirror images (release; fidelity 1.6)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from cosa_kernels import cam_pseudo_labels, merge_cams
from torch import Tensor, nn

from cosa_fast.bands import BAND_BYTES, bands
from cosa_fast.config import RuntimeConfig
from cosa_fast.data.index import Image, Index
from cosa_fast.data.torch_loader import read_image
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.multi_scale import MultiScale, multi_scale
from cosa_fast.models.segmenter import Segmenter
from cosa_fast.models.vit import ConvStem
from cosa_fast.runtime import Runtime
from cosa_fast.transfer import to_device

Item = TypeVar("Item")
Result = TypeVar("Result")
Bands = Iterable[tuple[slice, Tensor]]
"""The (K, H, W) scores of an image from top to bottom: some rows, and the (K, h, W) scores in them."""


COMPILED_FROM = 10_000
"""Images. Compiling takes some 10 s for each of five scales; it saves an estimated 4 ms an image on an H200."""


@dataclass(frozen=True)
class Prediction:
    """What CoSA's network says of a batch of square images; larger maps are made when they are asked for."""

    views: MultiScale
    """float32, at the resolution of the tokens."""
    class_labels: Tensor
    """(B, C), 1 for classes in the image-level labels."""
    side: tuple[int, int]
    """Height and width of the square images, S and S."""

    @cached_property
    def cams(self) -> Tensor:
        """(B, C, S, S) float32 merged CAMs in [0, 1]; zero for classes that are not in the image-level labels."""
        views = self.views
        return merge_cams(views.cams, views.mirrored_cams, class_labels=self.class_labels, size=self.side)

    @cached_property
    def aux_cams(self) -> Tensor:
        """(B, C, S, S) the same of the auxiliary CAMs."""
        views = self.views
        return merge_cams(views.aux_cams, views.mirrored_aux_cams, class_labels=self.class_labels, size=self.side)

    @cached_property
    def seg(self) -> Tensor:
        """(B, C + 1, S, S) float32 segmentation logits added over scales and mirror images; channel 0 is background."""
        return self.views.summed_seg(self.side)

    @cached_property
    def logits(self) -> Tensor:
        """(B, C) class logits, the mean of the views'."""
        return torch.stack(self.views.logits).mean(dim=0)

    def cams_of(self, slot: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        """`cams` and `aux_cams` of one image and some of its classes, without the memory that all classes take.

        Args:
            slot: the image's place in the batch.
            kept: (P + 1,) uint8: 0 and the mask values of the classes, see `mask_values`.

        Returns:
            Main and auxiliary (P, S, S) float32; one map that is 0 for P = 0.
        """
        if len(kept) == 1:
            nothing = torch.zeros(1, *self.side, device=kept.device)
            return nothing, nothing
        classes = kept[1:].int() - 1
        labels = self.class_labels[slot].index_select(0, classes)[None]

        def merged(views: Sequence[Tensor], mirrored: Sequence[Tensor]) -> Tensor:
            chosen, others = ([view[slot].index_select(0, classes)[None] for view in of] for of in (views, mirrored))
            return merge_cams(chosen, others, class_labels=labels, size=self.side)[0]

        views = self.views
        return merged(views.cams, views.mirrored_cams), merged(views.aux_cams, views.mirrored_aux_cams)

    @cached_property
    def summed_views(self) -> list[Tensor]:
        """Per scale, (B, C + 1, h, w) segmentation logits, those of the mirror image added."""
        scales = len(self.views.cams)
        return [torch.stack(self.views.seg[k::scales]).sum(dim=0) for k in range(scales)]

    def seg_bands(self, slot: int, size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
        """Bands of `resize(seg[slot], size)`, up to rounding, never more than one of them in memory."""
        for rows, scores in bands([view[slot : slot + 1] for view in self.summed_views], self.side, [size]):
            yield rows, scores[0].transpose(0, 1)

    def label_maps(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """(H, W) uint8 label-free label map of each image at its own size; on a GPU of many images at once.

        There, images of all sizes share one set of launches, padded to the largest of them, and nothing waits.
        """
        views = self.summed_views
        device = views[0].device
        largest = max(height for height, _ in sizes) * max(width for _, width in sizes)
        fitting = BAND_BYTES[device.type] // (4 * views[0].shape[1] * largest)
        group = max(1, fitting) if device.type == "cuda" else 1  # on a CPU one image is more than its cache holds
        maps: list[Tensor] = []
        for start in range(0, len(sizes), group):
            chosen = sizes[start : start + group]
            shape = (len(chosen), max(height for height, _ in chosen), max(width for _, width in chosen))
            labels = torch.empty(shape, dtype=torch.uint8, device=device)
            for rows, scores in bands([view[start : start + len(chosen)] for view in views], self.side, chosen):
                labels[:, rows] = scores.max(dim=2).indices
            maps += [image[:height, :width] for image, (height, width) in zip(labels, chosen, strict=True)]
        return maps


def worth_compiling(config: RuntimeConfig, runtime: Runtime, images: int) -> bool:
    """Whether so many images pay for what `for_inference` compiles; `runtime.compile: on` insists."""
    return config.compile == "on" or (runtime.compiles and images >= COMPILED_FROM)


def for_inference(net: CosaNet | Segmenter, runtime: Runtime, compiled: bool = False) -> None:
    """Make a network that is not trained any more fast; its predictions stay the same up to rounding.

    With bf16 the weights that autocast would convert in every pass are converted once (bit for bit the same results).
    A convolutional network's weights lie as tensor cores and AMX read them, which in fp32 on a CPU gains nothing.

    Args:
        compiled: torch.compile the blocks of CoSA's encoder, once for each scale: 12 blocks share one compilation. Not
            for CoSA-MS, whose images come at their own sizes.
    """
    if runtime.bf16:
        # A stem that folds its batch norms into its weights does that in fp32.
        folded = [module for stem in net.modules() if isinstance(stem, ConvStem) for module in stem.modules()]
        for module in net.modules():
            # Not what is derived from them and does more with its weights.
            if type(module) in (nn.Linear, nn.Conv2d) and module not in folded:
                module.to(torch.bfloat16)
    if isinstance(net, Segmenter):
        if runtime.bf16 or runtime.device.type == "cuda":
            net.to(memory_format=torch.channels_last)
    elif compiled:
        for block in net.encoder.vit.blocks:
            block.compile(dynamic=False)


@torch.inference_mode()
def predict(
    net: CosaNet,
    images: Tensor,
    class_labels: Tensor,
    scales: Sequence[float],
    flip: bool,
    runtime: Runtime,
    batch: int | None = None,
) -> Prediction:
    """Run CoSA's network on (B, 3, S, S) normalised images with their (B, C) image-level labels.

    The labels only mask and normalise the CAMs; the segmentation logits know nothing of them.

    Args:
        batch: fill the images up to so many with empty ones, for a compiled network: each number is compiled anew.
    """
    count = len(images)
    if batch is not None and count < batch:
        images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, batch - count))
    with runtime.autocast():
        views = multi_scale(net, images, scales, flip)
    views = MultiScale(*(tuple(view[:count].float() for view in getattr(views, name)) for name in MultiScale.__slots__))
    return Prediction(views, class_labels, (images.shape[-2], images.shape[-1]))


@torch.inference_mode()
def predict_segmenter(net: Segmenter, images: Tensor, scales: Sequence[float], flip: bool, runtime: Runtime) -> Tensor:
    """(B, K, H, W) float32 class probabilities of CoSA-MS, added over scales and mirror images, at the images' size."""
    size = (images.shape[-2], images.shape[-1])
    total: Tensor | None = None
    for scale in scales:
        scaled = images
        if scale != 1.0:
            scaled_size = [max(1, round(side * scale)) for side in size]
            scaled = F.interpolate(images, size=scaled_size, mode="bilinear", align_corners=False)
        with runtime.autocast():
            logits = net(torch.cat([scaled, scaled.flip(-1)]) if flip else scaled)
        if total is None:
            total = torch.zeros((len(images), logits.shape[1], *size), device=images.device)
        _add_probabilities(total, logits)
        del logits
    assert total is not None, "no scales"
    return total


def _add_probabilities(total: Tensor, logits: Tensor) -> None:
    """Add one scale's views, mirrored ones last, image by image: each needs several times the memory of its result."""
    for position, view in enumerate(logits):
        straight = view.float() if position < len(total) else view.float().flip(-1)
        total[position % len(total)] += resize(straight, (total.shape[-2], total.shape[-1])).softmax(dim=0)


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


def mask_values(image: Image, device: torch.device) -> Tensor:
    """(P + 1,) uint8 on `device`: 0 for the background, and c + 1 for each class in the image-level labels."""
    return to_device(torch.tensor([0, *(label + 1 for label in image.labels)], dtype=torch.uint8), device)


def cam_label_map(cams: Tensor, threshold: float, size: tuple[int, int], kept: Tensor) -> Tensor:
    """(H, W) uint8 CAM pseudo-label (Eq. 3) of an image from the (P, S, S) CAMs of the classes in `kept`."""
    labels, _ = cam_pseudo_labels(cams[None], threshold, size=size)
    return kept[labels[0].int()]


def label_maps(bands: Bands, size: tuple[int, int], kept: Tensor) -> tuple[Tensor, Tensor]:
    """`label_map` of an image without and with its labels, from scores that need not be in memory at once.

    Args:
        bands: the (K, H, W) scores.
        size: (H, W).
        kept: (P + 1,) uint8 channels that may be chosen with labels, see `mask_values`.

    Returns:
        Two (H, W) uint8: the best of all channels, and of those in `kept`.
    """
    free, filtered = (torch.empty(size, dtype=torch.uint8, device=kept.device) for _ in range(2))
    channels = kept.int()
    for rows, scores in bands:
        free[rows] = scores.max(dim=0).indices
        filtered[rows] = kept[scores.index_select(0, channels).max(dim=0).indices]
    return free, filtered


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
    values = to_device(images, device).float().div_(255)
    for channel, centre, spread in zip(values.unbind(dim=1), mean, std, strict=True):
        channel.sub_(centre).div_(spread)  # numbers of Python's: a tensor of them would be copied to the device too
    return values


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The same items, each taken from `items` `count` items early: a GPU works while the host uses what is there.

    An error of `items` comes after what was taken before it.
    """
    taken: deque[Item] = deque()
    failure: Exception | None = None
    source = iter(items)
    while failure is None:
        try:
            taken.append(next(source))
        except Exception as error:
            failure = error
        else:
            if len(taken) > count:
                yield taken.popleft()
    yield from taken
    if not isinstance(failure, StopIteration):
        raise failure


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
