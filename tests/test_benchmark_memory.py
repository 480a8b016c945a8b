"""The benchmark of the memory: the estimates, and what is made of them."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import memory
from benchmarks.step_cases import TINY


@pytest.mark.parametrize(("name", "batch"), [("minivoc", 16), ("ms_resnet101", 16), ("evaluation_voc", 8)])
def test_the_memory_estimate_is_what_a_real_run_takes(
    name: Any, batch: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # At 64 pixels an evaluation's maps are smaller than what its convolutions need for themselves.
    monkeypatch.setitem(TINY, "voc_b4", replace(TINY["voc_b4"], crop=224))
    how: Any = {"tiny": True, "device": "cpu", "variants": ("fp32",), "check": True}
    memory.run(memory.Options(presets=(name,), batch_sizes=(batch,), **how))
    estimate, real = map(float, capsys.readouterr().out.splitlines()[-1].split("|")[-3:-1])
    assert real == pytest.approx(estimate, rel=0.15)


def test_memory_is_estimated_by_stage_and_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.csv"
    shutil.copy("benchmarks/results/cpu/memory.csv", path)  # its rows must stay valid
    with path.open(newline="") as handle:
        before = len(list(csv.DictReader(handle)))
    common: Any = {"tiny": True, "device": "cpu", "batch_sizes": (1, 16), "csv": path}
    memory.run(memory.Options(**common, presets=("minivoc", "ms_resnet101"), accumulate=(1, 3)))
    assert "GiB at the peak, estimated" in capsys.readouterr().out
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle))[before:]
    # 3 divides neither batch size, and CoSA-MS normalises over more than one image.
    assert [(row["preset"], row["batch"], row["accumulate"], row["variant"]) for row in rows] == [
        (name, batch, "1", variant)
        for name, batch in (("minivoc", "1"), ("minivoc", "16"), ("ms_resnet101", "16"))
        for variant in ("fp32", "bf16")
    ]
    for fp32, bf16 in zip(rows[2::2], rows[3::2], strict=True):
        assert float(bf16["extra_mib"]) < float(fp32["extra_mib"]) < float(fp32["mib"])


def test_what_fits_a_card_leaves_room_for_the_context() -> None:
    row = {"preset": "ms_resnet101", "variant": "bf16", "accumulate": 1, "how": "measured"}
    sizes = {2: "1000", 4: "7168", 8: "7169", 16: "nan"}  # out of memory
    text = memory.table([row | {"batch": batch, "mib": mib} for batch, mib in sizes.items()])
    assert text.splitlines()[-1] == "| ms_resnet101 | bf16 | 1 | 1.0 | 7.0 | 7.0 | nan | 4, 8, 8 |"


def test_memory_is_that_of_a_gpu_where_a_cpu_differs() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    with memory.like_gpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(x @ x.T, (2,)).dtype == torch.float32
        mask = torch.zeros(4, 4, requires_grad=True)
        out = F.scaled_dot_product_attention(*torch.randn(3, 1, 2, 4, 8, requires_grad=True), attn_mask=mask)
    assert "Flash" in type(out.grad_fn).__name__
