"""Peak memory of a training step by batch size: `python -m benchmarks.memory`.

On a GPU it is measured, by the allocator's count. Without one it is estimated: the step runs on fake tensors, which
have sizes but no values, and every storage is counted from its birth to its death. That leaves out what a kernel needs
for itself, the CUDA context and the allocator's fragments. `--check` compares the estimate with the growth of the
resident set in a real step on this CPU.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import common, measure
from benchmarks.step_cases import PHASES, PRESETS, TINY, Preset, Variant, make_step, synthetic_batch

CARDS = (8, 12, 24)
"""GiB of common cards."""
BESIDE = 1.0
"""GiB that the CUDA context, cuBLAS and fragments are taken to need beside the tensors."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Peak memory of the guided training step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """On a GPU measured, on the CPU estimated."""
    presets: tuple[Literal["minivoc", "voc_b4", "coco_b8"], ...] = ("voc_b4", "coco_b8")
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    accumulate: tuple[int, ...] = (1,)
    """Parts of a batch; those that do not divide a batch size are left out."""
    variants: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/memory.csv."""
    check: bool = False
    """Instead: estimate and measure what a real step needs on this CPU beyond weights and states."""
    tiny: bool = False
    """Tiny sizes: they show that everything works; the numbers mean nothing."""


def run(options: Options) -> None:
    """Print the table, and append it to the CSV."""
    on_gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = "cuda" if on_gpu else "cpu"
    path = options.csv or common.results_folder(device, options.tiny) / "memory.csv"
    if options.check:
        _check(options)
        return
    machine = common.record(device)
    rows: list[dict[str, Any]] = []
    with measure.fresh_processes("benchmarks.step_cases") as pool:
        for preset, variant in tqdm(list(_points(options)), disable=None):
            total, extra = _measured(preset, variant) if on_gpu else pool.submit(estimated, preset, variant).result()
            about = {"preset": preset.name.partition("_")[0], "batch": preset.batch, "accumulate": preset.accumulate}
            how = {"how": "measured" if on_gpu else "estimated"}
            rows.append(machine | about | {"variant": variant} | how | {"mib": round(total), "extra_mib": round(extra)})
    common.append_csv(path, rows)
    print(table(rows))
    print(f"\nappended to {path}")


def _points(options: Options) -> Iterator[tuple[Preset, Variant]]:
    for name in options.presets:
        for batch in options.batch_sizes:
            preset = (TINY if options.tiny else PRESETS)[name].with_batch(batch)
            for parts in options.accumulate:
                if batch % parts == 0:
                    yield from ((replace(preset, accumulate=parts), variant) for variant in options.variants)


class Count(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self.bound = 0
        """At least the bytes alive: those that died since the last look are still in it."""

    @property
    def bytes(self) -> int:
        """Of what is alive now."""
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.bound = sum(size for _, size in self.alive.values())
        return self.bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference, size = StorageWeakRef(storage), storage.nbytes()
                self.bound += size - self.alive.get(reference.cdata, (None, 0))[1]
                self.alive[reference.cdata] = (reference, size)
        if self.bound > self.peak:
            self.peak = max(self.peak, self.bytes)
        return result


class OneMode(FakeTensorMode):
    """Copies of its tensors belong to it, too."""

    def __deepcopy__(self, memo: Any) -> OneMode:
        return self


def estimated(preset: Preset, variant: Variant) -> tuple[float, float]:
    """MiB at the peak of a step, and what of it is there during the step only.

    For a fresh process: fake tensors stay in the caches of what was called.
    """
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by deepcopy, to no harm
    with torch.device("meta"):
        net = preset.network()
    # Fake modules are where they should be, and cannot be moved.
    stay = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with stay, OneMode(), Count() as count:
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = nn.Parameter(torch.empty(parameter.shape), requires_grad=parameter.requires_grad)
                setattr(module, name, fake)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        step, batch = make_step(preset, variant, "cpu", net), synthetic_batch(preset, "cpu")
        step(PHASES["guided"], batch)  # makes the optimiser's state
        gc.collect()
        before, count.peak = count.bytes, 0
        step(PHASES["guided"], batch)
        return count.peak / common.MIB, (count.peak - before) / common.MIB


def _measured(preset: Preset, variant: Variant) -> tuple[float, float]:
    """The same on the GPU; NaN where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step, batch = make_step(preset, variant, "cuda"), synthetic_batch(preset, "cuda")
        for _ in range(2):
            step(PHASES["guided"], batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(PHASES["guided"], batch)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return math.nan, math.nan
    peak = torch.cuda.max_memory_allocated()
    return peak / common.MIB, (peak - before) / common.MIB


def _check(options: Options) -> None:
    print("| preset | batch | accumulate | variant | estimated MiB | measured MiB |\n|---|---|---|---|---|---|")
    with measure.fresh_processes("benchmarks.step_cases") as pool:
        for preset, variant in _points(options):
            extra = pool.submit(estimated, preset, variant).result()[1]
            real = pool.submit(resident, preset, variant).result()
            print(f"| {preset.name} | {preset.batch} | {preset.accumulate} | {variant} | {extra:.0f} | {real:.0f} |")


def resident(preset: Preset, variant: Variant) -> float:
    """MiB by which the resident set grows in a step on the CPU; for a fresh process."""
    torch.set_num_threads(1)
    common.return_freed_memory()
    gc.freeze()
    step, batch = make_step(preset, variant, "cpu"), synthetic_batch(preset, "cpu")
    step(PHASES["guided"], batch)
    with common.Peak("cpu") as peak:
        step(PHASES["guided"], batch)
    return peak.mib


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per preset, variant and parts, a column per batch size; below it what fits the common cards."""
    batches = sorted({row["batch"] for row in rows})
    lines = [
        f"GiB at the peak, {rows[0]['how']}",
        "",
        f"| dataset | precision | parts | {' | '.join(f'{b} images' for b in batches)} "
        f"| largest batch in {', '.join(map(str, CARDS))} GiB |",
        "|" + "---|" * (len(batches) + 4),
    ]
    for line in dict.fromkeys((row["preset"], row["variant"], row["accumulate"]) for row in rows):
        of = {r["batch"]: r["mib"] / 1024 for r in rows if (r["preset"], r["variant"], r["accumulate"]) == line}
        fits = [max((b for b, gib in of.items() if gib + BESIDE <= card), default=0) for card in CARDS]
        cells = [f"{of[b]:.1f}" if b in of else "" for b in batches]
        lines.append(
            f"| {' | '.join(map(str, line))} | {' | '.join(cells)} | {', '.join(str(f or '-') for f in fits)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
