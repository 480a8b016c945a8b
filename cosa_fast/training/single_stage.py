"""The `train` stage: CoSA from an index to a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from cosa_fast.config import (
    RHYTHM,
    AugmentConfig,
    CosaConfig,
    LoaderConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
    before_guidance,
)
from cosa_fast.data.batch import Batch
from cosa_fast.data.index import Index
from cosa_fast.data.loader import batches
from cosa_fast.distributed import World
from cosa_fast.files import require_space, sha256
from cosa_fast.models.checkpoint import save_safetensors
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.shared import normalises_over_batch, share_layers
from cosa_fast.models.vit import parameter_count
from cosa_fast.runtime import resolve
from cosa_fast.training import loop
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.oracle import oracle_masks
from cosa_fast.training.step import CosaTrainer, Settings, make_trainer
from cosa_fast.training.validation import Thresholds, Validator, summary

log = logging.getLogger(__name__)


class Sections(TypedDict):
    """The settings that `warm_up` and `train` pass on as they are."""

    augment: AugmentConfig
    loader: LoaderConfig
    optim: OptimConfig
    validation: ValidationConfig
    runtime: RuntimeConfig
    threads: int


def warm_up(
    index: Path,
    output: Path,
    resume: Path,
    masks: Path | None = None,
    validation_index: Path | None = None,
    *,
    model: ModelConfig,
    cosa: CosaConfig,
    train: TrainConfig,
    **sections: Unpack[Sections],
) -> None:
    """Train up to `train.guidance_start`, where the variants of CoSA part, and write the folder `output` for `train`.

    Settings that only matter later are ignored, so that all variants can begin with it.

    Args:
        index, resume, masks, validation_index: as for `train`.

    Raises:
        ValueError: as `train`; or guidance starts with the first iteration or never.
    """
    if not 0 < train.guidance_start < train.iterations:
        raise ValueError(
            f"train.guidance_start = {train.guidance_start} of {train.iterations} iterations leaves nothing to share: "
            "run `cosa-fast train` alone"
        )
    cosa, model = before_guidance(cosa, model)
    run = _prepare("warmup", index, resume, masks, validation_index, model, cosa, train, sections)
    run.loop(until=train.guidance_start)
    if run.trainer.runtime.world.first:
        loop.publish(resume, output)


def train(
    index: Path,
    output: Path,
    resume: Path,
    masks: Path | None = None,
    validation_index: Path | None = None,
    warmup: Path | None = None,
    *,
    model: ModelConfig,
    cosa: CosaConfig,
    train: TrainConfig,
    **sections: Unpack[Sections],
) -> None:
    """Train CoSA on image-level labels and write both networks to `output`.

    Args:
        index: the dataset index.
        output: safetensors file with `online.*` and `assignment.*` weights and everything needed to use them; the
            logs come to stand beside it.
        resume: folder of the resumable state and the metrics; a killed run continues from it.
        masks: list of masks, for the oracle guidance (those of the training split) and for validation.
        validation_index: the index whose first evaluation split is measured every `validation.every` iterations.
        warmup: what `warm_up` wrote; the result is the same as without it.

    Raises:
        ValueError: something is impossible (said before training where it can be known), or the disk is full.
    """
    _check_schedule(train, cosa)
    run = _prepare("train", index, resume, masks, validation_index, model, cosa, train, sections)
    early = dict(zip(("cosa", "model"), before_guidance(cosa, model), strict=True))
    origin = None
    if warmup is not None:
        origin = loop.Origin(
            warmup, run.fingerprint | {key: part.model_dump(mode="json") for key, part in early.items()}
        )
    require_space(output.parent, 3 * 4 * parameter_count(run.trainer.online), "the checkpoint")
    loop.say_if_finished(output, resume, run.trainer.runtime.world)
    run.loop(until=train.iterations, origin=origin)
    trainer = run.trainer
    if not trainer.runtime.world.first:
        return
    tensors = {
        f"{network}.{name}": tensor
        for network in ("online", "assignment")
        for name, tensor in getattr(trainer, network).state_dict().items()
    }
    metadata = {
        "kind": "cosa",
        "classes": run.dataset.classes,
        "dataset": run.dataset.name,
        "threshold": float(trainer.threshold.xi),
        "aux_threshold": float(trainer.aux_threshold.xi),
        "iteration": train.iterations,
        "config": run.config,
    }
    save_safetensors(output, tensors, metadata)
    loop.finish(resume, output, ("metrics", "validation"))


@dataclass(frozen=True, slots=True)
class _Run:
    """A training ready to start."""

    name: str
    dataset: Index
    resume: Path
    trainer: CosaTrainer
    config: dict[str, Any]
    """Every section that decides the result, for the checkpoint."""
    fingerprint: dict[str, Any]
    source: Callable[[int], Iterator[Batch]]
    validation: loop.Validation | None

    def loop(self, until: int, origin: loop.Origin | None = None) -> None:
        """Train up to iteration `until`."""
        trainer, settings = self.trainer, self.trainer.settings.train
        device = trainer.runtime.device
        loop.run(
            name=self.name,
            folder=self.resume,
            fingerprint=self.fingerprint,
            iterations=until,
            state={"trainer": trainer, "optimizer": trainer.optimizer},
            batches=self.source,
            step=lambda iteration, batch: trainer.step(iteration, batch.to(device)),
            checkpoint_every=settings.checkpoint_every,
            log_every=settings.log_every,
            validation=self.validation,
            origin=origin,
            world=trainer.runtime.world,
        )


def _prepare(
    name: str,
    index: Path,
    resume: Path,
    masks: Path | None,
    validation_index: Path | None,
    model: ModelConfig,
    cosa: CosaConfig,
    train: TrainConfig,
    sections: Sections,
) -> _Run:
    """Check everything that can be checked before the first iteration."""
    augment, loader, optim, threads = sections["augment"], sections["loader"], sections["optim"], sections["threads"]
    machine = resolve(sections["runtime"], threads)
    dataset = Index.load(index)
    torch.manual_seed(train.seed)
    net = CosaNet(model, len(dataset.classes), augment.crop)
    _check_sizes(net, augment, cosa)
    _check_parts(net, train, cosa, machine.world)
    share_layers(net, machine.world, machine.device)
    truth = oracle_masks(masks, dataset, augment, train) if cosa.guidance == "gt" else None
    guidance = Guidance(cosa.guidance, truth, train.seed)
    decisive = {"augment": augment, "model": model, "cosa": cosa, "optim": optim, "train": train}
    config: dict[str, Any] = {key: section.model_dump(mode="json") for key, section in decisive.items()}
    decided = train.model_dump(mode="json", exclude=set(RHYTHM))
    fingerprint = {**config, "train": decided, "index": sha256(index)}
    log.info(
        "CoSA on %s: %d images, %d classes, %.1f M parameters, %s",
        dataset.name, len(dataset.train), len(dataset.classes), parameter_count(net) / 1e6, machine.device,
    )  # fmt: skip
    trainer = make_trainer(net, Settings(augment, cosa, optim, train), machine, guidance)

    def source(start: int) -> Iterator[Batch]:
        return batches(
            dataset, augment=augment, loader=loader, batch_size=train.batch_size, seed=train.seed, start=start,
            device=machine.device, world=machine.world,
        )  # fmt: skip

    config_of_validation = sections["validation"]
    validation = None
    if config_of_validation.every:
        validator = Validator(
            validation_index or index, masks, config_of_validation, cosa, augment, machine, threads, dataset.classes
        )
        validation = loop.Validation(config_of_validation.every, partial(_measure, trainer, validator))
    return _Run(name, dataset, resume, trainer, config, fingerprint, source, validation)


def _measure(trainer: CosaTrainer, validator: Validator, done: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Records of both networks, and their figures as `online/seg_free_miou` and so on."""
    networks = {"online": trainer.online, "assignment": trainer.assignment}
    thresholds = Thresholds(float(trainer.threshold.xi), float(trainer.aux_threshold.xi))
    last = done == trainer.settings.train.iterations
    records = validator.measure(networks, thresholds, done, last)
    scalars = {f"{record['network']}/{key}": value for record in records for key, value in summary(record).items()}
    shown = ", ".join(f"{record['network']} {100 * summary(record)['seg_free_miou']:.1f}" for record in records)
    log.info("validation at %d on %s: mIoU %s", done, validator.split, shown)
    return records, scalars


