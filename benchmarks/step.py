"""Time of a whole training step, by phase of the schedule: `python -m benchmarks.step`.

Variants: `release`, the authors' way written from its description; `fp32` and `bf16`, ours; with `_compile`, under
torch.compile; with `_graphs`, in CUDA graphs. Batches are synthetic and lie on the device: the loaders have a benchmark
of their own. Nothing is timed before the variants' losses agree. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from tqdm import tqdm

from benchmarks import common, step_profile
from benchmarks.common import Spread
from benchmarks.plot_kernels import read
from benchmarks.step_cases import PHASES, PRESETS, TINY, Phase, Preset, Step, Variant, make_step, synthetic_batch, tflop

Row = dict[str, str]
WHERE = ("device", "machine", "threads", "torch")
WHAT = ("preset", "batch", "phase", "variant", "commit")
PEAK_TFLOP_S = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "RTX 3090": 71.0}
"""The vendors' figures for dense bf16 by a part of the GPU's name; elsewhere a large product is timed."""
TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp8": 1e-1}
"""Relative difference that the first loss may have from that of `fp32`."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the training step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    presets: tuple[Literal["minivoc", "voc_b4", "coco_b8"], ...] = ()
    """Empty: on the CPU `minivoc`, where the others take minutes per step; on a GPU all."""
    batch_sizes: tuple[int, ...] = ()
    """Instead of the preset's own."""
    phases: tuple[Phase, ...] = get_args(Phase)
    variants: tuple[Variant, ...] = ()
    """Empty: on the CPU `release` and `fp32`; on a GPU all."""
    turns: int = 5
    """Each variant runs at least so often."""
    seconds: float = 10.0
    """Time to fill with more turns, per preset and phase."""
    threads: int = 1
    """On the CPU."""
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/step.csv."""
    table: bool = False
    """Instead: print the results in the CSV, of repeated runs the medians."""
    smoke: bool = False
    """Instead: only compare the variants' first losses."""
    profile: Path | None = None
    """Instead: write torch.profiler's traces into this folder, and print each part's share."""
    tiny: bool = False
    """Tiny sizes: they show that everything works; the numbers mean nothing."""


def run(options: Options) -> list[Row]:
    """Do what the options ask; returns the rows that were measured.

    Raises:
        SystemExit: impossible options; or, after the others were measured, a variant was left out.
    """
    options = _resolved(options)
    path = options.csv or common.results_folder(options.device, options.tiny) / "step.csv"
    if options.table:
        print(table(read(path)))
        return []
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    # Each preset and variant compiles the same functions anew; the limit, 8, is meant for one of them.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    rows: list[Row] = []
    left_out: list[str] = []
    for preset in tqdm(list(_presets(options)), disable=None):
        steps = _agreeing(preset, options)
        left_out += [f"{preset.name} {variant}" for variant in options.variants if variant not in steps]
        for phase in options.phases if steps and not options.smoke else ():
            if options.profile is not None:
                for variant, step in steps.items():
                    print(step_profile.profile(step, preset, phase, variant, options.device, options.profile))
                continue
            new = list(_measured(steps, preset, phase, options))
            common.append_csv(path, new)
            rows += new
    if rows:
        print(f"{table(rows)}\n\nappended to {path}")
    if left_out:
        raise SystemExit(f"not measured, for the reasons above: {', '.join(left_out)}")
    return rows


