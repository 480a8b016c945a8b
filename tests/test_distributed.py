"""The global batch decides the result: 1 process x 4 images, 2 x 2 and parts of them end with the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from test_single_stage import index, sections  # noqa: F401  # a fixture

HERE = Path(__file__).parent
ROOT = HERE.parent


def torchrun(processes: int, *command: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script, or with `--no-python` a program, in several processes that meet over gloo."""
    paths = [ROOT, ROOT / "kernels", HERE, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    output = tmp_path_factory.mktemp("two") / "results.pt"
    done = torchrun(2, HERE / "distributed_worker.py", output)
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, torch.Tensor]] = torch.load(output, weights_only=True)
    return results


@pytest.mark.parametrize("case", list(worker.CASES))
def test_two_processes_with_two_images_are_one_with_four(
    two_processes: dict[str, dict[str, torch.Tensor]], case: str
) -> None:
    alone = worker.train(case)
    together = two_processes[case]
    assert together.keys() == alone.keys()
    exact = worker.CASES[case][3] == torch.float64
    for name, value in alone.items():
        tolerance = {"rtol": 1e-6, "atol": 1e-9} if exact else {"rtol": 1e-4, "atol": 1e-5}
        if not exact and name.endswith("histograms"):
            tolerance["atol"] = 2  # of some 9,000 confidences, a few lie on the edge of a bin
        torch.testing.assert_close(together[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    losses = alone["curve.loss"]
    assert losses[5:8].mean() < losses[:3].mean()  # there was something to agree on
