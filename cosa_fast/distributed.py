"""Several processes that train or evaluate together, one per GPU, started by torchrun; one process without it.

The global batch and the whole split decide a result: with any number of processes it is the same, up to rounding.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")
PATIENCE = datetime.timedelta(hours=2)
"""How long a process waits for the others: the first one alone writes stores and reports."""


class OthersGone(ValueError):
    """Another process of this run has ended: why is for that one to tell."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others. Every method but `share` must be called by all of them, in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the processes of its machine: the number of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    @property
    def quiet(self) -> bool | None:
        """What tqdm's `disable` is to be: the first process shows its progress, on a terminal."""
        return None if self.first else True

    def share(self, items: Sequence[Item], whole: int = 1) -> Sequence[Item]:
        """This process's consecutive part of `items`; the parts of all of them are `items`, each one once.

        Args:
            whole: so many items, counted from the first one, stay together: what is computed in batches of that size
                is then computed in the same batches, and to the same bit, by any number of processes.
        """
        groups = -(-len(items) // whole)
        start, stop = (groups * rank // self.size * whole for rank in (self.rank, self.rank + 1))
        return items[start:stop]

    def add(self, *tensors: Tensor) -> None:
        """Replace each tensor, on the device of this process, by the sum of all processes'."""
        if self.size > 1:
            with _together():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def concatenate(self, values: Tensor) -> Tensor:
        """(size * B, ...) of all processes' (B, ...), in the order of ranks.

        A gradient reaches this process's part only, times `size`: averaged over processes it is that of a loss which
        every process computes of all parts.
        """
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        with _together():
            dist.all_gather(parts, values.detach().contiguous())
        own = values.detach()
        parts[self.rank] = own + self.size * (values - own) if values.requires_grad else own
        return torch.cat(parts)

    def gather(self, value: Item) -> list[Item]:
        """Every process's `value`, picklable and in the order of ranks, in the first one; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        values: list[Item] = [value] * self.size if self.first else []
        with _together():
            dist.gather_object(value, values if self.first else None)
        return values

    def tell(self, value: Item) -> Item:
        """The first process's `value` (picklable), in all of them."""
        values = [value]
        if self.size > 1:
            with _together():
                dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            with _together():
                dist.barrier()


@contextmanager
def _together() -> Iterator[None]:
    """A failed exchange as what it means: the processes fail one by one, and only the first one to do so knows why."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise OthersGone("another process of this run ended early or hangs: its own message says why") from error


ALONE = World()
"""One process, without torchrun."""


def requested() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device_type: str) -> World:
    """Meet the other processes (once): NCCL on "cuda", gloo on "cpu"."""
    if requested() == 1:
        return ALONE
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(world.local_rank)
        # gloo too: objects are told and gathered on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    return world


def leave() -> None:
    """Part from the other processes, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
