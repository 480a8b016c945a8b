"""The benchmarks at tiny sizes: they measure what they say, refuse wrong results, and report what was measured."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import cosa_kernels
import pytest
import torch
from cosa_kernels import reference
from torch import Tensor

from benchmarks import common, kernels, measure, plot_kernels, release, shapes, step_cases, tune
from benchmarks.kernels import Options
from benchmarks.operations import BUILD, Inputs, build

ROOT = Path(__file__).resolve().parents[1]
WHERE = ["date", "device", "machine", "threads", "python", "torch", "triton", "commit", "dtype"]
WHAT = ["op", "shape", "batch", "classes", "pixels", "provider", "mode", "metric"]
COLUMNS = [*WHERE, *WHAT, "value", "p20", "p80"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmark sets them for its process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tiny(csv: Path, **changes: Any) -> Options:
    settings = {"ops": ("raw_cross_entropy",), "shapes": ("tiny",), "turns": 2, "seconds": 0.0}
    return Options(device="cpu", tiny=True, csv=csv, **(settings | changes))


def inputs(dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs("cpu", dtype, dtype)


def row(provider: str, metric: str, value: float, **changes: str) -> dict[str, str]:
    about = dict.fromkeys(COLUMNS, "") | {"device": "cpu", "machine": "M", "op": "f", "shape": "s", "mode": "full"}
    numbers = {column: str(value) for column in ("value", "p20", "p80")}
    return about | {"provider": provider, "metric": metric} | numbers | changes


CEILINGS = [row("ceiling", metric, 10.0, op="machine", mode="") for metric in ("gb_per_s", "gexp_per_s")]


# Measuring.


def test_the_csv_has_every_number_and_is_appended_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results/kernels.csv"
    kernels.run(tiny(path))
    with path.open(newline="") as handle:
        first = list(csv.DictReader(handle))
    assert list(first[0]) == COLUMNS
    measured = {(line["provider"], line["mode"], line["metric"]) for line in first if line["op"] != "machine"}
    metrics = ("time_ms", "memory_mib", "gb_per_s", "gexp_per_s", "floor_ms")
    assert measured == {
        (provider, mode, metric)
        for provider in ("eager", "ours", "release")
        for mode in ("forward", "backward", "full")
        for metric in metrics
    }
    assert all(
        float(line["p20"]) <= float(line["value"]) <= float(line["p80"]) for line in first if line["p20"] != "nan"
    )
    assert all(float(line["value"]) > 0 for line in first if line["metric"] in ("time_ms", "floor_ms"))
    assert {line["metric"] for line in first if line["op"] == "machine"} == {"gb_per_s", "gexp_per_s"}

    kernels.run(tiny(path, providers=("ours",), turns=1))
    with path.open(newline="") as handle:
        both = list(csv.DictReader(handle))
    assert both[: len(first)] == first
    assert len(both) == len(first) + 2 + len(metrics) * 3

    capsys.readouterr()
    kernels.run(Options(table=True, csv=path))
    assert "| raw_cross_entropy | tiny | full | release |" in capsys.readouterr().out


def test_every_operation_agrees_with_float64(capsys: pytest.CaptureFixture[str]) -> None:
    kernels.run(Options(device="cpu", smoke=True))
    assert capsys.readouterr().out == f"gate: {', '.join(BUILD)} agree with float64 (float32, cpu)\n"


@pytest.mark.parametrize("name", BUILD)
def test_providers_agree_at_the_tiny_size(name: str) -> None:
    case = build(name, shapes.SHAPES[name]["tiny"][0], inputs())
    ready = measure.warmed_up(name, case, case.providers, torch.float32)
    assert ready.keys() == case.providers.keys()
    assert all(work.bytes > 0 for work in case.work.values())


def wrong_value(loss: Tensor, logits: Tensor) -> Tensor:
    return 1.001 * loss.detach() + (loss - loss.detach())


def wrong_gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return loss + 0.01 * (logits.sum() - logits.sum().detach())


@pytest.mark.parametrize(("broken", "what"), [(wrong_value, "value"), (wrong_gradient, "gradient")])
def test_nothing_is_measured_when_an_operation_is_wrong(
    broken: Any, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cosa_kernels.raw_cross_entropy
    monkeypatch.setattr(
        cosa_kernels,
        "raw_cross_entropy",
        lambda logits, *rest, **options: broken(right(logits, *rest, **options), logits),
    )
    path = tmp_path / "kernels.csv"
    with pytest.raises(SystemExit, match=f"raw_cross_entropy is wrong, so nothing is measured: its {what}"):
        kernels.run(tiny(path))
    assert not path.exists()


def test_providers_must_agree_where_they_are_measured() -> None:
    case = build("upsample_cross_entropy", shapes.TINY, inputs())
    calls = {**case.providers, "ours": lambda: 1.01 * case.providers["ours"]()}
    with pytest.raises(SystemExit, match=r"the value of ours differs from that of eager by 1\.0e-02"):
        measure.warmed_up("here", case, calls, torch.float32)


def test_a_baseline_that_fails_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> Tensor:
        raise torch.OutOfMemoryError("too large")

    case = build("upsample_cross_entropy", shapes.TINY, inputs())
    ready = measure.warmed_up("here", case, {**case.providers, "eager": fail}, torch.float32)
    assert list(ready) == ["ours"]
    assert "here: eager left out, OutOfMemoryError: too large" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        measure.warmed_up("here", case, {"ours": fail}, torch.float32)


def test_a_relative_error_of_nan_is_infinite() -> None:
    assert measure.relative_error(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])) == float("inf")
    assert measure.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ops": ("raw",)}, "--ops raw: no such operation; there are raw_cross_entropy, "),
        ({"shapes": ("voc_b3",)}, "--shapes voc_b3: no such shape here; there are tiny, tiny_aux"),
        ({"sweep": True}, "--sweep has an operation and shapes of its own"),
        ({"smoke": True, "table": True}, "--table and --smoke exclude each other"),
        ({"turns": 0}, "--turns and --threads must be at least 1, got 0 and 1"),
        ({"table": True}, "no results there; measure first, or pass --csv"),
    ],
)
def test_impossible_options(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        kernels.run(tiny(tmp_path / "absent.csv", **changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="--device cuda: this torch sees no CUDA"):
        kernels.run(Options(device="cuda"))
    with pytest.raises(SystemExit, match="tuning needs a GPU"):
        tune.run(tune.Options())


# What is counted.


def test_the_least_bytes_and_exponentials_of_a_small_case() -> None:
    shape = shapes.Shape("s", batch=2, classes=3, low=(3, 2), high=(24, 16), targets=2)
    work = build("raw_cross_entropy", shape, inputs()).work
    # 2 x 4 x 3 x 2 logits, two times 2 x 3 x 3 x 2 CAMs, 4 bytes each.
    assert work["forward"].bytes == 4 * (48 + 2 * 36)
    assert work["full"].bytes == 4 * (48 + 2 * 36 + 48)
    assert work["backward"].bytes == 4 * 2 * 48
    # 2 x 24 x 16 pixels: an exponential per channel, a logarithm of the sum, and one for each target's perplexity.
    assert work["full"].exps == 768 * (4 + 1 + 2)


def test_quantiles() -> None:
    assert common.spread([5.0]) == (5.0, 5.0, 5.0)
    assert common.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (3.5, 2.0, 5.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts it")
def test_memory_sees_temporaries_that_are_freed_again() -> None:
    def call() -> Tensor:
        return torch.ones(10 * 2**20).mul_(2.0).sum() + torch.ones(5 * 2**20).sum()

    call()
    assert common.peak_memory(call, None, "cpu")["forward"] == pytest.approx(40, abs=2)


def test_other_columns_are_not_mixed_into_a_csv(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    common.append_csv(path, [{"a": 1, "b": 2}])
    with pytest.raises(SystemExit, match="has other columns than this benchmark writes"):
        common.append_csv(path, [{"a": 1, "c": 2}])
    assert path.read_text().split() == ["a,b", "1,2"]


def test_the_kernel_behind_the_ceiling_of_exponentials() -> None:
    from benchmarks.exp_kernel import exp_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.empty(64, device=device)
    exp_kernel[(1,)](out, STEPS=5, BLOCK=64)
    expected = torch.arange(64, device=device) * 1e-9
    for _ in range(5):
        expected = torch.exp2(-expected)
    torch.testing.assert_close(out, expected)


# The release's formulation.


def test_release_labels_have_an_ignored_band() -> None:
    # One present class; confidence 0.9, 0.5, 0.1 on large areas, and an absent class that is stronger everywhere.
    cams = torch.zeros(1, 2, 8, 24)
    cams[0, 0] = torch.tensor([0.9, 0.5, 0.1]).repeat_interleave(8)
    cams[0, 1] = 0.95
    labels = release.pseudo_labels(cams, torch.tensor([[1, 0]]), torch.tensor([[2, 8, 0, 24]]))
    assert labels[0, 4, [3, 12, 20]].tolist() == [1, 255, 0]
    assert set(labels[0, :2].flatten().tolist()) == {255}


def test_release_loss_of_two_pixels() -> None:
    # A background pixel with CE log(1 + e) and two foreground pixels with CE log 2 and log(1 + e^-2), at one target;
    # the other target ignores all but a foreground pixel.
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0]]).view(1, 2, 1, 3)
    main, aux = torch.tensor([[[0, 1, 1]]]), torch.tensor([[[255, 1, 255]]])
    log = torch.log
    background = log(torch.tensor(1 + 2.718281828))
    foreground = [log(torch.tensor(2.0)), log(1 + torch.exp(torch.tensor(-2.0)))]
    expected = (0.5 * background + 0.5 * sum(foreground) / 2 + 0.5 * foreground[0]) / 2
    torch.testing.assert_close(release.balanced_cross_entropy(logits, [main, aux]), expected)


def test_release_targets_are_those_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    views, mirrored, seg, seg_mirrored = (
        [torch.randn(2, channels, side, side, generator=generator) for side in (4, 6)] for channels in (3, 3, 4, 4)
    )
    present = torch.tensor([[1, 0, 1], [0, 1, 0]])
    flipped, seg_flipped = ([view.flip(-1) for view in maps] for maps in (mirrored, seg_mirrored))
    torch.testing.assert_close(
        release.merge_cams(views, mirrored, present, (16, 20)),
        reference.merge_cams(views, flipped, class_labels=present, size=(16, 20)),
    )
    probabilities = release.seg_pseudo_labels(seg, seg_mirrored, present, (16, 20), temperature=0.5)
    torch.testing.assert_close(
        probabilities,
        reference.seg_pseudo_labels([*seg, *seg_flipped], present, temperature=0.5, size=(16, 20)),
    )
    cams = torch.rand(2, 3, 4, 4, generator=generator)
    torch.testing.assert_close(
        release.seg_to_cam_loss(cams, probabilities),
        reference.seg_to_cam_loss(cams, [*seg, *seg_flipped], present, temperature=0.5, size=(16, 20)),
    )


def test_scikit_learn_finds_the_gaps() -> None:
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    modes = [mean + 0.03 * torch.randn(2000, generator=generator) for mean in (0.2, 0.5, 0.8)]
    assert release.fit_two_modes(torch.cat([modes[0], modes[2]])) == pytest.approx(0.5, abs=0.05)
    low, high = release.fit_thresholds(torch.cat(modes))
    assert 0.2 < low < high < 0.95


# Reporting.


def test_the_table_shows_the_newest_and_the_ratio_to_eager() -> None:
    rows = [
        *CEILINGS,
        row("eager", "time_ms", 8.0),
        row("eager", "memory_mib", 50.0),
        row("ours", "time_ms", 4.0),
        row("ours", "memory_mib", 5.0),
        row("ours", "gb_per_s", 1.0),
        row("ours", "floor_ms", 0.5),
        row("ours", "time_ms", 2.0),
        *(line | {"machine": "other"} for line in [*CEILINGS, row("ours", "time_ms", 7.0)]),
    ]
    text = plot_kernels.table(rows)
    ours = next(line for line in text.splitlines() if "| ours |" in line)
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert cells == ["f", "s", "full", "ours", "2 (2 to 2)", "", "4", "5 (10 %)", "1 (10 %)", "", "0.5", "4"]
    assert text.count("| operation |") == 2
    assert text.count("| ours |") == 2


def test_the_figure_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "sweep.csv"
    lines = list(CEILINGS)
    for shape in shapes.sweep("tiny"):
        size = {"shape": shape.name, "batch": str(shape.batch), "classes": str(shape.classes)}
        size["pixels"] = str(shape.high[0] * shape.high[1])
        for provider, factor in (("eager", 4.0), ("ours", 1.0)):
            for metric in ("time_ms", "memory_mib"):
                lines.append(row(provider, metric, factor * shape.high_pixels, **size))
    common.append_csv(path, lines)
    plot_kernels.draw(path)
    assert path.with_suffix(".svg").read_text().count('id="axes_') == 6
    assert path.with_suffix(".png").stat().st_size > 10_000


# Tuning and the GPU script.


def test_launch_configurations_are_changed_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    launches: list[dict[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, **keywords: launches.append(keywords))
    before = JITFunction.run

    def kernel(name: str, module: str = "cosa_kernels.gpu.some") -> Any:
        return SimpleNamespace(fn=SimpleNamespace(__name__=name, __module__=module))

    with tune.seen() as found:
        JITFunction.run(kernel("a"), num_warps=2)
        JITFunction.run(kernel("a"), num_warps=2)
        JITFunction.run(kernel("b", "elsewhere"), num_warps=4)
    assert found == [tune.Kernel("a", "cosa_kernels.gpu.some", 2)]
    with tune.with_warps("a", 8):
        JITFunction.run(kernel("a"), num_warps=2)
        JITFunction.run(kernel("c"), num_warps=2)
    assert [keywords["num_warps"] for keywords in launches[-2:]] == [8, 2]
    assert JITFunction.run is before

    module: Any = SimpleNamespace(TILE=4)
    with tune.changed(module, "TILE", 8):
        assert module.TILE == 8
    assert module.TILE == 4


def test_tiny_results_are_not_kept_with_the_others() -> None:
    assert common.results_folder("cpu") == ROOT / "benchmarks/results/cpu"
    assert ROOT not in common.results_folder("cpu", tiny=True).parents


def test_the_gpu_script_parses() -> None:
    subprocess.run(["bash", "-n", ROOT / "benchmarks/gpu.sh"], check=True)


def gpu_script(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "benchmarks/gpu.sh", *arguments],
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_dry_run_of_the_gpu_script(tmp_path: Path) -> None:
    result = gpu_script("--dry", "versions", "tune", out=tmp_path / "out")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| versions | ok |" in result.stdout
    assert "| tune | not run, it needs a GPU | 0 |" in result.stdout
    assert f"torch {version('torch')}" in (tmp_path / "out/gpu.log").read_text()


def test_the_gpu_script_names_what_there_is() -> None:
    """What a dry run does not run: the arguments for a GPU."""
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    for module in set(re.findall(r"-m (benchmarks\.\w+)", script)):
        assert importlib.util.find_spec(module) is not None, module
    for word in " ".join(re.findall(r"--variants ((?:\w+ ?)+)", script)).split():
        assert word in get_args(step_cases.Variant), word
    for word in " ".join(re.findall(r"--phases ((?:\w+ ?)+)", script)).split():
        assert word in step_cases.PHASES, word


def test_the_gpu_script_knows_its_sections(tmp_path: Path) -> None:
    result = gpu_script("--dry", "benchmark", out=tmp_path)
    assert result.returncode == 2
    assert "no section benchmark; there are: versions tests" in result.stderr


def test_loaders(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from benchmarks import loader

    loader.run(loader.Options(tiny=True, parts=("all", "none"), consume=1000.0, csv=tmp_path / "loader.csv"))
    with (tmp_path / "loader.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 2 * 3 * 2  # parts, methods, turns
    pixels = 2 * 3 * 32 * 32 / 1000
    for row in rows:
        assert float(row["images_per_s"]) > 0
        assert 0 < float(row["waiting_percent"]) < 100
        assert float(row["kb_handed_over"]) == pytest.approx(pixels * (1 if row["method"] == "torch" else 4), abs=0.1)
