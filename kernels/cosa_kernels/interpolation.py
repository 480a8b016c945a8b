"""Bilinear interpolation (`align_corners=False`) as matrices: U S = A_y S A_x^T, whose adjoint is A_y^T G A_x."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def cached_on_cpu(function: Callable[..., Result]) -> Callable[..., Result]:
    """Remember results whose last argument, the device, is the CPU.

    On a GPU a remembered tensor may lie in the memory of a CUDA graph that has not run yet, or still be in the making
    on another stream.
    """
    remembered = functools.lru_cache(maxsize=64)(function)

    @functools.wraps(function)
    def call(*arguments: object) -> Result:
        cheap = arguments[-1].type == "cpu"  # type: ignore[attr-defined]
        return remembered(*arguments) if cheap else function(*arguments)

    return call


@cached_on_cpu
def interpolation_matrix(low: int, high: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(high, low) weights: row y holds the (at most two) source positions that output y mixes.

    The coordinates are computed in float64, then cast. Cached on the CPU: never write to it.
    """
    first, second, fraction = corners(low, high, device)
    matrix = torch.zeros(high, low, dtype=torch.float64, device=device)
    rows = torch.arange(high, device=device)
    # accumulate: at the borders both sources are the same position.
    matrix.index_put_((rows, first), 1.0 - fraction, accumulate=True)
    matrix.index_put_((rows, second), fraction, accumulate=True)
    return matrix.to(dtype)


def corners(low: int, high: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Per output: the two source positions (int64) and the share of the second one (float64)."""
    source = (torch.arange(high, dtype=torch.float64, device=device) + 0.5) * (low / high) - 0.5
    source = source.clamp(min=0.0)
    first = source.floor().long().clamp(max=low - 1)
    second = (first + 1).clamp(max=low - 1)
    return first, second, source - first


def support(low: int, high: int, start: int, stop: int) -> slice:
    """Source positions that outputs start..stop-1 mix: the non-zero columns of those matrix rows."""
    begin = (start + 0.5) * low / high - 0.5
    end = (stop - 0.5) * low / high - 0.5
    return slice(max(0, int(begin // 1)), min(low, int(end // 1) + 2))
