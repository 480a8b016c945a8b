"""The few formulas that the studies share, on plain numbers and arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

UNSURE = 10.0
"""Perplexity is infinite at the threshold; means count it as this, as the validation does."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Values of independent runs, their mean and its 95 % confidence interval."""

    values: tuple[float, ...]
    mean: float
    half: float | None
    """Half of the interval's length (Student's t, n - 1 degrees of freedom); None for a single run."""


def summarise(values: Sequence[float]) -> Summary:
    """Mean and 95 % t-interval of one value per seed."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Summary(tuple(values), mean, None)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Summary(tuple(values), mean, float(student.ppf(0.975, count - 1)) * deviation / math.sqrt(count))


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Summary:
    """Of each seed's value minus the reference's with the same seed: what the seeds share cancels out."""
    return summarise([value - base for value, base in zip(values, reference, strict=True)])


def iou(hits: Counts, truth: Counts, predicted: Counts) -> Floats:
    """(K,) IoU in percent from (K,) pixel counts; NaN for a class with no pixel in the truth and none predicted."""
    union = (truth + predicted - hits).astype(np.float64)
    return np.divide(100.0 * hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def mean_iou(values: Floats) -> float:
    """Mean over the classes whose IoU is defined; NaN if none is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan


def perplexity(confidence: Floats, xi: float, alpha: float, beta: float) -> Floats:
    """Perplexity of CAM confidences (Eq. 4), at most `UNSURE`.

    Args:
        confidence: nu in [0, 1], any shape.
        xi: the threshold, in (0, 1).
        alpha: lambda_alpha, the scale of the normalised distance; -log(alpha) is the least perplexity.
        beta: lambda_beta, the exponent.
    """
    distance = np.where(confidence >= xi, (confidence - xi) / (1.0 - xi), (xi - confidence) / xi)
    with np.errstate(divide="ignore"):
        return np.minimum(np.maximum(-np.log(alpha * distance), 0.0) ** beta, UNSURE)


def bin_centres(bins: int) -> Floats:
    """(bins,) centres of equal bins over [0, 1]."""
    return (np.arange(bins) + 0.5) / bins


def pearson(x: Floats, y: Floats, weights: Floats | Counts) -> float:
    """Pearson correlation of weighted points; NaN if x or y does not vary."""
    total = weights.sum()
    if total == 0:
        return math.nan
    x, y = x - (weights * x).sum() / total, y - (weights * y).sum() / total
    spread = math.sqrt((weights * x * x).sum() * (weights * y * y).sum())
    return float((weights * x * y).sum() / spread) if spread > 0 else math.nan
