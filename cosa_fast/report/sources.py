"""Reading the files of a results folder; what is damaged is named, with the way to make it again."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from safetensors import SafetensorError, safe_open

from cosa_fast.files import read_json

CHECKPOINT_HEADER = "cosa-fast"
"""The metadata key of `cosa_fast.models.checkpoint`, which is not imported because it needs torch."""


def read_text(path: Path, fix: str) -> str:
    """Read UTF-8 text.

    Raises:
        ValueError: the file cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): {fix}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file: {fix}") from None


def read_table(path: Path, fix: str, delimiter: str = ",") -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file.

    Raises:
        ValueError: there is no row, or a row has another number of cells than the header.
    """
    try:
        header, *rows = [row for row in csv.reader(io.StringIO(read_text(path, fix)), delimiter=delimiter) if row] or [
            []
        ]
    except csv.Error as error:
        raise ValueError(f"{path} is damaged ({error}): {fix}") from None
    if not rows:
        raise ValueError(f"{path} has no rows: {fix}")
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{path} row {line} has {len(row)} cells, the header {len(header)}: {fix}")
    return header, rows


def read_records(path: Path, fix: str) -> list[dict[str, Any]]:
    """Records of a JSON lines file, each with an integer `iteration`.

    Raises:
        ValueError: a line is no such record, or there is none.
    """
    records = []
    for place, line in enumerate(read_text(path, fix).splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            raise ValueError(f"{path} line {place} is not valid JSON: {fix}") from None
        if not isinstance(record, dict) or not isinstance(record.get("iteration"), int):
            raise ValueError(f"{path} line {place} is no record with an `iteration`: {fix}")
        records.append(record)
    if not records:
        raise ValueError(f"{path} is empty: {fix}")
    return records


def number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_checkpoint(path: Path, fix: str) -> dict[str, Any]:
    """The metadata of a checkpoint; no tensor is read.

    Raises:
        ValueError: the file is damaged or of another program.
    """
    try:
        with safe_open(str(path), framework="numpy") as handle:
            metadata = json.loads((handle.metadata() or {}).get(CHECKPOINT_HEADER, "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}): {fix}") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("config"), dict):
        raise ValueError(f"{path} is not a checkpoint of cosa-fast: {fix}")
    return metadata


def read_store(path: Path, fix: str) -> dict[str, Any]:
    """The attributes of a pseudo-label store.

    Raises:
        ValueError: it has none.
    """
    attributes = read_json(path / "zarr.json", "pseudo-label store's description", fix).get("attributes")
    if not isinstance(attributes, dict):
        raise ValueError(f"{path} is not a pseudo-label store: {fix}")
    return attributes


def embed_svg(path: Path, fix: str) -> tuple[str, float | None]:
    """A figure as a data URI, and its width in CSS pixels where it says so.

    Raises:
        ValueError: it is not SVG.
    """
    text = read_text(path, fix)
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not a whole SVG file ({error}): {fix}") from None
    if not re.fullmatch(r"(\{.*\})?svg", root.tag):
        raise ValueError(f"{path} is not an SVG file: {fix}")
    size = re.fullmatch(r"([\d.]+)(px|pt|)", root.get("width", ""))
    width = None if size is None else float(size[1]) * (4 / 3 if size[2] == "pt" else 1)
    return data_uri(text.encode(), "image/svg+xml"), width


def data_uri(content: bytes, kind: str) -> str:
    """`data:...` holding `content` of a media type."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
