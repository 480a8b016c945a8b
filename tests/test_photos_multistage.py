"""CoSA-MS with each of the paper's networks on photographs: a few steps, a checkpoint, multi-scale evaluation."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_results import write_true_store

from cosa_fast.config import (
    CocoConfig,
    DataConfig,
    MiniVocConfig,
    MultistageConfig,
    RuntimeConfig,
    VocConfig,
    load_config,
)
from cosa_fast.data.index import Index
from cosa_fast.data.prepare import prepare_index
from cosa_fast.inference import normalise, predict_segmenter, read_rgb, to_tensor
from cosa_fast.models.segmenter import load_segmenter
from cosa_fast.runtime import resolve
from cosa_fast.training import loop
from cosa_fast.training.multi_stage import train_segmenter

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT.parent / "shared/photos"
CPU = RuntimeConfig(device="cpu")

pytestmark = [
    pytest.mark.photos,
    pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs of ../shared/photos are not here"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 32 photographs and a store of their masks."""
    root = tmp_path_factory.mktemp("photos")
    prepare_index(
        root / "index.json",
        root / "cache",
        data=DataConfig(),
        voc=VocConfig(root=PHOTOS / "voc/VOC2012", train_split="train"),
        coco=CocoConfig(),
        minivoc=MiniVocConfig(),
        threads=1,
    )
    write_true_store(root / "index.json", root / "store.zarr")
    return root


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A folder whose checkpoints of up to half a gigabyte do not stay."""
    yield tmp_path / "run"
    shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.parametrize("overlay", ["ms_resnet101", "ms_wide_resnet38", "ms_swin_base"])
def test_trains_and_evaluates(overlay: str, photos: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_save", lambda *args: None)  # the resumable state, up to 1.4 GB: test_multi_stage has it
    paper = load_config(ROOT / "config/voc.yaml", ROOT / f"config/{overlay}.yaml").multistage
    small = {"encoder_weights": None, "weights": None, "iterations": 2, "batch_size": 2, "crop": 32, "log_every": 1}
    config = MultistageConfig.model_validate(paper.model_dump() | small)
    output = run / "segmenter.safetensors"
    train_segmenter(
        photos / "index.json", photos / "store.zarr", output, run / "resume",
        multistage=config, runtime=CPU, threads=1,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "segmenter.metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)

    trained = load_segmenter(output)
    assert trained.config == config
    index = Index.load(photos / "index.json")
    image = read_rgb(index, index.train[0]).resize((53, 41))
    pixels = normalise(to_tensor(image)[None], trained.mean, trained.std, torch.device("cpu"))
    scores = predict_segmenter(trained.net, pixels, (1.0, 0.5), True, resolve(CPU))
    assert scores.shape == (1, 21, 41, 53)
    torch.testing.assert_close(scores.sum(dim=1), torch.full((1, 41, 53), 4.0))  # two scales, each also mirrored
