"""How the results came about: configuration, versions, and what each stage took."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from cosa_fast.config import Config
from cosa_fast.report.markup import Html, Missing, Section, element, join, scroller, table_figure
from cosa_fast.report.sources import number, read_checkpoint, read_store, read_table, read_text

PACKAGES = ("cosa-fast", "torch", "timm", "zarr", "triton")
STAGES = ("index", "masks", "train_index", "warmup", "train", "pseudo_labels", "multistage", "evaluate")
"""In the order of the pipeline; other stages follow. A warm-up has the key of its settings behind its name."""
MEASURED = "Time and peak memory, measured by Snakemake; of a stage that was stopped and continued, the last part."
MACHINE = re.compile(r"^\S+ (CoSA(?:-MS)? on .* parameters, .*)$", re.MULTILINE)
"""What `train` and `multistage` log about network and device."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What checkpoints and store say about themselves."""

    dataset: str | None
    synthetic: bool | None
    """None: nothing says so."""
    config: dict[str, Any]
    """Configuration sections that are recorded."""
    versions: dict[str, str]
    """Of the packages that made the store."""
    sources: list[str]
    """Names of the files."""


def read_origin(results: Path) -> Origin:
    """Read the metadata of `cosa.safetensors`, `pseudo_labels.zarr` and `segmenter.safetensors`, where they exist.

    Raises:
        ValueError: a file is damaged.
    """
    dataset, synthetic = None, None
    config: dict[str, Any] = {}
    versions: dict[str, str] = {}
    sources = []
    cosa, store, segmenter = (
        results / name for name in ("cosa.safetensors", "pseudo_labels.zarr", "segmenter.safetensors")
    )
    if cosa.exists():
        metadata = read_checkpoint(cosa, "make it again with `cosa-fast train`")
        config |= metadata["config"]
        dataset = metadata.get("dataset")
        sources.append(cosa.name)
    if store.exists():
        attributes = read_store(store, "make it again with `cosa-fast pseudo-labels`")
        config = {**attributes.get("config", {}), **config}
        dataset, synthetic = attributes.get("dataset", dataset), attributes.get("synthetic")
        versions = attributes.get("versions", {})
        sources.append(store.name)
    if segmenter.exists():
        metadata = read_checkpoint(segmenter, "make it again with `cosa-fast multistage`")
        config["multistage"] = metadata["config"]
        sources.append(segmenter.name)
    return Origin(dataset, synthetic, config, versions, sources)


def configuration(origin: Origin, how: str) -> Section | Missing:
    """What differs from the defaults, then everything, as YAML."""
    if not origin.config:
        return Missing("configuration", how)
    defaults = Config().model_dump(mode="json")
    order = [*(name for name in defaults if name in origin.config), *sorted(origin.config.keys() - defaults.keys())]
    whole = {name: origin.config[name] for name in order}
    changed: dict[str, Any] = {}
    for name, section in whole.items():
        values = section if isinstance(section, Mapping) else {}
        different = {key: value for key, value in values.items() if defaults.get(name, {}).get(key, ...) != value}
        if different:
            changed[name] = different
    first = _yaml(changed) if changed else "# nothing: these are the paper's VOC settings"
    note = f"As recorded in {', '.join(origin.sources)}. What differs from the defaults (the paper's VOC settings):"
    return Section(
        "configuration",
        "Configuration",
        join(
            element("p", note, class_="muted"),
            _block("Settings that differ from the defaults", first),
            element("details", element("summary", "Every recorded setting"), _block("Every setting", _yaml(whole))),
        ),
    )


def _block(label: str, text: str) -> Html:
    return scroller(label, text, name="pre")


def _yaml(values: Mapping[str, Any]) -> str:
    """Sections apart by an empty line, each list on one line."""
    dumped = (yaml.dump({name: values[name]}, Dumper=_Dumper, sort_keys=False, allow_unicode=True) for name in values)
    return "\n".join(dumped).rstrip()


