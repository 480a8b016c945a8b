"""The inference benchmark, tiny: what it measures, what it refuses, and its table."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import fps, fps_methods, release
from benchmarks.fps import Options, run
from benchmarks.fps_methods import VIEWS, gate, gflop, made_pictures, random_network
from benchmarks.fps_table import table
from cosa_fast.config import RuntimeConfig
from cosa_fast.models.checkpoint import CosaCheckpoint
from cosa_fast.runtime import resolve
from tests.tiny_photos import write_photos
from tests.tiny_results import write_checkpoint

pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")

MACHINE = resolve(RuntimeConfig(device="cpu"), 1)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def tiny(path: Path, **changes: Any) -> Options:
    settings: dict[str, Any] = {"networks": ("voc",), "views": ("single",), "seconds": 0.0, "turns": 2}
    return Options(device="cpu", tiny=True, csv=path, **(settings | changes))


def test_every_method_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fps.csv"
    run(tiny(path, views=("five", "single"), precisions=("fp32", "bf16"), best_batch=3, crf=("none", "release")))
    rows = read(path)
    assert len({row["date"] for row in rows}) == 1
    methods = [tuple(row[column] for column in ("provider", "batch", "precision", "compile", "crf")) for row in rows]
    assert methods[: len(rows) // 2] == methods[len(rows) // 2 :] == [
        ("release", "1", "fp32", "off", "none"),
        ("release", "1", "fp32", "off", "release"),
        *[("ours", batch, kind, "off", "none") for kind in ("fp32", "bf16") for batch in ("1", "3")],
        ("ours", "3", "fp32", "off", "release"),
        ("decoding", "1", "", "", "none"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < float(row["slowest"]) <= float(row["images_per_s"]) <= float(row["fastest"])
        assert row["images"] == {"decoding": "32"}.get(row["provider"], str(2 * int(row["batch"])))
        assert (row["device"], row["threads"], row["torch"]) == ("cpu", "1", torch.__version__)
        assert all(row[column] for column in ("machine", "python", "triton", "commit", "cpu_s_per_image"))
    text = capsys.readouterr().out
    assert "CoSA, 20 classes, five scales with mirror images" in text
    assert text.count("| paper, RTX 3090 (another machine) |") == 2
    run(Options(device="cpu", csv=path, table=True))
    assert capsys.readouterr().out.strip() in text


def test_checkpoints_photographs_and_no_code_of_the_release_for_cosa_ms(tmp_path: Path) -> None:
    path = tmp_path / "fps.csv"
    write_photos(tmp_path / "photos")
    checkpoint = write_checkpoint(tmp_path / "cosa.safetensors")
    run(tiny(path, networks=("resnet101",), checkpoint=checkpoint, images=tmp_path / "photos", crf=("none",)))
    found = {(row["network"], row["provider"], row["classes"]) for row in read(path)}
    assert found == {
        ("resnet101", "ours", "20"),
        ("resnet101", "decoding", "20"),
        *[("cosa.safetensors", provider, "3") for provider in ("release", "ours", "decoding")],
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"empty has no \.jpg files: pass --images a folder of photographs"):
        run(tiny(path, images=tmp_path / "empty"))
    with pytest.raises(SystemExit, match="must be at least 1"):
        run(tiny(path, turns=0))


def test_the_best_batch_is_the_last_that_was_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.9}
    case = fps.Case(
        Options(device="cpu", tiny=True, precisions=("fp32",)), "voc", random_network("voc", tiny=True), "single",
        {"fp32": MACHINE}, made_pictures(1, ((20, 30),)),
    )  # fmt: skip
    monkeypatch.setattr(fps, "_turn", lambda method, *rest: (method.batch, seconds[method.batch], 0.0))
    assert fps._best_batch(case, "fp32") == 4

    def small(method: fps_methods.Method, *rest: object) -> tuple[int, float, float]:
        if method.batch == 4:
            raise torch.OutOfMemoryError("no memory")
        return method.batch, 1.0, 0.0

    monkeypatch.setattr(fps, "_turn", small)
    assert fps._best_batch(case, "fp32") == 2


def test_wrong_results_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    gate(MACHINE)
    segment = release.segment

    def wrong(*arguments: Any) -> Tensor:
        return segment(*arguments).flip(-1)

    monkeypatch.setattr(release, "segment", wrong)
    with pytest.raises(SystemExit, match=r"ours is wrong, so nothing is measured: at \(30, 52\), scales"):
        gate(MACHINE)


def test_the_release_adds_views_by_hand() -> None:
    network = random_network("voc", tiny=True)
    assert isinstance(network, CosaCheckpoint)
    explicit = release.explicit_attention(network.net)
    assert not any(block.attn.fused_attn for block in explicit.encoder.vit.blocks)
    assert all(block.attn.fused_attn for block in network.net.encoder.vit.blocks)  # its own is as it was
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        seg = [explicit(view).seg for view in (image, image.flip(-1))]
    up = [torch.nn.functional.interpolate(maps, size=(64, 64), mode="bilinear") for maps in seg]
    found = release.segment(explicit, image, (1.0,), True, (64, 64))
    torch.testing.assert_close(found, (up[0] + up[1].flip(-1))[0], atol=1e-5, rtol=1e-5)


def test_flop_counts_of_the_paper_network() -> None:
    """fidelity.md's, by hand: 157 GFLOP of ViT-B and 9 of LargeFOV at 448 pixels, 2.02 TFLOP for all views."""
    network = random_network("voc", tiny=False)
    assert gflop(network, VIEWS["single"], 448) == pytest.approx(166, rel=0.03)
    assert gflop(network, VIEWS["five"], 448) == pytest.approx(2020, rel=0.03)


def test_table() -> None:
    about = {
        "date": "2026-11-26T10:00:00", "device": "cpu", "machine": "M", "threads": "1", "torch": "2.14", "commit": "c",
        "network": "voc", "views": "single", "size": "448", "pictures": "random", "load_average": "1.0",
        "gflop_per_image": "500", "slowest": "1", "fastest": "9", "batch": "1", "precision": "fp32", "compile": "off",
        "crf": "none",
    }  # fmt: skip
    old = about | {"date": "2026-11-25T10:00:00", "provider": "ours", "images_per_s": "99", "cpu_s_per_image": "1"}
    theirs = about | {"provider": "release", "images_per_s": "2", "cpu_s_per_image": "0.6"}
    ours = about | {"provider": "ours", "images_per_s": "8", "cpu_s_per_image": "0.2", "batch": "16"}
    other = about | {"provider": "ours", "images_per_s": "5", "cpu_s_per_image": "0.2", "network": "mine"}
    lines = table([old, theirs, ours, other]).splitlines()
    assert "| release | 1 | fp32 | off | none | 2 (1 to 9) | 0.6 | 1 | 1.00 | 1.00 |" in lines
    assert "| ours | 16 | fp32 | off | none | 8 (1 to 9) | 0.2 | 4 | 4.00 | 3.00 |" in lines
    assert "| goal, one H200 | | | | none | 1,500 | | | | |" in lines
    assert "| ours | 1 | fp32 | off | none | 5 (1 to 9) | 0.2 | 2.5 |  |  |" in lines  # nothing to compare with
    assert not any("99" in line for line in lines)  # of an older run
