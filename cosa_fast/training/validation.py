"""Quality during training: what both networks make of images with masks. Measured only; no weight depends on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cosa_kernels import cam_pseudo_labels
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from cosa_fast.config import AugmentConfig, CosaConfig, ValidationConfig
from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Image, Index
from cosa_fast.data.masks import load_masks, read_mask
from cosa_fast.inference import chunks, label_map, normalise, predict, prefetch, read_rgb, resize, square
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
            raise ValueError(
                f"validation.every = {config.every} needs masks: name a split in eval_splits (now: {index}) and give "
                "--masks, or set validation.every to 0"
            )
        self.dataset, self.masks, self.split = dataset, load_masks(masks, index), dataset.eval_splits[0]
        if not self.masks.has(self.split):
            raise ValueError(f"{masks} has no masks for {self.split!r}: set validation.every to 0 or add them")
        self.config, self.cosa, self.augment, self.machine, self.threads = config, cosa, augment, machine, threads

    def measure(
        self, networks: Mapping[str, CosaNet], thresholds: Thresholds, iteration: int, last: bool
    ) -> list[dict[str, Any]]:
        """One record per network, as written to `validation.jsonl`.

        config/README.md documents the keys. All counts are of pixels with a known truth.

        Args:
            last: measure the whole split, and the CAM pseudo-labels image by image too.
        """
        everything = self.dataset.splits[self.split]
        count = len(everything) if last else min(self.config.images, len(everything))
        chosen = tuple(everything[k * len(everything) // count] for k in range(count))
        labels = torch.from_numpy(self.dataset.multi_hot(chosen))
        modes = {name: net.training for name, net in networks.items()}
        tallies = {name: _Tally(len(self.dataset.classes), self.machine.device) for name in networks}
        position = 0
        with torch.inference_mode():
            for batch in chunks(self._samples(chosen), self.config.batch_size):
                pixels = torch.stack([image for image, _ in batch])
                images = normalise(pixels, self.augment.mean, self.augment.std, self.machine.device)
                present = labels[position : position + len(batch)].to(self.machine.device)
                position += len(batch)
                for name, net in networks.items():
                    net.eval()
                    prediction = predict(net, images, present, self.config.scales, self.config.flip, self.machine)
                    tallies[name].logits.append(prediction.logits)
                    for slot, (_, mask) in enumerate(batch):
                        truth = mask.to(self.machine.device)
                        size = (truth.shape[0], truth.shape[1])
                        cams, aux_cams = (resize(part[slot], size) for part in (prediction.cams, prediction.aux_cams))
                        seg = resize(prediction.seg[slot], size)
                        tallies[name].add(truth, present[slot], cams, aux_cams, seg, thresholds, self.cosa)
        for name, net in networks.items():
            net.train(modes[name])
        ids = [image.id for image in chosen] if last else None
        fixed = {
            "iteration": iteration,
            "split": self.split,
            "images": count,
            "classes": ["background", *self.dataset.classes],
            "xi": round(thresholds.main, 6),
            "aux_xi": round(thresholds.aux, 6),
        }
        return [{**fixed, "network": name, **tally.record(labels, ids)} for name, tally in tallies.items()]

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
        present: Tensor,
        cams: Tensor,
        aux_cams: Tensor,
        seg: Tensor,
        thresholds: Thresholds,
        cosa: CosaConfig,
    ) -> None:
        """Count one image: (H, W) truth, (C,) labels, (C, H, W) CAMs in [0, 1], (C + 1, H, W) logits."""
        self._count("seg_free", truth, label_map(seg))
        self._count("seg_filtered", truth, label_map(seg, present))
        both = 0.5 * (cams + aux_cams)
        self._count("ensemble", truth, cam_pseudo_labels(both[None], 0.5 * (thresholds.main + thresholds.aux))[0][0])
        known = truth != IGNORED
        for kind, (name, maps, xi) in enumerate(
            (("cam", cams, thresholds.main), ("aux_cam", aux_cams, thresholds.aux))
        ):
            labels, perplexity = (
                values[0]
                for values in cam_pseudo_labels(
                    maps[None], xi, lambda_alpha=cosa.lambda_alpha, lambda_beta=cosa.lambda_beta
                )
            )
            confusion = self._count(name, truth, labels)
            unsure = torch.where(perplexity <= cosa.epsilon, truth, IGNORED)
            self._count(f"{name}_confident", unsure, labels)
            bins = (maps.amax(dim=0) * BINS).long().clamp(max=BINS - 1)
            cells = ((kind * 2 + (labels == truth)) * BINS + bins).flatten()
            counts = torch.bincount(cells, weights=known.flatten().double(), minlength=4 * BINS)
            self.confidence += counts.long().view(2, 2, BINS)
            if name == "cam":
                self.image_iou.append(iou_per_class(confusion).nanmean())
                self.image_perplexity.append(perplexity.clamp(max=UNSURE).mean())

    def _count(self, name: str, truth: Tensor, prediction: Tensor) -> Tensor:
        confusion = confusion_matrix(truth, prediction, self.kinds)
        self.confusion[name] = self.confusion[name] + confusion if name in self.confusion else confusion
        return confusion

    def record(self, labels: Tensor, ids: list[str] | None) -> dict[str, Any]:
        """Plain numbers; the only wait for the device."""
        shown = labels.sum(dim=0) > 0  # the precision of a class without images is undefined
        scores = torch.cat(self.logits)[:, shown].float().cpu().sigmoid()
        precision = MultilabelAveragePrecision(int(shown.sum()), average="macro")(scores, labels[:, shown].int())
        wrong, right = self.confidence.cpu().unbind(dim=1)
        record: dict[str, Any] = {
            "mean_average_precision": round(float(precision), 6),
            **{name: _pixel_counts(matrix.cpu()) for name, matrix in self.confusion.items()},
            "confidence": {"right": right[0].tolist(), "wrong": wrong[0].tolist()},
            "aux_confidence": {"right": right[1].tolist(), "wrong": wrong[1].tolist()},
        }
        if ids is not None:
            iou, perplexity = (
                [round(value, 6) for value in torch.stack(values).tolist()]
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
    figures = {"mean_average_precision": float(record["mean_average_precision"])}
    for name in ("seg_free", "seg_filtered", "cam", "aux_cam", "ensemble"):
        counts = {key: torch.tensor(values, dtype=torch.float64) for key, values in record[name].items()}
        iou = counts["hits"] / (counts["truth"] + counts["predicted"] - counts["hits"])
        figures[f"{name}_miou"] = float(iou.nanmean())
    return figures
