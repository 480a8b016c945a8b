"""What every system makes of the images of a split: CoSA, CoSA-MS, the CAM pseudo-labels, and what a CRF refines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from cosa_fast.config import EvalConfig
from cosa_fast.crf import CrfItem
from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import Masks, read_mask
from cosa_fast.data.store import Pixels, PseudoLabels
from cosa_fast.figures import PanelRow
from cosa_fast.inference import (
    Prediction,
    cam_label_map,
    chunks,
    label_maps,
    mask_values,
    normalise,
    predict,
    prefetch,
    read_rgb,
    resize,
    square,
    to_tensor,
)
from cosa_fast.models.checkpoint import CosaCheckpoint
from cosa_fast.models.segmenter import SegmenterCheckpoint
from cosa_fast.predictors import CosaMs, Views
from cosa_fast.runtime import Runtime
from cosa_fast.transfer import to_device

FREE, FILTERED = "label-free", "label-filtered"
COSA, COSA_MS = "CoSA", "CoSA-MS"
CAM, AUX_CAM, ENSEMBLE = "CAM pseudo-labels", "auxiliary CAM pseudo-labels", "ensemble CAM pseudo-labels"
CRF = {COSA: "CoSA + CRF", COSA_MS: "CoSA-MS + CRF"}
"""The same systems after the dense CRF."""
ORDER = (COSA, CRF[COSA], COSA_MS, CRF[COSA_MS], CAM, AUX_CAM, ENSEMBLE)
"""Of the rows."""
TRUTH = "truth"
"""The column of panels and galleries."""


@dataclass(frozen=True, slots=True)
class Systems:
    """What is evaluated, and on what."""

    dataset: Index
    masks: Masks
    cosa: CosaCheckpoint
    segmenter: SegmenterCheckpoint | None
    store: PseudoLabels | None
    config: EvalConfig
    machine: Runtime
    threads: int
    fill: int | None = None
    """Fill batches up to this: CoSA's network is compiled, see `predict`."""

    @property
    def thresholds(self) -> dict[str, float]:
        """xi of the main CAMs' pseudo-labels, of the auxiliary ones', and of those of both CAMs' mean."""
        fixed = self.config.threshold
        main, aux = (self.cosa.threshold, self.cosa.aux_threshold) if fixed is None else (fixed, fixed)
        return {CAM: main, AUX_CAM: aux, ENSEMBLE: 0.5 * (main + aux)}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of an evaluation split, loaded."""

    image: Image
    square: Tensor
    """(3, S, S) uint8, CoSA's input."""
    pixels: Tensor
    """(3, H, W) uint8, CoSA-MS's input."""
    truth: Tensor
    """(H, W) uint8."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the networks make of one image."""

    sample: Sample
    kept: Tensor
    """(P + 1,) uint8: 0 and the mask values of the image-level labels."""
    maps: dict[tuple[str, str], Tensor]
    """(H, W) uint8 classes by system and setting."""
    cams: Tensor
    """(P, S, S) main CAMs of the labels; one that is 0 without labels."""
    prediction: Prediction
    slot: int
    """The image's place in `prediction`."""
    standalone: Tensor | None
    """(K, H, W) probabilities of CoSA-MS, added over its views."""

    def panel_row(self) -> PanelRow:
        """What the panel and the gallery show."""
        columns = {"CAM pseudo-label": self.maps[CAM, FILTERED], COSA: self.maps[COSA, FREE]}
        if (COSA_MS, FREE) in self.maps:
            columns[COSA_MS] = self.maps[COSA_MS, FREE]
        columns[TRUTH] = self.sample.truth
        return PanelRow(
            id=self.sample.image.id,
            labels=self.sample.image.labels,
            image=self.sample.pixels.permute(1, 2, 0).numpy(),
            cam=resize(self.cams, self.sample.size).amax(dim=0).cpu().numpy(),
            maps={title: values.cpu().numpy() for title, values in columns.items()},
        )

    def crf_items(self) -> Iterator[tuple[str, str, Tensor, CrfItem]]:
        """System, setting, the (k,) uint8 class of each channel, and what the CRF refines.

        CoSA's probabilities are the softmax of its logits' sum over the views, as its label maps are their maximum;
        with labels, of the channels that are present.
        """
        scores = {COSA: torch.cat([band for _, band in self.prediction.seg_bands(self.slot, self.sample.size)], dim=1)}
        if self.standalone is not None:
            scores[COSA_MS] = self.standalone.clamp(min=1e-30).log()
        picture = self.sample.pixels.permute(1, 2, 0).contiguous().numpy()
        for system, values in scores.items():
            everything = torch.arange(len(values), dtype=torch.uint8, device=values.device)
            for setting, channels in ((FREE, everything), (FILTERED, self.kept)):
                probabilities = values.index_select(0, channels.int()).softmax(dim=0).cpu().numpy()
                yield CRF[system], setting, channels.cpu(), CrfItem(self.sample.image.id, picture, probabilities)


