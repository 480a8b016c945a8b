"""The Snakemake workflow: what runs, what runs again, what a person sees, and one real run of the whole pipeline."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cosa_fast.studies.needs import LADDER, STUDIES
from cosa_fast.studies.variants import VARIANTS, threshold_variant

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / ".test/config/config.yaml"
ALL = ["train_index", "index", "masks", "warmup", "train", "pseudo_labels", "multistage", "evaluate"]

# Stands in for the command line: notes the call, makes the outputs, fails on demand.
FAKE = """#!/usr/bin/env bash
call=$*
while [ $# -gt 1 ]; do
  case $1 in
    --log) log=$2 ;;
    --output|--csv|--panel|--gallery|--figure) outputs+=("$2") ;;
  esac
  shift
done
rule=$(basename "$log" .log)
echo "$rule|$call" >> calls
echo "12:00:00 $rule: started" | tee "$log" >&2
if [ "$rule" = "$FAIL" ]; then
  echo "cosa-fast $rule: error: no space left" | tee -a "$log" >&2
  exit 1
fi
for output in "${outputs[@]}"; do
  case $output in
    *.zarr|*_png|*/warmups/*|*/gallery|*/no_csc) mkdir -p "$output"; output=$output/content ;;
    *.safetensors) echo $RANDOM | tee "${output%.*}.metrics.jsonl" > "${output%.*}.validation.jsonl" ;;
  esac
  echo $RANDOM > "$output"
done
"""


def snakemake(folder: Path, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the workflow in `folder`; stdout and stderr together, as on a terminal."""
    return subprocess.run(
        command(*words),
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def command(*words: str | Path) -> list[str]:
    profile = ROOT / "profiles/default"
    options = ["--snakefile", ROOT / "Snakefile", "--workflow-profile", profile, "--cores", "2"]
    return [sys.executable, "-m", "snakemake", *map(str, [*options, *words])]


# Stands in for torchrun: notes what it starts, and starts it once.
FAKE_TORCHRUN = """#!/usr/bin/env bash
echo "OMP_NUM_THREADS=$OMP_NUM_THREADS torchrun $*" >> launches
while [ $1 != cosa-fast ]; do shift; done
exec "$@"
"""


class Pretended:
    """A folder in which the stages are stand-ins."""

    def __init__(self, folder: Path, bin_folder: Path) -> None:
        self.folder, self.bin_folder = folder, bin_folder

    def run(self, *words: str | Path, fail: str = "") -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").unlink(missing_ok=True)
        path = f"{self.bin_folder}{os.pathsep}{os.environ['PATH']}"
        return snakemake(self.folder, *words, PATH=path, FAIL=fail)

    @property
    def calls(self) -> dict[str, str]:
        """Rule and command line of each call of the last run, in order."""
        path = self.folder / "calls"
        return dict(line.split("|", 1) for line in path.read_text().splitlines()) if path.exists() else {}


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bin")
    for name, text in [("cosa-fast", FAKE), ("torchrun", FAKE_TORCHRUN)]:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def pretended(tmp_path: Path, bin_folder: Path) -> Pretended:
    """An empty folder."""
    return Pretended(tmp_path, bin_folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, bin_folder: Path) -> Pretended:
    """A folder in which everything has run."""
    pretended = Pretended(tmp_path_factory.mktemp("finished"), bin_folder)
    done = pretended.run("--configfile", TINY)
    assert done.returncode == 0, done.stdout
    return pretended


@pytest.mark.parametrize("words", [["snakemake", "--lint"], ["snakefmt", "--check", "Snakefile", "workflow"]])
def test_lint(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stages_run_in_order_and_masks_are_checked_before_training(finished: Pretended) -> None:
    calls = list(finished.calls)
    assert sorted(calls) == sorted(ALL)
    assert calls[3:] == ALL[3:]
    assert calls.index("index") < calls.index("masks")
    results = finished.folder / "results/test"
    assert {path.stem for path in (results / "benchmarks").iterdir()} == set(ALL)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("threads=2", []),
        ("processes=2", []),
        ("runtime={device: cpu}", []),  # the machine does not decide the result
        ("loader={workers: 1}", []),
        ("validation={every: 0}", []),
        ("validation={images: 3}", []),
        ("train={log_every: 3, checkpoint_every: 7}", []),
        ("multistage={log_every: 3, checkpoint_every: 7}", []),
        ("coco={root: elsewhere}", []),  # another dataset's
        ("eval={panel_images: 3}", ["evaluate"]),
        ("voc={eval_splits: [val, test]}", ["index", "masks", "evaluate"]),
        ("multistage={lr: 0.002}", ALL[6:]),
        ("pseudo={shard: 8}", ALL[5:]),
        ("cosa={csc: false}", ALL[4:]),  # begins with the same warm-up
        ("cosa={swap: false}", ALL[3:]),
        ("train={seed: 5}", ALL[3:]),
        ("minivoc={seed: 5}", ALL),
    ],
)
def test_a_changed_key_runs_again_what_depends_on_it(
    change: str, stages: list[str], finished: Pretended, tmp_path: Path
) -> None:
    again = Pretended(tmp_path / "copy", finished.bin_folder)
    shutil.copytree(finished.folder, again.folder)
    done = again.run("--configfile", TINY, "--config", change)
    assert done.returncode == 0, done.stdout
    assert sorted(again.calls) == sorted(stages)


