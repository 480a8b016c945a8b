"""The `multistage` stage: CoSA-MS, a standalone segmentation network trained on the stored pseudo-labels (Sec. 4.2)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL.Image import Resampling
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cosa_fast.config import RHYTHM, MultistageConfig, RuntimeConfig
from cosa_fast.data.augment import Geometry, apply_geometry, draw_geometry, epoch_positions
from cosa_fast.data.classes import IGNORED
from cosa_fast.data.index import Index
from cosa_fast.data.store import PseudoLabels
from cosa_fast.distributed import ALONE, World
from cosa_fast.files import require_space, sha256
from cosa_fast.inference import chunks, normalise, prefetch, read_rgb
from cosa_fast.models.segmenter import Segmenter, build_segmenter, normalisation, save_segmenter
from cosa_fast.models.shared import share_layers
from cosa_fast.models.vit import parameter_count
from cosa_fast.runtime import Runtime, resolve
from cosa_fast.training import loop
from cosa_fast.training.schedule import poly_lr

log = logging.getLogger(__name__)
# Besides biases and normalisation: what Swin and other transformers learn of positions.
UNDECAYED = ("relative_position_bias_table", "pos_embed")


@dataclass(frozen=True, slots=True)
class SegBatch:
    """Images and the pseudo-labels of the same crops."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    labels: Tensor
    """(B, S, S) uint8; 255 where nothing is to be learnt."""

    def to(self, device: torch.device) -> SegBatch:
        """The batch on `device`; to a GPU from pinned memory, so that the copy waits for nothing."""
        tensors = (self.images, self.labels)
        if device.type == "cuda":
            tensors = (self.images.pin_memory(), self.labels.pin_memory())
        return SegBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


def train_segmenter(
    index: Path,
    store: Path,
    output: Path,
    resume: Path,
    *,
    multistage: MultistageConfig,
    runtime: RuntimeConfig,
    threads: int,
) -> None:
    """Train on the pseudo-labels of the training split and write the network to `output`.

    Args:
        index: the dataset index.
        store: pseudo-labels of its training split.
        output: safetensors file with the weights and everything needed to use them.
        resume: folder of the resumable state and the metrics; a killed run continues from it.

    Raises:
        ValueError: the store is damaged or not of this index, the network cannot be made or trained with this batch
            size, an image cannot be read, or the disk is full.
    """
    machine = resolve(runtime, threads)
    dataset = Index.load(index)
    labels = PseudoLabels(store)
    labels.require_match(dataset)
    labels.load()
    torch.manual_seed(multistage.seed)
    net = build_segmenter(multistage, len(dataset.classes) + 1)
    _check_batch_size(net, multistage, machine.world)
    share_layers(net, machine.world, machine.device)
    require_space(output.parent, 3 * 4 * parameter_count(net), "the checkpoint")
    loop.say_if_finished(output, resume, machine.world)
    log.info(
        "CoSA-MS on %s: %s with %s, %d images, %.1f M parameters, %s",
        dataset.name, multistage.architecture, multistage.encoder, len(labels), parameter_count(net) / 1e6,
        machine.device,
    )  # fmt: skip
    digest = labels.digest()
    trainer = SegmenterTrainer(net, multistage, machine)
    loop.run(
        name="multistage",
        folder=resume,
        fingerprint={
            "multistage": multistage.model_dump(mode="json", exclude=set(RHYTHM)),
            "store": digest,
            "index": sha256(index),
        },
        iterations=multistage.iterations,
        state={"net": trainer.net, "optimizer": trainer.optimizer},
        batches=lambda start: batches(dataset, labels, multistage, threads, start, machine.world),
        step=trainer.step,
        checkpoint_every=multistage.checkpoint_every,
        log_every=multistage.log_every,
        world=machine.world,
    )
    if not machine.world.first:
        return
    origin = {
        "sha256": digest,
        "checkpoint_sha256": labels.info.checkpoint_sha256,
        "split": labels.info.split,
        "threshold": labels.info.threshold,
    }
    save_segmenter(output, trainer.net, classes=dataset.classes, dataset=dataset.name, config=multistage, store=origin)
    loop.finish(resume, output)


