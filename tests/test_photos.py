"""The whole pipeline, briefly, on real photographs: COCO's instance JSON and a VOC2012 folder (one image is grey)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from cosa_fast.config import (
    AugmentConfig,
    CocoConfig,
    CosaConfig,
    DataConfig,
    EvalConfig,
    LoaderConfig,
    MiniVocConfig,
    ModelConfig,
    MultistageConfig,
    OptimConfig,
    PseudoConfig,
    RuntimeConfig,
    TrainConfig,
    ValidationConfig,
    VocConfig,
)
from cosa_fast.data.index import Index
from cosa_fast.data.masks import prepare_masks
from cosa_fast.data.prepare import prepare_index
from cosa_fast.evaluate import evaluate
from cosa_fast.pseudo_labels import export_png, write_pseudo_labels
from cosa_fast.training.multi_stage import train_segmenter
from cosa_fast.training.single_stage import train

PHOTOS = Path(__file__).resolve().parents[1].parent / "shared/photos"
CPU = RuntimeConfig(device="cpu")
SOURCES = {
    "coco": (
        DataConfig(dataset="coco"),
        VocConfig(),
        CocoConfig(root=PHOTOS / "coco", year=2017, train_split="train", eval_splits=("train",)),
    ),
    "voc": (DataConfig(), VocConfig(root=PHOTOS / "voc/VOC2012", train_split="train"), CocoConfig()),
}

pytestmark = [
    pytest.mark.photos,
    pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs of ../shared/photos are not here"),
]


@pytest.mark.parametrize("dataset", ["coco", "voc"])
def test_from_photographs_to_miou(dataset: str, tmp_path: Path) -> None:
    data, voc, coco = SOURCES[dataset]
    index, masks = tmp_path / "index.json", tmp_path / "masks.json"
    prepare_index(index, tmp_path / "cache", data=data, voc=voc, coco=coco, minivoc=MiniVocConfig(), threads=1)
    prepare_masks(index, masks, tmp_path / "cache", threads=1)
    known = Index.load(index)
    assert (len(known.train), len(known.classes)) == {"coco": (62, 80), "voc": (32, 20)}[
        dataset
    ]  # two COCO images have no label

    checkpoint = tmp_path / "cosa.safetensors"
    train(
        index,
        checkpoint,
        tmp_path / "resume",
        augment=AugmentConfig(crop=96),
        loader=LoaderConfig(workers=1),
        model=ModelConfig(name="vit_tiny_patch16_224", pretrained=False, decoder_dim=16),
        cosa=CosaConfig(scales=(1.0, 0.5), threshold_queue=3),
        optim=OptimConfig(warmup=1),
        validation=ValidationConfig(),
        train=TrainConfig(iterations=4, batch_size=2, c2s_start=1, guidance_start=2, log_every=2),
        runtime=CPU,
        threads=1,
    )
    store = tmp_path / "store.zarr"
    pseudo = PseudoConfig(scales=(1.0,), flip=False, size=96, shard=16)
    write_pseudo_labels(index, checkpoint, store, pseudo=pseudo, runtime=CPU, threads=1)
    export_png(store, tmp_path / "png")
    first = known.train[0]
    exported = next((tmp_path / "png").rglob(f"{first.id}.png"))
    assert Image.open(exported).size == (first.width, first.height)

    segmenter = tmp_path / "segmenter.safetensors"
    train_segmenter(
        index,
        store,
        segmenter,
        tmp_path / "resume_ms",
        multistage=MultistageConfig(
            architecture="Linknet", encoder="tu-test_resnet", encoder_weights=None, iterations=2, batch_size=2, crop=96
        ),
        runtime=CPU,
        threads=1,
    )
    evaluate(
        index,
        masks,
        checkpoint,
        segmenter,
        store,
        tmp_path / "miou.txt",
        tmp_path / "iou.csv",
        tmp_path / "panel.png",
        evaluation=EvalConfig(scales=(1.0,), flip=False, size=96, panel_images=2),
        runtime=CPU,
        threads=1,
    )
    text = (tmp_path / "miou.txt").read_text()
    assert text.splitlines()[0] == {"coco": "COCO2017", "voc": "VOC2012"}[dataset]
    assert "synthetic" not in text
    with open(tmp_path / "iou.csv") as handle:
        rows = list(csv.DictReader(handle))
    values = [float(row["iou"]) for row in rows if row["iou"]]
    assert values
    assert all(0 <= value <= 100 for value in values)
    assert Image.open(tmp_path / "panel.png").width > 400
