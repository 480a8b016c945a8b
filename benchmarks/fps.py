"""Images per second of inference: `python -m benchmarks.fps`.

Ours and the release's way on the same network, in turns: five scales with mirror images and one, with and without CRF,
one by one and in the best batch, eager and compiled, fp32 and bf16. From normalised images on the device (CoSA: squares
of 448 pixels; CoSA-MS: the images themselves) to uint8 label maps of each image's own size on the host; decoding and
resizing are a row of their own. The weights are random unless a checkpoint is given: speed does not depend on them,
except for the CRF, which leaves out classes that a trained network rules out. benchmarks/README.md explains the table.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from benchmarks import common
from benchmarks.fps_methods import (
    SIZES,
    VIEWS,
    Checkpoint,
    Crf,
    Maps,
    Method,
    Provider,
    gate,
    gflop,
    made_pictures,
    preparations,
    random_network,
    read_pictures,
    trained_network,
    ways,
)
from benchmarks.fps_table import read, table
from cosa_fast.config import RuntimeConfig
from cosa_fast.crf import CRF_PRESETS, CrfPool
from cosa_fast.inference import prefetch
from cosa_fast.models.segmenter import SegmenterCheckpoint
from cosa_fast.predictors import Batch, Named, System, prepared
from cosa_fast.runtime import Runtime, resolve

Row = dict[str, Any]
GAIN = 1.03
"""A larger batch is tried while the last one was faster by this."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure inference as a whole."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    networks: tuple[Literal["voc", "coco", "resnet101"], ...] = ()
    """CoSA (ViT-B/16) with 20 or 80 classes; CoSA-MS (DeepLabV3+ on ResNet-101) with 20. Random weights.

    Without any: all, unless there is a checkpoint; of a tiny run the first.
    """
    checkpoint: Path | None = None
    """CoSA's, of the `train` stage: measured too."""
    segmenter: Path | None = None
    """CoSA-MS's, of the `multistage` stage: measured too."""
    views: tuple[Literal["five", "single"], ...] = ("five", "single")
    """Five scales with mirror images, or one without."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ()
    """Of ours (the release has fp32); empty: bf16 and fp32 on a GPU, fp32 on the CPU."""
    compile: tuple[Literal["off", "on"], ...] = ()
    """Empty: both on a GPU, off on the CPU. CoSA-MS is never compiled: its images have many sizes."""
    crf: tuple[Crf, ...] = ("none", "release", "standard")
    """Presets; with a CRF ours runs in the first precision, not compiled, in the best batch."""
    release: bool = True
    """Measure the release's way too."""
    best_batch: int | None = None
    """None: search, doubling from 1 to --max-batch while that helps."""
    max_batch: int = 64
    size: int = 448
    """Side of CoSA's squares."""
    seconds: float = 2.0
    """Of a turn of a method (a batch at least)."""
    turns: int = 3
    threads: int = 1
    """On the CPU; CRF processes, and threads that decode."""
    images: Path | None = None
    """Folder of photographs for sizes and CRF; without it smooth random pictures of usual sizes."""
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/fps.csv."""
    table: bool = False
    """Instead: print the newest results in the CSV."""
    profile: bool = False
    """Instead: torch.profiler's table of one batch of ours, per network and views."""
    tiny: bool = False
    """Tiny networks and pictures: they show that everything works; the numbers mean nothing."""


def run(options: Options) -> list[Row]:
    """Do what the options ask; returns the rows that were measured.

    Raises:
        SystemExit: impossible options, or results that disagree.
    """
    options = _resolved(options)
    path = options.csv or common.results_folder(options.device, options.tiny) / "fps.csv"
    if options.table:
        print(table(read(path)))
        return []
    machines: dict[str, Runtime] = {}
    for kind in ("fp32", *options.precisions):
        machines[kind] = resolve(RuntimeConfig(device=options.device, precision=kind, compile="off"), options.threads)
    gate(machines["fp32"])
    print(f"gate: label maps are those of the release's way (fp32, {options.device})")
    # Each network is compiled for each scale, batch and precision, which count together.
    torch._dynamo.config.recompile_limit = 256
    about, rows = common.record(options.device), []
    with contextlib.ExitStack() as stack:
        pools: dict[str, CrfPool] = {}
        for preset in options.crf:
            if preset != "none":
                pools[preset] = stack.enter_context(CrfPool(options.threads, CRF_PRESETS[preset]))
        for name, network in _networks(options):
            for views in options.views:
                case = Case(options, name, network, views, machines, _pictures(options, network))
                if options.profile:
                    print(f"{name}, {views}\n{_profile(case)}")
                    continue
                measured = _measured(case, pools)
                common.append_csv(path, [about | row for row in measured])
                rows += measured
    if rows:
        print(table([{key: str(value) for key, value in (about | row).items()} for row in rows]))
        print(f"\nappended to {path}")
    return rows


