"""What the studies say about their numbers: the networks, images and seeds behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny_runs import (
    SETTINGS,
    drawn,
    inputs_of,
    set_precision,
    table,
    write_index,
    write_inputs,
    write_segmenter,
)

from cosa_fast.data.index import Index
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import needs
from cosa_fast.studies.study import write_study


def heading(figure: Figure) -> str:
    """Title and subtitle on one line."""
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_systems_refuse_a_checkpoint_of_the_other_kind(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "systems")
    write_segmenter(inputs.checkpoints["cosa"])
    with pytest.raises(ValueError, match=r"cosa\.safetensors holds a 'segmenter' model, wanted 'cosa'"):
        table("systems", inputs)


def test_cpl_says_which_training_images_ours_are(tmp_path: Path) -> None:
    given = write_inputs(tmp_path, needs("cpl", SETTINGS))
    given["tables"]["cpl"].write_text(given["tables"]["cpl"].read_text().replace(",train,", ",train_aug,"))
    index = Index.load(write_index(tmp_path))
    splits = {"train_aug": index.splits["train"] * 1234, "val": index.splits["val"]}
    index = replace(index, train_split="train_aug", eval_splits=("val",), splits=splits)
    rows, figure = drawn("cpl", Inputs(index=index, **given))
    assert rows[0]["note"] == (
        "paper: VOC 2012 train, 1,464 images; ours: MiniVOC (synthetic), train_aug, 1,234 images"
    )
    assert rows[1]["note"] == "ours: MiniVOC (synthetic), train_aug, 1,234 images; not in the paper"
    assert "train_aug (1,234 images) and val (1 images); the paper's: VOC train (1,464) and VOC val" in heading(figure)


@pytest.mark.parametrize("name", ["guidance", "threshold", "oracle", "swap", "raw", "aux_cam", "confidence"])
def test_studies_of_one_seed_say_so(tmp_path: Path, name: str) -> None:
    rows, figure = drawn(name, inputs_of(tmp_path, name))
    text = heading(figure)
    assert "One run" in text
    assert "see the ladder's intervals for the spread between seeds" in text
    if name in ("guidance", "threshold"):
        assert all("one run per row: see the ladder's intervals" in row["note"] for row in rows)


def test_oracle_without_precision(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, "oracle")
    for of_seeds in inputs.runs.values():
        set_precision(of_seeds[0], None)
    rows, figure = drawn("oracle", inputs)
    assert {row["mean_average_precision"] for row in rows} == {""}
    assert all(row["cpl_miou"] for row in rows)
    named = [[text.get_text() for text in axes.texts].count("SPL (CoSA)") for axes in figure.axes]
    assert named == [0, 1]  # only lines that are there
    write_study("oracle", inputs, tmp_path / "oracle.csv", tmp_path / "oracle.svg")


def test_bars_of_the_speeds_reach_from_the_slowest_to_the_fastest(tmp_path: Path) -> None:
    rows, figure = drawn("speed", inputs_of(tmp_path, "speed"))
    bars = [container.lines[2][0].get_segments()[0] for container in figure.axes[0].containers]
    found = sorted(f"{slowest:.2f} {fastest:.2f}" for slowest, fastest in (bar[:, 0] for bar in bars))
    assert found == sorted(f"{row['slowest']} {row['fastest']}" for row in rows)


@pytest.mark.parametrize(
    ("encoder", "known"),
    [("tu-swin_base_patch4_window12_384.ms_in22k", "81.40"), ("wide_resnet38", "76.60"), ("tu-resnet101d", "76.50")],
)
def test_systems_name_the_papers_network(tmp_path: Path, encoder: str, known: str) -> None:
    inputs = inputs_of(tmp_path, "systems")
    write_segmenter(inputs.checkpoints["segmenter"], encoder=encoder)
    rows = [row for row in table("systems", inputs) if row["network"].endswith(encoder)]
    (row,) = [row for row in rows if (row["split"], row["setting"], row["crf"]) == ("val", "label-filtered", "none")]
    assert row["paper_voc"] == known
