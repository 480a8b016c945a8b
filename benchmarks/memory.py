"""Peak memory of the pipeline's GPU stages by batch size: `python -m benchmarks.memory`.

On a GPU it is measured, by the allocator's count. Without one it is estimated: a step or batch runs on fake tensors,
which have sizes but no values, and every storage is counted from its birth to its death. That leaves out what a kernel
needs for itself, the CUDA context and the allocator's fragments. `--check` compares the estimate with the growth of the
resident set in a real step or batch on this CPU.
"""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from benchmarks import common, measure
from benchmarks.memory_cases import Case, Evaluated, Name, Precision, Standalone, Training, make_case
from cosa_fast.bands import BAND_BYTES

CARDS = (8, 12, 24)
"""GiB of common cards."""
BESIDE = 1.0
"""GiB that the CUDA context, cuBLAS and fragments are taken to need beside the tensors."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Peak memory of a training step of CoSA (guided) or CoSA-MS, or of a batch of the evaluation."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """On a GPU measured, on the CPU estimated."""
    presets: tuple[Name, ...] = ("voc_b4", "coco_b8", *get_args(Standalone), *get_args(Evaluated))
    batch_sizes: tuple[int, ...] = ()
    """Empty: 1, 2, 4, 8 and 16, of tiny sizes 2 alone. Without 1 for CoSA-MS, which normalises over the batch."""
    accumulate: tuple[int, ...] = (1,)
    """Parts of a batch of CoSA's training; those that do not divide a batch size are left out."""
    variants: tuple[Precision, ...] = ("fp32", "bf16")
    csv: Path | None = None
    """Results are appended here; default: benchmarks/results/MACHINE/memory.csv."""
    check: bool = False
    """Instead: estimate and measure what a real step or batch needs on this CPU beyond weights and states."""
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
    with measure.fresh_processes("benchmarks.memory_cases") as pool:
        for case, precision in tqdm(list(_points(options)), disable=None):
            total, extra = _measured(case, precision) if on_gpu else pool.submit(estimated, case, precision).result()
            about = {"preset": case.name, "batch": case.batch, "accumulate": case.accumulate, "variant": precision}
            how = {"how": "measured" if on_gpu else "estimated", "mib": f"{total:.0f}", "extra_mib": f"{extra:.0f}"}
            rows.append(machine | about | how)
            common.append_csv(path, rows[-1:])  # what is out of time keeps what it has
    print(table(rows))
    print(f"\nappended to {path}")


def _points(options: Options) -> Iterator[tuple[Case, Precision]]:
    for name in options.presets:
        for batch in options.batch_sizes or ((2,) if options.tiny else (1, 2, 4, 8, 16)):
            if name in get_args(Standalone) and batch == 1:
                continue
            for parts in options.accumulate if name in get_args(Training) else (1,):
                if batch % parts == 0:
                    case = make_case(name, batch, parts, options.tiny)
                    yield from ((case, precision) for precision in options.variants)


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


@contextlib.contextmanager
def like_gpu() -> Iterator[None]:
    """Let the CPU take the memory that a GPU takes, where they differ."""
    with mock.patch.dict(BAND_BYTES, cpu=BAND_BYTES["cuda"]), _LikeGpu():
        yield


class _LikeGpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])  # as CUDA's autocast
        elif func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is not None:
            # On a CPU a mask with a gradient, Swin's, means explicit softmax matrices.
            kwargs = kwargs | {"attn_mask": kwargs["attn_mask"].detach()}
        elif func is Tensor.nonzero:
            # In a band, whose sources a GPU would have to be waited for: it takes all of them.
            return np.array([0, len(args[0]) - 1])
        return func(*args, **kwargs)


def estimated(case: Case, precision: Precision) -> tuple[float, float]:
    """MiB at the peak, and what of it is there during a step or batch only.

    For a fresh process: fake tensors stay in the caches of what was called.
    """
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by deepcopy, to no harm
    with torch.device("meta"):
        net = case.network(precision, "cpu")
    # Fake modules are where they should be, and cannot be moved.
    stay = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with stay, OneMode(), like_gpu(), Count() as count:
        for module in net.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        run = case.ready(net, precision, "cpu")
        run()  # makes the optimiser's state
        gc.collect()
        before, count.peak = count.bytes, 0
        run()
        return count.peak / common.MIB, (count.peak - before) / common.MIB


def _measured(case: Case, precision: Precision) -> tuple[float, float]:
    """The same on the GPU; NaN where it does not fit."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with torch.device("cuda"):  # where random numbers take no time
            net = case.network(precision, "cuda")
        run = case.ready(net, precision, "cuda")
        for _ in range(2):
            run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return math.nan, math.nan
    peak = torch.cuda.max_memory_allocated()
    return peak / common.MIB, (peak - before) / common.MIB


def _check(options: Options) -> None:
    print("| stage | batch | accumulate | variant | estimated MiB | measured MiB |\n|---|---|---|---|---|---|")
    with measure.fresh_processes("benchmarks.memory_cases") as pool:
        for case, precision in _points(options):
            extra = pool.submit(estimated, case, precision).result()[1]
            real = pool.submit(resident, case, precision).result()
            print(f"| {case.name} | {case.batch} | {case.accumulate} | {precision} | {extra:.0f} | {real:.0f} |")


def resident(case: Case, precision: Precision) -> float:
    """MiB by which the resident set grows in a step or batch on the CPU, `like_gpu`; for a fresh process."""
    torch.set_num_threads(1)
    common.return_freed_memory()
    gc.freeze()
    with like_gpu():
        run = case.ready(case.network(precision, "cpu"), precision, "cpu")
        run()
        with common.Peak("cpu") as peak:
            run()
    return peak.mib


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per stage, variant and parts, a column per batch size; below it what fits the common cards."""
    batches = sorted({row["batch"] for row in rows})
    lines = [
        f"GiB at the peak, {rows[0]['how']}",
        "",
        f"| stage | precision | parts | {' | '.join(f'{b} images' for b in batches)} "
        f"| largest batch in {', '.join(map(str, CARDS))} GiB |",
        "|" + "---|" * (len(batches) + 4),
    ]
    for line in dict.fromkeys((row["preset"], row["variant"], row["accumulate"]) for row in rows):
        of = {r["batch"]: float(r["mib"]) / 1024 for r in rows if (r["preset"], r["variant"], r["accumulate"]) == line}
        fits = [max((b for b, gib in of.items() if gib + BESIDE <= card), default=0) for card in CARDS]
        cells = [f"{of[b]:.1f}" if b in of else "" for b in batches]
        lines.append(
            f"| {' | '.join(map(str, line))} | {' | '.join(cells)} | {', '.join(str(f or '-') for f in fits)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(tyro.cli(Annotated[Options, tyro.conf.arg(name="")]))
