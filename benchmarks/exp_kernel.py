"""Exponentials per second of a GPU: a kernel that does nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 1024
STEPS = 1024


@triton.jit
def exp_kernel(out, STEPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = lanes.to(tl.float32) * 1e-9
    for _ in range(STEPS):
        # Stays between 1/2 and 1; the sign costs no instruction.
        x = tl.exp2(-x)
    tl.store(out + lanes, x)


def exponentials(device: str) -> tuple[int, Callable[[], object]]:
    """How many exponentials a run computes, and the run; eight blocks of 8 x 128 exponentials per multiprocessor."""
    blocks = 64 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(blocks * BLOCK, device=device)

    def run() -> None:
        exp_kernel[(blocks,)](out, STEPS=STEPS, BLOCK=BLOCK, num_warps=4)

    return blocks * BLOCK * STEPS, run
