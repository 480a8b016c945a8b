"""Quality during training: what both networks make of images with masks. Measured only; no weight depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cosa_kernels import cam_pseudo_labels
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from cosa_fast.config import AugmentConfig, CosaConfig, ValidationConfig
from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import load_masks, read_mask
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
    to_device,
)
from cosa_fast.metrics import confusion_matrix, iou_per_class
from cosa_fast.models.cosa import CosaNet
from cosa_fast.runtime import Runtime

BINS = 256
UNSURE = 10.0
"""Perplexity is infinite at the threshold; means count it as this, what Eq. 4 gives 6e-5 from it."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """xi of the main and of the auxiliary CAMs at a moment of the training."""

    main: float
    aux: float


class Validator:
    """Measures networks on (some images of) the first evaluation split.

    Args:
        index: the dataset index that holds the split.
        masks: its list of masks.
        classes: of the training.

    Raises:
        ValueError: the index has other classes or no evaluation split, or an image of it has no mask.
    """

    def __init__(
        self,
        index: Path,
        masks: Path | None,
        config: ValidationConfig,
        cosa: CosaConfig,
        augment: AugmentConfig,
        machine: Runtime,
        threads: int,
        classes: tuple[str, ...],
    ) -> None:
        dataset = Index.load(index)
        if dataset.classes != classes:
            raise ValueError(f"{index} has other classes than the training index: validate on the same dataset")
        if masks is None or not dataset.eval_splits:
            missing = "no --masks given" if dataset.eval_splits else f"{index} has no evaluation split"
            raise ValueError(
                f"validation.every = {config.every} needs masks, but {missing}: give --masks and --validation-index, "
                "or set validation.every to 0"
            )
        self.dataset, self.masks, self.split = dataset, load_masks(masks, index), dataset.eval_splits[0]
        if not self.masks.has(self.split):
            raise ValueError(f"{masks} has no masks for {self.split!r}: set validation.every to 0 or add them")
        self.config, self.cosa, self.augment, self.machine, self.threads = config, cosa, augment, machine, threads

    def measure(
        self, networks: Mapping[str, CosaNet], thresholds: Thresholds, iteration: int, last: bool
    ) -> list[dict[str, Any]]:
        """One record per network, as written to `validation.jsonl`, in the first process; elsewhere an empty list.

        config/README.md documents the keys. All counts are of pixels with a known truth. Processes of torchrun, which
        must all call this, share the batches; their number changes no bit of the records.

        Args:
            last: measure the whole split, and the CAM pseudo-labels image by image too.
        """
        everything = self.dataset.splits[self.split]
        count = len(everything) if last else min(self.config.images, len(everything))
        chosen = tuple(everything[k * len(everything) // count] for k in range(count))
        own = self.machine.world.share(chosen, whole=self.config.batch_size)
        labels = torch.from_numpy(self.dataset.multi_hot(tuple(own)))
        modes = {name: net.training for name, net in networks.items()}
        tallies = {name: _Tally(len(self.dataset.classes), self.machine.device) for name in networks}
        position = 0
        # Eager, because the shapes of whole images would use up the compiler's patience with those of the training.
        with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
            for batch in chunks(self._samples(own), self.config.batch_size):
                pixels = torch.stack([image for image, _ in batch])
                images = normalise(pixels, self.augment.mean, self.augment.std, self.machine.device)
                present = to_device(labels[position : position + len(batch)], self.machine.device)
                truths = [to_device(mask, self.machine.device) for _, mask in batch]
                kept = [mask_values(image, self.machine.device) for image in own[position : position + len(batch)]]
                position += len(batch)
                for name, net in networks.items():
                    net.eval()
                    prediction = predict(net, images, present, self.config.scales, self.config.flip, self.machine)
                    tallies[name].logits.append(prediction.logits)
                    for slot, truth in enumerate(truths):
                        tallies[name].add(truth, kept[slot], prediction, slot, thresholds, self.cosa)
        for name, net in networks.items():
            net.train(modes[name])
        gathered = self.machine.world.gather([tally.on_host() for tally in tallies.values()])
        if not gathered:
            return []
        labels = torch.from_numpy(self.dataset.multi_hot(chosen))
        ids = [image.id for image in chosen] if last else None
        fixed = {
            "iteration": iteration,
            "split": self.split,
            "images": count,
            "classes": ["background", *self.dataset.classes],
            "xi": round(thresholds.main, 6),
            "aux_xi": round(thresholds.aux, 6),
        }
        return [
            {**fixed, "network": name, **_Tally.of_all(parts).record(labels, ids)}
            for name, parts in zip(networks, zip(*gathered, strict=True), strict=True)
        ]

    def _samples(self, images: Sequence[Image]) -> Iterator[tuple[Tensor, Tensor]]:
        """(3, S, S) uint8 image and (H, W) uint8 truth of each image."""

        def load(image: Image) -> tuple[Tensor, Tensor]:
            mask = read_mask(self.masks.path(self.split, image.id), (image.width, image.height))
            return square(read_rgb(self.dataset, image), self.config.size), torch.from_numpy(mask)

        return prefetch(load, images, self.threads, ahead=2 * self.config.batch_size)


class _Tally:
    """Sums over images of one network's results, kept on the device."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.kinds = classes + 1
        self.confusion: dict[str, Tensor] = {}
        self.confidence = torch.zeros(2, 2, BINS, dtype=torch.int64, device=device)
        """Main or auxiliary CAM, wrong or right, bin."""
        self.logits: list[Tensor] = []
        self.image_iou: list[Tensor] = []
        self.image_perplexity: list[Tensor] = []

    def add(
        self,
        truth: Tensor,
        kept: Tensor,
        prediction: Prediction,
        slot: int,
        thresholds: Thresholds,
        cosa: CosaConfig,
    ) -> None:
        """Count one image of a batch: its (H, W) truth, and the (P + 1,) mask values of its labels."""
        size = (truth.shape[0], truth.shape[1])
        free, filtered = label_maps(prediction.seg_bands(slot, size), size, kept)
        self._count("seg_free", truth, free)
        self._count("seg_filtered", truth, filtered)
        cams, aux_cams = prediction.cams_of(slot, kept)
        middle = 0.5 * (thresholds.main + thresholds.aux)
        self._count("ensemble", truth, cam_label_map(0.5 * (cams + aux_cams), middle, size, kept))
        for kind, (name, maps, xi) in enumerate(
            (("cam", cams, thresholds.main), ("aux_cam", aux_cams, thresholds.aux))
        ):
            classes, perplexities = cam_pseudo_labels(
                maps[None], xi, size=size, lambda_alpha=cosa.lambda_alpha, lambda_beta=cosa.lambda_beta
            )
            labels, perplexity = kept[classes[0].int()], perplexities[0]
            confusion = self._count(name, truth, labels)
            self._count(f"{name}_confident", torch.where(perplexity <= cosa.epsilon, truth, IGNORED), labels)
            bins = (resize(maps, size).amax(dim=0) * BINS).long().clamp(max=BINS - 1)
            cells = ((kind * 2 + (labels == truth)) * BINS + bins).flatten()
            self.confidence.view(-1).scatter_add_(0, cells, (truth != IGNORED).flatten().long())
            if name == "cam":
                self.image_iou.append(iou_per_class(confusion).nanmean())
                self.image_perplexity.append(perplexity.clamp(max=UNSURE).mean())

    def _count(self, name: str, truth: Tensor, prediction: Tensor) -> Tensor:
        confusion = confusion_matrix(truth, prediction, self.kinds)
        self._add(name, confusion)
        return confusion

    def _add(self, name: str, confusion: Tensor) -> None:
        self.confusion[name] = self.confusion[name] + confusion if name in self.confusion else confusion

    def on_host(self) -> _Tally:
        """The same on the CPU, with at most one tensor in each list; here the host waits for the device."""
        copy = _Tally(self.kinds - 1, torch.device("cpu"))
        copy.confusion = {name: confusion.cpu() for name, confusion in self.confusion.items()}
        copy.confidence = self.confidence.cpu()
        if self.logits:
            copy.logits = [torch.cat(self.logits).float().cpu()]
            copy.image_iou, copy.image_perplexity = (
                [torch.stack(values).cpu()] for values in (self.image_iou, self.image_perplexity)
            )
        return copy

    @classmethod
    def of_all(cls, parts: Sequence[_Tally]) -> _Tally:
        """What one process would have counted, from the parts `on_host` of all processes in the order of the images."""
        total = cls(parts[0].kinds - 1, torch.device("cpu"))
        for part in parts:
            for name, confusion in part.confusion.items():
                total._add(name, confusion)
            total.confidence += part.confidence
            total.logits += part.logits
            total.image_iou += part.image_iou
            total.image_perplexity += part.image_perplexity
        return total

    def record(self, labels: Tensor, ids: list[str] | None) -> dict[str, Any]:
        """Plain numbers of a tally on the CPU with the (N, C) labels of all its images."""
        scores = torch.cat(self.logits).sigmoid()
        shown = labels.any(dim=0).nonzero().flatten().tolist()  # without an image, a class has no precision
        precisions = [float(binary_average_precision(scores[:, c], labels[:, c].int())) for c in shown]
        wrong, right = self.confidence.unbind(dim=1)
        record: dict[str, Any] = {
            "mean_average_precision": round(sum(precisions) / len(shown), 6) if shown else None,
            **{name: _pixel_counts(matrix) for name, matrix in self.confusion.items()},
            "confidence": {"right": right[0].tolist(), "wrong": wrong[0].tolist()},
            "aux_confidence": {"right": right[1].tolist(), "wrong": wrong[1].tolist()},
        }
        if ids is not None:
            iou, perplexity = (
                [round(value, 6) for value in torch.cat(values).tolist()]
                for values in (self.image_iou, self.image_perplexity)
            )
            record["per_image"] = {"id": ids, "iou": iou, "perplexity": perplexity}
        return record


def _pixel_counts(confusion: Tensor) -> dict[str, list[int]]:
    return {
        "hits": confusion.diagonal().tolist(),
        "truth": confusion.sum(dim=1).tolist(),
        "predicted": confusion[:, : len(confusion)].sum(dim=0).tolist(),
    }


def summary(record: Mapping[str, Any]) -> dict[str, float]:
    """The mIoU figures of a record, for the log and TensorBoard."""
    precision = record["mean_average_precision"]
    figures = {} if precision is None else {"mean_average_precision": float(precision)}
    for name in ("seg_free", "seg_filtered", "cam", "aux_cam", "ensemble"):
        counts = {key: torch.tensor(values, dtype=torch.float64) for key, values in record[name].items()}
        iou = counts["hits"] / (counts["truth"] + counts["predicted"] - counts["hits"])
        figures[f"{name}_miou"] = float(iou.nanmean())
    return figures
