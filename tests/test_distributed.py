"""The whole batch decides the result: 1 process x 4 images, 2 x 2 and parts of them end with the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_results import write_dataset, write_masks, write_true_store
from torchrun import torchrun

from cosa_fast.config import AugmentConfig, CosaConfig, TrainConfig
from cosa_fast.data.augment import Draws, Plan
from cosa_fast.distributed import World
from cosa_fast.training.single_stage import _check_parts

EXACT = {"rtol": 1e-9, "atol": 1e-12}
"""In float64. 8 % of it is needed, by the bias of attention's keys."""
ROUNDED = {"rtol": 1e-3, "atol": 1e-4}
"""In float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave: the cases in `cases.pt`, the stages' files in `together/`."""
    folder = tmp_path_factory.mktemp("distributed")
    write_masks(write_dataset(folder, train=9, val=5))
    write_true_store(folder / "index.json", folder / "store.zarr")
    done = torchrun(2, sys.executable, worker.__file__, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("case", list(worker.CASES))
def test_two_processes_with_two_images_are_one_with_four(folder: Path, case: str) -> None:
    alone, together = worker.train(case), torch.load(folder / "cases.pt", weights_only=True)[case]
    assert together.keys() == alone.keys()
    exact = worker.CASES[case][3] == torch.float64
    for name, value in alone.items():
        other, tolerance = together[name], EXACT if exact else ROUNDED
        if not exact and name.endswith("histograms"):
            # A plateau of one confidence may lie on the edge of a bin, so what is compared is the mean of each batch.
            assert torch.equal(other.sum(dim=1), value.sum(dim=1))
            centres = torch.linspace(0, 1, value.shape[1], dtype=torch.float64)
            value, other = (counts.double() @ centres / counts.sum(dim=1).clamp(min=1) for counts in (value, other))
            tolerance = {"rtol": 0, "atol": 2e-5}  # 40 of 7,768 confidences in the next bin
        if not exact and name.endswith("qkv.bias"):
            continue  # the gradient of a key's bias is 0 but for rounding, which Adam scales up to the learning rate
        torch.testing.assert_close(other, value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    losses = alone["curve.loss"]
    assert losses[5:8].mean() < losses[:3].mean()  # there was something to agree on


def test_parts_one_after_the_other_are_the_whole_batch() -> None:
    whole, parts = worker.train("release", parts=1), worker.train("release", parts=4)
    contrasted, halves = worker.train("paper", parts=1), worker.train("paper", parts=2)
    for one, two in ((whole, parts), (contrasted, halves)):
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_stages_end_with_the_same_files(folder: Path) -> None:
    worker.stages(folder, folder / "alone")
    names = [sorted(path.name for path in (folder / who).iterdir()) for who in ("alone", "together")]
    assert names[0] == names[1]
    for name, tolerance in (("cosa.safetensors", ROUNDED), ("segmenter.safetensors", EXACT)):
        alone, together = (load_file(folder / who / name) for who in ("alone", "together"))
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, **tolerance, msg=lambda m, n=key: f"{n}: {m}")
    for name in ("cosa.metrics.jsonl", "segmenter.metrics.jsonl", "cosa.validation.jsonl"):
        alone, together = (records(folder / who / name) for who in ("alone", "together"))
        assert len(alone) == len(together) > 0
        for one, two in zip(alone, together, strict=True):
            assert one.keys() == two.keys()
            assert one["iteration"] == two["iteration"]
            for key in one.keys() & {"loss", "cls", "c2s", "s2c", "csc", "threshold", "mean_average_precision"}:
                assert two[key] == pytest.approx(one[key], rel=1e-3), key


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_batch_that_cannot_be_shared_is_said(folder: Path) -> None:
    message = torch.load(folder / "cases.pt", weights_only=True)["error"]
    assert message.startswith("train.batch_size = 5 cannot be divided among 2 processes with train.accumulate = 1")
    assert not (folder / "uneven").exists() or not list((folder / "uneven").glob("*.safetensors"))


def test_parts_know_nothing_of_each_other() -> None:
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    parts = TrainConfig(batch_size=4, accumulate=2)
    with pytest.raises(ValueError, match=r"train\.accumulate = 2, but the model has batch norm"):
        _check_parts(norm, parts, CosaConfig(), World())
    with pytest.raises(ValueError, match="contrasts the whole batch at once"):
        _check_parts(torch.nn.Linear(1, 1), parts, CosaConfig(csc_scope="batch"), World())
    with pytest.raises(ValueError, match=r"batch_size = 4 .* 2 processes with train\.accumulate = 4: use 4 in all"):
        _check_parts(torch.nn.Linear(1, 1), TrainConfig(batch_size=4, accumulate=4), CosaConfig(), World(0, 2, 0))
    _check_parts(torch.nn.Linear(1, 1), parts, CosaConfig(), World(0, 2, 0))


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [3, 10])
def test_processes_draw_what_one_would(processes: int, count: int) -> None:
    sizes = np.random.default_rng(0).integers(30, 90, (count, 2))
    whole = Plan(AugmentConfig(crop=48), ("x",) * count, sizes, batch_size=8, seed=3)
    parts = [
        Plan(AugmentConfig(crop=48), ("x",) * count, sizes, 8 // processes, 3, rank, processes)
        for rank in range(processes)
    ]
    for iteration in (0, 5):
        one = whole.draws(iteration)
        for name in ("positions", "blur", "operation", "magnitude"):
            together = np.concatenate([getattr(part.draws(iteration), name) for part in parts])
            np.testing.assert_array_equal(together, getattr(one, name))
        np.testing.assert_array_equal(np.concatenate([box(part.draws(iteration)) for part in parts]), box(one))


def box(draws: Draws) -> np.ndarray:
    return np.hstack([draws.geometry.valid_box, draws.geometry.source_box])