def outcomes(systems: Systems, split: str, images: Sequence[Image]) -> Iterator[Outcome]:
    """Load images of a split and run the networks on them, in order.

    Raises:
        ValueError: an image or a mask is missing, damaged, or another one than when it was indexed.
    """
    dataset, config = systems.dataset, systems.config

    def load(image: Image) -> Sample:
        picture, truth = read_rgb(dataset, image), read_truth(systems, split, image)
        return Sample(image, square(picture, config.size), to_tensor(picture), torch.from_numpy(truth))

    samples = prefetch(load, images, systems.threads, ahead=2 * config.batch_size)
    for batch in chunks(samples, config.batch_size):
        yield from _predict(systems, batch)


def read_truth(systems: Systems, split: str, image: Image) -> Pixels:
    """(H, W) uint8 mask of an image.

    Raises:
        ValueError: it cannot be read, is of another size, or holds values that are no class (`cosa-fast data masks`
            looks for them too, but the file may have changed since).
    """
    path, classes = systems.masks.path(split, image.id), len(systems.dataset.classes)
    mask = read_mask(path, (image.width, image.height))
    if int((mask + np.uint8(1)).max()) > classes + 1:  # 255, which wraps to 0, is allowed
        unknown = np.setdiff1d(mask, [*range(classes + 1), IGNORED]).tolist()
        raise ValueError(
            f"{path} holds the value{'s' if len(unknown) > 1 else ''} {', '.join(map(str, unknown))}: classes are "
            f"1..{classes}, {IGNORED} is ignored; restore the file or run `cosa-fast data masks` again"
        )
    return mask


def _predict(systems: Systems, batch: Sequence[Sample]) -> Iterator[Outcome]:
    config, machine, cosa = systems.config, systems.machine, systems.cosa
    present = torch.from_numpy(systems.dataset.multi_hot(tuple(sample.image for sample in batch)))
    squares = normalise(torch.stack([sample.square for sample in batch]), cosa.mean, cosa.std, machine.device)
    present = to_device(present, machine.device)
    prediction = predict(cosa.net, squares, present, config.scales, config.flip, machine, systems.fill)
    for slot, (sample, standalone) in enumerate(zip(batch, _predict_standalone(systems, batch), strict=True)):
        kept = mask_values(sample.image, machine.device)
        main, aux = prediction.cams_of(slot, kept)
        cams = {CAM: main, AUX_CAM: aux, ENSEMBLE: 0.5 * (main + aux)}
        maps = {
            (system, FILTERED): cam_label_map(cams[system], threshold, sample.size, kept)
            for system, threshold in systems.thresholds.items()
        }
        bands = {COSA: prediction.seg_bands(slot, sample.size)}
        if standalone is not None:
            bands[COSA_MS] = iter([(slice(None), standalone)])
        for system, scores in bands.items():
            maps[system, FREE], maps[system, FILTERED] = label_maps(scores, sample.size, kept)
        yield Outcome(sample, kept, maps, main, prediction, slot, standalone)


def _predict_standalone(systems: Systems, batch: Sequence[Sample]) -> Iterator[Tensor | None]:
    """CoSA-MS's (K, H, W) probabilities of each image, added over the views; None without CoSA-MS."""
    if systems.segmenter is None:
        return repeat(None, len(batch))
    standalone = CosaMs(systems.segmenter, systems.machine)
    images = standalone.prepare([sample.pixels for sample in batch], [sample.size for sample in batch])
    return standalone.scores(images, Views(systems.config.scales, systems.config.flip))
