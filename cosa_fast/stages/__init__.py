"""The stages of the pipeline as dataclasses: paths and configuration sections in, one call of the stage's code out.

The fields become the flags of `cosa-fast <command>`, their docstrings its help. Stage code is imported in `run`, so
that reading this package, and every `--help`, stays clear of torch.
"""

from cosa_fast.stages.base import Stage
from cosa_fast.stages.data import Index, Masks, MiniVoc
from cosa_fast.stages.results import Evaluate, Report, Speed, Study, Submission
from cosa_fast.stages.training import Export, Multistage, PseudoLabels, Train, Warmup

STAGES: tuple[type[Stage], ...] = (
    MiniVoc,
    Index,
    Masks,
    Warmup,
    Train,
    PseudoLabels,
    Export,
    Multistage,
    Evaluate,
    Speed,
    Study,
    Report,
    Submission,
)

__all__ = ["STAGES", "Stage"]
