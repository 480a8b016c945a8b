"""The threshold search (Eq. 6): against scikit-learn, by construction, and every implementation against the others."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from cosa_kernels import DynamicThreshold, fit_bimodal_threshold, reference
from cosa_kernels.ops import dynamic_threshold as module
from cosa_kernels.ops.dynamic_threshold import confidence_histogram
from sklearn.mixture import GaussianMixture
from three_way import DEVICE, poisoned_memory
from torch.utils._python_dispatch import TorchDispatchMode

IMPLS = ("reference", "torch", "triton")


class NoHostReads(TorchDispatchMode):
    """Fails where a value would travel from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
        assert func not in reads, "a tensor was read by the host"
        return func(*args, **(kwargs or {}))


def bimodal(seed: int, low: float, high: float, share: float, count: int = 40_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    background = rng.normal(low, 0.07, int(count * (1 - share)))
    foreground = rng.normal(high, 0.12, count - len(background))
    values = np.concatenate([background, foreground])
    return values[(values > 0) & (values < 1)]


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
            ({"histogram": torch.zeros(8).double(), "impl": "triton"}, "float64"),
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


SHAPES = {
    # (B, C, H, W)
    "several programs": (2, 3, 45, 67),
    "one pixel": (1, 1, 1, 1),
    "one class": (2, 1, 9, 13),
    "C = 80": (1, 80, 5, 7),
    "C = 150": (2, 150, 3, 3),
}


def counted_by_numpy(cams: torch.Tensor, floor: float, box: torch.Tensor | None) -> list[int]:
    """256 bins over [0, 1] of what lies in them."""
    confidence = cams.float().cpu().numpy().max(axis=1)
    kept = np.zeros(confidence.shape, dtype=bool)
    for image, mask in enumerate(kept):
        y0, y1, x0, x1 = (0, *mask.shape[:1], 0, *mask.shape[1:]) if box is None else box[image].clamp(min=0).tolist()
        mask[y0:y1, x0:x1] = True
    kept &= confidence >= np.float32(floor)
    return np.histogram(confidence[kept], bins=256, range=(0, 1))[0].tolist()


class TestCount:
    """confidence_histogram."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
    def test_as_numpy_counts(self, shape: tuple[int, ...], impl: str, dtype: torch.dtype) -> None:
        cams = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
        cams[:, ::2] = 0
        cams[0, 0, 0, 0] = 1
        for floor in (0.0, 0.3):
            with poisoned_memory():
                counts = confidence_histogram(cams, floor=floor, impl=impl)
            assert counts.dtype == torch.int64
            assert counts.tolist() == counted_by_numpy(cams, floor, None)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_valid_box(self, impl: str) -> None:
        cams = torch.rand(4, 2, 11, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        # Inside, empty, reaching beyond the image on either side, everything.
        box = torch.tensor([[1, 9, 2, 12], [3, 3, 0, 12], [-2, 50, -1, 7], [0, 11, 0, 12]], device=DEVICE)
        for boxes in (box, box.int()):
            counts = confidence_histogram(cams, floor=0.1, valid_box=boxes, impl=impl)
            assert counts.tolist() == counted_by_numpy(cams, 0.1, box)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_by_hand(self, impl: str) -> None:
        """Bins of [-1, 1] in quarters; what lies beyond counts at the ends, a pixel with a NaN or below the floor does
        not, nor does the floor's own bin vanish."""
        cams = torch.tensor(
            [
                [-9.0, -0.9, -0.5, -0.25, 0.0, 0.7, 1.0, 2.0, math.inf, math.nan, 0.1, -math.inf],
                [-9.5, -1.0, -0.8, -0.30, 0.6, 0.2, 0.3, 0.1, 0.5, 0.9, math.nan, -math.inf],
            ],
            device=DEVICE,
        ).view(1, 2, 3, 4)
        count = functools.partial(confidence_histogram, cams, bins=4, low=-1.0, high=1.0, impl=impl)
        assert count(floor=-math.inf).tolist() == [3, 2, 0, 5]
        assert count(floor=-0.9).tolist() == [1, 2, 0, 5]
        assert count(floor=-0.25).tolist() == [0, 1, 0, 5]
        assert count().tolist() == [0, 0, 0, 5]

    @pytest.mark.parametrize("impl", IMPLS)
    def test_leaves_its_arguments_alone(self, impl: str) -> None:
        cams = torch.rand(2, 3, 4, 5, device=DEVICE, requires_grad=True)
        copy = cams.detach().clone()
        assert not confidence_histogram(cams, impl=impl).requires_grad
        confidence_histogram(cams[:, :1], floor=0.5, impl=impl)
        assert torch.equal(cams, copy)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_strides_do_not_matter(self, impl: str) -> None:
        cams = torch.rand(2, 6, 8, 10, device=DEVICE)
        strided = (
            cams[:, 1::2],
            cams.to(memory_format=torch.channels_last),
            cams.transpose(2, 3),
            cams.expand(2, 6, 8, 10),
        )
        for view in strided:
            assert torch.equal(
                confidence_histogram(view, impl=impl), confidence_histogram(view.contiguous(), impl=impl)
            )

    @pytest.mark.parametrize("impl", ["torch", "triton"])
    def test_operator_is_registered_as_torch_expects(self, impl: str) -> None:
        box = torch.tensor([[0, 3, 0, 3], [1, 3, 1, 3]], device=DEVICE)
        torch.library.opcheck(
            module._count_operator, (torch.rand(2, 3, 4, 4, device=DEVICE), box, 8, 0.0, 1.0, 0.1, impl)
        )

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"cams": torch.zeros(3, 4, 4)}, r"cams must be a floating \(B, C, h, w\) tensor"),
            ({"cams": torch.zeros(1, 0, 4, 4)}, r"\(1, 0, 4, 4\)"),
            ({"valid_box": torch.zeros(3, 4)}, r"valid_box must be an integer \(1, 4\) tensor"),
            ({"bins": 2}, "bins must be at least 4"),
            ({"bins": 12, "impl": "triton"}, "power of two"),
            ({"low": 2.0}, "low < high"),
            ({"cams": torch.zeros(1, 1, 4, 4).double(), "impl": "triton"}, "float64"),
        ],
    )
    def test_impossible_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            confidence_histogram(**{"cams": torch.zeros(1, 1, 4, 4), **arguments})


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_runs_on_a_gpu_never_waits_for_it(impl: str) -> None:
    """An operator hides what happens inside it, so its insides are called here."""
    cams, box = batch(0, 0.2, 0.7), torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]], device=DEVICE)
    with NoHostReads():
        if impl == "triton":
            from cosa_kernels.gpu import dynamic_threshold as gpu

            fit = gpu.fit(gpu.count(cams, box, 256, 0.0, 1.0, 0.1), 0.0, 1.0, 60, 50)
        else:
            fit = reference.fit_bimodal_threshold(module._count_anywhere(cams, box, 256, 0.0, 1.0, 0.1))
    assert float(fit) == pytest.approx(0.4, abs=0.05)