def _resolved(options: Options) -> Options:
    """With everything filled in that depends on the device."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: this torch sees no CUDA or ROCm device; use --device cpu")
    if min(options.turns, options.threads, options.max_batch, options.best_batch or 1) < 1:
        raise SystemExit("--turns, --threads, --max-batch and --best-batch must be at least 1")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    networks = options.networks
    if not networks and options.checkpoint is None and options.segmenter is None:
        networks = ("voc",) if options.tiny else ("voc", "coco", "resnet101")
    return replace(
        options,
        device=device,
        networks=networks,
        precisions=options.precisions or (("bf16", "fp32") if on_gpu else ("fp32",)),
        compile=options.compile or (("off", "on") if on_gpu else ("off",)),
        size=64 if options.tiny else options.size,
        max_batch=2 if options.tiny else options.max_batch,
    )


def _pictures(options: Options, network: Checkpoint) -> list[Named]:
    if options.images is not None:
        return read_pictures(options.images, 8)
    sizes = SIZES["coco" if len(network.classes) > 20 else "voc"]
    return made_pictures(8, tuple((h // 8, w // 8) for h, w in sizes) if options.tiny else sizes)


def _networks(options: Options) -> Iterator[tuple[str, Checkpoint]]:
    for name in options.networks:
        yield name, random_network(name, options.tiny)
    if options.checkpoint is not None:
        yield options.checkpoint.name, trained_network(options.checkpoint, "checkpoint")
    if options.segmenter is not None:
        yield options.segmenter.name, trained_network(options.segmenter, "segmenter")


@dataclass(frozen=True, slots=True)
class Case:
    """One network and its views."""

    options: Options
    name: str
    network: Checkpoint
    views: str
    machines: dict[str, Runtime]
    """By precision."""
    pictures: list[Named]

    def method(self, provider: Provider, batch: int, precision: str, compiled: bool, crf: Crf) -> Method:
        return Method(self.name, provider, self.views, batch, precision, compiled, crf)

    def ways(self, methods: Sequence[Method], pools: dict[str, CrfPool]) -> dict[Method, tuple[System, Maps]]:
        return ways(methods, self.network, self.options.size, self.machines, pools)


def _measured(case: Case, pools: dict[str, CrfPool]) -> list[Row]:
    """Every method, in turns."""
    options = case.options
    best = {kind: options.best_batch or _best_batch(case, kind) for kind in options.precisions}
    methods = _methods(case, best)
    made = case.ways(methods, pools)
    first: dict[Method, float] = {}
    turns: dict[Method, list[tuple[int, float, float]]] = {method: [] for method in methods}
    everything = list(itertools.product(range(-1, options.turns), methods))
    for turn, method in tqdm(everything, desc=f"{case.name}, {case.views}", unit="turn", disable=None):
        # Untimed first: what has to be compiled is, and the CRF's processes start.
        result = _turn(method, *made[method], case.pictures, options.seconds if turn >= 0 else 0.0)
        if turn >= 0:
            turns[method].append(result)
        else:
            first[method] = result[1]
    work = gflop(case.network, VIEWS[case.views], options.size)
    rows = [
        _row(case, turns[method], "ours")
        | {
            "provider": method.provider,
            "batch": method.batch,
            "precision": method.precision,
            "compile": "on" if method.compiled else "off",
            "crf": method.crf,
            "gflop_per_image": f"{work:.4g}",
            "first_pass_s": f"{first[method]:.2f}",
        }
        for method in methods
    ]
    system, _ = made[methods[0]]
    return [*rows, _row(case, _decoding(case, system), "decoding")]


def _methods(case: Case, best: dict[Literal["fp32", "bf16"], int]) -> list[Method]:
    """The release's way first."""
    options, methods = case.options, list[Method]()
    standalone = isinstance(case.network, SegmenterCheckpoint)
    if options.release and not standalone:  # the release has no code for CoSA-MS
        methods += [case.method("release", 1, "fp32", False, crf) for crf in options.crf]
    kinds = ("off",) if standalone else options.compile
    if "none" in options.crf:
        methods += [
            case.method("ours", batch, precision, compiled == "on", "none")
            for precision in options.precisions
            for compiled in kinds
            for batch in dict.fromkeys((1, best[precision]))
        ]
    first = options.precisions[0]
    return methods + [case.method("ours", best[first], first, False, crf) for crf in options.crf if crf != "none"]


