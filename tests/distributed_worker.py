"""Trainings by several processes: `torchrun --nproc-per-node 2 tests/distributed_worker.py FOLDER`.

`train` takes 50 steps on this process's part of each batch; `stages` trains through the stages. Imported, both run in
one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from cosa_fast.config import (
    AugmentConfig,
    CosaConfig,
    LoaderConfig,
    ModelConfig,
    MultistageConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
)
from cosa_fast.data.batch import Batch
from cosa_fast.distributed import leave
from cosa_fast.models.cosa import CosaNet
from cosa_fast.models.segmenter import Segmenter, build_segmenter
from cosa_fast.models.shared import share_layers
from cosa_fast.runtime import resolve
from cosa_fast.training import multi_stage, single_stage
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.step import Settings, make_trainer

STEPS, IMAGES, CLASSES, CROP = 50, 4, 3, 48
VIT = {"name": "test_vit", "aux_norm": True, "aux_block": 2}
MINI = {"name": "mini_vit", "aux_norm": True, "aux_block": 0}
SEGMENTER = MultistageConfig(
    encoder="tu-test_resnet",
    encoder_weights=None,
    iterations=6,
    batch_size=4,
    crop=48,
    lr=3e-2,  # with SGD: Adam scales up the rounding of gradients that are nearly 0
    warmup=2,
    checkpoint_every=3,
    log_every=2,
)
# Name: model, CoSA's switches, parts of a process's share, and its dtype.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int, torch.dtype]] = {
    "paper": (VIT, {}, 1, torch.float64),
    "float32": (VIT, {}, 1, torch.float32),
    "parts": (VIT, {"balance": True, "guidance": "noise"}, 2, torch.float64),
    "batch norm": (MINI, {"csc_scope": "batch"}, 1, torch.float64),
    "release": (
        VIT,
        {
            "raw": False,
            "csc": False,
            "dynamic_threshold": False,
            "ignore_band": (0.25, 0.7),
            "balance": True,
            "lambda_energy": 0.05,
        },
        1,
        torch.float64,
    ),
}


def whole_batch(iteration: int, dtype: torch.dtype) -> Batch:
    """Four images with one to three classes, of which two have a padded border."""
    generator = torch.Generator().manual_seed(iteration)
    labels = (torch.rand(IMAGES, CLASSES, generator=generator) < 0.4).to(dtype)
    labels[torch.arange(IMAGES), torch.randint(0, CLASSES, (IMAGES,), generator=generator)] = 1
    lists = [row.nonzero().flatten().tolist() for row in labels]
    present = torch.tensor([[*some, *[-1] * (CLASSES - len(some))] for some in lists])
    # Classes are blobs of colour, so that there is something to learn.
    colours = torch.eye(CLASSES, dtype=dtype)
    weak = 0.3 * torch.randn(IMAGES, 3, CROP, CROP, generator=generator).to(dtype)
    for image, classes in enumerate(lists):
        for slot, label in enumerate(classes):
            weak[image, :, 16 * slot : 16 * slot + 16, 8:40] += 3 * colours[label][:, None, None]
    strong = weak + 0.1 * torch.randn(weak.shape, generator=generator).to(dtype)
    box = torch.tensor([[0, CROP, 0, CROP], [3, 45, 8, CROP], [0, CROP, 0, CROP], [0, 40, 0, 37]])
    return Batch(weak, strong, labels, present, box, torch.arange(IMAGES))


def train(case: str, parts: int | None = None) -> dict[str, Tensor]:
    """Every step's loss terms, averaged over processes, the thresholds and the final weights.

    Args:
        parts: of a process's share, other than the case's.
    """
    model, cosa, of_case, dtype = CASES[case]
    parts = parts or of_case
    machine = resolve(RuntimeConfig(device="cpu"), threads=1)
    world = machine.world
    torch.manual_seed(0)
    settings = Settings(
        AugmentConfig(crop=CROP),
        CosaConfig(scales=(1.0, 0.67), momentum=0.9, **cosa),
        OptimConfig(lr=1e-3, warmup=5, clip=5.0, head_lr_scale=2.0),
        TrainConfig(iterations=STEPS, batch_size=IMAGES, c2s_start=8, guidance_start=15, accumulate=parts),
    )
    net = CosaNet(ModelConfig(decoder_dim=8, decoder_dilation=1, **model), CLASSES, CROP, pretrained=False).to(dtype)
    share_layers(net, world, machine.device)
    trainer = make_trainer(net, settings, machine, Guidance(settings.cosa.guidance))
    trainer.to(dtype)
    curves: dict[str, list[Tensor]] = {}
    for iteration in range(STEPS):
        part = whole_batch(iteration, dtype).split(world.size)[world.rank]
        for name, value in trainer.step(iteration, part).items():
            shared = value.double().clone()
            world.add(shared)
            curves.setdefault(name, []).append(shared / world.size)
    result = {f"curve.{name}": torch.stack(values) for name, values in curves.items()}
    return result | {f"weight.{name}": value.detach().clone() for name, value in trainer.state_dict().items()}


def stages(folder: Path, results: Path, batch_size: int = 4) -> None:
    """CoSA with a warm-up and validation, and CoSA-MS, on the dataset in `folder`."""
    index, masks, train = folder / "index.json", folder / "masks.json", single_stage.train
    sections: dict[str, Any] = {
        "augment": AugmentConfig(crop=48, scale=(0.7, 1.3)),
        "loader": LoaderConfig(backend="torch", workers=0),
        "model": ModelConfig(decoder_dim=8, decoder_dilation=1, **MINI),
        "cosa": CosaConfig(scales=(1.0,), label_size=24, momentum=0.9),
        "optim": OptimConfig(lr=1e-3, warmup=2),
        "train": TrainConfig(
            iterations=12, batch_size=batch_size, c2s_start=2, guidance_start=6, checkpoint_every=4, log_every=4
        ),
        "validation": ValidationConfig(every=6, images=4, size=48, batch_size=2),
        "runtime": RuntimeConfig(device="cpu"),
        "threads": 1,
    }
    single_stage.warm_up(index, results / "warmup", results / "resume-warmup", masks, **sections)
    train(index, results / "cosa.safetensors", results / "resume", masks, warmup=results / "warmup", **sections)
    with patch.object(multi_stage, "build_segmenter", exact_segmenter):
        multi_stage.train_segmenter(
            index,
            folder / "store.zarr",
            results / "segmenter.safetensors",
            results / "resume-segmenter",
            multistage=SEGMENTER,
            runtime=RuntimeConfig(device="cpu"),
            threads=1,
        )


def exact_segmenter(*arguments: Any, **options: Any) -> Segmenter:
    """In float64: a rounding of float32 turns some ReLU's sign, which moves the weights by 1 % of their way."""
    net = build_segmenter(*arguments, **options).double()
    net.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return net


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    cases = {case: train(case) for case in CASES}
    stages(folder, folder / "together")
    world = resolve(RuntimeConfig(device="cpu")).world
    try:
        stages(folder, folder / "uneven", batch_size=5)
    except ValueError as error:
        cases["error"] = str(error)  # type: ignore[assignment]
    if world.first:
        torch.save(cases, folder / "cases.pt")
    leave()
