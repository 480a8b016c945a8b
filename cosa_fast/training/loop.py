"""A training loop that can be killed at any moment and continues with the same weights."""

from __future__ import annotations

import json
import logging
import math
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cosa_fast.distributed import ALONE, World
from cosa_fast.files import describe_os_error, exclusive, require_space, write_atomically

log = logging.getLogger(__name__)
BatchT = TypeVar("BatchT")


class Stateful(Protocol):
    """A module, an optimiser, or anything else with a state to resume."""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Continue from `state`."""


@dataclass(frozen=True, slots=True)
class Validation:
    """Something to measure now and then."""

    every: int
    """Iterations from one call to the next; the last iteration is measured too."""
    measure: Callable[[int], tuple[list[dict[str, Any]], dict[str, float]]]
    """Of the iterations done so far: records for `validation.jsonl`, and scalars for TensorBoard."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Another run's state to begin with."""

    folder: Path
    """What `publish` wrote."""
    fingerprint: Mapping[str, Any]
    """What must be the same as in that run."""


def run(
    *,
    name: str,
    folder: Path,
    fingerprint: Mapping[str, Any],
    iterations: int,
    state: Mapping[str, Stateful],
    batches: Callable[[int], Iterator[BatchT]],
    step: Callable[[int, BatchT], dict[str, Tensor]],
    checkpoint_every: int,
    log_every: int,
    validation: Validation | None = None,
    origin: Origin | None = None,
    world: World = ALONE,
) -> None:
    """Call `step(iteration, batch)` for every iteration not yet done; afterwards the state of the end is saved.

    Every `checkpoint_every` iterations the `state`, torch's random generators and the iteration are saved to
    `folder/state.pt`, atomically. A later call with the same `fingerprint` (everything that decides the result)
    continues from there; with another one it starts anew and says so: from `origin`, if there is one. The loader's
    position is the iteration: `batches(start)` must give batch number `start` first. The scalars that `step` returns
    stay on the device and are averaged over `log_every` iterations, then written to `folder/metrics.jsonl` and
    TensorBoard files there, with the seconds per iteration and `waiting`, the share of them spent on the loader; what
    `validation` measures goes to `folder/validation.jsonl`.

    All processes of `world` call this together. The first one alone touches `folder`; the state it saves continues on
    any number of them, and the logged scalars are means over them.

    Raises:
        ValueError: another process trains in `folder`, the disk is or gets full, the loss is not finite, or a saved
            state is damaged or, for `origin`, of other settings.
    """
    with exclusive(folder) if world.first else nullcontext():
        path = folder / "state.pt"
        saved = world.tell(_choose_state(path, fingerprint, origin, name) if world.first else None)
        start = _restore(_read_state(saved), state) if saved is not None else 0
        size = sum(_bytes(part.state_dict()) for part in state.values())
        require_space(folder, 4 * size, f"{name} (two checkpoints and the result)")
        logs = _Logs(folder, start, validated=validation is not None) if world.first else None
        if world.first:
            for leftover in folder.glob(f".{path.name}.*.tmp"):  # of a process killed while it saved
                leftover.unlink()
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        source = batches(start)
        waited, clock = 0.0, time.perf_counter()
        progress = tqdm(range(start, iterations), desc=name, initial=start, total=iterations, disable=world.quiet)
        for iteration in progress:
            asked = time.perf_counter()
            batch = next(source)
            waited += time.perf_counter() - asked
            for key, value in step(iteration, batch).items():
                totals[key] = totals[key] + value if key in totals else value.clone()
                counts[key] = counts.get(key, 0) + 1
            done = iteration + 1
            if done % log_every == 0 or done == iterations:
                # One wait for the device per log line, not per iteration.
                means = _means(totals, counts, world)
                elapsed, clock = time.perf_counter() - clock, time.perf_counter()
                timing = {"seconds_per_iteration": elapsed / counts["loss"], "waiting": waited / elapsed}
                waited = 0.0
                totals.clear()
                counts.clear()
                if logs is not None:
                    logs.report(done, {**means, **timing})
                    progress.set_postfix(loss=f"{means['loss']:.3f}")
                    if progress.disable:
                        log.info("%s: iteration %d/%d, loss %.3f", name, done, iterations, means["loss"])
                if not math.isfinite(means["loss"]):
                    raise ValueError(
                        f"{name}: the loss is {means['loss']} at iteration {done}; lower the learning rate or look at "
                        f"{folder / 'metrics.jsonl'}. The last checkpoint is kept"
                    )
            if validation is not None and (done % validation.every == 0 or done == iterations):
                began = time.perf_counter()
                lines, scalars = validation.measure(done)
                if logs is not None:
                    logs.validated(done, lines, scalars)
                clock += time.perf_counter() - began
            if (done % checkpoint_every == 0 or done == iterations) and _finite(totals, world) and world.first:
                _save(path, fingerprint, state, done)
        if logs is not None:
            logs.writer.close()
        if hasattr(source, "close"):
            source.close()
        world.wait()


def say_if_finished(output: Path, folder: Path, world: World) -> None:
    """Warn that a training whose result `output` is there, and no state to go on with, begins anew and replaces it."""
    if world.first and output.exists() and not (folder / "state.pt").exists():
        log.warning("%s is finished: training anew, it will be replaced (interrupt now to keep it)", output)


def publish(folder: Path, output: Path) -> None:
    """Make a run's folder, state and logs, the origin of other runs: it becomes the folder `output`.

    Raises:
        ValueError: the folder cannot be written.
    """
    try:
        for private in (".lock", "state.other.pt"):
            (folder / private).unlink(missing_ok=True)
        shutil.rmtree(output, ignore_errors=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder, output)
    except OSError as error:
        raise ValueError(describe_os_error(error, output)) from None


