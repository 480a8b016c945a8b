"""The evaluation stage: every number recomputed by torchmetrics, the report's words, and what it refuses."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as PilImage
from tiny_results import CLASSES, read_values, write_checkpoint, write_dataset, write_masks, write_true_store
from torchmetrics.classification import MulticlassJaccardIndex

from cosa_fast.config import EvalConfig, MultistageConfig, PseudoConfig, RuntimeConfig
from cosa_fast.data.index import Index
from cosa_fast.data.masks import read_mask
from cosa_fast.data.store import PseudoLabels
from cosa_fast.evaluate import evaluate
from cosa_fast.figures import PALETTE, PanelRow, overlay, write_panel
from cosa_fast.inference import normalise, predict, predict_segmenter, read_rgb, square, to_tensor
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.models.segmenter import build_segmenter, load_segmenter, save_segmenter
from cosa_fast.pseudo_labels import write_pseudo_labels
from cosa_fast.runtime import resolve

CPU = RuntimeConfig(device="cpu")
EVAL = EvalConfig(scales=(1.0, 0.5), flip=True, size=48, batch_size=4, panel_images=3)
SEGMENTER = MultistageConfig(encoder="tu-test_resnet", encoder_weights=None, iterations=9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    index = write_dataset(root, train=4, val=6)
    write_masks(index)
    checkpoint = write_checkpoint(root / "cosa.safetensors")
    torch.manual_seed(2)
    save_segmenter(
        root / "segmenter.safetensors",
        build_segmenter(SEGMENTER, 4),
        classes=CLASSES,
        dataset="Rectangles",
        config=SEGMENTER,
        store={"sha256": "5" * 64},
    )
    pseudo = PseudoConfig(scales=(1.0,), size=48, shard=2)
    write_pseudo_labels(index, checkpoint, root / "store.zarr", pseudo=pseudo, runtime=CPU, threads=1)
    run(root, root / "results")
    return root


def run(root: Path, results: Path, **changes: Path | EvalConfig | None) -> None:
    arguments: dict[str, Path | EvalConfig | None] = {
        "index": root / "index.json",
        "masks": root / "masks.json",
        "checkpoint": root / "cosa.safetensors",
        "segmenter": root / "segmenter.safetensors",
        "store": root / "store.zarr",
        "evaluation": EVAL,
    }
    outputs = {"output": results / "miou.txt", "csv": results / "iou.csv", "panel": results / "panel.png"}
    evaluate(**(arguments | outputs | changes), runtime=CPU, threads=1)  # type: ignore[arg-type]


def table(root: Path) -> dict[tuple[str, str, str, str], str]:
    with open(root / "results" / "iou.csv") as handle:
        rows = list(csv.DictReader(handle))
    return {(row["split"], row["system"], row["setting"], row["class"]): row["iou"] for row in rows}


def miou(predictions: list[np.ndarray], truths: list[np.ndarray]) -> float:
    metric = MulticlassJaccardIndex(4, ignore_index=255)
    for prediction, truth in zip(predictions, truths, strict=True):
        metric.update(torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64)))
    return 100 * float(metric.compute())


def expected(root: Path) -> dict[tuple[str, str], float]:
    """One image at a time, the labels applied by hand."""
    index = Index.load(root / "index.json")
    cosa, standalone = load_cosa(root / "cosa.safetensors"), load_segmenter(root / "segmenter.safetensors")
    cpu, machine = torch.device("cpu"), resolve(CPU)
    truths: list[np.ndarray] = []
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for image in index.splits["val"]:
        size = (image.height, image.width)
        picture = read_rgb(index, image)
        truths.append(read_mask(root / "SegmentationClass" / f"{image.id}.png", (image.width, image.height)))
        labels = torch.zeros(1, 3)
        labels[0, list(image.labels)] = 1
        pixels = normalise(square(picture, 48)[None], cosa.mean, cosa.std, cpu)
        got = predict(cosa.net, pixels, labels, (1.0, 0.5), True, machine)
        own = normalise(to_tensor(picture)[None], standalone.mean, standalone.std, cpu)
        scores = {
            "CoSA": F.interpolate(got.seg, size=size, mode="bilinear")[0],
            "CoSA-MS": predict_segmenter(standalone.net, own, (1.0, 0.5), True, machine)[0],
        }
        for system, maps in scores.items():
            found.setdefault((system, "label-free"), []).append(maps.argmax(0).numpy())
            kept = maps.clone()
            for number in range(3):
                if number not in image.labels:
                    kept[number + 1] = -1e9
            found.setdefault((system, "label-filtered"), []).append(kept.argmax(0).numpy())
        cams = F.interpolate(got.cams, size=size, mode="bilinear")[0]
        cam = torch.where(cams.amax(0) >= cosa.threshold, cams.argmax(0) + 1, 0).numpy()
        found.setdefault(("CAM pseudo-labels", "label-filtered"), []).append(cam)
    return {key: miou(maps, truths) for key, maps in found.items()}


def test_every_number_by_torchmetrics(made: Path) -> None:
    got = table(made)
    wanted = expected(made)
    assert len(wanted) == 5
    for (system, setting), value in wanted.items():
        assert float(got["val", system, setting, "mIoU"]) == pytest.approx(value, abs=0.02), (system, setting)
    assert wanted["CoSA", "label-free"] != pytest.approx(wanted["CoSA", "label-filtered"], abs=0.1)


def test_store_is_scored_on_the_training_split(made: Path) -> None:
    got = table(made)
    assert ("train (store)", "CoSA", "label-free", "mIoU") not in got
    index = Index.load(made / "index.json")
    store = PseudoLabels(made / "store.zarr")
    truths = [read_values(made / "SegmentationClass" / f"{image.id}.png") for image in index.train]
    for system, read in [("CAM pseudo-labels", store.labels), ("CoSA", store.segmentation)]:
        value = miou([read(position) for position in range(len(store))], truths)
        assert float(got["train (store)", system, "label-filtered", "mIoU"]) == pytest.approx(value, abs=0.02)


def test_true_labels_score_100_and_absent_classes_are_left_out(made: Path, tmp_path: Path) -> None:
    index = Index.load(made / "index.json")
    one = replace(index, splits={"train": index.train[:1], "val": index.splits["val"][:2]})
    one.save(tmp_path / "index.json")
    write_masks(tmp_path / "index.json")
    store = write_true_store(tmp_path / "index.json", tmp_path / "store.zarr")
    run(made, tmp_path / "results", index=tmp_path / "index.json", masks=tmp_path / "masks.json", store=store)
    got = table(tmp_path)
    assert got["train (store)", "CAM pseudo-labels", "label-filtered", "mIoU"] == "100.00"
    assert got["train (store)", "CAM pseudo-labels", "label-filtered", "bird"] == "100.00"
    assert got["train (store)", "CAM pseudo-labels", "label-filtered", "cow"] == ""
    assert "predicted (train (store)): cat, cow" in (tmp_path / "results" / "miou.txt").read_text()


def test_report(made: Path) -> None:
    lines = (made / "results" / "miou.txt").read_text().splitlines()
    assert lines[0] == "Rectangles (synthetic; not comparable with PASCAL VOC numbers)"
    text, got = "\n".join(lines), table(made)
    for words in [
        "val (6 images); 3 classes and background",
        "image-level labels of train (4 images)",
        f"cosa.safetensors (sha256 {load_cosa(made / 'cosa.safetensors').sha256[:12]}), 7 iterations",
        "assignment network, mini_vit; guidance spl; on: SA RAW DT; off: CSC",
        "DeepLabV3Plus with tu-test_resnet, trained on the store 555555555555",
        "scales 1.0 0.5, mirrored too, no CRF",
        "CAM threshold  0.450",
        "paper's 76.2 mIoU",
    ]:
        assert words in text
    row = next(line for line in lines if line.startswith("CoSA-MS") and "sha256" not in line).split()
    assert row == [
        "CoSA-MS",
        got["val", "CoSA-MS", "label-free", "mIoU"],
        got["val", "CoSA-MS", "label-filtered", "mIoU"],
        "-",
        "-",
    ]


def test_real_data_is_not_called_synthetic(made: Path, tmp_path: Path) -> None:
    replace(Index.load(made / "index.json"), name="VOC2012", synthetic=False).save(tmp_path / "index.json")
    write_masks(tmp_path / "index.json")
    run(
        made, tmp_path, index=tmp_path / "index.json", masks=tmp_path / "masks.json", segmenter=None, store=None,
        evaluation=EVAL.model_copy(update={"network": "online", "threshold": 0.3, "flip": False}),
    )  # fmt: skip
    text = (tmp_path / "miou.txt").read_text()
    assert text.splitlines()[0] == "VOC2012"
    assert "synthetic" not in text
    assert "online network" in text
    assert "CAM threshold  0.300" in text
    assert "CoSA-MS  " not in text
    assert "(store)" not in text


def test_panel(made: Path) -> None:
    with PilImage.open(made / "results" / "panel.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1200
    codes = set(np.unique(pixels.astype(np.int64) @ [65536, 256, 1]).tolist())
    assert {int(PALETTE[value].astype(np.int64) @ [65536, 256, 1]) for value in (0, 1, 3, 255)} <= codes


def test_panel_of_one_image_without_cam(tmp_path: Path) -> None:
    image = np.full((20, 30, 3), 120, dtype=np.uint8)
    row = PanelRow("a", (0,), image, np.zeros((20, 30), np.float32), {"truth": np.full((20, 30), 255, np.uint8)})
    grey = overlay(image, row.cam)
    assert (grey == grey[0, 0, 0]).all()  # nothing is lit
    write_panel(tmp_path / "panel.png", [row], ["bird"], "One", "image", None)
    assert [path.name for path in tmp_path.iterdir()] == ["panel.png"]


def test_refuses_missing_masks_and_foreign_files(made: Path, tmp_path: Path) -> None:
    index = Index.load(made / "index.json")
    replace(index, eval_splits=()).save(tmp_path / "index.json")
    write_masks(tmp_path / "index.json")
    foreign = {"index": tmp_path / "index.json", "masks": tmp_path / "masks.json"}
    with pytest.raises(ValueError, match="has no evaluation split: name one in eval_splits"):
        run(made, tmp_path, **foreign)
    val = index.splits["val"]
    root = tmp_path / "partial"
    write_dataset(root, train=2, val=len(val))
    replace(Index.load(root / "index.json"), eval_splits=()).save(root / "index.json")
    (root / "SegmentationClass" / "val_0.png").unlink()
    masks = write_masks(root / "index.json")
    replace(Index.load(root / "index.json"), eval_splits=("val",)).save(root / "index.json")
    with pytest.raises(ValueError, match="made for another index"):
        run(made, tmp_path, index=root / "index.json", masks=masks)
    other = write_checkpoint(tmp_path / "other.safetensors", classes=("dog",))
    with pytest.raises(ValueError, match=r"other.safetensors was trained for 1 classes \(dog ...\)"):
        run(made, tmp_path, checkpoint=other)
    with pytest.raises(ValueError, match=r"cosa.safetensors holds a 'cosa' model: give the output of the `multistage`"):
        run(made, tmp_path, segmenter=made / "cosa.safetensors")
    with pytest.raises(ValueError, match="there is no pseudo-label store"):
        run(made, tmp_path, store=tmp_path / "none.zarr")


def test_refuses_a_split_without_all_masks(made: Path, tmp_path: Path) -> None:
    text = (made / "masks.json").read_text()
    assert '"val"' in text
    (tmp_path / "masks.json").write_text(text.replace('"val"', '"other"', 1))
    with pytest.raises(ValueError, match="has no masks for the split 'val': evaluation needs one for each image"):
        run(made, tmp_path, masks=tmp_path / "masks.json")
