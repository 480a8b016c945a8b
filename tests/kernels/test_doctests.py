"""The examples in the docstrings of cosa_kernels and in kernels/README.md."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import cosa_kernels
import pytest

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(cosa_kernels.__path__, "cosa_kernels.")
    if not module.name.startswith("cosa_kernels.gpu")
)
README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme() -> None:
    results = doctest.testfile(str(README), module_relative=False)
    assert results.attempted > 0
    assert results.failed == 0
