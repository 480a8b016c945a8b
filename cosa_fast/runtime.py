"""The machine a stage runs on: device, precision, compilation, threads."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from cosa_fast.config import RuntimeConfig
from cosa_fast.distributed import ALONE, World, join


@dataclass(frozen=True, slots=True)
class Runtime:
    """Resolved settings of `RuntimeConfig`."""

    device: torch.device
    bf16: bool
    compiles: bool
    graphs: bool = False
    """Replay what is compiled from CUDA graphs."""
    float8: bool = False
    """Linear layers of the assignment network, while it is trained with, in float8."""
    world: World = ALONE
    """This process among those that torchrun started."""

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def compile(self, module: nn.Module, whole: bool = False) -> nn.Module:
        """torch.compile `module` in place where that is on; its parameters and state dict stay as they are.

        Args:
            whole: fail where the graph would break, instead of computing in pieces.
        """
        if self.compiles:
            module.compile(dynamic=False, fullgraph=whole, mode="reduce-overhead" if self.graphs else None)
        return module

    def begin_step(self) -> None:
        """What the CUDA graphs gave in the step before may be overwritten from now on."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()


def resolve(config: RuntimeConfig, threads: int | None = None) -> Runtime:
    """Choose the device, set the number of CPU threads and meet the other processes, if torchrun started some.

    Raises:
        ValueError: the device does not exist here, or has no float8 where that is asked for.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"runtime.device = {config.device!r} is not a device: use auto, cpu or cuda[:n]") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"runtime.device = {config.device!r}: only cpu and cuda devices are supported")
    if device.type == "cuda":
        _check_gpus(config, device)
    on_cuda = device.type == "cuda"
    if config.precision == "fp8" and not on_cuda:
        raise ValueError("runtime.precision = 'fp8' needs a GPU of compute capability 8.9 or newer: use bf16 or fp32")
    world = join(device.type)
    if on_cuda and world.size > 1:
        device = torch.device("cuda", world.local_rank)
    return Runtime(
        device=device,
        world=world,
        bf16=config.precision in ("bf16", "fp8") or (config.precision == "auto" and on_cuda),
        compiles=config.compile in ("on", "graphs") or (config.compile == "auto" and on_cuda),
        graphs=config.compile == "graphs" and on_cuda,
        float8=config.precision == "fp8",
    )


def _check_gpus(config: RuntimeConfig, device: torch.device) -> None:
    """One GPU for each process of this machine."""
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    named = f"runtime.device = {config.device!r}"
    if processes > 1 and device.index is not None:
        raise ValueError(f"{named} is one GPU, but torchrun started {processes} processes: use auto or cuda")
    if max(processes, (device.index or 0) + 1) > gpus:
        of_each = f" and torchrun started {processes} processes" if processes > 1 else ""
        raise ValueError(f"{named}{of_each}, but this machine has {gpus} CUDA devices: use auto or cpu, or fewer")
