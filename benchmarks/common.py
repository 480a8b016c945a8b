"""What the benchmarks share: the machine's record, time, memory, ceilings and the CSV."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import datetime
import gc
import math
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


class Spread(NamedTuple):
    """A median with the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of one value at least."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[-1])


# The machine.


def machine_name(device: str) -> str:
    """Of the GPU, or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def folder_name(device: str) -> str:
    """Of the machine's results: "cpu", or the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "-", machine_name(device).lower()).strip("-") if device == "cuda" else "cpu"


def results_folder(device: str, tiny: bool = False) -> Path:
    """Where results go unless told otherwise: those of a tiny run, which mean nothing, into a temporary folder."""
    if tiny:
        return Path(tempfile.mkdtemp(prefix="benchmark-"))
    return ROOT / "benchmarks/results" / folder_name(device)


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def commit() -> str:
    """What git calls the code, "-dirty" if it is changed (results aside); "unknown" outside a checkout."""
    try:
        name, changes = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["git", "describe", "--always", "--exclude", "*"],
                ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}-dirty" if changes else name


def record(device: str) -> dict[str, Any]:
    """The columns that say where and with what a number was measured."""
    return {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "device": device,
        "machine": machine_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "commit": commit(),
    }


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows at the end; the header comes with the first.

    Raises:
        SystemExit: the file has other columns.
    """
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as handle:
            if next(csv.reader(handle)) != columns:
                raise SystemExit(f"{path} has other columns than this benchmark writes: pass --csv another file")
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


# Time.


def cpu_turn(call: Callable[[], Tensor], leaf: Tensor | None) -> dict[str, float]:
    """Milliseconds of CPU time in each mode, once: forward alone, backward alone, both.

    CPU time of the process, because others share the machine: it leaves out the waits for them.
    """
    start = time.process_time()
    with torch.no_grad():
        call()
    times = {"forward": time.process_time() - start}
    if leaf is not None:
        start = time.process_time()
        value = call()
        middle = time.process_time()
        torch.autograd.grad(value, leaf)
        end = time.process_time()
        times |= {"backward": end - middle, "full": end - start}
    return {mode: 1000 * seconds for mode, seconds in times.items()}


def cpu_times(
    calls: Mapping[str, Callable[[], Tensor]], leaf: Tensor | None, turns: int, seconds: float
) -> dict[str, dict[str, Spread]]:
    """Per call and mode. The calls take turns, so that what disturbs the machine disturbs all of them alike.

    Args:
        turns: at least so many of each.
        seconds: more turns until so much time is over, up to 100.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for turn in range(max(turns, 100)):
        if turn >= turns and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            times[name].append(cpu_turn(call, leaf))
    return {name: {mode: spread([t[mode] for t in all_of]) for mode in all_of[0]} for name, all_of in times.items()}


def cuda_times(call: Callable[[], Tensor], leaf: Tensor | None, rep: int = 100) -> dict[str, Spread]:
    """Milliseconds per mode by CUDA events, the L2 cache cleared before each run; `rep` milliseconds of runs."""
    from triton.testing import do_bench

    quantiles = [0.5, 0.2, 0.8]
    with torch.no_grad():
        times = {"forward": Spread(*do_bench(call, rep=rep, quantiles=quantiles))}
    if leaf is not None:
        times["full"] = Spread(*do_bench(lambda: torch.autograd.grad(call(), leaf), rep=rep, quantiles=quantiles))
        times["backward"] = _cuda_backward(call, leaf, runs=max(10, min(200, int(rep / times["full"].median))))
    return times


def _cuda_backward(call: Callable[[], Tensor], leaf: Tensor, runs: int) -> Spread:
    """As do_bench, each time after a fresh forward pass: compiled graphs cannot be walked twice."""
    cache = torch.empty(256 * MIB, dtype=torch.int8, device=leaf.device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        value = call()
        cache.zero_()
        start.record()
        torch.autograd.grad(value, leaf)
        end.record()
    torch.cuda.synchronize()
    return spread([start.elapsed_time(end) for start, end in events])


def graph_times(call: Callable[[], Tensor], leaf: Tensor | None) -> dict[str, Spread]:
    """Milliseconds of CUDA graph replays: no launch gaps, a warm cache. Empty if a graph cannot hold the call."""
    from triton.testing import do_bench_cudagraph

    quantiles = [0.5, 0.2, 0.8]
    try:
        with torch.no_grad():
            times = {"forward": Spread(*do_bench_cudagraph(call, quantiles=quantiles))}
        if leaf is not None:
            full = do_bench_cudagraph(lambda: torch.autograd.grad(call(), leaf), quantiles=quantiles)
            times["full"] = Spread(*full)
    except RuntimeError:
        torch.cuda.synchronize()
        return {}
    return times


# Memory.


def peak_memory(call: Callable[[], Tensor], leaf: Tensor | None, device: str) -> dict[str, float]:
    """MiB that each mode takes at its peak, beyond what was there before it (results included).

    On the GPU the allocator's count. On the CPU the growth of the resident set, whose peak Linux lets a process reset:
    every library's temporaries, exact in a process that called `return_freed_memory` before. NaN where there is no such
    counter.
    """
    extra = {}
    with Peak(device) as peak, torch.no_grad():
        call()
    extra["forward"] = peak.mib
    if leaf is not None:
        with Peak(device) as peak:
            torch.autograd.grad(call(), leaf)
        extra["full"] = peak.mib
        value = call()
        with Peak(device) as peak:
            torch.autograd.grad(value, leaf)
        extra["backward"] = peak.mib
    return extra


def return_freed_memory() -> None:
    """From now on glibc hands blocks from 64 KiB on back when they are freed, so that the resident set is what is used.

    Otherwise they stay as holes in its heap, which later blocks fill unseen or do not fit. Slower: not for timing.
    """
    mmap_threshold = -3
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(mmap_threshold, 2**16)


class Peak:
    """How far memory rises while the context is entered, in MiB, counted as in `peak_memory`."""

    mib = math.nan

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = float(torch.cuda.memory_allocated())
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.before = _status("VmRSS")
            except OSError:
                self.before = math.nan
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / MIB
        elif not math.isnan(self.before):
            self.mib = max(0.0, _status("VmHWM") - self.before) / MIB


def _status(field: str) -> float:
    """Bytes, from /proc/self/status."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024.0 * int(match[1]) if match else math.nan


# Ceilings.


class Ceilings(NamedTuple):
    """What this machine can do at most, measured."""

    gb_per_s: float
    """Bytes read and written by a copy too large for the caches."""
    gexp_per_s: float
    """Float32 exponentials."""


def ceilings(device: str, tiny: bool = False) -> Ceilings:
    """Best of some runs. On the CPU with torch's threads; `tiny` runs are over at once and mean nothing."""
    size = 2**16 if tiny else 2**26 if device == "cpu" else 2**30
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / fastest(lambda: target.copy_(source), device) / 1e9
    if device == "cuda":
        from benchmarks.exp_kernel import exponentials

        count, run = exponentials(device)
        return Ceilings(copy, count / fastest(run, device) / 1e9)
    # Within the first-level cache.
    source, target = source[:2048], target[:2048]

    def run_cpu() -> None:
        for _ in range(200):
            torch.exp(source, out=target)

    return Ceilings(copy, 200 * len(source) / fastest(run_cpu, device) / 1e9)


def fastest(call: Callable[[], object], device: str, runs: int = 10) -> float:
    """Seconds of the fastest run."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, return_mode="min")) / 1000
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)
