"""Which implementation of an operation runs: Triton kernels, plain torch written for speed, or the reference."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch", "reference"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(impl: Impl, tensor: Tensor) -> Impl:
    """Resolve `impl` for inputs like `tensor`: "triton", "torch" or "reference".

    "auto" takes the Triton kernels on CUDA and ROCm (except for float64, in which they do not accumulate) and plain
    torch elsewhere.

    Raises:
        ValueError: `impl` is unknown, or "triton" cannot run on these inputs.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}; got {impl!r}")
    if impl == "auto":
        return "triton" if tensor.is_cuda and _obstacle(tensor) is None else "torch"
    if impl == "triton" and (obstacle := _obstacle(tensor)) is not None:
        raise ValueError(f"impl='triton' cannot run: {obstacle}; use impl='torch' or 'auto'")
    return impl


def _obstacle(tensor: Tensor) -> str | None:
    """Why the Triton kernels cannot take `tensor`; None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if not tensor.is_cuda and not interpreted():
        return f"the tensors are on {tensor.device} (set TRITON_INTERPRET=1 before Python starts to emulate them there)"
    if tensor.dtype == torch.float64:
        return "the inputs are float64 and the kernels accumulate in float32"
    return None


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def debugging() -> bool:
    """Whether values are checked even where that waits for the device: the environment has COSA_KERNELS_DEBUG=1."""
    return os.environ.get("COSA_KERNELS_DEBUG", "0") == "1"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(dtype, torch.float32)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, which is still on inside an operator, and no rounding of float32 products to TF32 or bfloat16."""
    setting = torch.get_float32_matmul_precision()
    if setting != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if setting != "highest":
            torch.set_float32_matmul_precision(setting)