def test_torchrun_starts_the_stages_that_can_share_their_work(pretended: Pretended) -> None:
    done = pretended.run("--configfile", TINY, "--config", "processes=2", "threads=3", "--cores", "4")
    assert done.returncode == 0, done.stdout
    launches = (pretended.folder / "launches").read_text().splitlines()
    # Of 4 cores, 2 for each process.
    start = "OMP_NUM_THREADS=2 torchrun --standalone --nproc-per-node 2 --no-python -- cosa-fast "
    assert all(launch.startswith(start) for launch in launches)
    assert [launch.removeprefix(start).split(" --threads 2 ")[0] for launch in launches] == [
        rule.replace("_", "-") for rule in ALL[3:]
    ]


def test_the_demo_runs_without_a_named_configuration(pretended: Pretended) -> None:
    shutil.copytree(ROOT / "config", pretended.folder / "config")
    assert pretended.run("results/voc_val_miou.txt").returncode == 0
    assert "--model.name mini_vit" in pretended.calls["train"]
    assert (pretended.folder / "results/voc_panel.png").exists()


def test_a_named_preset_is_not_laid_over_the_demo(pretended: Pretended) -> None:
    shutil.copytree(ROOT / "config", pretended.folder / "config")
    target = "results/coco/coco_val_miou.txt"
    done = pretended.run("--configfile", "config/coco.yaml", "config/release.yaml", "--", target)
    assert done.returncode == 0, done.stdout
    train = pretended.calls["train"]
    assert "--model.name vit_base_patch16_224.orig_in21k_ft_in1k" in train
    assert "--train.iterations 60000" in train
    assert "--cosa.ignore-band 0.25 0.7" in train
    assert "--coco.root data/coco" in pretended.calls["index"]


def test_without_evaluation_no_mask_is_looked_for(pretended: Pretended) -> None:
    done = pretended.run("--configfile", TINY, "--config", "voc={root: mine, train_split: all, eval_splits: []}")
    assert done.returncode == 0, done.stdout
    assert list(pretended.calls) == ["train_index", "warmup", "train", "pseudo_labels", "multistage"]
    assert "masks" not in pretended.calls["train"] + pretended.calls["warmup"]
    assert "--validation.every 0" in pretended.calls["train"]


def test_masks_are_for_the_oracle_and_for_validation(pretended: Pretended) -> None:
    target = "results/test/cosa.safetensors"
    unwatched = "validation={every: 0}"
    for guidance, in_training in [("spl", False), ("gt", True)]:
        pretended.run("--configfile", TINY, "--config", unwatched, f"cosa={{guidance: {guidance}}}", "--", target)
        assert ("--masks results/test/data/masks.json" in pretended.calls["train"]) == in_training
    done = pretended.run("--configfile", TINY, "--", target)
    assert done.returncode == 0, done.stdout
    assert list(pretended.calls) == ["train"]  # what the warm-up left serves without validation too
    for flag in ("--masks results/test/data/masks.json", "--validation-index results/test/data/index.json"):
        assert flag in pretended.calls["train"]


