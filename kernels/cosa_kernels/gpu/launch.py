"""What every launch needs: the right device, and a matrix-product precision that the target has."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from cosa_kernels.implementation import interpreted


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(exact: bool) -> str:
    """Of float32 matrix products: `exact`, or as exact as half-precision inputs are; of what the target has."""
    if interpreted():
        return "ieee"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "hip":
        return "tf32" if not exact and target.arch == "gfx942" else "ieee"
    return "tf32x3" if exact else "tf32"
