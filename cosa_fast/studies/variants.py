"""What the studies train: CoSA with parts taken away or exchanged (Tables 3 and 4, Fig. 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosa_fast.config import Config

_NONE = {"guidance": "none", "swap": False, "raw": False, "csc": False, "dynamic_threshold": False, "ignore_band": None}
_ALL = {"guidance": "spl", "swap": True, "raw": True, "csc": True, "dynamic_threshold": True, "ignore_band": None}

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "baseline": {"cosa": _NONE},
    "gc": {"cosa": _NONE | {"guidance": "spl"}},
    "gc_sa": {"cosa": _NONE | {"guidance": "spl", "swap": True}},
    "gc_sa_raw": {"cosa": _ALL | {"csc": False, "dynamic_threshold": False}},
    "gc_sa_csc": {"cosa": _ALL | {"raw": False, "dynamic_threshold": False}},
    "gc_sa_raw_csc": {"cosa": _ALL | {"dynamic_threshold": False}},
    "cosa": {"cosa": _ALL},
    "no_csc": {"cosa": _ALL | {"csc": False}},
    "no_raw": {"cosa": _ALL | {"raw": False}},
    "no_sa": {"cosa": _ALL | {"swap": False}},
    "no_gc": {"cosa": _ALL | {"guidance": "none"}},
    "noise": {"cosa": _ALL | {"guidance": "noise"}},
    "gt": {"cosa": _ALL | {"guidance": "gt"}},
    "detach_feat": {"cosa": _ALL, "model": {"detach": "feat"}},
    "detach_cls": {"cosa": _ALL, "model": {"detach": "cls"}},
}
"""Name to overrides of the configuration. CoSA without DT is `gc_sa_raw_csc`; the oracle is `gt`."""

DECISIVE = ("augment", "model", "cosa", "optim", "train")
"""The sections that decide the result of a training."""


def threshold_variant(threshold: float) -> str:
    """Name of CoSA with a fixed threshold, as in `threshold_0.4`."""
    return f"threshold_{threshold:g}"


def variant(config: Config, name: str, seed: int) -> Config:
    """The configuration of a run: `config` with the overrides of a variant and a seed.

    Raises:
        ValueError: there is no such variant.
    """
    if name.startswith("threshold_"):
        overrides: dict[str, dict[str, Any]] = {
            "cosa": _ALL | {"dynamic_threshold": False, "threshold": float(name.removeprefix("threshold_"))}
        }
    elif name in VARIANTS:
        overrides = VARIANTS[name]
    else:
        raise ValueError(f"there is no variant {name!r}; there are {', '.join(VARIANTS)} and threshold_<xi>")
    model = config.model.model_copy(update={"detach": "none"} | overrides.get("model", {}))
    return config.model_copy(
        update={
            "model": model,
            "cosa": config.cosa.model_copy(update=overrides["cosa"]),
            "train": config.train.model_copy(update={"seed": seed}),
        }
    )


def run_prefix(config: Config, name: str, seed: int) -> Path:
    """Where a run's files are, without their endings; trainings with the same settings are one run.

    It may be the main run's, or that of another variant: a fixed threshold may be the configured one.
    """
    wanted = variant(config, name, seed)

    def same(other: Config) -> bool:
        return all(getattr(other, section) == getattr(wanted, section) for section in DECISIVE)

    if same(config):
        return config.results / "cosa"
    first = next((known for known in VARIANTS if same(variant(config, known, seed))), name)
    return config.results / f"studies/runs/{first}/{seed}/cosa"
