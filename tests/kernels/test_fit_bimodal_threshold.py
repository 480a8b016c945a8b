"""The threshold search (Eq. 6): against scikit-learn, by construction, and every implementation against the others."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cosa_kernels import fit_bimodal_threshold, reference
from cosa_kernels.ops import fit_bimodal_threshold as module
from sklearn.mixture import GaussianMixture
from three_way import DEVICE, bimodal, poisoned_memory

IMPLS = ("reference", "torch", "triton")


def histogram(values: np.ndarray, bins: int = 256) -> torch.Tensor:
    return torch.from_numpy(np.histogram(values, bins=bins, range=(0, 1))[0].astype(np.float32)).to(DEVICE)


def spikes(**counts: float) -> torch.Tensor:
    """256 bins with spikes(at3=10) counts in bin 3."""
    result = torch.zeros(256)
    for place, count in counts.items():
        result[int(place.removeprefix("at"))] = count
    return result.to(DEVICE)


@functools.cache
def converged_crossing(low: float, high: float, share: float) -> float:
    """Where scikit-learn's mixture, converged, changes its mind between its two means."""
    mixture = GaussianMixture(2, tol=1e-7, max_iter=2000, random_state=0).fit(bimodal(0, low, high, share)[:, None])
    grid = np.linspace(*np.sort(mixture.means_.ravel()), 20_001)
    return float(grid[mixture.predict(grid[:, None]).tolist().index(int(mixture.means_.argmax()))])


