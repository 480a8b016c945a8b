"""Where a training step's time goes: torch.profiler's trace, and a table of the parts that the step labels."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.step_cases import PHASES, Phase, Preset, Step, synthetic_batch, tflop_per_image

PARTS = ("teacher x", "merging", "targets", "student", "losses", "backward", "optimizer", "average")
"""Beginnings of the labels; what lies outside of them is `other`."""
STEPS = 3


def profile(step: Step, preset: Preset, phase: Phase, variant: str, device: str, folder: Path) -> str:
    """Trace some steps; a Chrome trace (chrome://tracing, Perfetto) goes to the folder, the table of parts is returned.

    On a GPU the times are the device's, without the gaps, which stand below; on the CPU they are the clock's, with the
    profiler's own share.
    """
    batch = synthetic_batch(preset, device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(STEPS):
            with torch.profiler.record_function("step"):
                step(PHASES[phase], batch)
        if device == "cuda":
            torch.cuda.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{preset.name}_{phase}_{variant}.json.gz"
    profiler.export_chrome_trace(str(trace))
    parts = _device_parts(profiler.events() or ()) if device == "cuda" else _host_parts(profiler.key_averages())
    whole = parts.pop("step")
    work = tflop_per_image(preset)
    lines = [
        f"\n{preset.name}, {phase}, {variant}: {whole:.4g} ms per step ({trace})",
        "",
        "| part | ms | share | TFLOP/s |",
        "|---|---|---|---|",
    ]
    for part, ms in {**parts, "other": whole - sum(parts.values())}.items():
        rate = f"{1000 * preset.batch * work[part] / ms:.3g}" if part in work and ms > 0 else ""
        lines.append(f"| {part} | {ms:.4g} | {ms / whole:.1%} | {rate} |")
    if device == "cuda":
        busy, span = _busy(profiler.events() or ())
        lines.append(f"\nThe device was idle {1 - busy / span:.1%} of {span:.4g} ms.")
    return "\n".join(lines)


def _host_parts(averages: Iterable[Any]) -> dict[str, float]:
    """Milliseconds per step of `step` and of each labelled part, by the host's clock, in the order of PARTS."""
    return _ordered({event.key: event.cpu_time_total for event in averages if _is_label(event.key)})


def _device_parts(events: Iterable[Any]) -> dict[str, float]:
    """The same by the device's clock: the kernels of all operators that began while a label was open.

    In whichever thread: the backward pass has one of its own, so that labels do not enclose its operators.
    """
    events = list(events)
    annotations = {event.name for event in events if event.is_user_annotation}
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    labels = [event for event in on_host if _is_label(event.name)]
    found = dict.fromkeys((label.name for label in labels), 0.0)
    for event in on_host:
        # Annotations are on the device's clock as well, with the gaps between their kernels.
        busy = sum(kernel.duration for kernel in event.kernels if kernel.name not in annotations)
        for label in labels if busy else ():
            if label.time_range.start <= event.time_range.start <= label.time_range.end:
                found[label.name] += busy
    return _ordered(found)


def _is_label(name: str) -> bool:
    return name == "step" or name.startswith(PARTS)


def _ordered(microseconds: dict[str, float]) -> dict[str, float]:
    order = ("step", *PARTS)
    place = {name: next(i for i, part in enumerate(order) if name.startswith(part)) for name in microseconds}
    return {name: microseconds[name] / 1000 / STEPS for name in sorted(microseconds, key=place.__getitem__)}


def _busy(events: Iterable[Any]) -> tuple[float, float]:
    """Milliseconds in which some kernel ran, and from the first kernel's begin to the last one's end."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    )
    if not kernels:
        return 0.0, 1.0
    busy, (begin, end) = 0.0, kernels[0]
    for start, stop in kernels[1:]:
        if start > end:
            busy, begin = busy + end - begin, start
        end = max(end, stop)
    return (busy + end - begin) / 1000, (end - kernels[0][0]) / 1000
