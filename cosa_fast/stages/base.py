"""What every stage of the command line has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from cosa_fast.config import Positive


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """Flags that every stage takes."""

    command: ClassVar[str]
    parallel: ClassVar[bool] = False
    """Whether several processes of torchrun can share the work."""

    threads: Positive = 2
    """CPU threads. More than the idle cores of a shared machine makes it slower, not faster."""
    config: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """YAML file whose values become the defaults of the other flags; given again, later files win."""
    log: Path | None = None
    """Also write the log to this file."""

    @abstractmethod
    def run(self) -> None:
        """Do the work."""
