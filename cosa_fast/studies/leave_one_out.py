"""Table 3b: CoSA without one of its parts at a time."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.ablation import ablation
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import LEAVE_ONE_OUT
from cosa_fast.studies.tables import Row

LABELS = ("CoSA", "without DT", "without CSC", "without RAW", "without SA", "without GC")


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure; differences are to full CoSA."""
    return ablation(
        inputs,
        dict(zip(LEAVE_ONE_OUT, LABELS, strict=True)),
        "cosa",
        paper.LEAVE_ONE_OUT,
        "CoSA without one part at a time (Table 3b)",
    )
