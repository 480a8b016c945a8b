"""Bytes that the processes of a training exchange: `torchrun --nproc-per-node 2 -m benchmarks.communication`.

The real step on the real ViT-B/16 with random weights and images, at a small crop: what is exchanged depends on the
parameters and the classes alone. Counted from torch.profiler's record of the collectives, DDP's own included.
"""

from __future__ import annotations

import math

import torch
import tyro
from torch.profiler import ProfilerActivity, profile

from cosa_fast.config import AugmentConfig, CosaConfig, ModelConfig, OptimConfig, RuntimeConfig, TrainConfig
from cosa_fast.data.batch import Batch
from cosa_fast.distributed import leave, requested
from cosa_fast.models.cosa import CosaNet
from cosa_fast.runtime import resolve
from cosa_fast.training.guidance import Guidance
from cosa_fast.training.step import Settings, make_trainer

CROP = 64
PHASES = {"warm-up": 0, "assignments": 3, "guided": 6}
"""First iteration of each; DDP arranges its buckets in the first two, and the third is recorded."""


def main() -> None:
    """Print a line per data set and phase.

    Raises:
        SystemExit: it is the only process.
    """
    if requested() == 1:
        raise SystemExit(f"one process exchanges nothing: {__doc__.splitlines()[0].partition(': ')[2]}")
    machine = resolve(RuntimeConfig(device="cpu"), threads=1)
    for dataset, classes in {"voc": 20, "coco": 80}.items():
        torch.manual_seed(0)
        settings = Settings(
            AugmentConfig(crop=CROP),
            CosaConfig(scales=(1.0,)),
            OptimConfig(),
            TrainConfig(
                batch_size=machine.world.size,
                c2s_start=PHASES["assignments"],
                guidance_start=PHASES["guided"],
            ),
        )
        net = CosaNet(ModelConfig(pretrained=False), classes, CROP, pretrained=False)
        trainer = make_trainer(net, settings, machine, Guidance("spl"))
        for phase, start in PHASES.items():
            for iteration in (start, start + 1):
                trainer.step(iteration, _part(classes))
            with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
                trainer.step(start + 2, _part(classes))
            if machine.world.first:
                print(f"{dataset}, {phase}: {_exchanged(record)}")
    leave()


def _part(classes: int) -> Batch:
    """One image of the whole batch."""
    views = torch.randn(2, 1, 3, CROP, CROP)
    labels = torch.zeros(1, classes)
    labels[0, 0] = 1
    box = torch.tensor([[0, CROP, 0, CROP]])
    return Batch(views[0], views[1], labels, torch.zeros(1, 1, dtype=torch.long), box, torch.zeros(1, dtype=torch.long))


def _exchanged(record: profile) -> str:
    """Gradients are float32; histograms, totals and counts have eight bytes each."""
    sizes = [math.prod(event.input_shapes[0]) for event in record.events() if event.name == "gloo:all_reduce"]
    buckets, small = [size for size in sizes if size > 10_000], [size for size in sizes if size <= 10_000]
    numbers = sum(buckets)
    return (
        f"{len(buckets)} all-reduces of {numbers:,} gradients, {4 * numbers / 1e6:.1f} MB; "
        f"{len(small)} others of {8 * sum(small):,} bytes"
    )


if __name__ == "__main__":
    tyro.cli(main)
