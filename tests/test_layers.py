"""The layer table: a module imports only what stands above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    ["cosa_fast"],  # __version__
    ["cosa_fast.config"],
    ["cosa_fast.files", "cosa_fast.processes", "cosa_fast.distributed", "cosa_fast.transfer"],
    ["cosa_fast.runtime"],
    ["cosa_fast.data"],
    ["cosa_fast.models"],
    ["cosa_fast.assign", "cosa_fast.bands"],
    ["cosa_fast.losses", "cosa_fast.metrics", "cosa_fast.inference", "cosa_fast.crf"],
    ["cosa_fast.training", "cosa_fast.predictors"],
    ["cosa_fast.pseudo_labels"],
    ["cosa_fast.figures"],
    ["cosa_fast.systems"],
    ["cosa_fast.gallery", "cosa_fast.results"],
    ["cosa_fast.evaluate", "cosa_fast.speed", "cosa_fast.submission", "cosa_fast.studies", "cosa_fast.report"],
    ["cosa_fast.stages"],
    ["cosa_fast.cli"],
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
LIGHT = ["cosa_fast.config", "cosa_fast.stages", "cosa_fast.cli"]
HEAVY = {"torch", "numpy", "timm", "zarr", "nvidia", "sklearn", "matplotlib", "snakemake"}


def modules() -> dict[str, Path]:
    """Dotted name of every module of the two packages."""
    found = {}
    for folder in (ROOT, ROOT / "kernels"):
        for path in folder.glob("cosa_*/**/*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, top_level_only: bool = False) -> set[str]:
    """Modules that `name` imports, absolute and as precise as the text says (a from-imported module counts)."""
    tree = ast.parse(MODULES[name].read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: a package's own name stays in for its __init__
                package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found


def layer(name: str) -> str:
    """The row that a module belongs to: cosa_fast.data.voc is in cosa_fast.data."""
    return ".".join(name.split(".")[:2])


def test_every_module_has_a_layer() -> None:
    missing = {layer(name) for name in MODULES if name.startswith("cosa_fast")} - LEVELS.keys()
    assert not missing, f"add these to the layer table: {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("cosa_fast")))
def test_imports_point_upwards(name: str) -> None:
    for imported in imports(name):
        if imported.split(".")[0] != "cosa_fast" or layer(imported) == layer(name):
            continue
        assert LEVELS[layer(imported)] < LEVELS[layer(name)], f"{name} must not import {imported}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name.startswith("cosa_kernels")))
def test_the_kernels_stand_alone(name: str) -> None:
    foreign = {imported for imported in imports(name) if imported.split(".")[0] == "cosa_fast"}
    assert not foreign


def test_the_import_name_kernels_stays_free() -> None:
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("name", LIGHT)
def test_the_command_line_is_light(name: str) -> None:
    roots = {imported.split(".")[0] for imported in imports(name, top_level_only=True)}
    assert not roots & HEAVY


def test_no_circles() -> None:
    graph = {name: {i for i in imports(name, top_level_only=True) if i in MODULES and i != name} for name in MODULES}
    while free := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"modules that import each other: {sorted(graph)}"
