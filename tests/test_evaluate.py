"""The evaluation stage: every number recomputed by torchmetrics, the report's words, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from PIL import Image as PilImage
from tiny_results import CLASSES, read_values, write_checkpoint, write_dataset, write_masks, write_true_store
from torchmetrics.classification import MulticlassJaccardIndex

from cosa_fast import inference
from cosa_fast.config import EvalConfig, MultistageConfig, PseudoConfig, RuntimeConfig
from cosa_fast.crf import CRF_PRESETS, dense_crf
from cosa_fast.data.index import Index
from cosa_fast.data.masks import read_mask
from cosa_fast.data.store import PseudoLabels
from cosa_fast.evaluate import evaluate
from cosa_fast.figures import PALETTE
from cosa_fast.inference import normalise, predict, predict_segmenter, read_rgb, square, to_tensor
from cosa_fast.models.checkpoint import load_cosa, load_safetensors, save_safetensors
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
    tensors, metadata = load_safetensors(checkpoint)
    save_safetensors(checkpoint, tensors, metadata | {"aux_threshold": 0.55})
    pseudo = PseudoConfig(scales=(1.0,), size=48, shard=2)
    write_pseudo_labels(index, checkpoint, root / "store.zarr", pseudo=pseudo, runtime=CPU, threads=1)
    store = PseudoLabels(root / "store.zarr")
    torch.manual_seed(2)
    save_segmenter(
        root / "segmenter.safetensors",
        build_segmenter(SEGMENTER, 4),
        classes=CLASSES,
        dataset="Rectangles",
        config=SEGMENTER,
        store={"sha256": store.digest(), "checkpoint_sha256": store.info.checkpoint_sha256},
    )
    run(root, root / "results")
    return root


def run(root: Path, results: Path, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "index": root / "index.json",
        "masks": root / "masks.json",
        "checkpoint": root / "cosa.safetensors",
        "segmenter": root / "segmenter.safetensors",
        "store": root / "store.zarr",
        "evaluation": EVAL,
    }
    outputs = {"output": results / "miou.txt", "csv": results / "iou.csv", "panel": results / "panel.png"}
    evaluate(**(arguments | outputs | changes), runtime=CPU, threads=1)


def table(root: Path, file: str = "results/iou.csv") -> dict[tuple[str, str, str, str], str]:
    with open(root / file) as handle:
        rows = list(csv.DictReader(handle))
    return {(row["split"], row["system"], row["setting"], row["class"]): row["iou"] for row in rows}


def miou(predictions: list[np.ndarray], truths: list[np.ndarray]) -> float:
    metric = MulticlassJaccardIndex(4, ignore_index=255)
    for prediction, truth in zip(predictions, truths, strict=True):
        metric.update(torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64)))
    return 100 * float(metric.compute())


def image_iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Percent; the mean over the classes in the truth or in the prediction."""
    known = truth != 255
    classes = np.union1d(truth[known], prediction[known])
    hits, both = ([((prediction == c) & (truth == c))[known].sum() for c in classes],
                  [((prediction == c) | (truth == c))[known].sum() for c in classes])  # fmt: skip
    return 100 * float(np.mean(np.divide(hits, both)))


def expected(root: Path, crf: str = "none") -> dict[tuple[str, str], float]:
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
            "CoSA-MS": predict_segmenter(standalone.net, own, (1.0, 0.5), True, machine)[0].log(),
        }
        for system, maps in scores.items():
            kept = maps.clone()
            for number in range(3):
                if number not in image.labels:
                    kept[number + 1] = -1e9
            for setting, values in {"label-free": maps, "label-filtered": kept}.items():
                found.setdefault((system, setting), []).append(values.argmax(0).numpy())
                if crf != "none":
                    refined = dense_crf(np.array(picture), values.softmax(0).numpy(), CRF_PRESETS[crf])  # type: ignore[index]
                    found.setdefault((f"{system} + CRF", setting), []).append(refined)
        main, aux = (F.interpolate(cams, size=size, mode="bilinear")[0] for cams in (got.cams, got.aux_cams))
        cams = {"CAM": (main, 0.45), "auxiliary CAM": (aux, 0.55), "ensemble CAM": ((main + aux) / 2, 0.5)}
        for name, (maps, xi) in cams.items():
            cam = torch.where(maps.amax(0) >= xi, maps.argmax(0) + 1, 0).numpy()
            found.setdefault((f"{name} pseudo-labels", "label-filtered"), []).append(cam)
    return {key: miou(maps, truths) for key, maps in found.items()}


def test_every_number_by_torchmetrics(made: Path) -> None:
    got = table(made)
    wanted = expected(made)
    assert len(wanted) == 7
    for (system, setting), value in wanted.items():
        assert float(got["val", system, setting, "mIoU"]) == pytest.approx(value, abs=0.02), (system, setting)
    assert wanted["CoSA", "label-free"] != pytest.approx(wanted["CoSA", "label-filtered"], abs=0.1)
    cams = {round(value, 1) for (system, _), value in wanted.items() if "pseudo" in system}
    assert len(cams) == 3


