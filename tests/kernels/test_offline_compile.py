"""Every kernel compiles for real GPU targets, spills nothing, and needs no GPU for that: tests/kernels/offline.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("offline.py")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_without_spills(target: str) -> None:
    # In a process of its own: here the kernels were made for the interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    process = subprocess.run(
        [sys.executable, SCRIPT, target], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    assert ", 0 in plain TF32, 0 spill" in process.stdout
