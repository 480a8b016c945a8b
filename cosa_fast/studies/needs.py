"""What each study reads. Light enough to import while Snakemake parses its rules."""

from __future__ import annotations

from dataclasses import dataclass

from cosa_fast.config import StudiesConfig
from cosa_fast.studies.variants import threshold_variant

STUDIES = (
    "systems",
    "cpl",
    "ladder",
    "leave_one_out",
    "guidance",
    "coexistence",
    "speed",
    "threshold",
    "oracle",
    "confidence",
    "aux_cam",
    "swap",
    "raw",
    "qualitative",
)
"""Names of the studies, in the order of the paper; each is a module of this package."""

LADDER = ("baseline", "gc", "gc_sa", "gc_sa_raw", "gc_sa_csc", "gc_sa_raw_csc", "cosa")
"""Variants of Table 3a from the baseline up."""
LEAVE_ONE_OUT = ("cosa", "gc_sa_raw_csc", "no_csc", "no_raw", "no_sa", "no_gc")
"""Variants of Table 3b; `gc_sa_raw_csc` is CoSA without the dynamic threshold."""

GUIDANCE = ("gt", "no_gc", "detach_feat", "detach_cls", "cosa")
"""Variants of Table 4a."""
COEXISTENCE = ("no_csc", "cosa")
"""Variants of Table 4b."""
ORACLE = ("gt", "cosa", "no_gc", "noise")
"""Variants of Fig. 1."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The inputs of one study besides the dataset index."""

    variants: tuple[str, ...] = ()
    """Training variants, by their names in `cosa_fast.studies.variants`."""
    seeds: tuple[int, ...] = ()
    """Of each variant."""
    tables: tuple[str, ...] = ()
    """Tables of IoU per class: "main" (the results' own), "cpl" (also scored on the training split), "crf_release" and
    "crf_standard" (evaluated with that CRF)."""
    checkpoints: tuple[str, ...] = ()
    """"cosa" and "segmenter" of the results, for the names of their networks."""
    speed: bool = False
    """The table of `cosa-fast speed`."""
    galleries: tuple[str, ...] = ()
    """Folders of qualitative results: "main", and "no_csc", which may be absent."""
    suffix: str = ".svg"
    """Of the figure."""

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """Every (variant, seed)."""
        return tuple((variant, seed) for variant in self.variants for seed in self.seeds)


def needs(name: str, studies: StudiesConfig) -> Needs:
    """What the study `name` reads.

    Raises:
        ValueError: there is no such study.
    """
    every, first = studies.seeds, studies.seeds[:1]
    fixed = tuple(threshold_variant(value) for value in studies.thresholds)
    known = {
        "systems": Needs(tables=("main", "crf_release", "crf_standard"), checkpoints=("cosa", "segmenter")),
        "cpl": Needs(tables=("cpl",)),
        "ladder": Needs(variants=LADDER, seeds=every),
        "leave_one_out": Needs(variants=LEAVE_ONE_OUT, seeds=every),
        "guidance": Needs(variants=GUIDANCE, seeds=first),
        "coexistence": Needs(variants=COEXISTENCE, seeds=every),
        "speed": Needs(tables=("main", "crf_standard"), speed=True),
        "threshold": Needs(variants=(*fixed, "gc_sa_raw_csc", "cosa"), seeds=first),
        "oracle": Needs(variants=ORACLE, seeds=first),
        "confidence": Needs(variants=("cosa",), seeds=first),
        "aux_cam": Needs(variants=("cosa",), seeds=first),
        "swap": Needs(variants=("cosa", "no_sa"), seeds=first),
        "raw": Needs(variants=("cosa", "no_raw"), seeds=first),
        "qualitative": Needs(galleries=("main", "no_csc"), suffix=".png"),
    }
    if name not in known:
        raise ValueError(f"there is no study {name!r}: {', '.join(STUDIES)}")
    return known[name]
