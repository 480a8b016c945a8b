"""The `train` stage: CoSA from an index to a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cosa_fast.config import (
    AugmentConfig,
    CosaConfig,
    LoaderConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from cosa_fast.data.batch import Batch
from cosa_fast.data.index import Index
from cosa_fast.data.loader import batches
from cosa_fast.files import require_space, sha256
from cosa_fast.models.checkpoint import save_safetensors
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.vit import parameter_count
from cosa_fast.runtime import Runtime, resolve
from cosa_fast.training import loop
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.oracle import oracle_masks
from cosa_fast.training.step import CosaTrainer, Settings

log = logging.getLogger(__name__)


def train(
    index: Path,
    output: Path,
    resume: Path,
    masks: Path | None = None,
    *,
    augment: AugmentConfig,
    loader: LoaderConfig,
    model: ModelConfig,
    cosa: CosaConfig,
    optim: OptimConfig,
    train: TrainConfig,
    runtime: RuntimeConfig,
    threads: int,
) -> None:
    """Train CoSA on image-level labels and write both networks to `output`.

    Args:
        index: the dataset index.
        output: safetensors file with `online.*` and `assignment.*` weights and everything needed to use them.
        resume: folder of the resumable state and the metrics; a killed run continues from it.
        masks: of the training split, for the oracle guidance only.

    Raises:
        ValueError: something is impossible (said before training where it can be known), or the disk is full.
    """
    machine = resolve(runtime, threads)
    dataset = Index.load(index)
    torch.manual_seed(train.seed)
    net = CosaNet(model, len(dataset.classes), augment.crop)
    _check_sizes(net, augment, cosa)
    _check_schedule(train, cosa)
    truth = oracle_masks(masks, dataset, augment, train) if cosa.guidance == "gt" else None
    guidance = Guidance(cosa.guidance, truth, train.seed)
    sections = {"augment": augment, "model": model, "cosa": cosa, "optim": optim, "train": train}
    config: dict[str, Any] = {name: section.model_dump(mode="json") for name, section in sections.items()}
    # How often the state is saved and the losses are logged does not decide the result.
    rhythm = {"checkpoint_every", "log_every"}
    decisive = {**config, "train": train.model_dump(mode="json", exclude=rhythm)}
    require_space(output.parent, 3 * 4 * parameter_count(net), "the checkpoint")
    log.info(
        "CoSA on %s: %d images, %d classes, %.1f M parameters, %s",
        dataset.name, len(dataset.train), len(dataset.classes), parameter_count(net) / 1e6, machine.device,
    )  # fmt: skip
    trainer = make_trainer(net, Settings(augment, cosa, optim, train), machine, guidance)

    def source(start: int) -> Iterator[Batch]:
        return batches(
            dataset, augment=augment, loader=loader, batch_size=train.batch_size, seed=train.seed, start=start,
            device=machine.device,
        )  # fmt: skip

    loop.run(
        name="train",
        folder=resume,
        fingerprint={**decisive, "index": sha256(index)},
        iterations=train.iterations,
        state={"trainer": trainer, "optimizer": trainer.optimizer},
        batches=source,
        step=lambda iteration, batch: trainer.step(iteration, batch.to(machine.device)),
        checkpoint_every=train.checkpoint_every,
        log_every=train.log_every,
    )
    tensors = {
        f"{network}.{name}": tensor
        for network in ("online", "assignment")
        for name, tensor in getattr(trainer, network).state_dict().items()
    }
    metadata = {
        "kind": "cosa",
        "classes": dataset.classes,
        "dataset": dataset.name,
        "threshold": float(trainer.threshold.xi),
        "iteration": train.iterations,
        "config": config,
    }
    save_safetensors(output, tensors, metadata)
    loop.finish(resume)


def make_trainer(net: CosaNet, settings: Settings, machine: Runtime, guidance: Guidance) -> CosaTrainer:
    """A trainer on its device, compiled where that is on."""
    trainer = CosaTrainer(net.to(machine.device), settings, machine, guidance).to(machine.device)
    machine.compile(trainer.online)
    machine.compile(trainer.assignment)
    return trainer


def _check_sizes(net: CosaNet, augment: AugmentConfig, cosa: CosaConfig) -> None:
    stride = net.encoder.stride
    if augment.crop % stride:
        near = max(stride, round(augment.crop / stride) * stride)
        raise ValueError(f"augment.crop = {augment.crop} must be a multiple of the model's stride {stride}: try {near}")
    if cosa.label_size is not None and cosa.label_size > augment.crop:
        raise ValueError(f"cosa.label_size = {cosa.label_size} is larger than augment.crop = {augment.crop}")


def _check_schedule(train: TrainConfig, cosa: CosaConfig) -> None:
    if train.iterations <= train.c2s_start:
        raise ValueError(
            f"train.iterations = {train.iterations} ends before train.c2s_start = {train.c2s_start}: the segmentation "
            "would never be trained; lower c2s_start (and guidance_start) with it"
        )
    if train.iterations <= train.guidance_start and (cosa.guidance != "none" or cosa.csc or cosa.dynamic_threshold):
        log.warning(
            "train.iterations = %d ends before train.guidance_start = %d: guidance, contrastive separation and the "
            "dynamic threshold never start",
            train.iterations,
            train.guidance_start,
        )
