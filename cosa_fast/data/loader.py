"""Training batches from an index, by either backend."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cosa_fast.config import AugmentConfig, LoaderConfig
from cosa_fast.data.augment import Plan
from cosa_fast.data.batch import Batch
from cosa_fast.data.index import Index
from cosa_fast.distributed import ALONE, World


def batches(
    index: Index,
    *,
    augment: AugmentConfig,
    loader: LoaderConfig,
    batch_size: int,
    seed: int,
    start: int,
    device: torch.device,
    world: World = ALONE,
) -> Iterator[Batch]:
    """Batch number `start`, `start + 1`, ... of the training split on `device`, without end.

    Batch t depends on `seed` and t alone: to resume after t batches, pass `start=t`. Each process of `world` gets its
    part of it, `batch_size / world.size` images. Closing the iterator, or dropping it, ends the loader's threads and
    processes.

    Raises:
        ValueError: the training split is empty, or the backend is not installed; while iterating: a file cannot be
            decoded or has another size than when it was indexed.
    """
    images = index.train
    if not images:
        raise ValueError(f"the training split {index.train_split!r} of {index.name} has no images")
    plan = Plan(
        config=augment,
        paths=tuple(str(index.image_path(image)) for image in images),
        sizes=np.array([(image.height, image.width) for image in images], dtype=np.int64),
        batch_size=batch_size // world.size,
        seed=seed,
        rank=world.rank,
        processes=world.size,
    )
    if loader.backend == "dali":
        try:
            from cosa_fast.data.dali import views
        except ImportError as error:
            raise ValueError(
                f"loader.backend = 'dali' but NVIDIA DALI cannot be imported ({error}): set loader.backend: torch or "
                "install cosa-fast[pipeline]"
            ) from None
    else:
        from cosa_fast.data.torch_loader import views
    labels = torch.from_numpy(index.multi_hot(images)).to(device)
    classes = [image.labels for image in images]
    return _batches(plan, views(plan, loader, start, device), labels, classes, start)


def _batches(
    plan: Plan, views: Iterator[tuple[Tensor, Tensor]], labels: Tensor, classes: list[tuple[int, ...]], start: int
) -> Iterator[Batch]:
    with closing(views):  # type: ignore[type-var]  # a generator
        for iteration in itertools.count(start):
            weak, strong = next(views)
            draws = plan.draws(iteration)
            positions = _send(draws.positions, labels.device)
            yield Batch(
                weak=weak,
                strong=strong,
                labels=labels[positions],
                present=_send(_padded([classes[position] for position in draws.positions]), labels.device),
                valid_box=_send(draws.geometry.valid_box, labels.device),
                index=positions,
                first=plan.first,
                total=plan.batch_size * plan.processes,
            )


def _padded(classes: list[tuple[int, ...]]) -> NDArray[np.int64]:
    """(B, P) the lists, filled up with -1."""
    longest = max(1, *map(len, classes))
    return np.array([[*some, *[-1] * (longest - len(some))] for some in classes], dtype=np.int64)


def _send(values: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy on `device`; from pinned memory, so that the host does not wait for the previous step."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
