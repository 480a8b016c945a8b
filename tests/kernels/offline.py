"""Compile the kernels for real GPU targets, without a GPU: `python tests/kernels/offline.py [--all] [TARGET...]`.

Triton's driver is replaced by a mock that only names the target, and each launch stops after compiling. The code that
launches is the real one, so what is compiled is what would run: same specialisation, same configuration. Prints a line
per kernel and fails if one does not compile, spills registers or multiplies in plain TF32. `--all` takes every
combination of options; without it each option occurs at least once, the hungriest combination of each size included.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from cosa_kernels.gpu import (
    cam_pseudo_labels,
    confidence_histogram,
    csc_info_nce,
    fit_bimodal_threshold,
    merge_cams,
    upsample_cross_entropy,
)
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"


class MockDriver:
    """A driver for a device that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 227 * 1024 if self.target.backend == "cuda" else 64 * 1024,
            "multiprocessor_count": 132,
        }


def launches(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches as (name, call): `everything` that can be launched, or each option at least once."""
    yield from _cross_entropy(everything)
    yield from _pseudo_labels(everything)
    yield from _merge(everything)
    yield from _csc(everything)
    yield from _threshold(everything)


def _cross_entropy(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    padded_classes, sides = (2, 21, 41, 81, 151), (112, 224, 448, 1024)  # one per padded count, one per tile shape
    usual = (21, 448, 2, True, True, torch.uint8)
    varied = [(classes, *usual[1:]) for classes in padded_classes] + [(21, side, *usual[2:]) for side in sides]
    varied += [(*usual[:2], *rest) for rest in itertools.product((1, 2), (True, False), (True, False), (torch.uint8,))]
    varied += [(*usual[:5], wide) for wide in (torch.int32, torch.int64)]
    if everything:
        targets = (torch.uint8, torch.int32, torch.int64)
        varied = list(itertools.product(padded_classes, sides, (1, 2), (True, False), (True, False), targets))
    for classes, high, count, weighted, gradient, target_dtype in varied:
        logits = torch.empty(2, classes, 28, 28)  # float32 is what the kernels read, whatever is given
        target = torch.empty(count, 2, high, high, dtype=target_dtype)
        weight = torch.empty(count, 2, high, high) if weighted else None
        arguments = (logits, target, weight, torch.empty(count), 255, gradient)
        name = f"cross-entropy {classes} 28->{high} x{count} {weighted=} {gradient=} {target_dtype}"
        yield name, functools.partial(upsample_cross_entropy.forward, *arguments)


def _pseudo_labels(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    usual = (28, torch.float32, False, True, True, 1.0)
    varied = [usual, (448, *usual[1:]), (28, torch.bfloat16, *usual[2:]), (448, torch.float16, *usual[2:])]
    varied += [(448, torch.float32, True, *usual[3:]), (*usual[:3], False, False, 2.0)]
    if everything:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        flags = (True, False)
        varied = list(itertools.product((28, 448), dtypes, flags, flags, flags, (1.0, 2.0)))
    for low, dtype, listed, boxed, reliability, beta in varied:
        classes = torch.zeros(2, 20, dtype=torch.int64) if listed else None
        box = torch.zeros(2, 4, dtype=torch.int64) if boxed else None
        cams, out = torch.empty(2, 20, low, low, dtype=dtype), torch.empty(2, 448, 448)
        arguments = (cams, torch.empty(()), classes, box, 0.8, beta, 255, reliability, out.byte(), out)
        name = f"labels {dtype} {low}->448 {listed=} {boxed=} {reliability=} {beta=}"
        yield name, functools.partial(cam_pseudo_labels.assign, *arguments)


def _merge(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    usual = (3, torch.float32, True)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    varied = [usual, (1, torch.float32, False), (3, torch.bfloat16, True), (3, torch.float16, True)]
    if everything:
        varied = list(itertools.product((1, 3), dtypes, (True, False)))
    for scales, dtype, flipped in varied:
        cams = [torch.empty(2, 20, side, side, dtype=dtype) for side in (28, 14, 42)[:scales]]
        arguments = (cams, cams if flipped else [], torch.ones(2, 20, dtype=torch.bool), (448, 448), 1e-5)
        yield f"merge {dtype} x{scales} {flipped=}", functools.partial(merge_cams.merge, *arguments)


def _csc(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    # Padded to 16, 32 and multiples of 32.
    padded_classes = [16, *range(32, 257, 32)] if everything else [1, 20, 80, 150, 256]
    for classes in padded_classes:
        x, labels = torch.empty(2, classes, 100), torch.zeros(2, 100, dtype=torch.int64)
        yield f"csc {classes}", functools.partial(csc_info_nce.forward, x, labels, 0.5, True)


def _threshold(everything: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    sizes = [2**power for power in range(2, 11)] if everything else (4, 256, 1024)
    for bins, dtype in itertools.product(sizes, (torch.float32, torch.int64)):
        arguments = (torch.zeros(bins, dtype=dtype), 0.0, 1.0, 60, 50)
        yield f"fit {bins} {dtype}", functools.partial(fit_bimodal_threshold.fit, *arguments)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for bins, dtype, boxed in itertools.product(sizes, dtypes, (True, False)):
        cams, box = torch.empty(2, 20, 64, 64, dtype=dtype), torch.zeros(2, 4, dtype=torch.int64)
        arguments = (cams, box if boxed else None, bins, 0.0, 1.0, 0.0)
        yield f"count {bins} {dtype} {boxed=}", functools.partial(confidence_histogram.count, *arguments)


def compile_all(target: GPUTarget, everything: bool) -> dict[str, Any]:
    """Compiled kernels by a description, each once."""
    triton.runtime.driver.set_active(MockDriver(target))
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def only_compile(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.setdefault(f"{kernel.hash} {kernel.name}", (current, kernel))
        return kernel

    JITFunction.run = only_compile
    try:
        for current, launch in launches(everything):  # noqa: B007 - read by only_compile
            launch()
    finally:
        JITFunction.run = run
    return compiled


def usage(kernel: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers per thread, and bytes (CUDA) or registers (ROCm) spilled."""
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        return registers, spilled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])  # type: ignore[index]


