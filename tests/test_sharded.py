"""Evaluation, pseudo-labels and validation by several processes: the bytes that one process writes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_results import AUGMENT, CLASSES, write_checkpoint, write_dataset, write_masks
from torchrun import torchrun

from cosa_fast.config import CosaConfig, EvalConfig, MultistageConfig, PseudoConfig, RuntimeConfig, ValidationConfig
from cosa_fast.data.index import Index
from cosa_fast.distributed import leave
from cosa_fast.evaluate import evaluate
from cosa_fast.models.checkpoint import load_cosa
from cosa_fast.models.segmenter import build_segmenter, save_segmenter
from cosa_fast.pseudo_labels import write_pseudo_labels
from cosa_fast.runtime import resolve
from cosa_fast.training.validation import Thresholds, Validator

CPU = RuntimeConfig(device="cpu")
COSA_FAST = (sys.executable, "-m", "cosa_fast.cli")
# Neither the images nor the shards are whole batches.
EVAL = EvalConfig(scales=(1.0, 0.5), size=48, batch_size=2, panel_images=4)
PSEUDO = PseudoConfig(scales=(1.0,), size=48, batch_size=2, shard=3)
VALIDATION = ValidationConfig(every=1, images=3, size=48, batch_size=2)
SEGMENTER = MultistageConfig(encoder="tu-test_resnet", encoder_weights=None, iterations=9)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of many images and one of a single image in each split, and what one process makes of them."""
    root = tmp_path_factory.mktemp("sharded")
    for name, train, val in (("many", 20, 7), ("single", 1, 1)):
        write_masks(write_dataset(root / name, train, val))
        write_checkpoint(root / name / "cosa.safetensors")
        save_segmenter(
            root / name / "segmenter.safetensors",
            build_segmenter(SEGMENTER, 4),
            classes=CLASSES,
            dataset="Rectangles",
            config=SEGMENTER,
            store={"sha256": "0" * 64, "checkpoint_sha256": "0" * 64},
        )
        make_everything(root / name, root / name / "alone")
    return root


def make_everything(root: Path, results: Path) -> None:
    """The store, the evaluation and the validation, in this process or in all that torchrun started."""
    index, masks, checkpoint = root / "index.json", root / "masks.json", root / "cosa.safetensors"
    write_pseudo_labels(index, checkpoint, results / "store.zarr", pseudo=PSEUDO, runtime=CPU, threads=1)
    machine = resolve(CPU, 1)
    machine.world.wait()  # the first process renames the store last
    make_evaluation(root, results, EVAL)
    validator = Validator(index, masks, VALIDATION, CosaConfig(), AUGMENT, machine, 1, CLASSES)
    networks = {name: load_cosa(checkpoint, name).net for name in ("online", "assignment")}
    records = [validator.measure(networks, Thresholds(0.45, 0.3), step, last=step == 2) for step in (1, 2)]
    assert [len(lines) for lines in records] == ([2, 2] if machine.world.first else [0, 0])
    if machine.world.first:
        (results / "validation.json").write_text(json.dumps(records))


def make_evaluation(root: Path, results: Path, config: EvalConfig) -> None:
    evaluate(
        root / "index.json",
        root / "masks.json",
        root / "cosa.safetensors",
        root / "segmenter.safetensors",
        root / "alone/store.zarr",
        results / "miou.txt",
        results / "iou.csv",
        results / "panel.png",
        results / "gallery",
        evaluation=config,
        runtime=CPU,
        threads=1,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_three_processes_write_what_one_writes(made: Path) -> None:
    """20 images in 7 shards, two of which share a batch; 7 in 4 batches; and one image for three processes."""
    done = torchrun(3, sys.executable, __file__, str(made))
    assert done.returncode == 0, done.stderr
    for name in ("many", "single"):
        alone, together = (contents(made / name / results) for results in ("alone", "together"))
        assert len(alone) > 20
        assert alone.keys() == together.keys()
        assert {path for path, content in alone.items() if content != together[path]} == set()
        records = json.loads(together["validation.json"])
        ids = [image.id for image in Index.load(made / name / "index.json").splits["val"]]
        assert [record["per_image"]["id"] for record in records[1]] == [ids, ids]
    assert done.stderr.count("trained on pseudo-labels of another CoSA checkpoint") == 2  # not once per process


def test_the_command_line(made: Path, tmp_path: Path) -> None:
    """With a CRF, whose own processes each process has; the first one alone reports."""
    pytest.importorskip("pydensecrf.densecrf")
    make_evaluation(made / "many", tmp_path / "alone", EVAL.model_copy(update={"crf": "release"}))
    files = {name: f"{made}/many/{name}" for name in ("index.json", "masks.json", "cosa.safetensors")}
    done = torchrun(
        2, *COSA_FAST, "evaluate", "--index", files["index.json"], "--masks", files["masks.json"],
        "--checkpoint", files["cosa.safetensors"], "--segmenter", f"{made}/many/segmenter.safetensors",
        "--store", f"{made}/many/alone/store.zarr", "--output", f"{tmp_path}/together/miou.txt",
        "--csv", f"{tmp_path}/together/iou.csv", "--panel", f"{tmp_path}/together/panel.png",
        "--gallery", f"{tmp_path}/together/gallery", "--log", f"{tmp_path}/log", "--threads", "1",
        "--eval.scales", "1", "0.5", "--eval.size", "48", "--eval.batch-size", "2", "--eval.panel-images", "4",
        "--eval.crf", "release", "--runtime.device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "alone") == contents(tmp_path / "together")
    assert done.stderr.count("evaluate: finished in") == 1
    assert (tmp_path / "log").read_text().count("CoSA-MS + CRF") == 1


def test_a_failing_process_leaves_the_former_store(made: Path, tmp_path: Path) -> None:
    """The last image, of the second process, is broken: no half store, and the former one is whole.

    The message stands once on a line of its own, and once more as the cause in torchrun's report.
    """
    write_masks(write_dataset(tmp_path, train=20, val=0))
    index = Index.load(tmp_path / "index.json")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    images = (*index.train[:-1], replace(index.train[-1], path="broken.jpg"))
    replace(index, splits={"train": images}).save(tmp_path / "index.json")
    results = tmp_path / "results"
    given = ["--index", f"{tmp_path}/index.json", "--checkpoint", f"{made}/many/cosa.safetensors"]
    (results / ".store.zarr.partial/labels").mkdir(parents=True)
    (results / "store.zarr").mkdir()
    (results / "store.zarr/former").write_text("whole")
    done = torchrun(
        2, *COSA_FAST, "pseudo-labels", *given, "--output", f"{results}/store.zarr", "--threads", "1",
        "--pseudo.scales", "1", "--pseudo.size", "48", "--pseudo.batch-size", "2", "--pseudo.shard", "3",
        "--runtime.device", "cpu",
    )  # fmt: skip
    assert done.returncode != 0
    message = "cosa-fast pseudo-labels: error: cannot decode"
    said = [line.startswith(message) for line in done.stderr.splitlines() if message in line]
    assert said == [True, False], done.stderr
    assert f"traceback : {message}" in done.stderr.split("Root Cause (first observed failure):")[1]
    assert "failed unexpectedly" not in done.stderr
    assert contents(results) == {"store.zarr/former": b"whole"}
    assert [path.name for path in results.iterdir()] == ["store.zarr"]


if __name__ == "__main__":
    for dataset in ("many", "single"):
        make_everything(Path(sys.argv[1]) / dataset, Path(sys.argv[1]) / dataset / "together")
    leave()
