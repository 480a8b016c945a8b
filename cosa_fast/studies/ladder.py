"""Table 3a: CoSA's parts added one after the other to the baseline."""

from __future__ import annotations

from matplotlib.figure import Figure

from cosa_fast.studies import paper
from cosa_fast.studies.ablation import ablation
from cosa_fast.studies.inputs import Inputs
from cosa_fast.studies.needs import LADDER
from cosa_fast.studies.tables import Row

LABELS = ("baseline", "+ GC", "+ GC, SA", "+ GC, SA, RAW", "+ GC, SA, CSC", "all but DT", "CoSA")


def study(inputs: Inputs) -> tuple[list[Row], Figure]:
    """The table and the figure; differences are to the baseline."""
    return ablation(
        inputs,
        dict(zip(LADDER, LABELS, strict=True)),
        "baseline",
        paper.LADDER,
        "CoSA's parts, added one by one (Table 3a)",
    )
