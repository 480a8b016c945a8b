"""Several processes as torchrun starts them, gloo on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program in so many processes; each imports torch, which takes seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # After the dashes, because torchrun takes our --log for an abbreviation of its own options.
    command += ["--no-python", "--", *words]
    # Against a hang alone: beside two other test runs on two cores test_distributed.py's takes 100 s.
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
