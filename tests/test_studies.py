"""The studies' formulas against hand-computed values, their inputs, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cosa_kernels.reference import perplexity_of
from tiny_runs import (
    CLASSES,
    ITERATIONS,
    set_last,
    set_metadata,
    set_precision,
    write_index,
    write_iou_table,
    write_run,
    write_segmenter,
)

from cosa_fast.config import StudiesConfig, load_config
from cosa_fast.data.index import Index
from cosa_fast.models import checkpoint
from cosa_fast.studies import runs, stats
from cosa_fast.studies.coexistence import c_miou
from cosa_fast.studies.confidence import correlation, group
from cosa_fast.studies.inputs import Inputs, parse_named_paths, parse_runs
from cosa_fast.studies.needs import STUDIES, needs
from cosa_fast.studies.raw import distance_to_ideal
from cosa_fast.studies.runs import checkpoint_metadata, load_run
from cosa_fast.studies.tables import percent, read_iou_table, signed
from cosa_fast.studies.variants import VARIANTS, variant


def test_interval_of_a_mean() -> None:
    summary = stats.summarise([1.0, 2.0, 3.0])
    assert (summary.mean, summary.values) == (2.0, (1.0, 2.0, 3.0))
    assert summary.half == pytest.approx(4.302653 / 3**0.5, abs=1e-6)  # s = 1, t(0.975; 2) = 4.302653
    assert stats.summarise([5.0]).half is None


def test_paired_difference_uses_the_differences_own_spread() -> None:
    difference = stats.paired_difference([5.0, 7.0, 6.0], [4.0, 4.0, 5.0])
    assert difference.values == (1.0, 3.0, 1.0)
    assert difference.mean == pytest.approx(5 / 3)
    assert difference.half == pytest.approx(4.302653 * (4 / 3) ** 0.5 / 3**0.5, abs=1e-5)  # s^2 = 4 / 3
    with pytest.raises(ValueError, match="argument"):
        stats.paired_difference([1.0], [1.0, 2.0])


def test_miou_from_counts() -> None:
    hits, truth, predicted = (np.array(values) for values in ([6, 2, 0], [8, 4, 0], [9, 3, 0]))
    values = stats.iou(hits, truth, predicted)
    assert values[:2] == pytest.approx([100 * 6 / 11, 40.0])
    assert np.isnan(values[2])
    assert stats.mean_iou(values) == pytest.approx((100 * 6 / 11 + 40) / 2)
    assert np.isnan(stats.mean_iou(np.array([np.nan])))


def test_perplexity() -> None:
    confidence = np.array([0.7, 0.1, 0.4, 1.0])
    values = stats.perplexity(confidence, xi=0.4, alpha=0.8, beta=1.0)
    # Normalised distances 0.5, 0.75, 0 and 1.
    assert values == pytest.approx([-np.log(0.4), -np.log(0.6), stats.UNSURE, -np.log(0.8)])
    assert stats.perplexity(confidence[:2], 0.4, 0.8, 2.0) == pytest.approx([np.log(0.4) ** 2, np.log(0.6) ** 2])


def test_perplexity_is_that_of_the_training() -> None:
    centres = stats.bin_centres(256)
    assert centres[[0, 255]] == pytest.approx([0.5 / 256, 255.5 / 256])
    expected = perplexity_of(torch.from_numpy(centres), 0.437, 0.8, 1.0).clamp(max=stats.UNSURE)
    np.testing.assert_allclose(stats.perplexity(centres, 0.437, 0.8, 1.0), expected.numpy(), rtol=1e-9)


def test_pearson() -> None:
    x, y = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 2.0])
    assert stats.pearson(x, y, np.ones(3)) == pytest.approx(0.5)
    assert stats.pearson(x, y, np.array([1, 2, 1])) == pytest.approx(1 / 5.5**0.5)
    assert stats.pearson(x, y, np.array([1, 2, 1])) == pytest.approx(
        np.corrcoef(np.repeat(x, [1, 2, 1]), np.repeat(y, [1, 2, 1]))[0, 1]
    )
    assert np.isnan(stats.pearson(x, np.ones(3), np.ones(3)))


def test_c_miou_is_the_mean_over_the_named_classes(tmp_path: Path) -> None:
    prefix = write_run(tmp_path, "cosa")
    set_last(prefix, "cam", [90.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    last = load_run("cosa", 0, prefix).last()
    assert c_miou(last, ("aeroplane", "bird", "train")) == pytest.approx((10 + 20 + 60) / 3)
    assert last.miou("cam") == pytest.approx(300 / 7)
    with pytest.raises(ValueError, match=r"studies.coexisting names car: give classes of the dataset, out of aeropl"):
        c_miou(last, ("bird", "car"))
    with pytest.raises(ValueError, match="names no class"):
        c_miou(last, ())


def test_groups_of_confidence_bins(tmp_path: Path) -> None:
    prefix = write_run(tmp_path, "cosa")
    path = prefix.with_name("cosa.validation.jsonl")
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    right, wrong = np.zeros((2, 256), dtype=int)
    right[[0, 1, 200]], wrong[[0, 200]] = (6, 3, 8), (1, 2)
    last |= {"xi": 0.5, "confidence": {"right": right.tolist(), "wrong": wrong.tolist()}}
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]))
    run = load_run("cosa", 0, prefix)
    record = run.last()
    groups = group(run, record, np.arange(256) // 128, 3)
    assert groups.pixels.tolist() == [10, 10, 0]
    assert groups.accuracy[:2] == pytest.approx([90.0, 80.0])
    p = [-np.log(0.8 * (0.5 - (k + 0.5) / 256) / 0.5) for k in (0, 1)]
    p.append(-np.log(0.8 * (200.5 / 256 - 0.5) / 0.5))
    assert groups.perplexity[:2] == pytest.approx([(7 * p[0] + 3 * p[1]) / 10, p[2]])
    assert np.isnan(groups.accuracy[2])
    assert run.mean_perplexity(record) == pytest.approx((7 * p[0] + 3 * p[1] + 10 * p[2]) / 20)
    points = np.repeat(p, [7, 3, 10]), np.repeat([6 / 7, 1.0, 0.8], [7, 3, 10])
    assert correlation(run, record, weighted=True) == pytest.approx(np.corrcoef(*points)[0, 1])
    assert correlation(run, record, weighted=False) == pytest.approx(np.corrcoef(p, [6 / 7, 1.0, 0.8])[0, 1])


def test_distance_to_the_ideal() -> None:
    assert distance_to_ideal(np.array([0.7, 1.0]), np.array([0.5, 0.0])) == pytest.approx([0.4, 0.0])


def test_cells() -> None:
    assert [percent(1.005), percent(None), percent(float("nan")), signed(2.0), signed(-0.5), signed(None)] == [
        "1.00", "", "", "+2.00", "-0.50", "",
    ]  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_needs_name_known_variants(name: str) -> None:
    studies = StudiesConfig(seeds=(3, 4), thresholds=(0.25,))
    need = needs(name, studies)
    assert set(need.variants) <= {*VARIANTS, "threshold_0.25"}
    assert need.runs == tuple((variant, seed) for variant in need.variants for seed in need.seeds)
    assert need.seeds in ((), (3,), (3, 4))
    assert set(need.tables) <= {"main", "cpl", "crf_release", "crf_standard"}


def test_needs_are_light_and_know_their_names() -> None:
    code = (
        "import sys; from cosa_fast.studies.needs import needs; "
        "print([m for m in ('numpy', 'torch', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    with pytest.raises(ValueError, match="there is no study 'table9': systems, cpl"):
        needs("table9", StudiesConfig())


def test_flags() -> None:
    parsed = parse_runs(["cosa:0:results/cosa", "cosa:1:a:b", "gc:0:x"])
    assert parsed == {"cosa": {0: Path("results/cosa"), 1: Path("a:b")}, "gc": {0: Path("x")}}
    assert parse_named_paths("table", ["main:a.csv"]) == {"main": Path("a.csv")}
    for text in ("cosa", "cosa:0", "cosa:zero:x", ":0:x"):
        with pytest.raises(ValueError, match=f"--run {text}: wanted VARIANT:SEED:PREFIX"):
            parse_runs([text])
    with pytest.raises(ValueError, match="--table main: wanted NAME:PATH"):
        parse_named_paths("table", ["main"])


def test_a_run_is_read(tmp_path: Path) -> None:
    run = load_run("no_raw", 2, write_run(tmp_path, "no_raw", 2))
    assert (run.dataset, run.train.seed, run.cosa.raw, run.cosa.csc) == ("MiniVOC", 2, False, True)
    assert [record.iteration for record in run.curve()] == list(range(100, 1001, 100))
    assert run.last().classes == ("background", *CLASSES)
    assert run.last().per_image is not None
    assert run.curve()[0].per_image is None
    assert run.last("online").network == "online"
    assert runs.HEADER == checkpoint.HEADER


def damage(path: Path, how: str) -> None:
    """Spoil a validation log."""
    lines = path.read_text().splitlines()
    record: dict[str, Any] = json.loads(lines[2])
    if how == "cut":
        path.write_text("\n".join(lines)[:-40])
    elif how == "unfinished":
        path.write_text("\n".join(lines[:-2]))
    elif how == "twice":
        path.write_text("\n".join(lines[:4] + lines))
    elif how == "key":
        del record["seg_free"]["truth"]
        path.write_text("\n".join([*lines[:2], json.dumps(record), *lines[3:]]))
    elif how == "classes":
        record["cam"]["hits"].pop()
        path.write_text("\n".join([*lines[:2], json.dumps(record), *lines[3:]]))
    elif how == "list":
        path.write_text("[1]\n" + "\n".join(lines))
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut", r"validation.jsonl, line 20 is damaged"),
        ("unfinished", r"ends at iteration 900 of 1000: delete it"),
        ("twice", r"iterations go back"),
        ("key", r"line 3: 'truth' is missing"),
        ("classes", r"line 3 is damaged \(cam does not have 7 classes\)"),
        ("list", r"line 1 is damaged"),
        ("missing", r"cannot read the validation log .*No such file"),
    ],
)
def test_damaged_logs_are_named_with_the_target_that_makes_them(tmp_path: Path, how: str, message: str) -> None:
    prefix = write_run(tmp_path, "cosa")
    damage(prefix.with_name("cosa.validation.jsonl"), how)
    with pytest.raises(ValueError, match=message) as caught:
        load_run("cosa", 0, prefix)
    assert f"snakemake --cores all {prefix}.safetensors" in str(caught.value)


def test_bad_checkpoints(tmp_path: Path) -> None:
    prefix = write_run(tmp_path, "cosa")
    with pytest.raises(ValueError, match="was trained with seed 0, not 1"):
        load_run("cosa", 1, prefix)
    for other, reason in [
        ("no_csc", r"cosa.csc = True, not False"),
        ("detach_cls", r"model.detach = 'none', not 'cls'"),
        ("threshold_0.3", r"cosa.dynamic_threshold = True, not False"),
    ]:
        with pytest.raises(ValueError, match=f"is not the variant '{other}': it was trained with {reason}"):
            load_run(other, 0, prefix)
    with pytest.raises(ValueError, match="there is no variant 'cosaa'"):
        load_run("cosaa", 0, prefix)
    path = prefix.with_name("cosa.safetensors")
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match=r"the checkpoint .* cannot be read .*make it with `snakemake"):
        load_run("cosa", 0, prefix)
    path.unlink()
    with pytest.raises(ValueError, match=r"the checkpoint .* is missing: make it with `snakemake"):
        load_run("cosa", 0, prefix)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: json.dumps(content)[:-9], r"metadata of .* is damaged \(JSONDecodeError"),
        (lambda _: [1], r"metadata of .* is damaged \(TypeError"),
        (lambda _: {"schema": 1}, r"metadata of .* is damaged \(KeyError\('kind'\)\)"),
        (lambda content: without(content, "dataset", "iteration"), r"metadata of .* lacks dataset, iteration"),
        (lambda content: content | {"config": [1]}, r"lacks config\.model\.name, config\.cosa, config\.train"),
        (lambda content: content | {"config": without(content["config"], "cosa")}, r"lacks config\.cosa"),
    ],
)
def test_damaged_metadata(tmp_path: Path, damage: Callable[[Any], object], message: str) -> None:
    prefix = write_run(tmp_path, "cosa")
    path = prefix.with_name("cosa.safetensors")
    set_metadata(path, damage(checkpoint_metadata(path, "cosa", "")))
    with pytest.raises(ValueError, match=message) as caught:
        load_run("cosa", 0, prefix)
    assert str(path) in str(caught.value)
    assert f"delete it, then make it with `snakemake --cores all {path}`" in str(caught.value)


def without(content: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name not in names}


def test_a_checkpoint_of_the_other_kind(tmp_path: Path) -> None:
    prefix = write_run(tmp_path, "cosa")
    path = prefix.with_name("cosa.safetensors")
    with pytest.raises(ValueError, match=r"holds a 'cosa' model, wanted 'segmenter': give the `multistage` stage's"):
        checkpoint_metadata(path, "segmenter", "make it")
    write_segmenter(path)
    with pytest.raises(
        ValueError, match=r"cosa\.safetensors holds a 'segmenter' model, wanted 'cosa': give the `train`"
    ):
        load_run("cosa", 0, prefix)


def test_no_precision_where_no_class_occurs(tmp_path: Path) -> None:
    prefix = write_run(tmp_path, "cosa")
    set_precision(prefix, None)
    run = load_run("cosa", 0, prefix)
    assert all(math.isnan(record.mean_average_precision) for record in run.validations)


@pytest.mark.parametrize("preset", ["config.yaml", "release.yaml"])
def test_variants_differ_in_the_five_parts_alone(preset: str) -> None:
    config = load_config(Path(__file__).resolve().parents[1] / "config" / preset)
    parts = {"guidance", "swap", "raw", "csc", "dynamic_threshold"}
    rest = {name: variant(config, name, 0).cosa.model_dump(exclude=parts) for name in VARIANTS}
    assert all(settings == rest["cosa"] for settings in rest.values())
    fixed = variant(config, "threshold_0.7", 0).cosa
    assert fixed.model_dump(exclude=parts) == rest["cosa"] | {"threshold": 0.7}
    for name in VARIANTS:  # combinations that the training takes
        type(fixed).model_validate(variant(config, name, 0).cosa.model_dump())


def test_only_comparable_runs_are_compared(tmp_path: Path) -> None:
    index = Index.load(write_index(tmp_path))
    cosa, gc = write_run(tmp_path, "cosa"), write_run(tmp_path, "gc")

    def compare(paths: dict[str, dict[int, Path]]) -> None:
        Inputs(index=index, runs=paths).compare(("cosa", "gc"))

    compare({"cosa": {0: cosa}, "gc": {0: gc}})
    with pytest.raises(ValueError, match="needs runs of 'gc': give --run gc:SEED:PREFIX"):
        compare({"cosa": {0: cosa}})
    with pytest.raises(ValueError, match="'cosa' has runs with the seeds 0 but 'gc' with 1: only the same seeds"):
        compare({"cosa": {0: cosa}, "gc": {1: gc}})
    shorter = write_run(tmp_path / "short", "gc", iterations=ITERATIONS - 100)
    with pytest.raises(ValueError, match=r"ends with iteration = 900 but .* with 1000"):
        compare({"cosa": {0: cosa}, "gc": {0: shorter}})
    other = write_run(tmp_path / "other", "gc", dataset="VOC2012")
    with pytest.raises(ValueError, match="is of the dataset VOC2012, the index of MiniVOC"):
        compare({"cosa": {0: cosa}, "gc": {0: other}})


def test_iou_tables(tmp_path: Path) -> None:
    path = write_iou_table(tmp_path / "iou.csv", {("val", "CoSA", "label-free"): 51.0})
    table = read_iou_table(path, "make it")
    assert table.get("val", "CoSA", "label-free") == 51.0
    with pytest.raises(ValueError, match="has no mIoU of CoSA-MS, label-free, on val: make it"):
        table.get("val", "CoSA-MS", "label-free")
    path.write_text(path.read_text().replace("51.00", "much"))
    with pytest.raises(ValueError, match="line 4: iou = 'much' is no number: make it"):
        read_iou_table(path, "make it")
    path.write_text("dataset,split\nMiniVOC,val\n")
    with pytest.raises(ValueError, match="line 2 is without system, setting, class, iou: make it"):
        read_iou_table(path, "make it")
    path.write_text("")
    with pytest.raises(ValueError, match="is empty: make it"):
        read_iou_table(path, "make it")
    with pytest.raises(ValueError, match=r"cannot read the table .*absent.csv \(No such file.*make it"):
        read_iou_table(tmp_path / "absent.csv", "make it")
