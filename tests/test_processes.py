"""Work in other processes: in order, and given up at Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cosa_fast.processes import mapped

COUNT = 4000
# Says "go" where Ctrl-C is to come: in a worker that is still importing, or between two results.
SCRIPT = """
import sys, time
from pathlib import Path
starting, folder = sys.argv[1] == "starting", Path(sys.argv[2])
if __name__ == "__mp_main__" and starting:
    print("go", flush=True)
    time.sleep(0.5)
from cosa_fast.processes import mapped

def make(number):
    time.sleep(0.01)
    (folder / str(number)).touch()

if __name__ == "__main__":
    with mapped(make, range({count}), 2, chunk=8) as results:
        for _ in results:
            if not starting:
                print("go", flush=True)
                time.sleep(60)
"""


@pytest.mark.parametrize("when", ["starting", "between"])
def test_ctrl_c_gives_up_what_waits(when: str, tmp_path: Path) -> None:
    script, made = tmp_path / "script.py", tmp_path / "made"
    script.write_text(SCRIPT.format(count=COUNT))
    made.mkdir()
    process = subprocess.Popen(
        [sys.executable, script, when, made],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # What runs in the background of a script is started with Ctrl-C ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C goes to the workers too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1  # the parent's own, none of a worker
    assert len(list(made.iterdir())) < COUNT / 10


def test_results_come_in_order() -> None:
    with mapped(abs, range(-5, 5), 2, chunk=3) as results:
        assert list(results) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
