"""Validation during training, against numpy on the same predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from sklearn.metrics import average_precision_score
from tiny_results import AUGMENT, CLASSES, read_values, write_checkpoint, write_dataset, write_masks

from cosa_fast.config import CosaConfig, RuntimeConfig, ValidationConfig
from cosa_fast.data.index import Index
from cosa_fast.inference import normalise, predict, read_rgb, square
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.runtime import resolve
from cosa_fast.training.validation import UNSURE, Thresholds, Validator, summary

THRESHOLDS = Thresholds(0.45, 0.3)
CONFIG = ValidationConfig(every=1, images=3, size=48, batch_size=2)
COSA = CosaConfig()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Index, masks and checkpoint; 5 images to validate on."""
    root = tmp_path_factory.mktemp("rectangles")
    index = write_dataset(root, val=5)
    return index, write_masks(index), write_checkpoint(root / "cosa.safetensors")


def validator(index: Path, masks: Path | None, classes: tuple[str, ...] = CLASSES) -> Validator:
    return Validator(index, masks, CONFIG, COSA, AUGMENT, resolve(RuntimeConfig(device="cpu")), 1, classes)


def counts(truth: np.ndarray, prediction: np.ndarray) -> dict[str, list[int]]:
    kinds = range(len(CLASSES) + 1)
    known = truth != 255
    return {
        "hits": [int(((truth == k) & (prediction == k)).sum()) for k in kinds],
        "truth": [int((truth == k).sum()) for k in kinds],
        "predicted": [int(((prediction == k) & known).sum()) for k in kinds],
    }


def iou(truth: np.ndarray, prediction: np.ndarray) -> float:
    values = {key: np.array(value, float) for key, value in counts(truth, prediction).items()}
    union = values["truth"] + values["predicted"] - values["hits"]
    return float(np.mean(values["hits"][union > 0] / union[union > 0]))


def upsample(maps: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0].numpy()


def test_a_record_equals_numpy(dataset: tuple[Path, Path, Path]) -> None:
    index, masks, checkpoint = dataset
    net = load_cosa(checkpoint).net.train()
    (record,) = validator(index, masks).measure({"online": net}, THRESHOLDS, 7, last=True)
    assert net.training

    listed = Index.load(index)
    images = listed.splits["val"]
    labels = torch.from_numpy(listed.multi_hot(images))
    pixels = torch.stack([square(read_rgb(listed, image), 48) for image in images])
    inputs = normalise(pixels, AUGMENT.mean, AUGMENT.std, torch.device("cpu"))
    prediction = predict(net.eval(), inputs, labels, (1.0,), True, resolve(RuntimeConfig(device="cpu")))
    maps: dict[str, list[np.ndarray]] = {}
    truths, perplexities = [], []
    histogram = {name: np.zeros((2, 256), int) for name in ("confidence", "aux_confidence")}
    for slot, image in enumerate(images):
        truth = read_values(Path(listed.root) / "SegmentationClass" / f"{image.id}.png")
        truths.append(truth.ravel())
        seg = upsample(prediction.seg[slot], truth.shape)
        filtered = np.where(np.r_[True, labels[slot].numpy() > 0][:, None, None], seg, -np.inf)
        cams, aux = (upsample(part[slot], truth.shape) for part in (prediction.cams, prediction.aux_cams))
        made = {
            "seg_free": seg.argmax(0),
            "seg_filtered": filtered.argmax(0),
            "ensemble": np.where(((cams + aux) / 2).max(0) >= 0.375, (cams + aux).argmax(0) + 1, 0),
        }
        for name, values, xi in (("cam", cams, 0.45), ("aux_cam", aux, 0.3)):
            nu = values.max(0).astype(np.float64)
            made[name] = np.where(nu >= xi, values.argmax(0) + 1, 0)
            distance = np.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi)
            with np.errstate(divide="ignore"):
                perplexity = -np.log(0.8 * distance)
            made[f"{name}_confident"] = np.where(perplexity <= 1.0, made[name], -1)
            if name == "cam":
                perplexities.append(np.minimum(perplexity, UNSURE).mean())
            key = "confidence" if name == "cam" else "aux_confidence"
            bins = np.minimum((nu * 256).astype(int), 255)
            for right in (0, 1):
                chosen = ((made[name] == truth) == bool(right)) & (truth != 255)
                histogram[key][right] += np.bincount(bins[chosen], minlength=256)
        for name, values in made.items():
            maps.setdefault(name, []).append(values.ravel())

    truth = np.concatenate(truths)
    for name, parts in maps.items():
        together = np.concatenate(parts)
        seen = np.where(together < 0, 255, truth) if name.endswith("_confident") else truth
        assert record[name] == counts(seen, together), name
    for key, (wrong, right) in histogram.items():
        assert record[key]["wrong"] == wrong.tolist()
        assert record[key]["right"] == right.tolist()
    assert record["per_image"]["id"] == [image.id for image in images]
    each = [iou(*pair) for pair in zip(truths, maps["cam"], strict=True)]
    np.testing.assert_allclose(record["per_image"]["iou"], each, atol=1e-6)
    np.testing.assert_allclose(record["per_image"]["perplexity"], perplexities, atol=1e-4)
    shown = labels.numpy().any(axis=0)
    scores = prediction.logits.sigmoid().numpy()[:, shown]
    expected = average_precision_score(labels.numpy()[:, shown], scores, average="macro")
    assert record["mean_average_precision"] == pytest.approx(expected, abs=1e-5)
    assert summary(record)["cam_miou"] == pytest.approx(iou(truth, np.concatenate(maps["cam"])))
    fixed = {"iteration": 7, "network": "online", "split": "val", "images": 5, "xi": 0.45, "aux_xi": 0.3}
    assert fixed.items() <= record.items()
    assert record["classes"] == ["background", *CLASSES]


