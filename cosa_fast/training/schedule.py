"""Learning-rate and momentum schedules as plain functions of the iteration, so a resumed run needs no state."""

from __future__ import annotations


def poly_lr(step: int, base_lr: float, iterations: int, warmup: int, power: float) -> float:
    """Learning rate of iteration `step`: linear from base_lr * 1e-6 over `warmup`, then (1 - step / iterations)^power.

    As in the release, the decay counts from iteration 0, so the rate drops to its curve when the warm-up ends.
    """
    if step < warmup:
        return base_lr * (1.0 - (1.0 - step / warmup) * (1.0 - 1e-6))
    return float(base_lr * max(0.0, 1.0 - step / iterations) ** power)


def ema_momentum(step: int, momentum: float, warmup: bool) -> float:
    """m of the assignment network's update at `step`; with `warmup`, at most (1 + step) / (10 + step)."""
    return min(momentum, (1 + step) / (10 + step)) if warmup else momentum
