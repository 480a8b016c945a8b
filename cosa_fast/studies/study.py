"""One study: from the files of finished runs to a CSV table and a figure."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import STUDIES
from cosa_fast.studies.style import save_figure, style
from cosa_fast.studies.tables import write_table

log = logging.getLogger(__name__)


def write_study(name: str, inputs: Inputs, csv: Path, figure: Path) -> None:
    """Make a table or figure of the paper; see `needs` for what it reads.

    Args:
        name: one of `STUDIES`; the module of that name in this package does it.
        csv: table to write.
        figure: SVG or PNG to write.

    Raises:
        ValueError: there is no such study, an input is missing, damaged or does not belong to the others, or the
            outputs cannot be written.
    """
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}: {', '.join(STUDIES)}")
    if figure.suffix not in (".svg", ".png"):
        raise ValueError(f"--figure {figure}: give a file that ends in .svg or .png")
    with style():
        rows, drawing = import_module(f"cosa_fast.studies.{name}").study(inputs)
        save_figure(figure, drawing)
    write_table(csv, rows)
    log.info("%s: %d lines in %s, %s", name, len(rows), csv, figure)
