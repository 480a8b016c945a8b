"""DynamicThreshold, and that what it does on a GPU never waits for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cosa_kernels import DynamicThreshold, reference
from cosa_kernels.ops import confidence_histogram as module
from three_way import DEVICE, bimodal
from torch.utils._python_dispatch import TorchDispatchMode

IMPLS = ("reference", "torch", "triton")


class NoHostReads(TorchDispatchMode):
    """Fails where a value would travel from the device to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
        assert func not in reads, "a tensor was read by the host"
        return func(*args, **(kwargs or {}))


def batch(seed: int, low: float, high: float) -> torch.Tensor:
    values = np.resize(bimodal(seed, low, high, 0.3, 8000), (2, 1, 50, 60))
    return torch.from_numpy(values).float().to(DEVICE)


def dynamic(*args: Any, **kwargs: Any) -> DynamicThreshold:
    return DynamicThreshold(*args, **kwargs).to(DEVICE)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_runs_on_a_gpu_never_waits_for_it(impl: str) -> None:
    """An operator hides what happens inside it, so its insides are called here."""
    cams, box = batch(0, 0.2, 0.7), torch.tensor([[0, 50, 0, 30], [0, 50, 0, 30]], device=DEVICE)
    with NoHostReads():
        if impl == "triton":
            from cosa_kernels.gpu import confidence_histogram, fit_bimodal_threshold

            counts = confidence_histogram.count(cams, box, 256, 0.0, 1.0, 0.1)
            fit = fit_bimodal_threshold.fit(counts, 0.0, 1.0, 60, 50)
        else:
            fit = reference.fit_bimodal_threshold(module._count_anywhere(cams, box, 256, 0.0, 1.0, 0.1))
    assert float(fit) == pytest.approx(0.4, abs=0.05)


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
