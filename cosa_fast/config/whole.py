"""The whole configuration: read from files, checked, and turned into the stages' flags."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from cosa_fast.config.data import AugmentConfig, CocoConfig, DataConfig, LoaderConfig, MiniVocConfig, VocConfig
from cosa_fast.config.results import EvalConfig, MultistageConfig, PseudoConfig, RuntimeConfig, StudiesConfig
from cosa_fast.config.section import Positive, Section
from cosa_fast.config.training import CosaConfig, ModelConfig, OptimConfig, TrainConfig, ValidationConfig


class Config(Section):
    """The whole configuration file."""

    results: Path = Path("results")
    """Folder of everything the workflow writes."""
    threads: Positive = 2
    """CPU threads of each stage. More than the idle cores of a shared machine makes it slower, not faster."""
    processes: Positive = 1
    """Processes, with `threads` and a GPU each, of trainings (they share each batch), pseudo-labels and evaluation."""
    data: DataConfig = DataConfig()
    voc: VocConfig = VocConfig()
    coco: CocoConfig = CocoConfig()
    minivoc: MiniVocConfig = MiniVocConfig()
    augment: AugmentConfig = AugmentConfig()
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    cosa: CosaConfig = CosaConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    pseudo: PseudoConfig = PseudoConfig()
    multistage: MultistageConfig = MultistageConfig()
    eval: EvalConfig = EvalConfig()
    studies: StudiesConfig = StudiesConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _divisible(self) -> Config:
        # Here too, so that a cluster's queue is not waited for in vain.
        sizes = {"train": self.train.batch_size, "multistage": self.multistage.batch_size}
        for section, size in sizes.items():
            if size % self.processes:
                possible = ", ".join(str(count) for count in range(1, size + 1) if size % count == 0)
                raise ValueError(
                    f"processes = {self.processes} cannot share {section}.batch_size = {size}: use one of {possible}"
                )
        share, parts = self.train.batch_size // self.processes, self.train.accumulate
        if share % parts:
            raise ValueError(
                f"train.accumulate = {parts} cannot divide train.batch_size = {self.train.batch_size} with processes = "
                f"{self.processes}: use one of {', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}"
            )
        if parts > 1 and self.model.name == "mini_vit":
            raise ValueError(
                f"train.accumulate = {parts}, but model.name = 'mini_vit' has batch norm, whose statistics would be a "
                "part's, not the batch's: set it to 1"
            )
        return self


def before_guidance(cosa: CosaConfig, model: ModelConfig) -> tuple[CosaConfig, ModelConfig]:
    """The same settings with everything that first matters at `train.guidance_start` switched off or at its default.

    Runs that agree on the rest share one warm-up.
    """
    off = {"guidance": "none", "csc": False, "dynamic_threshold": False}
    unused = (
        "threshold_floor", "threshold_range", "threshold_momentum", "lambda_s2c", "lambda_csc",
        "spl_temperature", "csc_temperature", "csc_scope", "s2c_relu",
    )  # fmt: skip
    defaults = {key: CosaConfig.model_fields[key].default for key in unused}
    return cosa.model_copy(update=off | defaults), model.model_copy(update={"detach": "none"})


def config_from_mapping(values: Mapping[str, Any], source: str = "config") -> Config:
    """Validate a nested mapping (a parsed YAML file, Snakemake's `config`).

    Raises:
        ValueError: an unknown key or a value out of range, with the key's full name, the value and `source`.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError(describe_validation_error(error, source)) from None


def load_config(*paths: Path) -> Config:
    """Read YAML files, later ones overriding earlier ones key by key.

    Raises:
        ValueError: a file is missing, is not YAML, or holds an unknown key or a value out of range.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ValueError(f"cannot read the configuration file {path}: {error.strerror}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not valid YAML: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold sections (key: value), got {type(content).__name__}")
        _merge(merged, content)
    return config_from_mapping(merged, source=", ".join(map(str, paths)))


RHYTHM = ("accumulate", "checkpoint_every", "log_every")
"""Keys of the trainings that do not decide the result (rounding aside)."""


def to_flags(config: Config, *sections: str, rhythm: bool | None = None) -> str:
    """Command-line flags that give `cosa-fast <stage>` exactly these sections (used by the Snakemake rules).

    Args:
        rhythm: only the keys in `RHYTHM`, or all but these; None: every key.
    """
    flags = []
    for section in sections:
        for key, value in json.loads(getattr(config, section).model_dump_json()).items():
            if rhythm is not None and (key in RHYTHM) != rhythm:
                continue
            words = value if isinstance(value, list) else [value]
            text = " ".join(shlex.quote(str(word)) for word in words)
            flags.append(f"--{section}.{key.replace('_', '-')} {text}".rstrip())
    return " ".join(flags)


def describe_validation_error(error: ValidationError, source: str) -> str:
    """One line per problem: where, what was given, what is wanted."""
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"]) or "(top level)"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{source}: unknown key {place!r}; config/README.md lists every key")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            # A rule between keys names them itself; the whole section would only hide its message.
            between_keys = problem["type"] == "value_error" and isinstance(problem["input"], dict)
            given = "" if between_keys else f" = {problem['input']!r}"
            lines.append(f"{source}: {place}{given}: {message}")
    return "\n".join(lines)


def _merge(base: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