class SegmenterTrainer:
    """The network and its optimiser on their device, advanced one batch at a time."""

    def __init__(self, net: Segmenter, config: MultistageConfig, runtime: Runtime) -> None:
        self.net, self.config, self.runtime = net.to(runtime.device), config, runtime
        if runtime.device.type == "cuda":
            self.net.to(memory_format=torch.channels_last)
        runtime.compile(self.net)
        self.mean, self.std = normalisation(config)
        groups = parameter_groups(self.net, config)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
            if config.optimizer == "sgd"
            else torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999))
        )
        # Averages the gradients of all processes.
        self.parallel = (
            DistributedDataParallel(self.net, gradient_as_bucket_view=True) if runtime.world.size > 1 else self.net
        )

    def step(self, iteration: int, batch: SegBatch) -> dict[str, Tensor]:
        """Train on one batch, or this process's part of it: cross-entropy over the pixels that have a label.

        Returns:
            The 0-d loss; its mean over processes is that of the whole batch.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            rate = poly_lr(iteration, config.lr, config.iterations, config.warmup, config.power)
            group["lr"] = group["scale"] * rate
        batch = batch.to(self.runtime.device)
        images = normalise(batch.images, self.mean, self.std, self.runtime.device)
        self.net.train()
        with self.runtime.autocast():
            logits = self.parallel(images)
        total = F.cross_entropy(logits.float(), batch.labels.long(), ignore_index=IGNORED, reduction="sum")
        world, counted = self.runtime.world, (batch.labels != IGNORED).sum()
        world.add(counted)
        # Gradients are averaged over processes, hence their number. 0, not NaN, where every pixel is ignored.
        loss = world.size * total / counted.clamp(min=1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


def parameter_groups(net: Segmenter, config: MultistageConfig) -> list[dict[str, Any]]:
    """The optimiser's groups, the encoder's first; `scale` is their factor of the learning rate.

    AdamW spares biases, normalisation and position tables the weight decay, as Swin's authors do; SGD decays all, as
    DeepLab's do.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in net.named_parameters():
        spared = config.optimizer == "adamw" and (parameter.ndim < 2 or name.endswith(UNDECAYED))
        groups.setdefault((not name.startswith("net.encoder."), spared), []).append(parameter)
    return [
        {
            "params": groups[head, spared],
            "scale": config.head_lr_scale if head else 1.0,
            "weight_decay": 0.0 if spared else config.weight_decay,
        }
        for head, spared in sorted(groups)
    ]


def _check_batch_size(net: Segmenter, config: MultistageConfig, world: World) -> None:
    """One image is enough unless batch normalisation follows a pooling to one pixel: a dry run without data tells."""
    if config.batch_size % world.size:
        raise ValueError(
            f"multistage.batch_size = {config.batch_size} cannot be divided among {world.size} processes: make it a "
            "multiple"
        )
    if config.batch_size > 1:
        return
    try:
        deepcopy(net).to("meta").train()(torch.empty(1, 3, config.crop, config.crop, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"multistage.batch_size = 1, but {config.architecture} normalises over the batch after pooling to one "
            "pixel: it needs at least 2 images"
        ) from None


def batches(
    index: Index,
    store: PseudoLabels,
    config: MultistageConfig,
    threads: int,
    start: int,
    world: World = ALONE,
) -> Iterator[SegBatch]:
    """This process's part of batches from number `start` on, without end; batch t depends on (seed, t) alone."""
    size = config.batch_size // world.size
    first = world.rank * size

    def samples() -> Iterator[tuple[Geometry, int, int]]:
        for iteration in count(start):
            positions = epoch_positions(config.seed, len(store), config.batch_size, iteration)[first : first + size]
            geometry = draw_geometry(
                store.sizes[positions].astype(np.int64),
                crop=config.crop,
                scale=config.scale,
                flip=0.5,
                seed=config.seed,
                iteration=iteration,
                first=first,
            )
            for slot, position in enumerate(positions.tolist()):
                yield geometry, slot, position

    def load(sample: tuple[Geometry, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        geometry, slot, position = sample
        image = read_rgb(index, index.train[position])
        labels = training_labels(store, position, config.min_confidence)
        return (
            apply_geometry(image, geometry, slot),
            apply_geometry(labels, geometry, slot, Resampling.NEAREST, fill=IGNORED),
        )

    for crops in chunks(prefetch(load, samples(), threads, ahead=2 * size), size):
        images, labels = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*crops, strict=True))
        yield SegBatch(images=images.permute(0, 3, 1, 2), labels=labels)


def training_labels(store: PseudoLabels, position: int, min_confidence: float) -> NDArray[np.uint8]:
    """(h, w) uint8 CAM pseudo-labels of an image; 255 where their reliability is below `min_confidence`."""
    labels = store.labels(position)
    if min_confidence == 0:
        return labels
    return np.where(store.reliability(position) < min_confidence, IGNORED, labels).astype(np.uint8)