def batch(seed: int, low: float, high: float) -> torch.Tensor:
    values = np.resize(bimodal(seed, low, high, 0.3, 8000), (2, 1, 50, 60))
    return torch.from_numpy(values).float().to(DEVICE)


def dynamic(*args: Any, **kwargs: Any) -> DynamicThreshold:
    return DynamicThreshold(*args, **kwargs).to(DEVICE)


class TestModule:
    """DynamicThreshold."""

    @pytest.mark.parametrize("impl", IMPLS)
    def test_follows_the_confidences_and_forgets(self, impl: str) -> None:
        threshold = dynamic(0.5, queue=3, momentum=0.0, limits=(0.05, 0.95), impl=impl)
        for seed in range(3):
            threshold.update(batch(seed, 0.2, 0.6))
        early = float(threshold.xi)
        assert 0.3 < early < 0.5
        for seed in range(3):
            threshold.update(batch(seed, 0.4, 0.85))
        fresh = dynamic(0.5, queue=3, momentum=0.0, limits=(0.05, 0.95), impl=impl)
        for seed in range(3):
            fresh.update(batch(seed, 0.4, 0.85))
        assert float(threshold.xi) > early + 0.1
        assert torch.equal(threshold.xi, fresh.xi)  # the queue of 3 holds nothing of the first 3 batches

    @pytest.mark.parametrize("impl", IMPLS)
    def test_keeps_the_old_threshold_when_there_is_nothing_to_fit(self, impl: str) -> None:
        threshold = dynamic(0.37, impl=impl)
        for cams in (torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), math.nan)):
            before = threshold.xi.clone()
            assert torch.equal(threshold.update(cams.to(DEVICE)), before)

    def test_is_smoothed_and_clamped(self) -> None:
        threshold = dynamic(0.5, momentum=0.9, limits=(0.15, 0.3))
        assert float(threshold.update(batch(0, 0.2, 0.7))) == pytest.approx(0.9 * 0.5 + 0.1 * 0.3)
        threshold = dynamic(0.2, momentum=0.75, limits=(0.6, 0.7))
        assert float(threshold.update(batch(0, 0.2, 0.7))) == pytest.approx(0.75 * 0.2 + 0.25 * 0.6)

    @pytest.mark.parametrize("impl", IMPLS)
    def test_padding_and_low_confidences_do_not_count(self, impl: str) -> None:
        cams = batch(0, 0.2, 0.7)
        box = torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]], device=DEVICE)
        boxed, cropped = dynamic(floor=0.1, impl=impl), dynamic(floor=0.1, impl=impl)
        boxed.update(cams, box)
        cropped.update(cams[..., :30])
        assert torch.equal(boxed.histograms, cropped.histograms)
        assert boxed.histograms.sum() == (cams[..., :30] >= 0.1).sum()
        assert boxed.histograms[1:].sum() == 0

    def test_state_dict_round_trip(self) -> None:
        one, other = dynamic(0.5, queue=3), dynamic(0.2, queue=3)
        one.update(batch(0, 0.2, 0.7))
        other.load_state_dict(one.state_dict())
        for seed in range(1, 5):  # more than the queue holds
            one.update(batch(seed, 0.3, 0.8))
            other.update(batch(seed, 0.3, 0.8))
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())

    def test_loads_the_counts_that_earlier_versions_kept_as_floats(self) -> None:
        ours = dynamic(0.5, queue=3)
        ours.update(batch(0, 0.2, 0.7))
        state = {name: value.float() if name == "histograms" else value for name, value in ours.state_dict().items()}
        other = dynamic(0.2, queue=3)
        other.load_state_dict(state)
        assert other.histograms.dtype == torch.int64
        assert torch.equal(other.histograms, ours.histograms)

    def test_half_precision_modules_count_beyond_its_largest_number(self) -> None:
        threshold = dynamic(0.5).half()
        for seed in range(3):
            threshold.update(batch(seed, 0.2, 0.7).repeat(1, 1, 10, 10).half())
        assert int(threshold.histograms.sum()) > 65_504
        assert threshold.xi.isfinite()
        assert float(threshold.xi) != 0.5

    @pytest.mark.parametrize("options", [{"limits": (0.7, 0.15)}, {"momentum": float("nan")}, {"momentum": 1.0}])
    def test_options_in_the_wrong_order_or_range(self, options: dict) -> None:
        with pytest.raises(ValueError, match=next(iter(options))):
            dynamic(0.5, **options)

    @pytest.mark.parametrize("impl", ["torch", "triton"])
    def test_compiles(self, impl: str) -> None:
        plain, compiled = (dynamic(0.5, queue=3, impl=impl) for _ in range(2))
        update = torch.compile(compiled.update, fullgraph=True, backend="aot_eager")
        box = torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]], device=DEVICE)
        for seed in range(4):
            cams = batch(seed, 0.2, 0.7)
            assert torch.equal(update(cams, box), plain.update(cams, box))
        assert torch.equal(compiled.histograms, plain.histograms)
        assert float(plain.xi) != 0.5

    @pytest.mark.parametrize("impl", ["auto", "triton"])
    def test_update_never_waits_for_the_device(self, impl: str) -> None:
        threshold, cams = dynamic(0.5, impl=impl), batch(0, 0.2, 0.7)
        box = torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]], device=DEVICE)
        with NoHostReads():
            threshold.update(cams, box)
        assert float(threshold.xi) != 0.5

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_runs_in_a_cuda_graph(self) -> None:
        plain, captured = dynamic(0.5, queue=3), dynamic(0.5, queue=3)
        cams = batch(0, 0.2, 0.7)
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            dynamic(0.5, queue=3).update(cams)
        warm.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.update(cams)
        for seed in range(4):
            cams.copy_(batch(seed, 0.2, 0.7))
            graph.replay()
            plain.update(cams)
            assert torch.equal(captured.xi, plain.xi)

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"initial": 1.0}, "initial"),
            ({"queue": 0}, "queue"),
            ({"limits": (0.0, 0.5)}, "limits"),
            ({"bins": 3}, "bins must be at least 4"),
            ({"impl": "gpu"}, "impl must be 'auto' or 'triton' or 'torch' or 'reference', got 'gpu'"),
        ],
    )
    def test_impossible_arguments(self, kwargs: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DynamicThreshold(**kwargs)

    def test_cams_elsewhere(self) -> None:
        with pytest.raises(ValueError, match="histograms is on cpu and cams on meta"):
            DynamicThreshold(0.5).update(torch.zeros(1, 1, 4, 4, device="meta"))
