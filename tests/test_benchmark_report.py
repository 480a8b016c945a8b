"""The pages show what the CSV files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report


def test_pages_are_up_to_date() -> None:
    for name in report.PAGES:
        text = (report.ROOT / name).read_text()
        assert report.filled(text, report.ROOT / "benchmarks/results") == text, "run python -m benchmarks.report"
        assert report.PLACE.search(text)


def test_a_table_is_made_from_the_newest_rows(tmp_path: Path) -> None:
    folder = tmp_path / "some-gpu"
    folder.mkdir()
    columns = "date,device,torch,commit,preset,batch,phase,variant,metric,value"
    row = "{},cuda,2.11.0,{},voc_b4,4,guided,{},time_ms,{}"
    lines = [
        row.format("2026-01-01T00:00:00", "old", "release", 1),
        row.format("2026-11-26T10:00:00", "new", "release", 900),
        row.format("2026-11-26T10:00:00", "new", "bf16_compile", 30),
        row.format("2026-11-26T10:00:00", "new", "fp32", 90),
    ]
    (folder / "step.csv").write_text("\n".join([columns, *lines]) + "\n")
    page = "before\n<!-- table: summary some-gpu -->\nstale\n<!-- end -->\nafter"
    filled = report.filled(page, tmp_path)
    assert "| training step, voc_b4, guided, 4 images | 900 ms | 30 ms | **30x** | 2026-11-26, torch 2.11.0 |" in filled
    assert "stale" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter")
    assert report.filled(filled, tmp_path) == filled


def test_inference_compares_within_the_newest_run(tmp_path: Path) -> None:
    """On a shared machine another run of the same day is another machine."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    columns = "date,device,torch,network,views,provider,precision,crf,batch,cpu_s_per_image,images_per_s"
    row = "2026-11-26T{},cpu,2.14,voc,five,{},{},none,{},{},1"
    lines = [
        row.format("10:00", "release", "fp32", 1, 4.0),
        row.format("10:00", "ours", "fp32", 1, 0.5),
        row.format("11:00", "release", "fp32", 1, 6.0),
        row.format("11:00", "ours", "fp32", 1, 3.0),
        row.format("11:00", "ours", "fp32", 2, 2.0),
    ]
    (folder / "fps.csv").write_text("\n".join([columns, *lines]) + "\n")
    what = "inference, CoSA, 20 classes, five scales with mirror images, fp32"
    assert f"| {what} | 6 s | 2 s | **3x** | 2026-11-26, torch 2.14 |" in report.summary(folder)


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no such table"):
        report.filled("<!-- table: prices cpu -->\n<!-- end -->", tmp_path)
    with pytest.raises(SystemExit, match="no results there"):
        report.filled("<!-- table: kernels cpu -->\n<!-- end -->", tmp_path)
