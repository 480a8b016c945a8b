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


def dot_precision(tensor: Tensor) -> str:
    """Of float32 matrix products: as exact as the inputs were. AMD has no tf32x3."""
    if tensor.dtype != torch.float32 or interpreted():
        return "tf32"
    return "ieee" if triton.runtime.driver.active.get_current_target().backend == "hip" else "tf32x3"