def finish(folder: Path, output: Path, logs: Sequence[str] = ("metrics",)) -> None:
    """Once the result `output` is written: put the logs beside it, forget the saved state.

    `results/cosa.safetensors` gets `results/cosa.metrics.jsonl` and so on; a log that nothing was written to is empty,
    so that the same files stand there whatever the settings were.
    """
    for log_name in logs:
        path = folder / f"{log_name}.jsonl"
        content = path.read_bytes() if path.exists() else b""
        write_atomically(output.with_suffix(f".{log_name}.jsonl"), content)
    (folder / "state.pt").unlink(missing_ok=True)


def _save(path: Path, fingerprint: Mapping[str, Any], state: Mapping[str, Stateful], iteration: int) -> None:
    content: dict[str, Any] = {
        "fingerprint": json.dumps(fingerprint, sort_keys=True, default=str),
        "iteration": iteration,
        "state": {key: part.state_dict() for key, part in state.items()},
        "rng": torch.get_rng_state(),
        # One: of several processes each has its own GPU, and all draw from the same state.
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }

    def write(target: Path) -> None:
        try:
            torch.save(content, target)
        except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
            raise OSError(28, str(error)) from error

    write_atomically(path, write)


def _choose_state(path: Path, fingerprint: Mapping[str, Any], origin: Origin | None, name: str) -> Path | None:
    """The saved state to go on with: this run's own, else that of `origin`, whose logs are taken over; or none."""
    if path.exists():
        saved = _read_state(path)
        difference = _difference(json.loads(saved["fingerprint"]), json.loads(json.dumps(fingerprint, default=str)))
        if not difference:
            log.info("%s: continuing from iteration %d (%s)", name, saved["iteration"], path)
            return path
        other = path.with_name("state.other.pt")
        path.replace(other)
        log.warning("%s: starting anew, %s is of another run (%s)", name, other, "; ".join(difference[:5]))
    return None if origin is None else _take_over(origin, path.parent, name)


def _take_over(origin: Origin, folder: Path, name: str) -> Path:
    """The state of another run, with its logs."""
    path = origin.folder / "state.pt"
    if not path.exists():
        raise ValueError(f"{origin.folder} is no warm-up of `cosa-fast warmup`: there is no {path.name}")
    saved = _read_state(path)
    difference = _difference(json.loads(saved["fingerprint"]), json.loads(json.dumps(origin.fingerprint, default=str)))
    if difference:
        raise ValueError(
            f"{origin.folder} is a warm-up with other settings ({'; '.join(difference[:5])}): make it again"
        )
    for log_file in folder.glob("*.jsonl"):  # of another run
        log_file.unlink()
    shutil.copytree(origin.folder, folder, ignore=shutil.ignore_patterns(path.name), dirs_exist_ok=True)
    log.info("%s: beginning at iteration %d with %s", name, saved["iteration"], origin.folder)
    return path


def _read_state(path: Path) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise ValueError(f"the saved state {path} is damaged: delete it to start again") from None
    return saved


def _restore(saved: dict[str, Any], state: Mapping[str, Stateful]) -> int:
    for key, part in state.items():
        part.load_state_dict(saved["state"][key])
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda_rng"])
    return int(saved["iteration"])


def _difference(old: Any, new: Any, place: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _difference(old.get(key), new.get(key), f"{place}.{key}".lstrip("."))]
    return [] if old == new else [f"{place} was {old!r}, is {new!r}"]


class _Logs:
    """A run's metrics, validation records and TensorBoard files; those past the resumed iteration are forgotten."""

    def __init__(self, folder: Path, start: int, validated: bool) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.metrics, self.records = (
            _truncate_log(folder / f"{kind}.jsonl", start) for kind in ("metrics", "validation")
        )
        if not validated:
            self.records.unlink(missing_ok=True)

    def report(self, iteration: int, values: Mapping[str, float]) -> None:
        """Scalars of the training."""
        _append(self.metrics, [{"iteration": iteration, **{k: round(v, 6) for k, v in values.items()}}])
        self._scalars(iteration, values)

    def validated(self, iteration: int, lines: list[dict[str, Any]], scalars: Mapping[str, float]) -> None:
        """What the validation measured."""
        _append(self.records, lines)
        self._scalars(iteration, scalars)

    def _scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, iteration)


def _truncate_log(path: Path, start: int) -> Path:
    """Drop lines past the resumed iteration, which will be written again, and one that a full disk cut short."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() and start else []:
        try:
            if json.loads(line)["iteration"] <= start:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    path.unlink(missing_ok=True)
    if kept:
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
    return path


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    with open(path, "a") as handle:
        handle.write("".join(json.dumps(record) + "\n" for record in records))


def _means(totals: Mapping[str, Tensor], counts: Mapping[str, int], world: World) -> dict[str, float]:
    """Of each scalar over the iterations, and over all processes."""
    if world.size > 1:
        together = torch.stack([total.double() for total in totals.values()])
        world.add(together)
        totals = dict(zip(totals, (together / world.size).unbind(), strict=True))
    return {key: float(total) / counts[key] for key, total in totals.items()}


def _finite(totals: Mapping[str, Tensor], world: World) -> bool:
    """Whether a state is worth saving: one whose loss is not finite, in any process, could never be resumed."""
    if world.size > 1 and totals:
        bad = torch.stack([~total.isfinite() for total in totals.values()]).sum()
        world.add(bad)
        return not bad
    return all(bool(total.isfinite().all()) for total in totals.values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    return sum(_bytes(item) for item in value) if isinstance(value, list | tuple) else 0
