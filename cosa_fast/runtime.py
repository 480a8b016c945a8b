"""The machine a stage runs on: device, precision, compilation, threads."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from cosa_fast.config import RuntimeConfig


@dataclass(frozen=True, slots=True)
class Runtime:
    """Resolved settings of `RuntimeConfig`."""

    device: torch.device
    bf16: bool
    compiles: bool

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def compile(self, module: nn.Module) -> nn.Module:
        """torch.compile `module` in place where that is on; its parameters and state dict stay as they are."""
        if self.compiles:
            module.compile(dynamic=False)
        return module


def resolve(config: RuntimeConfig, threads: int | None = None) -> Runtime:
    """Choose the device and set the number of CPU threads.

    Raises:
        ValueError: the device does not exist here.
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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device = {config.device!r}, but this machine has {torch.cuda.device_count()} CUDA devices: "
            "use auto or cpu"
        )
    on_cuda = device.type == "cuda"
    return Runtime(
        device=device,
        bf16=config.precision == "bf16" or (config.precision == "auto" and on_cuda),
        compiles=config.compile == "on" or (config.compile == "auto" and on_cuda),
    )
