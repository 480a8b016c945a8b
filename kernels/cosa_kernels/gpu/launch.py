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


def dot_precision() -> str:
    """Of float32 matrix products: the fastest that the target has without losing float32's digits.

    Not plain TF32, not even for inputs of half precision: what is multiplied are float32 intermediates (unit vectors,
    sums of weights), and Hopper's matrix units cut off the last 13 bits of theirs. That cost losses 5e-5 and gradients
    9e-4 of their norm in the tests' cases; float16 itself rounds to 5e-4.
    """
    if interpreted() or triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"
    return "tf32x3"
