"""CSV tables: those that the studies write, and the IoU tables that the evaluation wrote."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosa_fast.files import write_atomically

Row = dict[str, str]
"""Column to cell."""


def percent(value: float | None) -> str:
    """Two decimals; empty for what is unknown or undefined."""
    return fixed(value, 2)


def signed(value: float | None) -> str:
    """Two decimals with their sign."""
    return "" if value is None or math.isnan(value) else f"{value:+.2f}"


def fixed(value: float | None, digits: int) -> str:
    """So many decimals; empty for what is unknown or undefined."""
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write rows of the same columns as CSV, atomically.

    Raises:
        ValueError: the disk is full or the folder cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_table(path: Path, columns: Sequence[str], remedy: str) -> list[dict[str, str]]:
    """Read a CSV with at least these columns.

    Raises:
        ValueError: the file is missing or empty, or a column or a cell is.
    """
    try:
        with open(path, newline="") as handle:
            rows = list(csv.DictReader(handle))
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(f"cannot read the table {path} ({problem}): {remedy}") from None
    if not rows:
        raise ValueError(f"the table {path} is empty: {remedy}")
    for number, row in enumerate(rows, start=2):
        missing = [column for column in columns if row.get(column) is None]
        if missing or None in row:
            what = f"without {', '.join(missing)}" if missing else "with too many cells"
            raise ValueError(f"{path}, line {number} is {what}: {remedy}")
    return rows


@dataclass(frozen=True, slots=True)
class IouTable:
    """`per_class_iou.csv` of an evaluation."""

    path: Path
    dataset: str
    splits: tuple[str, ...]
    """In the file's order; "<split> (store)" is what the pseudo-label store holds."""
    miou: dict[tuple[str, str, str], float]
    """(split, system, setting) to mIoU in percent."""
    remedy: str

    def get(self, split: str, system: str, setting: str) -> float:
        """One mIoU.

        Raises:
            ValueError: the table does not have it.
        """
        try:
            return self.miou[split, system, setting]
        except KeyError:
            raise ValueError(f"{self.path} has no mIoU of {system}, {setting}, on {split}: {self.remedy}") from None


def read_iou_table(path: Path, remedy: str) -> IouTable:
    """Read the mIoU lines of a table of IoU per class.

    Raises:
        ValueError: the file is missing or damaged.
    """
    rows = read_table(path, ("dataset", "split", "system", "setting", "class", "iou"), remedy)
    miou = {}
    for number, row in enumerate(rows, start=2):
        if row["class"] == "mIoU" and row["iou"]:
            try:
                miou[row["split"], row["system"], row["setting"]] = float(row["iou"])
            except ValueError:
                raise ValueError(f"{path}, line {number}: iou = {row['iou']!r} is no number: {remedy}") from None
    return IouTable(path, rows[0]["dataset"], tuple(dict.fromkeys(row["split"] for row in rows)), miou, remedy)