def _resolved(options: Options) -> Options:
    """With device, presets and variants filled in."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA or ROCm device; use --device cpu")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if min(options.turns, options.threads, *options.batch_sizes, 1) < 1:
        raise SystemExit("--turns, --threads and --batch-sizes must be at least 1")
    on_cpu: tuple[Variant, ...] = ("release", "fp32")
    presets = options.presets or (("minivoc",) if device == "cpu" else ("minivoc", "voc_b4", "coco_b8"))
    variants = options.variants or (on_cpu if device == "cpu" else get_args(Variant))
    return replace(options, device=device, presets=presets, variants=variants)


def _presets(options: Options) -> Iterator[Preset]:
    for name in options.presets:
        preset = (TINY if options.tiny else PRESETS)[name]
        yield from (preset.with_batch(batch) for batch in options.batch_sizes or (preset.batch,))


def _agreeing(preset: Preset, options: Options) -> dict[Variant, Step]:
    """A step for each variant, warmed up in all phases.

    One that cannot run here is left out and said so; likewise one whose first loss of a phase is not that of `fp32`,
    which only the release's is not by design. Without `fp32`, no other but the release's can be compared.
    """
    batch = synthetic_batch(preset, options.device)
    truth: dict[Phase, float] = {}
    ready: dict[Variant, Step] = {}
    first: Variant = "fp32"
    for variant in (first, *(v for v in options.variants if v != first)):
        try:
            step = make_step(preset, variant, options.device)
            for phase in options.phases:
                loss = float(step(PHASES[phase], batch)["loss"])
                for _ in range(2):  # CUDA graphs are recorded in the second
                    step(PHASES[phase], batch)
                if variant == "fp32":
                    truth[phase] = loss
                true = truth.get(phase, math.nan)
                if variant != "release" and not abs(loss - true) <= TOLERANCE[variant.partition("_")[0]] * abs(true):
                    raise ArithmeticError(f"the first loss of {phase} is {loss:.6g}, that of fp32 {true:.6g}")
        except Exception as error:  # whatever it is, it must not cost the other variants their figures
            print(
                f"{preset.name}: {variant} is left out, {type(error).__name__}: {(str(error) or '?').splitlines()[0]}"
            )
            continue
        if variant in options.variants:
            ready[variant] = step
    return ready


def _measured(steps: Mapping[Variant, Step], preset: Preset, phase: Phase, options: Options) -> Iterator[Row]:
    """The variants take turns, so that what disturbs the machine disturbs all of them alike."""
    batch = synthetic_batch(preset, options.device)
    times: dict[Variant, list[dict[str, float]]] = {variant: [] for variant in steps}
    begin = time.perf_counter()
    for turn in range(max(options.turns, 100)):
        if turn >= options.turns and time.perf_counter() - begin > options.seconds:
            break
        for variant, step in steps.items():
            times[variant].append(_turn(step, PHASES[phase], batch, options.device))
    machine = common.record(options.device) | {"load": f"{os.getloadavg()[0]:.1f}"}
    about = machine | {"preset": preset.name, "batch": preset.batch, "phase": phase}
    work, peak = tflop(preset, phase), peak_tflop_s(options.device, options.tiny)
    for variant, all_of in times.items():
        ms = common.spread([turn["ms"] for turn in all_of])
        per_second = [1000 / value for value in (ms.median, ms.high, ms.low)]
        values = {
            "time_ms": ms,
            "images_per_s": Spread(*(preset.batch * rate for rate in per_second)),
            "tflop_per_s": Spread(*(work * rate for rate in per_second)),
            "peak_share": Spread(*(work * rate / peak for rate in per_second)),
        }
        for metric in all_of[0].keys() - {"ms"}:
            values[metric] = common.spread([turn[metric] for turn in all_of])
        for metric, value in values.items():
            numbers = {column: f"{x:.5g}" for column, x in zip(("value", "p20", "p80"), value, strict=True)}
            texts = {key: str(entry) for key, entry in about.items()}
            yield texts | {"variant": variant, "metric": metric} | numbers


def _turn(step: Step, iteration: int, batch: Any, device: str, steps: int = 5) -> dict[str, float]:
    """Milliseconds of one step: on the CPU its CPU time, on a GPU the mean of some that follow each other.

    There `host_ms` is what Python needs to order them: the device is never idle while that is less.
    """
    if device == "cpu":
        start = time.process_time()
        step(iteration, batch)
        return {"ms": 1000 * (time.process_time() - start)}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    for _ in range(steps):
        step(iteration, batch)
    end.record()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return {"ms": begin.elapsed_time(end) / steps, "host_ms": 1000 * host / steps}


def peak_tflop_s(device: str, tiny: bool = False) -> float:
    """What shares refer to."""
    if device == "cuda":
        for name, peak in PEAK_TFLOP_S.items():
            if name in common.machine_name(device):
                return peak
    side = 64 if tiny else 2048 if device == "cpu" else 8192
    left = torch.randn(side, side, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return 2 * side**3 / common.fastest(lambda: left @ left, device) / 1e12


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Markdown: for each machine a line per preset, phase, variant and commit; medians over runs."""
    pooled: dict[tuple[str, ...], dict[tuple[str, ...], dict[str, list[float]]]] = {}
    for row in rows:
        group = pooled.setdefault(tuple(row[name] for name in WHERE), {})
        line = group.setdefault(tuple(row[name] for name in WHAT), {})
        line.setdefault(row["metric"], []).append(float(row["value"]))
        for edge in ("p20", "p80"):
            line.setdefault(f"{row['metric']} {edge}", []).append(float(row[edge]))
    return "\n\n".join(_one_table(dict(zip(WHERE, where, strict=True)), group) for where, group in pooled.items())


def _one_table(where: Mapping[str, str], group: Mapping[tuple[str, ...], Mapping[str, Sequence[float]]]) -> str:
    medians = {what: {name: common.spread(many).median for name, many in line.items()} for what, line in group.items()}
    lines = [
        f"{where['machine']} ({where['device']}, {where['threads']} threads), torch {where['torch']}.",
        "",
        "| preset | images | phase | variant | commit | runs | ms (20 % to 80 %) | images/s | release / this "
        "| fp32 / this | TFLOP/s (share of peak) | host ms |",
        "|" + "---|" * 12,
    ]
    for what, values in medians.items():
        preset, batch, phase, variant, commit = what

        def over(other: str, what: tuple[str, ...] = what, mine: float = values["time_ms"]) -> str:
            same = medians.get((*what[:3], other, what[4]))
            return f"{same['time_ms'] / mine:.2f}" if same else ""

        low, high = values["time_ms p20"], values["time_ms p80"]
        cells = [
            preset, batch, phase, variant, commit, str(len(group[what]["time_ms"])),
            f"{values['time_ms']:.4g} ({low:.4g} to {high:.4g})",
            f"{values['images_per_s']:.3g}", over("release"), over("fp32"),
            f"{values['tflop_per_s']:.3g} ({values['peak_share']:.0%})",
            f"{values['host_ms']:.4g}" if "host_ms" in values else "",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