def test_on_the_way_some_images_are_enough(dataset: tuple[Path, Path, Path]) -> None:
    index, masks, checkpoint = dataset
    nets = {network: load_cosa(checkpoint, network).net for network in ("online", "assignment")}
    records = validator(index, masks).measure(nets, THRESHOLDS, 7, last=False)
    assert [(record["network"], record["images"], "per_image" in record) for record in records] == [
        ("online", 3, False),
        ("assignment", 3, False),
    ]
    assert records[0]["cam"] != records[1]["cam"]


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_have_a_precision_too(classes: int, tmp_path: Path) -> None:
    index = write_dataset(tmp_path, val=2)
    content = json.loads(index.read_text())
    content["classes"] = content["classes"][:classes]
    for images in content["splits"].values():
        for image in images:
            image["labels"] = [label for label in image["labels"] if label < classes]
            mask = Path(content["root"]) / "SegmentationClass" / f"{image['id']}.png"
            values = read_values(mask)
            PilImage.fromarray(np.where((values > classes) & (values < 255), 0, values).astype(np.uint8)).save(mask)
    content["splits"]["val"] = content["splits"]["val"][:1]
    for labels, expected in ([content["splits"]["val"][0]["labels"], 1.0], [[], None]):
        content["splits"]["val"][0]["labels"] = labels
        index.write_text(json.dumps(content))
        masks = write_masks(index)
        names = CLASSES[:classes]
        net = load_cosa(write_checkpoint(tmp_path / "cosa.safetensors", names)).net
        (record,) = validator(index, masks, names).measure({"online": net}, THRESHOLDS, 7, last=True)
        assert record["mean_average_precision"] == (expected if labels else None)
        assert ("mean_average_precision" in summary(record)) == bool(labels)


def test_impossible_validation_is_refused(dataset: tuple[Path, Path, Path], tmp_path: Path) -> None:
    index, masks, _ = dataset
    with pytest.raises(ValueError, match=r"validation.every = 1 needs masks"):
        validator(index, None)
    with pytest.raises(ValueError, match=r"other classes than the training index"):
        validator(index, masks, ("cat",))
    other = write_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"was made for another index"):
        validator(other, masks)
