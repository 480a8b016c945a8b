"""The resumable loop: killed anywhere, it ends with the same weights."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cosa_fast.files import exclusive
from cosa_fast.training import loop


class Run:
    """A small regression whose step also draws from torch's generator, as dropout would."""

    def __init__(self, iterations: int = 23) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(4, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.iterations = iterations
        self.seen: list[int] = []

    def batches(self, start: int) -> Iterator[Tensor]:
        while True:
            yield torch.full((8, 4), float(start)).sin()
            start += 1

    def step(self, iteration: int, batch: Tensor) -> dict[str, Tensor]:
        self.seen.append(iteration)
        loss = (self.model(batch + torch.randn(8, 4)) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def go(self, folder: Path, fingerprint: dict | None = None, step: object = None) -> Tensor:
        loop.run(
            name="test",
            folder=folder,
            fingerprint=fingerprint or {"lr": 0.1},
            iterations=self.iterations,
            state={"model": self.model, "optimizer": self.optimizer},
            batches=self.batches,
            step=step or self.step,
            checkpoint_every=5,
            log_every=4,
        )
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", [3, 5, 14, 22])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path: Path, stop: int) -> None:
    whole = Run().go(tmp_path / "whole")
    broken = Run()

    def failing(iteration: int, batch: Tensor) -> dict[str, Tensor]:
        if iteration == stop:
            raise KeyboardInterrupt
        return broken.step(iteration, batch)

    with pytest.raises(KeyboardInterrupt):
        broken.go(tmp_path / "parts", step=failing)
    resumed = Run()
    if stop >= 5:
        torch.manual_seed(98)  # the new process's generator is elsewhere; the checkpoint's must be restored
    assert torch.equal(resumed.go(tmp_path / "parts"), whole)
    assert resumed.seen[0] == stop // 5 * 5
    lines = metrics(tmp_path / "parts")
    assert [line["iteration"] for line in lines][-3:] == [16, 20, 23]
    assert len({line["iteration"] for line in lines}) == len(lines)


def test_another_configuration_starts_anew_and_says_what_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run(10).go(tmp_path)
    second = Run(10)
    with caplog.at_level(logging.WARNING):
        second.go(tmp_path, fingerprint={"lr": 0.2})
    assert second.seen[0] == 0
    assert "lr was 0.1, is 0.2" in caplog.text
    assert (tmp_path / "state.other.pt").exists()  # the other run's state is put aside, not lost


def test_a_state_with_a_loss_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Checkpoints fall between the log lines here, so the log cannot be what stops it."""
    run = Run(20)
    run.go(tmp_path / "good", step=lambda i, b: {"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="the loss is nan at iteration 8"):
        run.go(tmp_path / "bad", step=lambda i, b: {"loss": torch.tensor(float("nan") if i >= 4 else 1.0)})
    assert not (tmp_path / "bad/state.pt").exists()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(ValueError, match="another process is working in"):
        Run().go(tmp_path)


def test_damaged_state_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"state\.pt is damaged: delete it"):
        Run().go(tmp_path)


def test_state_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (os.system, ("touch /tmp/cosa_fast_was_here",))

    torch.save({"fingerprint": "{}", "state": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="damaged"):
        Run().go(tmp_path)


def test_full_disk_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("cosa_fast.files.shutil.disk_usage", lambda _: usage(1, 1, 10))
    run = Run()
    with pytest.raises(ValueError, match=r"has 0 MiB free but test .* needs"):
        run.go(tmp_path)
    assert not run.seen


def test_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    """A real ENOSPC-like failure: the process may not write files larger than a few kB."""
    whole = Run().go(tmp_path / "whole")
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_loop import Run
run = Run()
def step(iteration, batch):
    if iteration == 9:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
    return run.step(iteration, batch)
try:
    run.go(Path({str(tmp_path / "parts")!r}), step=step)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no space left to write" in done.stdout, done.stdout + done.stderr
    resumed = Run()
    assert torch.equal(resumed.go(tmp_path / "parts"), whole)
    assert resumed.seen[0] == 5


def test_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the loss is nan at iteration 4"):
        Run().go(tmp_path, step=lambda iteration, batch: {"loss": torch.tensor(float("nan"))})


def test_a_term_that_starts_within_an_interval_is_averaged_over_its_own_iterations(tmp_path: Path) -> None:
    step = lambda i, b: {"loss": torch.tensor(1.0)} | ({"late": torch.tensor(6.0)} if i >= 2 else {})  # noqa: E731
    Run(4).go(tmp_path, step=step)
    assert metrics(tmp_path)[0]["late"] == 6.0


def test_metrics_are_means_over_the_log_interval(tmp_path: Path) -> None:
    Run(10).go(tmp_path, step=lambda iteration, batch: {"loss": torch.tensor(float(iteration))})
    assert [(line["iteration"], line["loss"]) for line in metrics(tmp_path)] == [(4, 1.5), (8, 5.5), (10, 8.5)]
    assert any((tmp_path / "tensorboard").iterdir())


def test_logs_are_of_this_run_alone(tmp_path: Path) -> None:
    folder, result = tmp_path / "run", tmp_path / "result.pt"
    watched = loop.Validation(5, lambda done: ([{"iteration": done, "nested": {"a": 1}}], {}))

    def go(fingerprint: dict, validation: loop.Validation | None) -> None:
        run = Run()
        loop.run(
            name="test", folder=folder, fingerprint=fingerprint, iterations=run.iterations, batches=run.batches,
            state={"model": run.model, "optimizer": run.optimizer}, step=run.step, checkpoint_every=5, log_every=4,
            validation=validation,
        )  # fmt: skip
        loop.finish(folder, result, ("metrics", "validation"))

    go({"lr": 1}, watched)
    records = [json.loads(line) for line in result.with_suffix(".validation.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [5, 10, 15, 20, 23]
    go({"lr": 2}, None)
    assert result.with_suffix(".validation.jsonl").read_text() == ""
    assert len(result.with_suffix(".metrics.jsonl").read_text().splitlines()) == 6


def test_a_log_line_cut_short_does_not_stop_the_resume(tmp_path: Path) -> None:
    run = Run()

    def failing(iteration: int, batch: Tensor) -> dict[str, Tensor]:
        if iteration == 14:
            raise KeyboardInterrupt
        return run.step(iteration, batch)

    with pytest.raises(KeyboardInterrupt):
        run.go(tmp_path, step=failing)
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"iteration": 14, "nested": {"a": 1}')
    resumed = Run()
    resumed.go(tmp_path)
    assert [line["iteration"] for line in metrics(tmp_path)] == [4, 8, 12, 16, 20, 23]
