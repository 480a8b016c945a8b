"""The evaluation benchmark, small: that it measures what it says, and refuses what it cannot."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from tiny_photos import write_photos

from benchmarks import evaluation
from benchmarks.evaluation import Options, run
from cosa_fast.inference import label_maps


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_a_repeated_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = write_photos(tmp_path / "photos")
    (tmp_path / "masks").mkdir()
    for file in files:
        with PilImage.open(file) as image:
            mask = np.zeros((image.height, image.width), dtype=np.uint8)
        mask[:20, :20], mask[20:40, :20] = 80, 255
        PilImage.fromarray(mask).save(tmp_path / "masks" / f"{file.stem}.png")
    table = tmp_path / "out.csv"
    run(Options(images=tmp_path / "photos", masks=tmp_path / "masks", side=40, count=21, samples=4, csv=table))
    rows = read(table)
    assert [row["images"] for row in rows] == ["5", "10", "15", "20", "21"]
    assert {row["case"] for row in rows} == {"40 px"}
    seconds = [float(row["seconds"]) for row in rows]
    assert sorted(seconds) == seconds
    assert all(float(row["mib"]) > 50 for row in rows)
    text = capsys.readouterr().out
    assert "val (21 images); 80 classes and background" in text
    assert "class 78" in text.split("left out of the mean")[1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty has no .jpg files: pass --images a folder of photographs"):
        run(Options(images=tmp_path / "empty", csv=table))


def test_wrong_bands_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluation.CASES, "tiny", (6, (30, 40)))
    calls = evaluation._ways("tiny")
    assert (calls["whole"]() == calls["bands"]()).float().mean() > 0.99
    monkeypatch.setattr(evaluation, "label_maps", lambda *args: [maps.clamp(max=1) for maps in label_maps(*args)])
    with pytest.raises(SystemExit, match=r"bands are wrong, so nothing is measured: \d+ pixels differ"):
        evaluation._ways("tiny")
