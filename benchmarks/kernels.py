"""Time and memory of the losses, against what others would write: `python -m benchmarks.kernels`.

Providers: `eager`, the formula in plain torch; `compile`, that under torch.compile; `ours`, cosa_kernels; `full`, the
same with maps of all classes, for the teacher's targets; `release`, the authors' way; `sklearn`, for the threshold.
Nothing is timed before the results agree. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from tqdm import tqdm

from benchmarks import common, measure, shapes
from benchmarks.operations import BUILD, Case, Inputs, build
from benchmarks.plot_kernels import draw, read, table
from benchmarks.shapes import SHAPES, Shape, Size

Provider = Literal["eager", "compile", "ours", "full", "release", "sklearn"]
Row = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the losses against the same in plain torch."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    ops: tuple[str, ...] = ()
    """Operations; empty: all."""
    shapes: tuple[str, ...] = ()
    """Names of shapes, as in the table; empty: all of the device."""
    providers: tuple[Provider, ...] = ()
    """Empty: all, but on the CPU without `compile`, which takes minutes there."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of logits and CAMs."""
    turns: int = 5
    """On the CPU each provider runs at least so often."""
    seconds: float = 3.0
    """On the CPU, time to fill with more turns, per operation and shape."""
    threads: int = 1
    """On the CPU."""
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/kernels.csv (or kernels_sweep.csv)."""
    sweep: bool = False
    """Instead: how raw_cross_entropy's cost grows with pixels, classes and batch; the figure goes beside the CSV."""
    table: bool = False
    """Instead: print the newest results in the CSV."""
    smoke: bool = False
    """Instead: only compare with float64 at small sizes (for a memory checker)."""
    profile: bool = False
    """Instead: torch.profiler's table of one step of each operation."""
    tiny: bool = False
    """Tiny sizes: they show that everything works; the numbers mean nothing."""

    @property
    def size(self) -> Size:
        return "tiny" if self.tiny else "cuda" if self.device == "cuda" else "cpu"


def run(options: Options) -> list[Row]:
    """Do what the options ask; returns the rows that were measured.

    Raises:
        SystemExit: impossible options, or results that disagree.
    """
    options = _resolved(options)
    path = options.csv or _default_csv(options)
    if options.table:
        print(table(read(path)))
        return []
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    measure.gate(options.ops, options.device, _dtype(options))
    print(f"gate: {', '.join(options.ops)} agree with float64 ({options.dtype}, {options.device})")
    if options.profile:
        for name, shape in _points(options):
            print(f"{name} {shape.name}\n{measure.profile(_build(name, shape, options), options.device)}")
    if options.smoke or options.profile:
        return []
    rows = _measured(options, path)
    print(table(rows))
    if options.sweep:
        draw(path)
    print(f"\nappended to {path}")
    return rows


def _resolved(options: Options) -> Options:
    """With device, operations and providers filled in."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA or ROCm device; use --device cpu")
    if options.device == "auto":
        options = replace(options, device="cuda" if torch.cuda.is_available() else "cpu")
    alternatives = [f"--{name}" for name in ("sweep", "table", "smoke", "profile") if getattr(options, name)]
    if len(alternatives) > 1:
        raise SystemExit(f"{' and '.join(alternatives)} exclude each other: pass one")
    if options.sweep and (options.ops or options.shapes):
        raise SystemExit("--sweep has an operation and shapes of its own: leave out --ops and --shapes")
    if options.turns < 1 or options.threads < 1:
        raise SystemExit(f"--turns and --threads must be at least 1, got {options.turns} and {options.threads}")
    for name in options.ops:
        if name not in BUILD:
            raise SystemExit(f"--ops {name}: no such operation; there are {', '.join(BUILD)}")
    ops = ("raw_cross_entropy",) if options.sweep else options.ops or tuple(BUILD)
    known = {shape.name for name in ops for shape in SHAPES[name][options.size]}
    for name in options.shapes:
        if name not in known:
            raise SystemExit(f"--shapes {name}: no such shape here; there are {', '.join(sorted(known))}")
    without = {"compile"} if options.sweep or options.device == "cpu" else set()
    providers = options.providers or tuple(name for name in get_args(Provider) if name not in without)
    return replace(options, ops=ops, providers=providers)


def _dtype(options: Options) -> torch.dtype:
    return getattr(torch, options.dtype)


def _default_csv(options: Options) -> Path:
    folder = common.results_folder(options.device, options.tiny)
    return folder / ("kernels_sweep.csv" if options.sweep else "kernels.csv")


def _points(options: Options) -> Iterator[tuple[str, Shape]]:
    """Operations and shapes to measure; those of a sweep are named after what grows."""
    for name in options.ops:
        points = shapes.sweep(options.size) if options.sweep else SHAPES[name][options.size]
        yield from ((name, shape) for shape in points if not options.shapes or shape.name in options.shapes)


def _build(name: str, shape: Shape, options: Options) -> Case:
    inputs = Inputs(options.device, _dtype(options), _dtype(options))
    return build(name, shape, inputs, "compile" in options.providers)


def _measured(options: Options, path: Path) -> list[Row]:
    """Measure all points and append them to the CSV, one by one: what is done is not lost."""
    machine: dict[str, Any] = common.record(options.device) | {"dtype": options.dtype}
    ceilings = common.ceilings(options.device, options.tiny)
    nowhere = dict.fromkeys(("shape", "batch", "classes", "pixels"), "")
    rows = [
        _row(machine | {"op": "machine"} | nowhere, "ceiling", "", metric, common.Spread(value, value, value))
        for metric, value in ceilings._asdict().items()
    ]
    common.append_csv(path, rows)
    with measure.fresh_processes() as pool:
        for name, shape in tqdm(list(_points(options)), disable=None):
            case = _build(name, shape, options)
            chosen: measure.Calls = {
                provider: call for provider, call in case.providers.items() if provider in options.providers
            }
            calls = measure.warmed_up(f"{name} {shape.name}", case, chosen, _dtype(options))
            memory_of = partial(_memory, pool, name, shape, _dtype(options))
            size = {"batch": shape.batch, "classes": shape.classes, "pixels": shape.high[0] * shape.high[1]}
            about = machine | {"op": name, "shape": shape.name} | size
            costs = measure.costs(case, calls, options.device, ceilings, options.turns, options.seconds, memory_of)
            new = [_row(about, *cost) for cost in costs]
            if new:
                common.append_csv(path, new)
                rows += new
    return rows


def _memory(pool: Executor, *arguments: Any) -> dict[str, float]:
    return pool.submit(measure.memory_alone, *arguments).result()


def _row(about: dict[str, Any], provider: str, mode: str, metric: str, value: common.Spread) -> Row:
    texts = {key: str(entry) for key, entry in about.items()} | {"provider": provider, "mode": mode, "metric": metric}
    return texts | {column: f"{number:.5g}" for column, number in zip(("value", "p20", "p80"), value, strict=True)}


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