@pytest.fixture(scope="module")
def studied(finished: Pretended, tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    """The finished folder, with all studies and the report."""
    again = Pretended(tmp_path_factory.mktemp("studied") / "copy", finished.bin_folder)
    shutil.copytree(finished.folder, again.folder)
    done = again.run("--configfile", TINY, "--", "studies", "report")
    assert done.returncode == 0, done.stdout
    return again


def test_the_studies_train_variants_and_nothing_twice(studied: Pretended) -> None:
    calls = studied.calls
    trained = [rule for rule, call in calls.items() if call.startswith("train ")]
    # All variants but plain CoSA, which is the main run; the only fixed threshold is a variant of its own.
    assert sorted(trained) == sorted(f"{name}_0" for name in [*(set(VARIANTS) - {"cosa"}), threshold_variant(0.4)])
    assert not set(ALL) & calls.keys() - {"warmup"}
    assert list(calls)[-1] == "report"
    assert {name for name in STUDIES if name in calls} == set(STUDIES)
    results = studied.folder / "results/test"
    assert (results / "studies/qualitative.png").exists()
    assert (results / "voc_report.html").exists()
    warmups = {path.name for path in (results / "warmups").iterdir()}
    assert len(warmups) == 5  # with and without SA and RAW, and the other threshold


def test_a_study_is_drawn_again_without_training(studied: Pretended, tmp_path: Path) -> None:
    again = Pretended(tmp_path / "copy", studied.bin_folder)
    shutil.copytree(studied.folder, again.folder)
    done = again.run("--configfile", TINY, "--config", "studies={coexisting: [boat]}", "--", "studies")
    assert done.returncode == 0, done.stdout
    assert sorted(again.calls) == sorted(STUDIES)
    done = again.run("--configfile", TINY, "--config", "studies={coexisting: [boat]}", "--", "report")
    assert list(again.calls) == ["report"]
    done = again.run(
        "--configfile", TINY, "--config", "studies={seeds: [0, 1]}", "--", "results/test/studies/ladder.csv"
    )
    assert sorted(name for name in again.calls if not name.startswith("warmup")) == sorted(
        ["ladder", *(f"{name}_1" for name in LADDER)]
    )


def test_studies_without_validation_are_refused(pretended: Pretended) -> None:
    done = pretended.run("--configfile", TINY, "--config", "validation={every: 0}", "--", "studies")
    assert done.returncode == 1
    assert "set validation.every, for example to 2000" in done.stdout
    assert not pretended.calls


def test_a_failed_stage_has_the_last_word_and_the_rest_is_kept(pretended: Pretended) -> None:
    done = pretended.run("--configfile", TINY, fail="multistage")
    assert done.returncode == 1
    assert "cosa-fast multistage: error: no space left" in done.stdout.splitlines()[-8:]
    again = pretended.run("--configfile", TINY)
    assert again.returncode == 0, again.stdout
    assert list(pretended.calls) == ALL[6:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trian: {iterations: 5}", "bad.yaml: unknown key 'trian'; config/README.md lists every key"),
        ("train: {iterations: 0}", "bad.yaml: train.iterations = 0: Input should be greater than 0"),
    ],
)
def test_a_bad_configuration_stops_at_once(content: str, message: str, pretended: Pretended) -> None:
    (pretended.folder / "bad.yaml").write_text(content)
    done = pretended.run("--configfile", "bad.yaml")
    assert done.returncode == 1
    assert message in done.stdout.splitlines()
    assert len(done.stdout.splitlines()) <= 5, done.stdout
    assert not pretended.calls


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the whole pipeline on the tiny configuration, for real."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = snakemake(folder, "--configfile", TINY)
    assert done.returncode == 0, done.stdout
    return folder / "results/test"


def test_the_whole_pipeline(pipeline: Path) -> None:
    text = (pipeline / "voc_val_miou.txt").read_text()
    assert "synthetic" in text.splitlines()[0].lower()
    for expected in ["MiniVOC", "val", "label-free", "label-filtered"]:
        assert expected.lower() in text.lower()
    classes = ["background", "aeroplane", "tvmonitor"]
    table = (pipeline / "per_class_iou.csv").read_text()
    assert not [name for name in classes if name not in table]
    assert (pipeline / "voc_panel.png").read_bytes().startswith(b"\x89PNG")
    for rule in ALL:
        assert "finished in" in (pipeline / f"logs/{rule}.log").read_text()
    again = snakemake(pipeline.parents[1], "--configfile", TINY)
    assert "Nothing to be done" in again.stdout


def test_pseudo_labels_are_exported_on_request(pipeline: Path) -> None:
    done = snakemake(pipeline.parents[1], "--configfile", TINY, "--", "results/test/pseudo_labels_png")
    assert done.returncode == 0, done.stdout
    assert len(list((pipeline / "pseudo_labels_png/SegmentationClass").glob("*.png"))) == 48


def test_killed_in_the_middle_of_training_it_continues_to_the_same_weights(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(pipeline.parents[1] / "data")  # MiniVOC is there already
    words = ["--configfile", TINY, "--", "results/test/cosa.safetensors"]
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    state = tmp_path / "results/test/.resume/cosa/state.pt"
    deadline = time.monotonic() + 600  # against a hang alone: beside two other test runs on two cores it takes 50 s
    while not state.exists():
        assert process.poll() is None, "the training ended before its first checkpoint was seen"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # Snakemake and everything it started
    process.wait()
    checkpoint = tmp_path / "results/test/cosa.safetensors"
    assert not checkpoint.exists()

    done = snakemake(tmp_path, *words)
    assert done.returncode == 0, done.stdout
    assert "continuing from iteration" in (tmp_path / "results/test/logs/train.log").read_text()
    assert fingerprint(checkpoint) == fingerprint(pipeline / "cosa.safetensors")