def _best_batch(case: Case, precision: Literal["fp32", "bf16"]) -> int:
    """Of 1, 2, 4 ... the last that was faster by `GAIN` than the one before it, without compilation or CRF."""
    method = case.method("ours", 1, precision, False, "none")
    ((system, maps),) = case.ways([method], {}).values()
    best, fastest, batch = 1, 0.0, 1
    while batch <= case.options.max_batch:
        method = replace(method, batch=batch)
        try:
            _turn(method, system, maps, case.pictures, 0.0)
            count, seconds, _ = _turn(method, system, maps, case.pictures, case.options.seconds / 2)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if count / seconds < GAIN * fastest:
            break
        best, fastest, batch = batch, count / seconds, 2 * batch
    return best


def _turn(
    method: Method, system: System, maps: Maps, pictures: Sequence[Named], seconds: float
) -> tuple[int, float, float]:
    """Images, wall-clock and CPU seconds of batches until `seconds` are over, but of one at least."""
    group = [pictures[number % len(pictures)] for number in range(method.batch)]
    other = [pictures[(number + method.batch) % len(pictures)] for number in range(method.batch)]
    ready = [prepared(system, group), prepared(system, other)]
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()

    def batches() -> Iterator[tuple[Batch, Sequence[Named]]]:
        yield ready[0]
        for number in itertools.count(1):
            if time.perf_counter() - start >= seconds:
                return
            yield ready[number % 2]

    # The maps are on the host when they come, so nothing is left on the device.
    with torch.inference_mode():
        count = sum(1 for _ in maps(batches(), VIEWS[method.views], method.crf))
    return count, time.perf_counter() - start, time.process_time() - cpu


def _row(case: Case, turns: Sequence[tuple[int, float, float]], provider: str) -> Row:
    """The columns of the CSV, from each turn's images, wall-clock and CPU seconds."""
    rates = [count / seconds for count, seconds, _ in turns]
    return {
        "network": case.name,
        "classes": len(case.network.classes),
        "provider": provider,
        "views": case.views,
        "size": case.options.size,
        "batch": 1,
        "precision": "",
        "compile": "",
        "crf": "none",
        "images": sum(count for count, _, _ in turns),
        "images_per_s": f"{statistics.median(rates):.4g}",
        "slowest": f"{min(rates):.4g}",
        "fastest": f"{max(rates):.4g}",
        "cpu_s_per_image": f"{statistics.median(cpu / count for count, _, cpu in turns):.4g}",
        "gflop_per_image": "",
        "first_pass_s": "",
        "pictures": case.options.images.name if case.options.images else "random",
        "load_average": f"{os.getloadavg()[0]:.1f}",
    }


def _decoding(case: Case, system: System) -> list[tuple[int, float, float]]:
    """What comes before: JPEG bytes in memory to uint8 pixels of the network's size, by `threads` threads."""
    prepare, threads = preparations(system, case.pictures), case.options.threads
    count, turns = 2 * len(case.pictures), []
    for _ in range(case.options.turns):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in prefetch(prepare, range(count), threads, ahead=2 * threads):
            pass
        turns.append((count, time.perf_counter() - start, time.process_time() - cpu))
    return turns


def _profile(case: Case) -> str:
    """Of one batch, after another."""
    options = case.options
    method = case.method("ours", options.best_batch or 1, options.precisions[0], False, "none")
    ((system, maps),) = case.ways([method], {}).values()
    _turn(method, system, maps, case.pictures, 0.0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        _turn(method, system, maps, case.pictures, 0.0)
    order = f"self_{'device' if options.device == 'cuda' else 'cpu'}_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=40)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
