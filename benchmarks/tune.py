"""Other launch configurations of the kernels, on a GPU: `python -m benchmarks.tune`.

Warps of each kernel, and each size that a module of `cosa_kernels.gpu` has as a constant, are halved and doubled, one
at a time; a variant with other results counts as failed. What wins belongs into the launch code, after `make test` has
compiled it for every target.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from benchmarks import common, measure
from benchmarks.operations import Case, Inputs, build
from benchmarks.shapes import SHAPES

PACKAGE = "cosa_kernels.gpu."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the kernels in other configurations."""

    points: tuple[str, ...] = (
        "raw_cross_entropy:voc_b16_aux",
        "raw_cross_entropy:coco_b16_aux",
        "csc_info_nce:voc_b16_batch",
        "csc_info_nce:coco_b16_batch",
        "upsample_cross_entropy:cityscapes_b4",
    )
    """operation:shape."""
    rep: int = 50
    """Milliseconds of runs per variant."""


@dataclass(frozen=True)
class Kernel:
    """A kernel that an operation launches."""

    name: str
    module: str
    warps: int


def run(options: Options) -> None:
    """Print a table per operation and shape, row by row.

    Raises:
        SystemExit: there is no GPU, or no such operation or shape.
    """
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU: this torch sees none")
    for point in options.points:
        name, _, wanted = point.partition(":")
        shape = next((shape for shape in SHAPES.get(name, {}).get("cuda", []) if shape.name == wanted), None)
        if shape is None:
            raise SystemExit(f"--points {point}: no such operation and shape; they are written operation:shape")
        case = build(name, shape, Inputs("cuda", torch.float32, torch.float32))
        print(f"\n{point}\n\n| variant | full ms (20 % to 80 %) | against the present |\n|---|---|---|", flush=True)
        for row in _rows(case, options.rep):
            print(row, flush=True)


def _rows(case: Case, rep: int) -> Iterator[str]:
    with seen() as kernels:
        expected = measure.outputs(case.providers["ours"], case.leaf)
    mode = "forward" if case.leaf is None else "full"
    present = common.cuda_times(case.providers["ours"], case.leaf, rep)[mode]
    launched = ", ".join(f"{kernel.name} {kernel.warps} warps" for kernel in kernels)
    yield f"| present: {launched} | {present.median:.4f} ({present.low:.4f} to {present.high:.4f}) | |"
    for title, module, constant, kernel, value in _variants(kernels):
        with changed(module, constant, value) if module else with_warps(kernel, value):
            try:
                got = measure.outputs(case.providers["ours"], case.leaf)
                time = common.cuda_times(case.providers["ours"], case.leaf, rep)[mode]
            except Exception as error:  # whatever a compiler says of a configuration it cannot do
                yield f"| {title} | {type(error).__name__} | |"
                continue
        if not _close(got, expected):
            yield f"| {title} | wrong result | |"
            continue
        ratio = time.median / present.median
        yield f"| {title} | {time.median:.4f} ({time.low:.4f} to {time.high:.4f}) | {ratio:.3f} |"


def _variants(kernels: Sequence[Kernel]) -> Iterator[tuple[str, ModuleType | None, str, str, int]]:
    for kernel in kernels:
        for warps in {kernel.warps // 2, kernel.warps * 2} - {0}:
            yield f"{kernel.name}: {warps} warps", None, "", kernel.name, warps
    for name in dict.fromkeys(kernel.module for kernel in kernels):
        module = importlib.import_module(name)
        for constant, value in list(vars(module).items()):
            # MOST_...: a limit, no size.
            if constant.isupper() and isinstance(value, int) and not constant.startswith("MOST"):
                for other in (value // 2, value * 2):
                    yield f"{name.removeprefix(PACKAGE)}.{constant} {value} -> {other}", module, constant, "", other


def _close(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(measure.relative_error(a, b) <= 1e-4 for a, b in zip(results, expected, strict=True))


@contextmanager
def seen() -> Iterator[list[Kernel]]:
    """The kernels of the package launched inside, each once."""
    found: list[Kernel] = []

    def look(name: str, module: str, keywords: dict[str, Any]) -> None:
        kernel = Kernel(name, module, keywords.get("num_warps", 4))
        if module.startswith(PACKAGE) and kernel not in found:
            found.append(kernel)

    with _launches(look):
        yield found


@contextmanager
def with_warps(kernel: str, warps: int) -> Iterator[None]:
    """Launches of the kernel inside have so many warps."""

    def change(name: str, module: str, keywords: dict[str, Any]) -> None:
        if name == kernel:
            keywords["num_warps"] = warps

    with _launches(change):
        yield


@contextmanager
def changed(module: ModuleType, constant: str, value: int) -> Iterator[None]:
    """The module's constant has another value inside."""
    before = getattr(module, constant)
    setattr(module, constant, value)
    try:
        yield
    finally:
        setattr(module, constant, before)


@contextmanager
def _launches(visit: Any) -> Iterator[None]:
    """Calls `visit` with the kernel's name, its module and the keywords of each launch, which it may change."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def visiting(self: Any, *arguments: Any, **keywords: Any) -> Any:
        visit(self.fn.__name__, self.fn.__module__, keywords)
        return run(self, *arguments, **keywords)

    JITFunction.run = visiting
    try:
        yield
    finally:
        JITFunction.run = run


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
