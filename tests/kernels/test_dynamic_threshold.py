"""The threshold search (Eq. 6) against scikit-learn and by construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cosa_kernels import DynamicThreshold, fit_bimodal_threshold
from sklearn.mixture import GaussianMixture
from torch.utils._python_dispatch import TorchDispatchMode


def bimodal(seed: int, low: float, high: float, share: float, count: int = 40_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    background = rng.normal(low, 0.07, int(count * (1 - share)))
    foreground = rng.normal(high, 0.12, count - len(background))
    values = np.concatenate([background, foreground])
    return values[(values > 0) & (values < 1)]


def histogram(values: np.ndarray, bins: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.histogram(values, bins=bins, range=(0, 1))[0].astype(np.float64))


@pytest.mark.parametrize(("low", "high", "share"), [(0.2, 0.7, 0.3), (0.15, 0.6, 0.5), (0.3, 0.8, 0.15)])
def test_agrees_with_scikit_learn(low: float, high: float, share: float) -> None:
    values = bimodal(0, low, high, share)
    mixture = GaussianMixture(2, tol=1e-7, max_iter=2000, random_state=0).fit(values[:, None])
    # Where the hard assignment flips: the crossing of the weighted densities between the two means.
    grid = np.linspace(*np.sort(mixture.means_.ravel()), 20_001)
    foreground = int(mixture.means_.argmax())
    crossing = grid[mixture.predict(grid[:, None]).tolist().index(foreground)]
    fit = fit_bimodal_threshold(histogram(values), iterations=300)
    assert float(fit) == pytest.approx(crossing, abs=1.01 / 256)  # within one bin of the converged answer


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(0),  # nothing
        np.full(30, 0.3),  # too few
        np.full(10_000, 0.4),  # one value
        np.random.default_rng(0).normal(0.4, 0.02, 10_000),  # one narrow mode
    ],
)
def test_says_nothing_without_two_modes(values: np.ndarray) -> None:
    assert fit_bimodal_threshold(histogram(values)).isnan()


def test_rejects_what_is_not_a_histogram() -> None:
    with pytest.raises(ValueError, match="at least 4 bins"):
        fit_bimodal_threshold(torch.zeros(3))


def batch(seed: int, low: float, high: float) -> torch.Tensor:
    values = np.resize(bimodal(seed, low, high, 0.3, 8000), (2, 1, 50, 60))
    return torch.from_numpy(values).float()


def test_follows_the_confidences_and_forgets() -> None:
    threshold = DynamicThreshold(0.5, queue=5, momentum=0.0, limits=(0.05, 0.95))
    for seed in range(5):
        threshold.update(batch(seed, 0.2, 0.6))
    early = float(threshold.xi)
    assert 0.3 < early < 0.5
    for seed in range(5):
        threshold.update(batch(seed, 0.4, 0.85))
    fresh = DynamicThreshold(0.5, queue=5, momentum=0.0, limits=(0.05, 0.95))
    for seed in range(5):
        fresh.update(batch(seed, 0.4, 0.85))
    assert float(threshold.xi) > early + 0.1
    assert torch.equal(threshold.xi, fresh.xi)  # the queue of 5 holds nothing of the first 5 batches


def test_keeps_the_old_threshold_when_there_is_nothing_to_fit() -> None:
    threshold = DynamicThreshold(0.37)
    assert float(threshold.update(torch.zeros(1, 3, 8, 8))) == pytest.approx(0.37)


def test_is_smoothed_and_clamped() -> None:
    threshold = DynamicThreshold(0.5, momentum=0.9, limits=(0.15, 0.3))
    assert float(threshold.update(batch(0, 0.2, 0.7))) == pytest.approx(0.9 * 0.5 + 0.1 * 0.3)


def test_padding_and_low_confidences_do_not_count() -> None:
    cams = batch(0, 0.2, 0.7)
    box = torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]])
    boxed, cropped = DynamicThreshold(floor=0.1), DynamicThreshold(floor=0.1)
    boxed.update(cams, box)
    cropped.update(cams[..., :30])
    assert torch.equal(boxed.histograms, cropped.histograms)
    assert boxed.histograms.sum() == (cams[..., :30] > 0.1).sum()


def test_state_dict_round_trip() -> None:
    one, other = DynamicThreshold(0.5, queue=3), DynamicThreshold(0.2, queue=3)
    one.update(batch(0, 0.2, 0.7))
    other.load_state_dict(one.state_dict())
    one.update(batch(1, 0.3, 0.8))
    other.update(batch(1, 0.3, 0.8))
    assert torch.equal(one.xi, other.xi)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"initial": 1.0}, "initial"), ({"queue": 0}, "queue"), ({"limits": (0.0, 0.5)}, "limits")]
)
def test_impossible_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicThreshold(**kwargs)


class NoHostReads(TorchDispatchMode):
    """Fails where a value would travel from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read by the host"
        return func(*args, **(kwargs or {}))


def test_update_never_waits_for_the_device() -> None:
    threshold, cams = DynamicThreshold(0.5), batch(0, 0.2, 0.7)
    with NoHostReads():
        threshold.update(cams, torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]]))
    assert float(threshold.xi) != 0.5
