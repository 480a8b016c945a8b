"""Configuration: validation messages, merging, flags, presets, and its documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from cosa_fast.config import Config, config_from_mapping, load_config, to_flags

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ROOT / "config"


def fields(model: BaseModel, prefix: str = "") -> dict[str, object]:
    """Every key by its dotted name, with its value as YAML would give it."""
    dumped = json.loads(model.model_dump_json())
    found: dict[str, object] = {}
    for key in type(model).model_fields:
        value = getattr(model, key)
        if isinstance(value, BaseModel):
            found |= fields(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = dumped[key]
    return found


def test_every_key_and_its_default_is_documented() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(.*?)` \| .+ \|$", (PRESETS / "README.md").read_text(), re.MULTILINE))
    expected = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields(Config()).items()}
    assert rows == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "f.yaml: unknown key 'trian'; config/README.md lists every key"),
        ({"train": {"iters": 5}}, "f.yaml: unknown key 'train.iters'; config/README.md lists every key"),
        ({"train": {"iterations": 0}}, "f.yaml: train.iterations = 0: Input should be greater than 0"),
        ({"train": {"batch_size": "many"}}, "train.batch_size = 'many': Input should be a valid integer"),
        ({"threads": 0}, "f.yaml: threads = 0: Input should be greater than 0"),
        ({"data": {"dataset": "cityscapes"}}, "data.dataset = 'cityscapes': Input should be 'voc' or 'coco'"),
        ({"augment": {"scale": [2.0, 0.5]}}, "scale must be (low, high) with low <= high, got (2.0, 0.5)"),
        ({"augment": {"scale": [1.0]}}, "augment.scale.1"),
        ({"augment": {"std": [0.2, 0.0, 0.2]}}, "std must be positive"),
        ({"cosa": {"scales": []}}, "cosa.scales = []: Tuple should have at least 1 item"),
        ({"eval": {"scales": []}}, "eval.scales = []: Tuple should have at least 1 item"),
        ({"cosa": {"threshold": 1.0}}, "cosa.threshold = 1.0: Input should be less than 1"),
        ({"cosa": {"threshold_range": [0.7, 0.2]}}, "threshold_range must be (low, high) with low < high"),
        ({"cosa": {"ignore_band": [0.25, 0.7]}}, "set dynamic_threshold and raw to false"),
        ({"train": {"c2s_start": 9, "guidance_start": 5}}, "guidance_start (5) must not be before c2s_start (9)"),
    ],
)
def test_bad_values_name_the_key_the_value_and_the_source(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_from_mapping(values, "f.yaml")


def test_processes_divide_the_batches() -> None:
    assert config_from_mapping({"processes": 4}).processes == 4
    with pytest.raises(ValueError, match=r"processes = 3 cannot share train.batch_size = 4: use one of 1, 2, 4$"):
        config_from_mapping({"processes": 3})
    with pytest.raises(ValueError, match=r"processes = 3 cannot share multistage.batch_size = 16: use"):
        config_from_mapping({"processes": 3, "train": {"batch_size": 6}})


def test_parts_divide_what_each_process_has() -> None:
    assert config_from_mapping({"processes": 2, "train": {"accumulate": 2}}).train.accumulate == 2
    with pytest.raises(ValueError, match=r"accumulate = 4 cannot divide .* with processes = 2: use one of 1, 2$"):
        config_from_mapping({"processes": 2, "train": {"accumulate": 4}})
    with pytest.raises(ValueError, match=r"accumulate = 2, but model.name = 'mini_vit' has batch norm"):
        config_from_mapping({"model": {"name": "mini_vit"}, "train": {"accumulate": 2}})


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="iterations") as error:
        config_from_mapping({"train": {"iterations": 0}, "nonsense": 1})
    assert len(str(error.value).splitlines()) == 2


def test_later_files_override_earlier_ones_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {iterations: 9, batch_size: 3}\nthreads: 1\n")
    (tmp_path / "b.yaml").write_text("train: {batch_size: 5}\n")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    config = load_config(tmp_path / "a.yaml", tmp_path / "b.yaml", tmp_path / "empty.yaml")
    assert (config.train.iterations, config.train.batch_size, config.threads) == (9, 5, 1)
    assert load_config() == Config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration file .*missing.yaml: No such file"),
        ("a: [", "missing.yaml is not valid YAML"),
        ("- 1\n", "missing.yaml must hold sections .*got list"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "missing.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_flags_name_every_key_of_a_section() -> None:
    flags = to_flags(config_from_mapping({"voc": {"root": "/my data", "eval_splits": []}}), "voc")
    assert flags == "--voc.root '/my data' --voc.download False --voc.train-split train_aug --voc.eval-splits"


def test_sections_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "names", [["config"], ["voc"], ["coco"], ["voc", "release"], ["coco", "release"]], ids="+".join
)
def test_presets_are_valid(names: list[str]) -> None:
    load_config(*(PRESETS / f"{name}.yaml" for name in names))


def test_presets_hold_the_published_numbers() -> None:
    paper = fields(Config())
    voc = fields(load_config(PRESETS / "voc.yaml"))
    assert {key for key in voc if voc[key] != paper[key]} == {"results", "voc.root", "validation.every"}
    coco = load_config(PRESETS / "coco.yaml")
    assert (coco.train.iterations, coco.train.batch_size) == (60000, 8)
    assert (coco.train.c2s_start, coco.train.guidance_start) == (10000, 10000)
    release = load_config(PRESETS / "voc.yaml", PRESETS / "release.yaml").cosa
    assert (release.raw, release.csc, release.dynamic_threshold) == (False, False, False)
    assert (release.ignore_band, release.balance, release.s2c_relu) == ((0.25, 0.7), True, True)
    assert (release.lambda_c2s, release.lambda_s2c, release.lambda_energy) == (0.05, 0.05, 0.05)


@pytest.mark.parametrize("path", [PRESETS / "config.yaml", ROOT / ".test/config/config.yaml"], ids=["demo", "test"])
def test_the_demo_downloads_nothing(path: Path) -> None:
    config = load_config(path)
    fetched = [config.voc.root, config.voc.download, config.model.pretrained, config.multistage.encoder_weights]
    assert not any(fetched)
