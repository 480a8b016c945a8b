"""The pipeline as jobs of a real Slurm on this machine, with the profile that a cluster gets."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = [name for name in ("slurmctld", "slurmd", "munged", "sbatch", "srun") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here: apt install slurmctld slurmd munge"),
    pytest.mark.skipif(
        importlib.util.find_spec("snakemake_executor_plugin_slurm") is None,
        reason="no snakemake-executor-plugin-slurm here: pip install -e '.[slurm]'",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a user of the cluster, without the virtual environment: its jobs have to find that themselves."""
    folder = tmp_path_factory.mktemp("slurm")
    done = subprocess.run([ROOT / "tests/slurm/start.sh", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    path = [name for name in os.get_exec_path() if not (Path(name) / "cosa-fast").exists()]
    yield {**os.environ, "PATH": os.pathsep.join([str(folder / "bin"), *path])}
    subprocess.run([ROOT / "tests/slurm/stop.sh", folder], check=True)


def pipeline(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start the pipeline as somebody would in `folder`, with two processes for each training and without a warm-up."""
    options = ["--snakefile", ROOT / "Snakefile", "--workflow-profile", ROOT / "profiles/slurm"]
    options += ["--configfile", "mine.yaml", "--config", "processes=2"]
    options += ["train={iterations: 60, c2s_start: 0, guidance_start: 0}"]
    # The profile's own values are for jobs of hours on a network file system. The plugin looks after 5, 20 and 45 s.
    options += ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5", "--retries", "0"]
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", *map(str, options)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def jobs(environment: dict[str, str]) -> list[tuple[str, str, str, int]]:
    """Id, rule, state and CPUs of every job so far, in order."""
    words = ["squeue", "--states=all", "--noheader", "--sort=i", "--format=%i|%k|%T|%C"]
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    lines = [line.split("|") for line in done.stdout.splitlines()]
    return [(job, comment.removeprefix("rule_"), state, int(cpus)) for job, comment, state, cpus in lines]


def ranks(job: str) -> set[str]:
    """Of the processes of a job that torchrun has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(word.split("=", 1) for word in path.read_text().split("\0") if "=" in word)
        except (OSError, UnicodeDecodeError):
            continue
        if variables.get("SLURM_JOB_ID") == job and "RANK" in variables:
            found.add(variables["RANK"])
    return found


def test_the_pipeline_as_jobs_goes_on_after_its_training_was_cancelled(cluster: dict[str, str], tmp_path: Path) -> None:
    shutil.copy(ROOT / ".test/config/config.yaml", tmp_path / "mine.yaml")
    results = tmp_path / "results/test"
    first = pipeline(tmp_path, cluster)
    deadline = time.monotonic() + 1200  # as the other limits against a hang alone, on a busy machine too
    training = []
    while not (training and (results / ".resume/cosa/state.pt").exists()):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline, jobs(cluster)
        training = training or [job for job, rule, state, _ in jobs(cluster) if (rule, state) == ("train", "RUNNING")]
        time.sleep(0.05)
    assert ranks(training[0]) == {"0", "1"}
    subprocess.run(["scancel", training[0]], env=cluster, check=True)
    output = first.communicate(timeout=600)[0]
    assert first.returncode == 1
    assert f"SLURM-job '{training[0]}' failed, SLURM status is: 'CANCELLED'" in output
    assert not (results / "cosa.safetensors").exists()

    again = pipeline(tmp_path, cluster)
    output = again.communicate(timeout=1200)[0]
    assert again.returncode == 0, output
    assert "continuing from iteration" in (results / "logs/train.log").read_text()
    assert "label-filtered" in (results / "voc_val_miou.txt").read_text()
    assert (results / "segmenter.safetensors").exists()
    assert [(rule, state, cpus) for _, rule, state, cpus in jobs(cluster)] == [
        ("prepare_index_masks_train_index", "COMPLETED", 2),
        ("train", "CANCELLED", 2),
        ("train", "COMPLETED", 2),
        ("pseudo_labels", "COMPLETED", 2),
        ("multistage", "COMPLETED", 2),
        ("evaluate", "COMPLETED", 2),
    ]
