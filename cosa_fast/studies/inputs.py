"""The files a study was given, opened and checked to belong together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cosa_fast.config import StudiesConfig
from cosa_fast.data.index import Index
from cosa_fast.studies.runs import Run, Validation, load_run
from cosa_fast.studies.tables import IouTable, read_iou_table

NOISE = "see the ladder's intervals for the spread between seeds"
"""Of studies with a single run per row or curve: small differences between them mean nothing."""
ONE_RUN = f"one run per row: {NOISE}"
"""Note of a table's row."""
RunPaths = Mapping[str, Mapping[int, Path]]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Paths and settings of one study."""

    index: Index
    """Of the dataset that everything is about."""
    studies: StudiesConfig = field(default_factory=StudiesConfig)
    runs: RunPaths = field(default_factory=dict)
    """Variant, then seed, to the prefix of the run's files."""
    tables: Mapping[str, Path] = field(default_factory=dict)
    """See `Needs.tables`."""
    checkpoints: Mapping[str, Path] = field(default_factory=dict)
    """See `Needs.checkpoints`."""
    speed: Path | None = None
    galleries: Mapping[str, Path] = field(default_factory=dict)

    @property
    def dataset(self) -> str:
        """The dataset's name, with what makes its numbers incomparable."""
        return f"{self.index.name} (synthetic)" if self.index.synthetic else self.index.name

    def table(self, name: str) -> IouTable:
        """A table of IoU per class.

        Raises:
            ValueError: it was not given, cannot be read or is of another dataset.
        """
        if name not in self.tables:
            raise ValueError(f"this study needs the table {name!r}: give --table {name}:PATH")
        path = self.tables[name]
        table = read_iou_table(path, f"make it with `snakemake --cores all {path}`")
        self._require_same_dataset(table.dataset, path)
        return table

    def compare(self, variants: Sequence[str]) -> dict[str, tuple[Run, ...]]:
        """The runs of some variants, one per seed and the same seeds in the same order for all.

        Raises:
            ValueError: a run is missing or unreadable, or they cannot be compared.
        """
        for variant in variants:
            if not self.runs.get(variant):
                raise ValueError(f"this study needs runs of {variant!r}: give --run {variant}:SEED:PREFIX")
        seeds = tuple(self.runs[variants[0]])
        for variant in variants:
            if set(self.runs[variant]) != set(seeds):
                raise ValueError(
                    f"{variants[0]!r} has runs with the seeds {_words(seeds)} but {variant!r} with "
                    f"{_words(self.runs[variant])}: only the same seeds can be paired"
                )
        loaded = {
            variant: tuple(load_run(variant, seed, self.runs[variant][seed]) for seed in seeds) for variant in variants
        }
        reference = loaded[variants[0]][0]
        for run in (run for runs in loaded.values() for run in runs):
            self._require_same_dataset(run.dataset, run.path)
            _require_comparable(run, reference)
        return loaded

    def about(self, record: Validation) -> str:
        """What a validation is of, for a figure's subtitle."""
        return f"{self.dataset}, {record.split}, {record.images} images"

    def about_curve(self, run: Run) -> str:
        """What a run's validations are of; those on the way may be of fewer images than the last."""
        first, last = run.curve()[0], run.last()
        return self.about(last) + (f" ({first.images} on the way)" if first.images < last.images else "")

    def identity(self, record: Validation) -> dict[str, str]:
        """The first cells of every line of a table."""
        return {"dataset": self.dataset, "split": record.split}

    def paper_note(self, paper: str, ours: str) -> str:
        """What differs between the paper's numbers and ours."""
        return f"paper: {paper}; ours: {self.dataset}, {ours}"

    def _require_same_dataset(self, name: str, path: Path) -> None:
        if name != self.index.name:
            raise ValueError(f"{path} is of the dataset {name}, the index of {self.index.name}: make it again")


def parse_runs(texts: Iterable[str]) -> dict[str, dict[int, Path]]:
    """`variant:seed:prefix` to a mapping.

    Raises:
        ValueError: a text has another form.
    """
    runs: dict[str, dict[int, Path]] = {}
    for text in texts:
        variant, _, rest = text.partition(":")
        seed, _, prefix = rest.partition(":")
        if not (variant and seed.isdecimal() and prefix):
            raise ValueError(f"--run {text}: wanted VARIANT:SEED:PREFIX, as in cosa:0:results/cosa")
        runs.setdefault(variant, {})[int(seed)] = Path(prefix)
    return runs


def parse_named_paths(flag: str, texts: Iterable[str]) -> dict[str, Path]:
    """`name:path` to a mapping.

    Raises:
        ValueError: a text has another form.
    """
    paths = {}
    for text in texts:
        name, _, path = text.partition(":")
        if not (name and path):
            raise ValueError(f"--{flag} {text}: wanted NAME:PATH, as in main:results/...")
        paths[name] = Path(path)
    return paths


def _require_comparable(run: Run, reference: Run) -> None:
    for what in ("split", "images", "classes", "iteration"):
        ours, theirs = getattr(run.last(), what), getattr(reference.last(), what)
        if ours != theirs:
            raise ValueError(
                f"{run.path} ends with {what} = {ours} but {reference.path} with {theirs}: make both with the same "
                "configuration (delete the older one and run snakemake again)"
            )


def _words(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(seeds)))
