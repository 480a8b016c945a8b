"""CoSA-MS: it learns its labels, image and labels share a geometry, and a killed run ends with the same weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_results import COLOURS, write_checkpoint, write_dataset, write_true_store
from torch import nn

from cosa_fast.config import MultistageConfig, RuntimeConfig
from cosa_fast.data.index import Index
from cosa_fast.data.store import PseudoLabel, PseudoLabels, write_store
from cosa_fast.inference import normalise, read_rgb, to_tensor
from cosa_fast.metrics import confusion_matrix, mean_iou
from cosa_fast.models.segmenter import build_segmenter, load_segmenter
from cosa_fast.runtime import resolve
from cosa_fast.training import loop
from cosa_fast.training.multi_stage import (
    SegBatch,
    SegmenterTrainer,
    batches,
    parameter_groups,
    train_segmenter,
    training_labels,
)

CPU = RuntimeConfig(device="cpu")
TINY = MultistageConfig(
    encoder="tu-test_resnet",
    encoder_weights=None,
    iterations=6,
    batch_size=3,
    crop=48,
    scale=(0.8, 1.25),
    optimizer="adamw",
    lr=3e-3,
    warmup=2,
    checkpoint_every=2,
    log_every=2,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("multistage")
    write_true_store(write_dataset(root, train=6, val=0), root / "store.zarr")
    return root


def train(root: Path, folder: Path, config: MultistageConfig = TINY) -> Path:
    output = folder / "segmenter.safetensors"
    train_segmenter(
        root / "index.json", root / "store.zarr", output, folder / "resume", multistage=config, runtime=CPU, threads=1
    )
    return output


def test_learns_the_labels(root: Path, tmp_path: Path) -> None:
    config = TINY.model_copy(update={"iterations": 40, "batch_size": 6, "checkpoint_every": 99})
    trained = load_segmenter(train(root, tmp_path, config))
    assert not trained.net.training
    assert trained.classes == ("bird", "cat", "cow")
    assert trained.dataset == "Rectangles"
    assert trained.config == config
    assert trained.store["sha256"] == PseudoLabels(root / "store.zarr").digest()
    index, store = Index.load(root / "index.json"), PseudoLabels(root / "store.zarr")
    total = torch.zeros(4, 5, dtype=torch.int64)
    for position, image in enumerate(index.train):
        pixels = to_tensor(read_rgb(index, image))[None]
        with torch.inference_mode():
            logits = trained.net(normalise(pixels, trained.mean, trained.std, torch.device("cpu")))
        total += confusion_matrix(torch.from_numpy(store.labels(position).copy()), logits[0].argmax(0), 4)
    assert mean_iou(total) > 0.75  # 0.9 when it was written
    assert [path.name for path in (tmp_path / "resume").iterdir() if path.name == "state.pt"] == []


def test_image_and_labels_share_the_geometry(root: Path) -> None:
    """Wherever a crop has label c + 1 its pixels have the colour of class c, after every resize, flip and crop."""
    index, store = Index.load(root / "index.json"), PseudoLabels(root / "store.zarr")
    config = TINY.model_copy(update={"scale": (0.5, 2.0)})
    seen = set()
    for batch in islice(batches(index, store, config, threads=2, start=0), 8):
        assert batch.images.shape == (3, 3, 48, 48)
        assert batch.images.dtype == batch.labels.dtype == torch.uint8
        for image, labels in zip(batch.images, batch.labels, strict=True):
            assert (image[:, labels == 255].float().amax(0) >= 0).all()
            for value in set(labels.unique().tolist()) - {0, 255}:
                seen.add(value)
                colour = image[:, labels == value].float().median(dim=1).values
                assert colour.tolist() == pytest.approx(COLOURS[value - 1], abs=45)
    assert seen == {1, 2, 3}


def test_padding_is_ignored_not_background(root: Path) -> None:
    index, store = Index.load(root / "index.json"), PseudoLabels(root / "store.zarr")
    config = TINY.model_copy(update={"scale": (0.5, 0.5)})
    batch = next(batches(index, store, config, threads=1, start=0))
    black = (batch.images == 0).all(dim=1)
    assert black.any(dim=(1, 2)).all()
    assert (batch.labels[black] == 255).all()


def test_batches_start_anywhere(root: Path) -> None:
    index, store = Index.load(root / "index.json"), PseudoLabels(root / "store.zarr")
    first = list(islice(batches(index, store, TINY, threads=2, start=0), 5))
    later = list(islice(batches(index, store, TINY, threads=1, start=3), 2))
    for one, other in zip(first[3:], later, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(first[0].images, first[2].images)


def test_a_killed_run_ends_with_the_same_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(train(root, tmp_path / "whole"))
    step = SegmenterTrainer.step

    def killed(self: SegmenterTrainer, iteration: int, batch: SegBatch) -> dict[str, torch.Tensor]:
        if iteration == 5:  # one step after the checkpoint of 4 was written and one step was lost
            raise KeyboardInterrupt
        return step(self, iteration, batch)

    monkeypatch.setattr(SegmenterTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(root, tmp_path / "killed")
    assert not (tmp_path / "killed" / "segmenter.safetensors").exists()
    monkeypatch.setattr(SegmenterTrainer, "step", step)
    torch.manual_seed(123)  # another process has other random numbers
    resumed = load_file(train(root, tmp_path / "killed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_labels_start_anew(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = []
    monkeypatch.setattr(loop, "run", lambda **settings: fingerprints.append(settings["fingerprint"]))
    train(root, tmp_path)
    train(root, tmp_path, TINY.model_copy(update={"checkpoint_every": 4}))
    train(root, tmp_path, TINY.model_copy(update={"lr": 1e-3}))
    store = PseudoLabels(root / "store.zarr")
    info = replace(store.info, ids=store.info.ids, threshold=0.6)
    rows = [PseudoLabel(store.labels(p), store.confidence(p), store.segmentation(p)) for p in range(len(store))]
    other = tmp_path / "other"
    other.mkdir()
    (other / "index.json").write_bytes((root / "index.json").read_bytes())
    write_store(other / "store.zarr", info, [row.labels.shape for row in rows], rows, 4)
    train(other, tmp_path)
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] != fingerprints[2]
    assert fingerprints[0]["store"] != fingerprints[3]["store"]


def test_unreliable_pixels_are_ignored(tmp_path: Path) -> None:
    """Confidence 0.6 at threshold 0.5 is a reliability of 0.2."""
    index = write_dataset(tmp_path, train=1, val=0)
    store = PseudoLabels(write_true_store(index, tmp_path / "store.zarr", confidence=153))
    np.testing.assert_array_equal(training_labels(store, 0, 0.0), store.labels(0))
    np.testing.assert_array_equal(training_labels(store, 0, 0.19), store.labels(0))
    assert (training_labels(store, 0, 0.21) == 255).all()


def test_a_batch_without_labels_changes_no_weight_to_nan() -> None:
    torch.manual_seed(0)
    trainer = SegmenterTrainer(build_segmenter(TINY, 4), TINY, resolve(CPU))
    nothing = SegBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.full((2, 32, 32), 255, dtype=torch.uint8))
    assert trainer.step(1, nothing)["loss"] == 0
    assert all(torch.isfinite(parameter).all() for parameter in trainer.net.parameters())


def test_loss_and_rate_are_those_of_plain_torch() -> None:
    torch.manual_seed(0)
    config = TINY.model_copy(update={"optimizer": "sgd", "lr": 0.1, "iterations": 10, "warmup": 0, "power": 1.0})
    trainer = SegmenterTrainer(build_segmenter(config, 4), config, resolve(CPU))
    for module in trainer.net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    labels = torch.randint(0, 4, (2, 32, 32), dtype=torch.uint8)
    labels[:, :9] = 255
    trainer.net.train()
    logits = trainer.net(normalise(images, trainer.mean, trainer.std, torch.device("cpu")))
    expected = torch.nn.functional.cross_entropy(logits, labels.long(), ignore_index=255)
    assert float(trainer.step(5, SegBatch(images, labels))["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_the_head_learns_faster_and_only_adamw_spares_norms() -> None:
    swin = MultistageConfig(
        architecture="UPerNet",
        encoder="tu-swin_tiny_patch4_window7_224",
        encoder_weights=None,
        head_lr_scale=10.0,
        weight_decay=0.01,
        optimizer="adamw",
        iterations=10,
        lr=0.1,
        power=1.0,
    )
    net = build_segmenter(swin, 3)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, swin)
    assert [(group["scale"], group["weight_decay"]) for group in groups] == [(1, 0.01), (1, 0), (10, 0.01), (10, 0)]
    assert sum(len(group["params"]) for group in groups) == len(names)  # each once: no two groups share one
    for group in groups:
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert name.startswith("net.encoder.") == (group["scale"] == 1)
            # In the decoder number 1 of convolution, normalisation, activation.
            norm = any(part in name for part in (".norm", "feature_norms", "conv_norm_relu.1", ".downsample.norm"))
            norm |= name.startswith("net.decoder.") and name.endswith(".1.weight")
            assert (norm or name.endswith(("bias", "bias_table"))) == (group["weight_decay"] == 0), name
    trainer = SegmenterTrainer(net, swin, resolve(CPU))
    trainer.step(5, SegBatch(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32, dtype=torch.uint8)))
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.5, 0.5])

    sgd = swin.model_copy(update={"optimizer": "sgd"})
    assert [(group["scale"], group["weight_decay"]) for group in parameter_groups(net, sgd)] == [(1, 0.01), (10, 0.01)]
    assert SegmenterTrainer(net, sgd, resolve(CPU)).optimizer.defaults["momentum"] == 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-2), ("bf16", 5e-2)])
def test_a_step_on_the_gpu_is_that_on_the_cpu(root: Path, precision: str, tolerance: float) -> None:
    source = batches(Index.load(root / "index.json"), PseudoLabels(root / "store.zarr"), TINY, threads=1, start=0)
    some = list(islice(source, 3))
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        machine = resolve(RuntimeConfig(device=device, precision="fp32" if device == "cpu" else precision))
        net = build_segmenter(TINY, 4)
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # devices draw differently
        trainer = SegmenterTrainer(net, TINY, machine)
        losses.append([float(trainer.step(iteration, batch)["loss"]) for iteration, batch in enumerate(some)])
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_reach_the_gpu(root: Path) -> None:
    batch = next(batches(Index.load(root / "index.json"), PseudoLabels(root / "store.zarr"), TINY, threads=1, start=0))
    there = batch.to(torch.device("cuda"))
    assert there.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(there.images.cpu(), batch.images)
    assert torch.equal(there.labels.cpu(), batch.labels)


def test_one_image_at_a_time_where_that_works(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multistage.batch_size = 1, but DeepLabV3Plus .* at least 2 images"):
        train(root, tmp_path / "pooled", TINY.model_copy(update={"batch_size": 1}))
    assert not (tmp_path / "pooled").exists()
    alone = TINY.model_copy(update={"batch_size": 1, "architecture": "Unet", "iterations": 2})
    assert train(root, tmp_path / "unet", alone).exists()


def test_a_missing_image_keeps_what_was_computed(tmp_path: Path) -> None:
    write_true_store(write_dataset(tmp_path, train=6, val=0), tmp_path / "store.zarr")
    image = tmp_path / "JPEGImages" / "train_5.jpg"
    index = Index.load(tmp_path / "index.json")
    first = next(batches(index, PseudoLabels(tmp_path / "store.zarr"), TINY, threads=1, start=0))
    image.unlink()
    with pytest.raises(ValueError, match=r"train_5\.jpg"):
        train(tmp_path, tmp_path / "run", TINY.model_copy(update={"batch_size": 2, "checkpoint_every": 1}))
    assert first.images.shape == (3, 3, 48, 48)
    assert not (tmp_path / "run" / "segmenter.safetensors").exists()


def other_dataset(root: Path) -> None:
    write_true_store(write_dataset(root / "other", train=5, val=0), root / "other.zarr")
    shutil.rmtree(root / "store.zarr")
    (root / "other.zarr").rename(root / "store.zarr")


def another_class(root: Path) -> None:
    index = Index.load(root / "index.json")
    replace(index, classes=(*index.classes, "dog")).save(root / "index.json")


def half_written(root: Path) -> None:
    (root / "store.zarr").rename(root / ".store.zarr.partial")


def lost_shard(root: Path) -> None:
    sorted(path for path in (root / "store.zarr" / "labels" / "c").rglob("*") if path.is_file())[-1].unlink()


def truncated_shard(root: Path) -> None:
    shard = next(path for path in sorted((root / "store.zarr" / "labels" / "c").rglob("*")) if path.is_file())
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def other_schema(root: Path) -> None:
    header = root / "store.zarr" / "zarr.json"
    content = json.loads(header.read_text())
    content["attributes"]["schema"] = 99
    header.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_dataset, r"store\.zarr holds 5 images of Rectangles train, not the 6 of Rectangles train"),
        (another_class, r"store\.zarr has the classes bird, cat, cow, the index bird, cat, cow, dog"),
        (half_written, r"there is no pseudo-label store .*store\.zarr: make it again with `cosa-fast pseudo-labels`"),
        (lost_shard, r"store\.zarr.*labels.*make it again with `cosa-fast pseudo-labels`"),
        (truncated_shard, r"store\.zarr.*labels.*make it again with `cosa-fast pseudo-labels`"),
        (other_schema, r"store\.zarr is not a pseudo-label store of schema \d: make it again"),
    ],
)
def test_refuses_another_or_a_damaged_store_at_once(
    damage: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_true_store(write_dataset(tmp_path, train=6, val=0), tmp_path / "store.zarr")
    damage(tmp_path)
    monkeypatch.setattr(loop, "run", lambda **settings: pytest.fail("it began to train"))
    with pytest.raises(ValueError, match=message) as error:
        train(tmp_path, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_refuses_what_cannot_work(root: Path, tmp_path: Path) -> None:
    index = Index.load(root / "index.json")
    other = tmp_path / "index.json"
    replace(index, classes=("a", "b", "c")).save(other)
    with pytest.raises(ValueError, match=r"has the classes bird, cat, cow, the index a, b, c"):
        train_segmenter(
            other, root / "store.zarr", tmp_path / "s", tmp_path / "r", multistage=TINY, runtime=CPU, threads=1
        )
    with pytest.raises(ValueError, match="there is no checkpoint"):
        load_segmenter(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"holds a 'cosa' model: give the output of the `multistage` stage"):
        load_segmenter(write_checkpoint(tmp_path / "cosa.safetensors"))