def cuts_off(kernel: Any) -> bool:
    """Whether matrix units read float32 as it is, that is without its last 13 bits (see `dot_precision`)."""
    ptx = kernel.asm.get("ptx", "")
    return re.search(r"mma\S*\.tf32", ptx) is not None and "cvt.rna.tf32" not in ptx


def report(name: str, everything: bool) -> int:
    """Compile for one target; returns the number of kernels that spill, or multiply in plain TF32."""
    kernels = compile_all(TARGETS[name], everything)
    spills = cuts = 0
    for launch, kernel in kernels.values():
        registers, spilled = usage(kernel, TARGETS[name])
        spills += spilled > 0
        cuts += cuts_off(kernel)
        print(
            f"{name:7} {kernel.name:24} registers {registers:3} warps {kernel.metadata.num_warps} "
            f"shared {kernel.metadata.shared:6} spilled {spilled:4} {launch}"
        )
    print(f"{name}: {len(kernels)} kernels, triton {triton.__version__}, {cuts} in plain TF32, {spills} spill")
    return spills + cuts


def main(arguments: list[str]) -> int:
    """One process per target: Triton keeps what it compiled by device, and all mocks are device 0."""
    everything = "--all" in arguments
    names = [name for name in arguments if name != "--all"] or list(TARGETS)
    if len(names) == 1:
        return min(1, report(names[0], everything))

    def one(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, name, *(["--all"] if everything else [])]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        finished = list(pool.map(one, names))
    for process in finished:
        print(process.stdout, process.stderr, sep="", flush=True)
    return max(process.returncode for process in finished)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
