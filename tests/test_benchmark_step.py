"""The benchmark of the training step at tiny sizes."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import precision, step, step_cases, step_profile
from benchmarks.step import Options
from benchmarks.step_cases import PRESETS, TINY, tflop, tflop_per_image


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmark sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny(**changes: Any) -> Options:
    return Options(**({"device": "cpu", "tiny": True, "turns": 2, "seconds": 0.0, "phases": ("guided",)} | changes))


def test_operations_are_those_counted_by_hand() -> None:
    counts = tflop_per_image(PRESETS["voc_b4"])
    # An independent count of the release's step: 1.283 for the teacher, 0.498 for the student.
    assert sum(counts.values()) == pytest.approx(1.781, abs=5e-4)
    assert tflop(PRESETS["voc_b4"], "warmup") == pytest.approx(4 * 0.498, rel=1e-3)


def test_the_csv_and_the_table_compare_with_the_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "step.csv"
    step.run(tiny(csv=path))
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {row["variant"] for row in rows} == {"fp32", "release"}
    assert {row["metric"] for row in rows} == {"time_ms", "images_per_s", "tflop_per_s", "peak_share"}
    assert all(float(row["p20"]) <= float(row["value"]) <= float(row["p80"]) for row in rows)
    capsys.readouterr()
    step.run(Options(device="cpu", csv=path, table=True))
    assert "| minivoc | 2 | guided | fp32 |" in capsys.readouterr().out


def test_a_variant_that_disagrees_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = step_cases.make_step

    def wrong(preset: Any, variant: Any, device: str) -> Any:
        right = make(preset, variant, device)
        return lambda *a: {name: value * (1.5 if variant == "bf16" else 1) for name, value in right(*a).items()}

    monkeypatch.setattr(step, "make_step", wrong)
    with pytest.raises(SystemExit, match=r"not measured, for the reasons above: minivoc bf16$"):
        step.run(tiny(variants=("bf16", "fp32"), csv=tmp_path / "step.csv"))
    assert "minivoc: bf16 is left out, ArithmeticError: the first loss of guided is" in capsys.readouterr().out
    with (tmp_path / "step.csv").open(newline="") as handle:
        assert {row["variant"] for row in csv.DictReader(handle)} == {"fp32"}


@pytest.mark.parametrize(
    ("failing", "variants", "measured"),
    [
        ("bf16", ("bf16", "fp32"), {"fp32"}),
        ("bf16", ("bf16",), None),
        ("fp32", ("release", "bf16"), {"release"}),  # without fp32 nothing says that bf16 is right
    ],
)
def test_a_variant_that_cannot_run_costs_the_others_nothing(
    failing: str,
    variants: Any,
    measured: set[str] | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = step_cases.make_step

    def broken(preset: Any, variant: Any, device: str) -> Any:
        if variant == failing:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")
        return make(preset, variant, device)

    monkeypatch.setattr(step, "make_step", broken)
    path = tmp_path / "step.csv"
    with pytest.raises(SystemExit, match=r"reasons above: minivoc bf16$"):
        step.run(tiny(variants=variants, csv=path))
    assert f"{failing} is left out, RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED\n" in capsys.readouterr().out
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    assert {row["variant"] for row in rows} == (measured or set())


def test_the_profile_names_the_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step.run(tiny(variants=("fp32",), profile=tmp_path))
    out = capsys.readouterr().out
    parts = (
        "teacher x1",
        "teacher x0.75",
        "merging",
        "targets",
        "student",
        "losses",
        "backward",
        "optimizer",
        "average",
    )
    assert all(f"| {part} | " in out for part in (*parts, "other"))
    assert (tmp_path / "minivoc_guided_fp32.json.gz").stat().st_size > 1000


def test_kernels_of_any_thread_belong_to_the_open_label() -> None:
    """As torch.profiler gives them for a GPU: labels on both clocks, kernels with the operators that launched them."""

    def event(name: str, start: int, end: int, *kernels: tuple[str, int], device: Any = DeviceType.CPU) -> Any:
        return SimpleNamespace(
            name=name,
            device_type=device,
            is_user_annotation=not name.startswith(("aten", "autograd")),
            time_range=SimpleNamespace(start=start, end=end),
            kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        )

    events = [
        event("step", 0, 100, ("step", 90)),
        event("student", 1, 40, ("triton_poi", 2), ("student", 35)),
        event("aten::mm", 5, 6, ("gemm", 30)),
        event("backward", 41, 80, ("backward", 38)),
        event("autograd::engine::evaluate_function", 45, 70, ("gemm_bwd", 20)),  # of another thread
        event("optimizer", 81, 89),
        event("Optimizer.step#AdamW.step", 82, 88, ("Optimizer.step#AdamW.step", 6), ("adamw", 5)),
        event("aten::copy_", 90, 91, ("copy", 4)),
        event("student", 1, 60, device=DeviceType.CUDA),
    ]
    expected = (("step", 61), ("student", 32), ("backward", 20), ("optimizer", 5))
    parts = step_profile._device_parts(events)
    assert parts == {name: value / 1000 / 3 for name, value in expected}


def test_impossible_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA"):
        step.run(Options(device="cuda"))
    with pytest.raises(SystemExit, match="at least 1"):
        step.run(Options(device="cpu", turns=0))


def test_the_batches_are_what_a_loader_gives() -> None:
    batch = step_cases.synthetic_batch(TINY["coco_b8"], "cpu")
    for labels, present in zip(batch.labels, batch.present, strict=True):
        assert labels.nonzero()[:, 0].tolist() == [label for label in present.tolist() if label >= 0]


def test_bf16_stays_near_fp32_and_rounding_nearer(tmp_path: Path) -> None:
    text = precision.run(precision.Options(device="cpu", preset="minivoc", tiny=True, steps=8, output=tmp_path))
    assert all(f"| {term} |" in text for term in ("cls", "cls_aux", "c2s", "s2c", "csc", "loss", "threshold"))
    with (tmp_path / "precision.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert {(row["run"], row["step"]) for row in rows if row["term"] == "csc"} == {
        (run, str(step)) for run in precision.RUNS for step in range(4, 8)
    }
    assert (tmp_path / "precision.svg").read_text().count("<path") > 10
    assert precision.differences([1.0, 3.0], [1.0, 2.0]) == pytest.approx((1 / 3, 2 / 3))
