"""CoSA and CoSA-MS from pictures to label-free label maps: what `speed`, `submission` and the benchmarks run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosa_fast.bands import Size
from cosa_fast.crf import CrfItem, CrfPool
from cosa_fast.inference import Prediction, ahead, normalise, predict, predict_segmenter, square, to_tensor
from cosa_fast.models.checkpoint import CosaCheckpoint
from cosa_fast.models.segmenter import SegmenterCheckpoint
from cosa_fast.runtime import Runtime
from cosa_fast.transfer import to_host

STANDALONE_BYTES = 2**28
"""Of the probabilities that CoSA-MS computes at a time; its own temporaries are several times as large."""

Picture = PIL.Image.Image
Named = tuple[str, Picture]
"""With what errors call it."""
Labels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Views:
    """Test-time augmentation."""

    scales: tuple[float, ...]
    flip: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures as a network takes them, on its device."""

    groups: tuple[tuple[tuple[int, ...], Tensor], ...]
    """Places in the batch, and the (n, 3, ...) float32 normalised images there: those that go through together."""
    sizes: tuple[Size, ...]
    """Of the pictures."""


class System(Protocol):
    """A network with its preprocessing."""

    def pixels(self, picture: Picture) -> Tensor:
        """(3, ...) uint8 of one picture; threads may do this."""

    def prepare(self, pixels: Sequence[Tensor], sizes: Sequence[Size]) -> Batch:
        """Normalise on the device; `sizes` are the pictures'."""

    def scores(self, batch: Batch, views: Views) -> Iterator[Tensor]:
        """(K, H, W) of each picture, on the device; the largest is the label."""

    def label_maps(self, batch: Batch, views: Views) -> list[Tensor]:
        """(H, W) uint8 of each picture, on the device; nothing waits for it."""

    def probabilities(self, scores: Tensor) -> Tensor:
        """(K, H, W) in [0, 1] for the CRF, as the evaluation has them."""


@dataclass(frozen=True, slots=True)
class Cosa:
    """CoSA: logits added over the views of a square image."""

    network: CosaCheckpoint
    size: int
    machine: Runtime
    batch: int | None = None
    """Fill batches up to this, see `predict`."""

    def pixels(self, picture: Picture) -> Tensor:
        """(3, S, S)."""
        return square(picture, self.size)

    def prepare(self, pixels: Sequence[Tensor], sizes: Sequence[Size]) -> Batch:
        """One group."""
        images = normalise(torch.stack(list(pixels)), self.network.mean, self.network.std, self.machine.device)
        return Batch(((tuple(range(len(sizes))), images),), tuple(sizes))

    def scores(self, batch: Batch, views: Views) -> Iterator[Tensor]:
        """Logits at each picture's own size."""
        prediction = self._predict(batch, views)
        for slot, size in enumerate(batch.sizes):
            yield torch.cat([band for _, band in prediction.seg_bands(slot, size)], dim=1)

    def label_maps(self, batch: Batch, views: Views) -> list[Tensor]:
        """Without the scores of a whole picture in memory."""
        return self._predict(batch, views).label_maps(batch.sizes)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax."""
        return scores.softmax(dim=0)

    def _predict(self, batch: Batch, views: Views) -> Prediction:
        ((slots, images),) = batch.groups
        unused = images.new_ones(len(slots), len(self.network.classes))  # only the CAMs look at labels
        return predict(self.network.net, images, unused, views.scales, views.flip, self.machine, self.batch)


@dataclass(frozen=True, slots=True)
class CosaMs:
    """CoSA-MS: probabilities added over the views of each image at its own size."""

    network: SegmenterCheckpoint
    machine: Runtime

    def pixels(self, picture: Picture) -> Tensor:
        """(3, H, W)."""
        return to_tensor(picture)

    def prepare(self, pixels: Sequence[Tensor], sizes: Sequence[Size]) -> Batch:
        """Pictures of one size together, as many as fit in `STANDALONE_BYTES`."""
        net = self.network
        groups: list[tuple[tuple[int, ...], Tensor]] = []
        for size in dict.fromkeys(sizes):
            alike = [slot for slot, other in enumerate(sizes) if other == size]
            fitting = max(1, STANDALONE_BYTES // (4 * (len(net.classes) + 1) * size[0] * size[1]))
            for start in range(0, len(alike), fitting):
                slots = alike[start : start + fitting]
                images = torch.stack([pixels[slot] for slot in slots])
                groups.append((tuple(slots), normalise(images, net.mean, net.std, self.machine.device)))
        groups.sort(key=lambda group: group[0][0])  # few results wait for those of other sizes before them
        return Batch(tuple(groups), tuple(sizes))

    def scores(self, batch: Batch, views: Views) -> Iterator[Tensor]:
        """Sums of probabilities."""
        waiting = dict[int, Tensor]()
        groups = iter(batch.groups)
        for slot in range(len(batch.sizes)):
            while slot not in waiting:
                slots, images = next(groups)
                waiting |= zip(slots, self._predict(images, views), strict=True)
            yield waiting.pop(slot)

    def label_maps(self, batch: Batch, views: Views) -> list[Tensor]:
        """Of a group at a time."""
        maps: dict[int, Tensor] = {}
        for slots, images in batch.groups:
            maps |= zip(slots, self._predict(images, views).max(dim=1).indices.to(torch.uint8), strict=True)
        return [maps[slot] for slot in range(len(batch.sizes))]

    def probabilities(self, scores: Tensor) -> Tensor:
        """Their share of the sum."""
        return scores / scores.sum(dim=0)

    def _predict(self, images: Tensor, views: Views) -> Tensor:
        return predict_segmenter(self.network.net, images, views.scales, views.flip, self.machine)


def prepared(system: System, pictures: Sequence[Named]) -> tuple[Batch, Sequence[Named]]:
    """Decoded pictures as a batch, and the same pictures."""
    sizes = [(picture.height, picture.width) for _, picture in pictures]
    return system.prepare([system.pixels(picture) for _, picture in pictures], sizes), pictures


def label_maps(system: System, batches: Iterable[Batch], views: Views) -> Iterator[Labels]:
    """(H, W) uint8 of each picture, in order; a GPU is at the next batch when the host gets the maps of one."""
    arriving = ([to_host(maps) for maps in system.label_maps(batch, views)] for batch in batches)
    for maps in ahead(arriving, 1):
        for arrived in maps:
            yield arrived().numpy()


def refined_label_maps(
    system: System, batches: Iterable[tuple[Batch, Sequence[Named]]], views: Views, pool: CrfPool
) -> Iterator[Labels]:
    """The same after a dense CRF, whose processes work beside the network."""

    def items() -> Iterator[CrfItem]:
        for batch, pictures in batches:
            for (name, picture), scores in zip(pictures, system.scores(batch, views), strict=True):
                yield CrfItem(name, np.array(picture), system.probabilities(scores).cpu().numpy())

    return pool.map(items())
