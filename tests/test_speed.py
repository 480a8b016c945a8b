"""The speed stage: a row for every variant, the same images in each, and label maps that are the evaluation's."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_results import CLASSES, write_checkpoint, write_dataset
from tiny_runs import SPEED_COLUMNS

from cosa_fast import predictors, speed
from cosa_fast.config import EvalConfig, MultistageConfig, RuntimeConfig
from cosa_fast.crf import CRF_PRESETS, CrfPool, dense_crf
from cosa_fast.data.index import Index
from cosa_fast.inference import label_map, normalise, predict, predict_segmenter, read_rgb, resize, square, to_tensor
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.models.segmenter import Segmenter, build_segmenter, load_segmenter, save_segmenter
from cosa_fast.predictors import Cosa, CosaMs, Picture, System, Views, prepared
from cosa_fast.runtime import resolve
from cosa_fast.speed import Variant, measure_speed
from cosa_fast.studies.speed import COLUMNS as STUDY_COLUMNS
from cosa_fast.studies.speed import RATES

pytest.importorskip("pydensecrf", reason="pydensecrf2 is not installed")

CPU = RuntimeConfig(device="cpu")
EVAL = EvalConfig(scales=(1.0, 0.5), flip=True, size=48, batch_size=3)
SEGMENTER = MultistageConfig(encoder="tu-test_resnet", encoder_weights=None, iterations=9)
COLUMNS = [
    "system", "scales", "flip", "batch", "crf", "images_per_second", "slowest", "fastest", "device", "threads", "torch",
    "date", "images",
]  # fmt: skip


def write_segmenter(path: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    torch.manual_seed(2)
    net = build_segmenter(SEGMENTER, len(classes) + 1)
    store = {"sha256": "5" * 64, "checkpoint_sha256": "6" * 64}
    save_segmenter(path, net, classes=classes, dataset="Rectangles", config=SEGMENTER, store=store)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("speed")
    write_dataset(root, train=2, val=7)
    write_checkpoint(root / "cosa.safetensors")
    write_segmenter(root / "segmenter.safetensors")
    return root


def run(root: Path, output: Path, *, images: int = 5, **changes: Path | EvalConfig | None) -> list[dict[str, str]]:
    paths = {name: root / f"{name}.safetensors" for name in ("cosa", "segmenter")}
    arguments = {"index": root / "index.json", "checkpoint": paths["cosa"], "segmenter": paths["segmenter"]}
    arguments |= {"evaluation": EVAL, "output": output} | changes  # type: ignore[dict-item]
    measure_speed(**arguments, runtime=CPU, threads=1, images=images)  # type: ignore[arg-type]
    with output.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_variant_is_timed_on_the_same_images(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, tuple[str, str, int]]] = []
    timed = speed._seconds

    def counted(variant: Variant, system: System, pictures: list[Picture], *rest: object) -> float:
        passes.append((len(pictures), (variant.name, variant.crf, variant.batch)))
        return timed(variant, system, pictures, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(speed, "_seconds", counted)
    rows = run(made, tmp_path / "results" / "speed.csv")
    assert list(rows[0]) == COLUMNS
    variants = [tuple(row[column] for column in COLUMNS[:5]) for row in rows]
    assert variants == [
        (system, scales, flip, batch, crf)
        for system in ("CoSA", "CoSA-MS")
        for scales, flip in (("1.0 0.5", "True"), ("1.0", "False"))
        for batch in ("1", "3")
        for crf in ("none", "standard")
    ]
    for row in rows:
        assert 0 < float(row["slowest"]) <= float(row["images_per_second"]) <= float(row["fastest"])
        assert (row["device"], row["threads"], row["torch"], row["images"]) == ("cpu", "1", torch.__version__, "5")
    # One short untimed pass and then all images, the variants in turn.
    assert len(passes) == 16 * (1 + speed.ROUNDS)
    assert {count for count, _ in passes[:16]} == {1, 3}
    assert {count for count, _ in passes[16:]} == {5}
    assert passes[16:32] == passes[32:48]


def test_the_rates_are_the_median_and_the_range_of_the_passes() -> None:
    variant = Variant("CoSA", Views((1.0,), False), 1, "none", seconds=[2.0, 5.0, 4.0])
    row = next(csv.DictReader(speed._table([variant], 20, torch.device("cpu"), 1).splitlines()))
    assert [row[column] for column in RATES] == ["5", "4", "10"]


def test_the_study_reads_what_the_stage_writes() -> None:
    assert list(STUDY_COLUMNS) == list(SPEED_COLUMNS) == COLUMNS


def test_cosa_ms_takes_as_many_images_as_the_evaluation(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index.load(made / "index.json")
    picture = read_rgb(index, index.splits["val"][0])
    system, views = CosaMs(load_segmenter(made / "segmenter.safetensors"), resolve(CPU, 1)), Views((1.0,), False)
    counts: list[int] = []

    def counted(net: Segmenter, images: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(len(images))
        return predict_segmenter(net, images, *rest)

    def scores() -> list[torch.Tensor]:
        batch, _ = prepared(system, [("an image", picture)] * 5)
        return list(system.scores(batch, views))

    monkeypatch.setattr(predictors, "predict_segmenter", counted)
    with torch.inference_mode():
        together = scores()
        monkeypatch.setattr(predictors, "STANDALONE_BYTES", 8 * (len(CLASSES) + 1) * picture.height * picture.width)
        apart = scores()
    assert counts == [5, 2, 2, 1]
    torch.testing.assert_close(apart, together)


def test_without_cosa_ms_and_with_nothing_to_compare(made: Path, tmp_path: Path) -> None:
    plain = EvalConfig(scales=(1.0,), flip=False, size=48, batch_size=1)
    rows = run(made, tmp_path / "speed.csv", images=100, segmenter=None, evaluation=plain)
    assert [(row["system"], row["crf"], row["images"]) for row in rows] == [
        ("CoSA", "none", "7"),
        ("CoSA", "standard", "7"),
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["CoSA", "CoSA-MS"])
def test_what_is_timed_are_the_label_maps(made: Path, name: str, batch: int) -> None:
    index, machine, cpu = Index.load(made / "index.json"), resolve(CPU, 1), torch.device("cpu")
    cosa, standalone = load_cosa(made / "cosa.safetensors"), load_segmenter(made / "segmenter.safetensors")
    pictures = [read_rgb(index, image) for image in index.splits["val"]]
    pictures = [pictures[0], pictures[5], *pictures[1:3]]  # the first two are of one size
    system: System = Cosa(cosa, 48, machine) if name == "CoSA" else CosaMs(standalone, machine)
    views = Views((1.0, 0.5), True)
    with CrfPool(1, CRF_PRESETS["standard"]) as pool, torch.inference_mode():
        plain, refined = (
            list(speed._label_maps(Variant(name, views, batch, crf), system, pictures, pool))
            for crf in ("none", "standard")
        )
    for picture, found, better in zip(pictures, plain, refined, strict=True):
        if name == "CoSA":
            pixels = normalise(square(picture, 48)[None], cosa.mean, cosa.std, cpu)
            seg = predict(cosa.net, pixels, torch.ones(1, 3), views.scales, views.flip, machine).seg[0]
            scores = resize(seg, (picture.height, picture.width))
            probabilities = scores.softmax(dim=0)
        else:
            pixels = normalise(to_tensor(picture)[None], standalone.mean, standalone.std, cpu)
            scores = predict_segmenter(standalone.net, pixels, views.scales, views.flip, machine)[0]
            probabilities = scores / 4  # two scales, mirrored too
        assert (found == label_map(scores).numpy()).mean() > 0.999  # ties
        expected = dense_crf(np.array(picture), probabilities.numpy(), CRF_PRESETS["standard"])
        assert (better == expected).mean() > 0.999


def test_refuses_other_classes_and_an_index_without_evaluation(made: Path, tmp_path: Path) -> None:
    output = tmp_path / "speed.csv"
    other = write_checkpoint(tmp_path / "other.safetensors", classes=("bird", "cat", "dog"))
    with pytest.raises(ValueError, match=r"other\.safetensors was trained for 3 classes .* train on this index"):
        run(made, output, checkpoint=other)
    other = write_segmenter(tmp_path / "other_ms.safetensors", classes=("bird", "cat"))
    with pytest.raises(ValueError, match=r"other_ms\.safetensors was trained for 2 classes"):
        run(made, output, segmenter=other)
    index = Index.load(made / "index.json")
    Index(
        index.name, index.format, True, index.root, index.classes, "train", (), {"train": index.train}
    ).save(tmp_path / "index.json")  # fmt: skip
    with pytest.raises(ValueError, match=r"index\.json has no evaluation split with images"):
        run(made, output, index=tmp_path / "index.json")
    assert not output.exists()