class _Dumper(yaml.SafeDumper):
    """Lists as [1.0, 0.5]."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def versions_table(origin: Origin) -> Section:
    """Versions recorded in the store, and those of this report."""
    here = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            here[package] = version(package)
        except PackageNotFoundError:
            here[package] = "not installed"
    names = [
        "cosa-fast",
        "python",
        *(name for name in {**here, **origin.versions} if name not in ("cosa-fast", "python")),
    ]
    heads = ["Package", *(["pseudo-label store"] if origin.versions else []), "this report"]
    rows = []
    for name in names:
        cells = [origin.versions.get(name, "not recorded")] if origin.versions else []
        cells.append(here.get(name, "not looked up"))
        rows.append(element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells)))
    recorded = "Versions recorded when the pseudo-labels were written, and those where this report was made."
    table = table_figure(
        recorded if origin.versions else "Versions where this report was made; no pseudo-label store recorded others.",
        element("thead", element("tr", *(element("th", head, scope="col") for head in heads))),
        element("tbody", *rows),
    )
    return Section("versions", "Versions", table)


@dataclass(frozen=True, slots=True)
class Cost:
    """One file of Snakemake's benchmarks."""

    name: str
    seconds: float
    memory: float | None
    """Peak resident memory in MiB; None: the stage was too quick to be measured."""


def times(results: Path, how: str) -> Section | Missing:
    """Seconds and peak memory of each stage, and what the logs say about the machine.

    Raises:
        ValueError: a benchmark file is damaged.
    """
    folder = results / "benchmarks"
    costs = [_cost(path, path.relative_to(folder).with_suffix("").as_posix()) for path in folder.rglob("*.tsv")]
    if not costs:
        return Missing("time per stage", how)
    costs.sort(key=_order)
    stages = [cost for cost in costs if "/" not in cost.name]
    others = [cost for cost in costs if "/" in cost.name]
    parts = [element("p", line, class_="machine") for line in _machine(results)]
    if stages:
        parts.append(_times_table(MEASURED, stages))
    if others:
        total = _duration(sum(cost.seconds for cost in others))
        summary = element("summary", f"Runs of the studies ({len(others)}, {total} in all)")
        parts.append(element("details", summary, _times_table(MEASURED, others)))
    return Section("time", "Time per stage", join(*parts))


def _order(cost: Cost) -> tuple[bool, int, str]:
    """Stages before runs of the studies, the pipeline's before others."""
    stage = "warmup" if cost.name.startswith("warmup_") else cost.name
    return "/" in cost.name, STAGES.index(stage) if stage in STAGES else len(STAGES), cost.name


def _times_table(caption: str, costs: list[Cost]) -> Html:
    longest = max(cost.seconds for cost in costs) or 1.0
    rows = [
        element(
            "tr",
            element("th", cost.name.replace("_", " "), scope="row"),
            element(
                "td",
                element("span", class_="meter", style=f"--value:{100 * cost.seconds / longest:.1f}"),
                class_="meter-cell",
            ),
            element("td", _duration(cost.seconds), class_="number"),
            element("td", "" if cost.memory is None else f"{cost.memory / 1024:.2f}", class_="number"),
        )
        for cost in costs
    ]
    total = element(
        "tr",
        element("th", "All", scope="row"),
        element("td"),
        element("td", _duration(sum(cost.seconds for cost in costs)), class_="number"),
        element("td", class_="number"),
    )
    names = (("Stage", None), ("", "meter-cell"), ("Time", "number"), ("Peak memory, GiB", "number"))
    heads = [element("th", name, scope="col", class_=kind) if name else element("td") for name, kind in names]
    return table_figure(
        caption,
        element("thead", element("tr", *heads)),
        element("tbody", *rows),
        element("tfoot", total),
        class_="times",
    )


def _cost(path: Path, name: str) -> Cost:
    fix = "delete it; running that stage again makes it"
    header, rows = read_table(path, fix, delimiter="\t")
    try:
        seconds = [float(row[header.index("s")]) for row in rows]
    except ValueError:
        raise ValueError(f"{path} has no seconds in a column 's': {fix}") from None
    memory = [number(row[header.index("max_rss")]) for row in rows] if "max_rss" in header else []
    known = [value for value in memory if value is not None]
    return Cost(name, sum(seconds) / len(seconds), max(known) if known else None)


def _machine(results: Path) -> list[str]:
    files = [results / "logs" / f"{name}.log" for name in ("train", "multistage")]
    texts = [read_text(file, "delete it") for file in files if file.exists()]
    return [match.group(1) for text in texts if (match := MACHINE.search(text))]


def _duration(seconds: float) -> str:
    """12.3 s, 4 min 07 s, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