def _check_sizes(net: CosaNet, augment: AugmentConfig, cosa: CosaConfig) -> None:
    stride = net.encoder.stride
    if augment.crop % stride:
        near = max(stride, round(augment.crop / stride) * stride)
        raise ValueError(f"augment.crop = {augment.crop} must be a multiple of the model's stride {stride}: try {near}")
    if cosa.label_size is not None and cosa.label_size > augment.crop:
        raise ValueError(f"cosa.label_size = {cosa.label_size} is larger than augment.crop = {augment.crop}")


def _check_parts(net: CosaNet, train: TrainConfig, cosa: CosaConfig, world: World) -> None:
    """Processes and parts have equally many images, and no part needs to know of the others."""
    whole, parts = train.batch_size, world.size * train.accumulate
    if whole % parts:
        possible = [size for size in range(parts, 0, -1) if whole % size == 0]
        raise ValueError(
            f"train.batch_size = {whole} cannot be divided among {world.size} processes with train.accumulate = "
            f"{train.accumulate}: use {possible[0]} in all ({' or '.join(map(str, possible))} divide it)"
        )
    if train.accumulate > 1 and any(map(normalises_over_batch, net.modules())):
        raise ValueError(
            f"train.accumulate = {train.accumulate}, but the model has batch norm, whose statistics would be a part's, "
            "not the batch's: set it to 1"
        )
    if train.accumulate > 1 and cosa.csc and cosa.csc_scope == "batch":
        raise ValueError(
            f"train.accumulate = {train.accumulate}, but cosa.csc_scope = 'batch' contrasts the whole batch at once: "
            "set accumulate to 1, or the scope to image"
        )


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
