"""One case: are the results right, and what do they cost?"""

from __future__ import annotations

import gc
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Ceilings, Spread
from benchmarks.operations import Case, Inputs, build
from benchmarks.shapes import SHAPES, Shape

Calls = Mapping[str, Callable[[], Any]]
MemoryOf = Callable[[str], Mapping[str, float]]

SMALL_MS = 1.0
"""Calls below it are replayed from a CUDA graph too: gaps between launches would hide what the kernels take."""
ROUNDING = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error by which ours may exceed five times the error of eager, both against float64."""
AGREEMENT = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative difference that providers may have at the measured shapes."""


def gate(names: Sequence[str], device: str, dtype: torch.dtype) -> None:
    """Compare ours with the float64 reference at small sizes, values and gradients.

    Raises:
        SystemExit: they differ.
    """
    for name in names:
        for shape in SHAPES[name]["gate"]:
            true = build(name, shape, Inputs("cpu", dtype, torch.float64))
            case = build(name, shape, Inputs(device, dtype, dtype))
            truth = outputs(true.providers["eager"], true.leaf)
            eager, ours = (outputs(case.providers[provider], case.leaf) for provider in ("eager", "ours"))
            for what, expected, plain, got in zip(_names(case), truth, eager, ours, strict=True):
                allowed = 5 * relative_error(plain, expected) + ROUNDING[dtype] + case.slack
                if not (error := relative_error(got, expected)) <= allowed:
                    raise SystemExit(
                        f"{name} is wrong, so nothing is measured: its {what} in {dtype} on {device} is {error:.1e} "
                        f"from float64 ({allowed:.1e} would pass) at {shape}"
                    )


def outputs(call: Callable[[], Any], leaf: Tensor | None) -> list[Tensor]:
    """Value and gradient; of an operation without a gradient all results."""
    if leaf is None:
        result = call()
        return list(result) if isinstance(result, tuple) else [result]
    value = call()
    # Not 1: a backward pass that forgets the upstream gradient must show.
    return [value.detach(), *torch.autograd.grad(value, leaf, torch.full_like(value, 1.7))]


def _names(case: Case) -> tuple[str, ...]:
    return case.results if case.leaf is None else ("value", "gradient")


def relative_error(result: Tensor, truth: Tensor) -> float:
    """||result - truth|| / ||truth||; infinite where only one of them is finite."""
    result, truth = result.double().cpu(), truth.double().cpu()
    finite = truth.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return math.inf
    difference, scale = (result - truth)[finite].norm(), truth[finite].norm()
    return float(difference / scale) if scale > 0 else float(difference)


def warmed_up(title: str, case: Case, calls: Calls, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The calls that can run here, each having run once in each mode, with equal results where that is promised.

    Raises:
        SystemExit: the results differ.
    """
    ready: dict[str, Callable[[], Any]] = {}
    first: tuple[str, list[Tensor]] | None = None
    for provider, call in calls.items():
        try:
            results = _run_each_mode(call, case.leaf)
        except Exception as error:
            # A baseline that is out of memory, cannot be compiled or is not installed must not cost the others.
            if provider == "ours":
                raise
            print(f"{title}: {provider} left out, {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        ready[provider] = call
        if provider not in case.agree:
            continue
        first = first or (provider, results)
        for what, result, expected in zip(_names(case), results, first[1], strict=True):
            difference = relative_error(result, expected)
            if not difference <= AGREEMENT[dtype] + case.slack:
                raise SystemExit(
                    f"{title}: the {what} of {provider} differs from that of {first[0]} by {difference:.1e}, so "
                    "nothing is measured"
                )
    return ready


def _run_each_mode(call: Callable[[], Any], leaf: Tensor | None) -> list[Tensor]:
    """Once without and once with a gradient, for which torch.compile makes different code; the latter's results."""
    with torch.no_grad():
        call()
    return outputs(call, leaf)


def costs(
    case: Case, calls: Calls, device: str, ceilings: Ceilings, turns: int, seconds: float, memory_of: MemoryOf
) -> Iterator[tuple[str, str, str, Spread]]:
    """Provider, mode, metric and value of all calls.

    Args:
        turns, seconds: as in `common.cpu_times`.
        memory_of: peak memory per mode of a provider, measured elsewhere (on the CPU).
    """
    if device == "cuda":
        times = {provider: common.cuda_times(call, case.leaf) for provider, call in calls.items()}
    else:
        times = common.cpu_times(calls, case.leaf, turns, seconds)
    for provider, call in calls.items():
        memory = common.peak_memory(call, case.leaf, device) if device == "cuda" else memory_of(provider)
        small = device == "cuda" and times[provider]["forward"].median < SMALL_MS
        graph = common.graph_times(call, case.leaf) if small and provider in case.agree else {}
        for mode, time in times[provider].items():
            work = case.work[mode]
            floor = max(work.bytes / ceilings.gb_per_s, work.exps / ceilings.gexp_per_s) / 1e6
            yield provider, mode, "time_ms", time
            if mode in graph:
                yield provider, mode, "graph_ms", graph[mode]
            for metric, value in (
                ("memory_mib", memory[mode]),
                ("gb_per_s", work.bytes / time.median / 1e6),
                ("gexp_per_s", work.exps / time.median / 1e6),
                ("floor_ms", floor),
            ):
                yield provider, mode, metric, Spread(value, math.nan, math.nan)


@contextmanager
def fresh_processes(*modules: str) -> Iterator[ProcessPoolExecutor]:
    """Each task gets a process in which nothing has run yet. They start from one that has imported everything.

    Args:
        modules: what it is to import besides the benchmark of the losses.
    """
    context = multiprocessing.get_context("forkserver")
    # What the first call of an operator, and of scikit-learn, would import: seconds in each process.
    context.set_forkserver_preload(["benchmarks.kernels", "torch._dynamo", "sklearn.mixture", *modules])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        yield pool


def memory_alone(name: str, shape: Shape, dtype: torch.dtype, provider: str) -> dict[str, float]:
    """`common.peak_memory` of a provider on the CPU, after a warm-up; for a fresh process."""
    torch.set_num_threads(1)
    common.return_freed_memory()
    gc.freeze()  # what has been imported: walking through it takes longer than the rest, and copies its pages
    case = build(name, shape, Inputs("cpu", dtype, dtype), provider == "compile")
    _run_each_mode(case.providers[provider], case.leaf)
    return common.peak_memory(case.providers[provider], case.leaf, "cpu")


def profile(case: Case, device: str) -> str:
    """torch.profiler's table of one step of ours, after a warm-up."""
    outputs(case.providers["ours"], case.leaf)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        outputs(case.providers["ours"], case.leaf)
        if device == "cuda":
            torch.cuda.synchronize()
    order = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40)
