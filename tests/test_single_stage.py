"""The `train` stage on a tiny MiniVOC: no masks, resumable, both loaders, impossible settings said first."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cosa_fast.config import (
    AugmentConfig,
    CocoConfig,
    CosaConfig,
    DataConfig,
    LoaderConfig,
    MiniVocConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
    VocConfig,
)
from cosa_fast.data.index import Index
from cosa_fast.data.masks import prepare_masks
from cosa_fast.data.prepare import prepare_index
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.training import single_stage

MINIVOC = MiniVocConfig(train=24, val=4, test=4, size=64)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed MiniVOC."""
    root = tmp_path_factory.mktemp("minivoc")
    path = root / "index.json"
    prepare_index(
        path, root / "cache", data=DataConfig(), voc=VocConfig(), coco=CocoConfig(), minivoc=MINIVOC, threads=1
    )
    return path


def sections(**changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of 12 iterations; `changes` per section."""
    base: dict[str, Any] = {
        "augment": {"crop": 48, "scale": (0.7, 1.3)},
        "loader": {"backend": "torch", "workers": 0},
        "model": {"name": "mini_vit", "aux_block": 0, "aux_norm": True, "decoder_dim": 8, "decoder_dilation": 1},
        "cosa": {"scales": (1.0,), "flip": False, "label_size": 24, "momentum": 0.9},
        "optim": {"lr": 1e-3, "warmup": 2},
        "train": {
            "iterations": 12, "batch_size": 4, "c2s_start": 2, "guidance_start": 4, "checkpoint_every": 4,
            "log_every": 4,
        },
        "validation": {"size": 64, "images": 3},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    kinds = {
        "augment": AugmentConfig, "loader": LoaderConfig, "model": ModelConfig, "cosa": CosaConfig,
        "optim": OptimConfig, "train": TrainConfig,
        "validation": ValidationConfig, "runtime": RuntimeConfig,
    }  # fmt: skip
    return {name: kind(**{**base[name], **changes.get(name, {})}) for name, kind in kinds.items()}


def run(
    index: Path, folder: Path, masks: Path | None = None, warmup: Path | None = None, **changes: dict[str, Any]
) -> Path:
    output = folder / "cosa.safetensors"
    single_stage.train(index, output, folder / "resume", masks, None, warmup, **sections(**changes), threads=1)
    return output


def warm_up(index: Path, folder: Path, masks: Path | None = None, **changes: dict[str, Any]) -> Path:
    output = folder / "warmup"
    single_stage.warm_up(index, output, folder / "resume-warmup", masks, **sections(**changes), threads=1)
    return output


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_trains_with_no_mask_on_disk(index: Path, tmp_path: Path) -> None:
    blind = tmp_path / "blind"
    content = json.loads(index.read_text())
    shutil.copytree(content["root"], blind)
    shutil.rmtree(blind / "SegmentationClass")
    (tmp_path / "index.json").write_text(json.dumps({**content, "root": str(blind)}))
    assert "SegmentationClass" not in (tmp_path / "index.json").read_text()
    checkpoint = load_cosa(run(tmp_path / "index.json", tmp_path))
    assert checkpoint.classes == Index.load(index).classes
    assert checkpoint.config["cosa"]["label_size"] == 24
    assert not (tmp_path / "resume/state.pt").exists()
    last = json.loads((tmp_path / "resume/metrics.jsonl").read_text().splitlines()[-1])
    assert {"cls", "cls_aux", "c2s", "s2c", "csc", "loss", "threshold"} <= set(last)


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_a_stopped_run_continues_to_the_same_file(
    index: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    loader = {"backend": backend, "workers": 1}
    whole = run(index, tmp_path / "whole", loader=loader)
    step = single_stage.CosaTrainer.step

    def stopping(self: Any, iteration: int, batch: Any) -> Any:
        if iteration == 9:
            raise KeyboardInterrupt
        return step(self, iteration, batch)

    monkeypatch.setattr(single_stage.CosaTrainer, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(index, tmp_path / "parts", loader=loader)
    monkeypatch.setattr(single_stage.CosaTrainer, "step", step)
    assert (tmp_path / "parts/resume/state.pt").exists()
    assert digest(run(index, tmp_path / "parts", loader=loader)) == digest(whole)


def test_another_seed_gives_other_weights(index: Path, tmp_path: Path) -> None:
    assert digest(run(index, tmp_path / "a")) != digest(run(index, tmp_path / "b", train={"seed": 1}))


def test_the_oracle_reads_masks_in_the_geometry_of_the_crops(index: Path, tmp_path: Path) -> None:
    masks = index.with_name("masks.json")
    prepare_masks(index, masks, index.with_name("cache"), threads=1)
    run(index, tmp_path, masks, cosa={"guidance": "gt"})
    with pytest.raises(ValueError, match="needs the training masks"):
        run(index, tmp_path / "none", cosa={"guidance": "gt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": {"crop": 50}}, "augment.crop = 50 must be a multiple of the model's stride 8: try 48"),
        ({"cosa": {"label_size": 64}}, "cosa.label_size = 64 is larger than augment.crop = 48"),
        ({"train": {"iterations": 2}}, "train.iterations = 2 ends before train.c2s_start = 2"),
        ({"runtime": {"device": "cuda:9"}}, "CUDA devices: use auto or cpu"),
        ({"runtime": {"device": "gpu"}}, "is not a device"),
    ],
)
def test_impossible_settings_are_said_before_training(
    index: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(index, tmp_path, **changes)
    assert not (tmp_path / "resume/metrics.jsonl").exists()


def test_missing_index_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read the dataset index .*absent.json.*: run"):
        run(tmp_path / "absent.json", tmp_path)


@pytest.fixture(scope="module")
def masks(index: Path) -> Path:
    prepare_masks(index, index.with_name("all_masks.json"), index.with_name("cache"), threads=1)
    return index.with_name("all_masks.json")


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "cosa": {},
    "no_csc": {"cosa": {"csc": False}},
    "unguided": {"cosa": {"guidance": "none", "lambda_csc": 0.2, "spl_temperature": 0.5}},
    "detached": {"model": {"detach": "feat"}},
}


def test_variants_that_begin_with_one_warm_up_are_what_they_are_alone(index: Path, masks: Path, tmp_path: Path) -> None:
    watched = {"validation": {"every": 3}}
    warmup = warm_up(index, tmp_path, masks, **watched, cosa={"guidance": "noise"})
    assert not (tmp_path / "resume-warmup").exists()
    digests = set()
    for name, changes in VARIANTS.items():
        alone = run(index, tmp_path / name / "alone", masks, **watched, **changes)
        branched = run(index, tmp_path / name / "branched", masks, warmup, **watched, **changes)
        assert digest(alone) == digest(branched)
        for log in ("metrics", "validation"):
            lines = [json.loads(line) for line in branched.with_suffix(f".{log}.jsonl").read_text().splitlines()]
            expected = [json.loads(line) for line in alone.with_suffix(f".{log}.jsonl").read_text().splitlines()]
            for line in lines + expected:
                line.pop("seconds_per_iteration", None)
                line.pop("waiting", None)
            # The warm-up's last record is one that a whole training has only if it falls on a multiple.
            assert [line for line in lines if line["iteration"] != 4] == [
                line for line in expected if line["iteration"] != 4
            ]
        digests.add(digest(alone))
    assert len(digests) == len(VARIANTS)


def test_validation_does_not_change_the_result(index: Path, masks: Path, tmp_path: Path) -> None:
    quiet, watched = run(index, tmp_path / "a"), run(index, tmp_path / "b", masks, validation={"every": 5})
    assert digest(quiet) == digest(watched)
    assert quiet.with_suffix(".validation.jsonl").read_text() == ""


def test_a_warm_up_of_other_settings_is_refused(index: Path, tmp_path: Path) -> None:
    warmup = warm_up(index, tmp_path)
    with pytest.raises(ValueError, match=r"warm-up with other settings \(cosa.raw was True, is False\): make it again"):
        run(index, tmp_path, warmup=warmup, cosa={"raw": False})
    with pytest.raises(ValueError, match=r"there is no state.pt"):
        run(index, tmp_path, warmup=tmp_path)
    with pytest.raises(ValueError, match=r"train.guidance_start = 0 of 12 iterations leaves nothing to share"):
        warm_up(index, tmp_path, train={"c2s_start": 0, "guidance_start": 0})


def test_validation_needs_masks(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation.every = 5 needs masks"):
        run(index, tmp_path, validation={"every": 5})


def test_a_finished_training_started_again_says_so(
    index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        first = digest(run(index, tmp_path))
        assert "is finished" not in caplog.text
        assert digest(run(index, tmp_path)) == first
    assert f"{tmp_path / 'cosa.safetensors'} is finished: training anew" in caplog.text