@pytest.mark.parametrize("preset", ["release", "standard"])
def test_crf(made: Path, tmp_path: Path, preset: str) -> None:
    pytest.importorskip("pydensecrf.densecrf")
    run(made, tmp_path, evaluation=EVAL.model_copy(update={"crf": preset}))
    got = table(tmp_path, "iou.csv")
    wanted = expected(made, preset)
    assert len(wanted) == 11
    for (system, setting), value in wanted.items():
        assert float(got["val", system, setting, "mIoU"]) == pytest.approx(value, abs=0.05), (system, setting)
    changes = [
        wanted[f"{name} + CRF", "label-filtered"] - wanted[name, "label-filtered"] for name in ("CoSA", "CoSA-MS")
    ]
    assert max(map(abs, changes)) > 0.1
    text = (tmp_path / "miou.txt").read_text()
    steps = {"release": 1, "standard": 10}[preset]
    assert f"no CRF but in the rows that say so:\n{'':15}{preset} (iterations {steps}, " in text
    rows = text[text.index("mIoU [%]") :].split("\n\n")[0].splitlines()[2:]
    assert [row.split("  ")[0] for row in rows] == [
        "CoSA",
        "CoSA + CRF",
        "CoSA-MS",
        "CoSA-MS + CRF",
        "CAM pseudo-labels",
        "auxiliary CAM pseudo-labels",
        "ensemble CAM pseudo-labels",
    ]


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
    trained = load_cosa(made / "cosa.safetensors").sha256
    zarr.open_group(store).attrs["checkpoint_sha256"] = trained
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
    assert "Attention" not in text
    for words in [
        "val (6 images); 3 classes and background",
        "image-level labels of train (4 images)",
        f"cosa.safetensors (sha256 {load_cosa(made / 'cosa.safetensors').sha256[:12]}), 7 iterations",
        "assignment network, mini_vit; guidance spl; on: SA RAW DT; off: CSC",
        f"DeepLabV3Plus with tu-test_resnet, trained on the store {PseudoLabels(made / 'store.zarr').digest()[:12]}",
        "scales 1.0 0.5, mirrored too, no CRF",
        "CAM threshold  0.450, auxiliary 0.550, ensemble 0.500",
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
    assert "CAM threshold  0.300, auxiliary 0.300, ensemble 0.300" in text
    assert "CoSA-MS  " not in text
    assert "(store)" not in text


def test_panel_and_gallery_show_the_same(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path, gallery=tmp_path / "gallery", store=None)
    assert (tmp_path / "panel.png").read_bytes() == (made / "results/panel.png").read_bytes()
    with PilImage.open(tmp_path / "panel.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 1200
    codes = set(np.unique(pixels.astype(np.int64) @ [65536, 256, 1]).tolist())
    assert {int(PALETTE[value].astype(np.int64) @ [65536, 256, 1]) for value in (0, 1, 3, 255)} <= codes
    content = json.loads((tmp_path / "gallery/gallery.json").read_bytes())
    assert [image["id"] for image in content["images"]] == ["val_0", "val_2", "val_5"]
    assert content["layers"] == ["image", "CAM", "CAM pseudo-label", "CoSA", "CoSA-MS", "truth", "error"]
    for image in content["images"]:
        truth, cosa = (read_values(tmp_path / "gallery" / image["files"][layer]) for layer in ("truth", "CoSA"))
        np.testing.assert_array_equal(truth, read_values(made / f"SegmentationClass/{image['id']}.png"))
        assert 100 * image["iou"] == pytest.approx(image_iou(cosa, truth), abs=0.01)


def test_only_what_is_asked_for(made: Path, tmp_path: Path) -> None:
    """No panel, no store; the training split, whose masks are listed too."""
    run(made, tmp_path, segmenter=None, store=None, panel=None, splits=("train", "val", "train"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iou.csv", "miou.txt"]
    got = table(tmp_path, "iou.csv")
    assert {(split, system) for split, system, _, _ in got} == {
        (split, system)
        for split in ("train", "val")
        for system in ("CoSA", "CAM pseudo-labels", "auxiliary CAM pseudo-labels", "ensemble CAM pseudo-labels")
    }
    before = table(made)
    assert all(value == before[key] for key, value in got.items() if key[0] == "val")
    assert "train (4 images), val (6 images)" in (tmp_path / "miou.txt").read_text()
    with pytest.raises(ValueError, match=r"index.json has no split 'test': choose among train, val"):
        run(made, tmp_path, splits=("test",))


def test_batch_size_and_band_do_not_matter(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of five sizes, alone and together, in bands of one row and whole; one of them without a label."""
    index = Index.load(made / "index.json")
    first, *others = index.splits["val"]
    bare = replace(index, splits=index.splits | {"val": (replace(first, labels=()), *others)})
    bare.save(tmp_path / "index.json")
    given = {"index": tmp_path / "index.json", "masks": write_masks(tmp_path / "index.json"), "store": None}
    tables = []
    for batch, band in ((1, 1), (6, 2**30)):
        monkeypatch.setitem(inference.BAND_BYTES, "cpu", band)
        config = EVAL.model_copy(update={"batch_size": batch})
        run(made, tmp_path, evaluation=config, panel=tmp_path / "panel.png", **given)
        tables.append(table(tmp_path, "iou.csv"))
    assert tables[0].keys() == tables[1].keys()
    for key, value in tables[0].items():  # rounding of a batched convolution may move a pixel
        assert float(value or 0) == pytest.approx(float(tables[1][key] or 0), abs=0.1), key


def test_provenance(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store has to come from the checkpoint; a network that does not is scored, and it is said."""
    other = write_checkpoint(tmp_path / "other.safetensors", threshold=0.3)
    with pytest.raises(ValueError, match=r"store.zarr was made from the checkpoint \w{12}, but .*other.safetensors is"):
        run(made, tmp_path, checkpoint=other)
    run(made, tmp_path, checkpoint=other, store=None)
    trained = load_cosa(made / "cosa.safetensors").sha256[:12]
    remark = f"CoSA-MS was trained on pseudo-labels of another CoSA checkpoint ({trained})"
    assert remark in caplog.messages
    assert f"Attention: {remark}." in (tmp_path / "miou.txt").read_text()
    shutil.copytree(made / "store.zarr", tmp_path / "again.zarr")
    zarr.open_group(tmp_path / "again.zarr").attrs["threshold"] = 0.4
    run(made, tmp_path, store=tmp_path / "again.zarr")
    remark = f"CoSA-MS was trained on another store of this CoSA checkpoint than {tmp_path / 'again.zarr'}"
    assert remark in caplog.messages
    assert f"Attention: {remark}." in (tmp_path / "miou.txt").read_text()


def test_files_that_changed_since_they_were_checked(made: Path, tmp_path: Path) -> None:
    """One clear error each, and the results of an earlier run stay as they are."""
    for folder in ("JPEGImages", "SegmentationClass"):
        shutil.copytree(made / folder, tmp_path / folder)
    replace(Index.load(made / "index.json"), root=str(tmp_path)).save(tmp_path / "index.json")
    given = {"index": tmp_path / "index.json", "masks": write_masks(tmp_path / "index.json")}
    results = tmp_path / "results"
    run(made, results, gallery=results / "gallery", **given)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    mask, image = tmp_path / "SegmentationClass/val_4.png", tmp_path / "JPEGImages/val_4.jpg"
    values = read_values(mask)
    wrong = values.copy()
    wrong[3, 5], wrong[0, 0] = 4, 254
    kept = (mask.read_bytes(), image.read_bytes())
    for break_it, message in [
        (
            lambda: PilImage.fromarray(wrong).save(mask),
            r"val_4.png holds the values 4, 254: classes are 1..3, 255 is",
        ),
        (lambda: PilImage.fromarray(values[:-1]).save(mask), r"val_4.png is 40x55, but its image is 40x56"),
        (mask.unlink, r"val_4.png is missing"),
        (image.unlink, r"cannot decode .*val_4.jpg .*No such file.*: restore the file"),
        (lambda: image.write_bytes(kept[1][:500]), r"cannot decode .*val_4.jpg .*: restore the file"),
        (lambda: shutil.copy(made / "JPEGImages/val_0.jpg", image), r"val_4.jpg has height and width \(40, 56\) but"),
    ]:
        break_it()
        with pytest.raises(ValueError, match=message):
            run(made, results, gallery=results / "gallery", **given)
        mask.write_bytes(kept[0])
        image.write_bytes(kept[1])
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before
    train = tmp_path / "SegmentationClass/train_1.png"
    PilImage.fromarray(np.full_like(read_values(train), 9)).save(train)
    with pytest.raises(ValueError, match=r"train_1.png holds the value 9: classes are 1..3"):
        run(made, results, **given)


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
    shutil.copytree(made / "store.zarr", tmp_path / "half.zarr")
    next(path for path in (tmp_path / "half.zarr/labels/c").rglob("*") if path.is_file()).unlink()
    with pytest.raises(ValueError, match=r"half.zarr.* missing: make it again"):
        run(made, tmp_path, store=tmp_path / "half.zarr")
    replace(index, splits={"train": index.train, "val": ()}).save(tmp_path / "index.json")
    with pytest.raises(ValueError, match=r"the split 'val' of .* has no images"):
        run(made, tmp_path, index=tmp_path / "index.json", masks=write_masks(tmp_path / "index.json"))


def test_refuses_a_split_without_all_masks(made: Path, tmp_path: Path) -> None:
    text = (made / "masks.json").read_text()
    assert '"val"' in text
    (tmp_path / "masks.json").write_text(text.replace('"val"', '"other"', 1))
    with pytest.raises(ValueError, match="has no masks for the split 'val': evaluation needs one for each image"):
        run(made, tmp_path, masks=tmp_path / "masks.json")