class TestFit:
    """fit_bimodal_threshold."""

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(("low", "high", "share"), [(0.2, 0.7, 0.3), (0.15, 0.6, 0.5), (0.3, 0.8, 0.15)])
    def test_agrees_with_scikit_learn(self, low: float, high: float, share: float, impl: str) -> None:
        fit = fit_bimodal_threshold(histogram(bimodal(0, low, high, share)), impl=impl)
        # Within one bin of the converged answer.
        assert float(fit) == pytest.approx(converged_crossing(low, high, share), abs=1.01 / 256)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_values_are_as_their_histogram(self, impl: str) -> None:
        values = bimodal(0, 0.2, 0.7, 0.3)
        expected = fit_bimodal_threshold(histogram(values), impl=impl)
        tensor = torch.from_numpy(values).float().to(DEVICE)
        with poisoned_memory():
            assert torch.equal(fit_bimodal_threshold(values=tensor, impl=impl), expected)
        # The same values on another scale, in another shape.
        scaled = (4 * tensor[: len(tensor) // 2 * 2] - 1).view(-1, 2, 1)
        assert float(fit_bimodal_threshold(values=scaled, low=-1.0, high=3.0, impl=impl) + 1) / 4 == float(expected)
        assert fit_bimodal_threshold(values=tensor.bfloat16(), impl=impl).dtype == torch.float32

    @pytest.mark.parametrize("impl", ["torch", "reference"])
    def test_float64(self, impl: str) -> None:
        values = torch.from_numpy(bimodal(0, 0.2, 0.7, 0.3)).to(DEVICE)
        fit = fit_bimodal_threshold(values=values, impl=impl)
        assert fit.dtype == torch.float64
        assert float(fit) == pytest.approx(converged_crossing(0.2, 0.7, 0.3), abs=1.01 / 256)
        assert torch.equal(fit, fit_bimodal_threshold(histogram(values.cpu().numpy()).double(), impl=impl))

    @pytest.mark.parametrize("impl", IMPLS)
    def test_by_hand(self, impl: str) -> None:
        """Spikes have the least variance, 1 / 12, so the densities cross log(w0 / w1) / 12 / (m1 - m0) beyond the
        middle: of the centres 3.5 and 200.5 that is 102.0005, just beyond the upper edge of bin 101."""
        assert float(fit_bimodal_threshold(spikes(at3=1000, at200=300), impl=impl)) == 102 / 256
        # And with the larger one on the other side just short of it: 101.9995, in bin 101, whose centre is 101.5.
        assert float(fit_bimodal_threshold(spikes(at3=300, at200=1000), impl=impl)) == 102 / 256
        # The same at the centre of a bin: 70.5 + log(49) / 12 / 40 = 70.508, so bin 70 (centre 70.5) is below.
        wide = spikes(at50=4900, at90=100)
        assert float(fit_bimodal_threshold(wide, impl=impl)) == 71 / 256
        assert float(fit_bimodal_threshold(wide, low=-1.0, high=1.0, impl=impl)) == -1 + 2 * 71 / 256
        assert float(fit_bimodal_threshold(spikes(at50=100, at90=4900), impl=impl)) == 70 / 256

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(
        "counts",
        [
            spikes(),  # nothing
            spikes(at70=20, at200=20),  # too few
            *(spikes(**{f"at{place}": 10_000}) for place in (0, 102, 255)),  # one value
            histogram(np.random.default_rng(0).normal(0.4, 0.02, 10_000)),  # one narrow mode
            spikes(at100=500, at120=500),  # less than a tenth of the range apart
            spikes(at50=9850, at200=150),  # one of 1.5 %
            spikes(at50=math.nan, at60=100, at200=100),
            spikes(at50=math.inf, at60=100, at200=100),
        ],
    )
    def test_says_nothing_without_two_modes(self, counts: torch.Tensor, impl: str) -> None:
        assert fit_bimodal_threshold(counts, impl=impl).isnan()

    @pytest.mark.parametrize("impl", IMPLS)
    def test_just_enough(self, impl: str) -> None:
        """The other side of the limits above."""
        assert fit_bimodal_threshold(spikes(at70=25, at200=25), impl=impl).isfinite()
        assert fit_bimodal_threshold(spikes(at70=20, at200=20), min_count=40, impl=impl).isfinite()
        assert fit_bimodal_threshold(spikes(at100=500, at126=500), impl=impl).isfinite()
        assert fit_bimodal_threshold(spikes(at50=9790, at200=210), impl=impl).isfinite()

    @pytest.mark.parametrize("impl", ["torch", "triton"])
    def test_implementations_agree(self, impl: str) -> None:
        """Same bin as the reference in float64, or both nothing."""
        found = 0
        for number, counts in enumerate(varied_histograms()):
            # Fewer steps than usual: 33 histograms are many for an emulator.
            truth = float(reference.fit_bimodal_threshold(counts.double(), iterations=25))
            fit = float(fit_bimodal_threshold(counts, iterations=25, impl=impl))
            assert fit == pytest.approx(truth, abs=1e-6, nan_ok=True), f"histogram {number}"
            found += math.isfinite(truth)
        assert found > 20

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("bins", [4, 8, 32, 64, 1024])
    def test_number_of_bins(self, bins: int, impl: str) -> None:
        values = bimodal(1, 0.2, 0.7, 0.3)
        fit = fit_bimodal_threshold(histogram(values, bins), impl=impl)
        truth = reference.fit_bimodal_threshold(histogram(values, bins).double())
        assert float(fit) == pytest.approx(float(truth), abs=1e-6)
        assert float(fit) == pytest.approx(0.4, abs=0.02 + 1 / bins)

    def test_kernels_want_a_power_of_two(self) -> None:
        values = torch.from_numpy(bimodal(1, 0.2, 0.7, 0.3)).float().to(DEVICE)
        assert float(fit_bimodal_threshold(values=values, bins=200)) == pytest.approx(0.4, abs=0.03)
        for bins in (200, 2048):
            with pytest.raises(
                ValueError, match=f"power of two up to 1024 .* got {bins}: use 256 bins, or impl='torch'"
            ):
                fit_bimodal_threshold(values=values, bins=bins, impl="triton")
            with pytest.raises(ValueError, match=f"got {bins}"):
                fit_bimodal_threshold(torch.zeros(bins, device=DEVICE), impl="triton")

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.bfloat16], ids=str)
    def test_dtypes(self, dtype: torch.dtype, impl: str) -> None:
        counts = spikes(at3=1000, at200=512)  # exact in every dtype
        fit = fit_bimodal_threshold(counts.to(dtype), impl=impl)
        assert fit.dtype == torch.float32
        assert torch.equal(fit, fit_bimodal_threshold(counts, impl=impl))

    @pytest.mark.parametrize("impl", IMPLS)
    def test_same_from_run_to_run(self, impl: str) -> None:
        values = torch.from_numpy(bimodal(2, 0.25, 0.6, 0.4)).float().to(DEVICE)
        runs = {float(fit_bimodal_threshold(values=values, impl=impl)) for _ in range(3)}
        assert len(runs) == 1

    @pytest.mark.parametrize("impl", IMPLS)
    def test_leaves_its_arguments_alone(self, impl: str) -> None:
        values = torch.from_numpy(bimodal(2, 0.25, 0.6, 0.4)).float().to(DEVICE).requires_grad_()
        counts = histogram(bimodal(2, 0.25, 0.6, 0.4)).requires_grad_()
        copies = values.detach().clone(), counts.detach().clone()
        for fit in (fit_bimodal_threshold(values=values, impl=impl), fit_bimodal_threshold(counts, impl=impl)):
            assert not fit.requires_grad
        assert torch.equal(values, copies[0])
        assert torch.equal(counts, copies[1])

    @pytest.mark.parametrize("impl", IMPLS)
    def test_autocast_changes_nothing(self, impl: str) -> None:
        counts = histogram(bimodal(2, 0.25, 0.6, 0.4))
        plain = fit_bimodal_threshold(counts, impl=impl)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert torch.equal(fit_bimodal_threshold(counts, impl=impl), plain)

    @pytest.mark.parametrize("impl", ["torch", "triton"])
    def test_operator_is_registered_as_torch_expects(self, impl: str) -> None:
        for dtype in (torch.float32, torch.int64):
            counts = spikes(at3=1000, at200=300).to(dtype)
            torch.library.opcheck(module._fit_operator, (counts, 0.0, 1.0, 5, 50, impl))

    @pytest.mark.parametrize("impl", ["torch", "triton"])
    def test_compiles(self, impl: str) -> None:
        values = torch.from_numpy(bimodal(2, 0.25, 0.6, 0.4)).float().to(DEVICE)
        function = functools.partial(fit_bimodal_threshold, impl=impl)
        compiled = torch.compile(lambda x: function(values=x) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(values), function(values=values) + 1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "either histogram or values: got neither"),
            ({"histogram": torch.zeros(8), "values": torch.zeros(8)}, "got both"),
            ({"histogram": torch.zeros(3)}, r"at least 4 bins, got torch.float32 \(3,\)"),
            ({"histogram": torch.zeros(8, 8)}, r"\(8, 8\)"),
            ({"histogram": torch.zeros(8, dtype=torch.bool)}, "torch.bool"),
            (
                {"values": torch.zeros(8, dtype=torch.int64)},
                r"values must be floating, got torch.int64: use values.float",
            ),
            ({"values": torch.zeros(8), "bins": 3}, "bins must be at least 4, got 3"),
            ({"values": torch.zeros(8), "low": 1.0}, "low < high, got 1.0 and 1.0"),
            ({"histogram": torch.zeros(8), "high": math.inf}, "must be finite"),
            ({"histogram": torch.zeros(8), "impl": "cuda"}, "impl must be one of auto, triton, torch, reference"),
            ({"histogram": torch.zeros(8, device=DEVICE).double(), "impl": "triton"}, "float64"),
        ],
    )
    def test_impossible_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fit_bimodal_threshold(**arguments)

    def test_debugging_finds_nan(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COSA_KERNELS_DEBUG", "1")
        with pytest.raises(ValueError, match="histogram holds NaN"):
            fit_bimodal_threshold(spikes(at3=math.nan))
        with pytest.raises(ValueError, match="confidences holds NaN"):
            fit_bimodal_threshold(values=torch.tensor([math.nan], device=DEVICE))


def varied_histograms() -> list[torch.Tensor]:
    """What confidences can look like: shares, overlaps, spikes, gaps."""
    rng = np.random.default_rng(5)
    result = []
    for share in (0.04, 0.3, 0.8):
        for low, high in ((0.1, 0.5), (0.25, 0.55), (0.3, 0.9)):
            values = bimodal(int(rng.integers(1000)), low, high, share, 10_000)
            result.append(values)
            # Guided CAMs are 0 on the background.
            result.append(np.concatenate([np.zeros(20_000), values]))
            # Saturated ones.
            result.append(np.concatenate([values, np.full(3_000, 0.999)]))
    result += [rng.beta(1, 8, 9_000), np.concatenate([rng.beta(1, 20, 9_000), rng.beta(8, 2, 2_000)])]
    result += [np.concatenate([rng.uniform(0.1, 0.2, 9_000), rng.uniform(0.6, 0.7, 2_000)])]  # an empty gap
    result += [rng.uniform(0, 1, 9_000), np.zeros(0), np.full(9_000, 0.5)]
    return [histogram(values) for values in result]
