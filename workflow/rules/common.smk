import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from cosa_fast.config import before_guidance, config_from_mapping, to_flags
from cosa_fast.studies.needs import STUDIES, needs
from cosa_fast.studies.variants import (
    DECISIVE,
    VARIANTS,
    run_prefix,
    threshold_variant,
    variant,
)

# The shorter of absolute and relative: what a person would have typed.
SOURCE = (
    ", ".join(
        min(str(file), os.path.relpath(file), key=len) for file in workflow.configfiles
    )
    or "config"
)

try:
    CONFIG = config_from_mapping(config, SOURCE)
except ValueError as error:
    raise WorkflowError(str(error)) from None

for key, weights in [
    ("model.weights", CONFIG.model.weights),
    ("multistage.weights", CONFIG.multistage.weights),
]:
    if weights is not None and not weights.is_file():
        raise WorkflowError(f"{SOURCE}: {key} = {weights}: there is no such file")

# Snakemake started by its path, without its environment activated.
if shutil.which("cosa-fast") is None:
    os.environ.update(
        PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    )

RESULTS = CONFIG.results
CACHE = Path("data")  # generated or derived once, whatever the results folder

# Only the settings that the index depends on: a change elsewhere must not index, and so train, again.
if CONFIG.data.dataset == "coco":
    DATASET, EMBEDDED = CONFIG.coco, False
    DATASET_SECTIONS = ["data", "coco"]
else:
    DATASET = CONFIG.voc
    EMBEDDED = DATASET.root is None and not DATASET.download
    DATASET_SECTIONS = ["data", "voc", "minivoc"] if EMBEDDED else ["data", "voc"]

# The training has an index of its own, without the splits that are evaluated: other ones must not train again.
UNSCORED = DATASET.model_copy(update={"eval_splits": ()})
TRAIN_CONFIG = CONFIG.model_copy(update={CONFIG.data.dataset: UNSCORED})

INDEX = RESULTS / "data/index.json"
TRAIN_INDEX = RESULTS / "data/train.json"
MASKS = RESULTS / "data/masks.json"
CHECKPOINT = RESULTS / "cosa.safetensors"
STORE = RESULTS / "pseudo_labels.zarr"
SEGMENTER = RESULTS / "segmenter.safetensors"
RESUME = (
    RESULTS / ".resume"
)  # not an output: Snakemake deletes the outputs of a failed job

DATASET_TRAIN_SPLIT = "train" if EMBEDDED else DATASET.train_split
SCORED = bool(DATASET.eval_splits)
FIRST_SPLIT = "val" if EMBEDDED else next(iter(DATASET.eval_splits), None)
MIOU = RESULTS / f"{CONFIG.data.dataset}_{FIRST_SPLIT}_miou.txt"
PER_CLASS = RESULTS / "per_class_iou.csv"
PANEL = RESULTS / f"{CONFIG.data.dataset}_panel.png"
GALLERY = RESULTS / "gallery"
PAGE = RESULTS / f"{CONFIG.data.dataset}_report.html"
PRODUCTS = [MIOU, PER_CLASS, PANEL] if SCORED else [STORE, SEGMENTER]

# Without a split with masks there is nothing to validate on.
VALIDATION = CONFIG.validation.model_copy(update={} if SCORED else {"every": 0})
VALIDATED = VALIDATION.every > 0

# What a cluster is asked for; no limit elsewhere.
GPUS = 0 if CONFIG.runtime.device == "cpu" else CONFIG.processes

THREADS = CONFIG.threads * CONFIG.processes


# Resources, like `machine`: they decide no result, and Snakemake compares no resource with that of the last run.
def threads_of_process(wildcards, threads) -> int:
    """Each process's part of the threads that Snakemake grants."""
    return max(1, threads // CONFIG.processes)


def launch(wildcards, threads) -> str:
    """How a stage is called whose work processes can share: trainings, pseudo-labels, evaluation."""
    if CONFIG.processes == 1:
        return "cosa-fast"
    omp = f"OMP_NUM_THREADS={threads_of_process(wildcards, threads)}"  # torchrun would choose 1, and say so
    # Without the `--` it takes a stage's --log for an abbreviation of its own flags.
    return f"{omp} torchrun --standalone --nproc-per-node {CONFIG.processes} --no-python -- cosa-fast"


def run_files(run) -> dict[str, Path]:
    """What a training leaves, by kind; always the same files, since with one missing Snakemake overlooks new settings."""
    logs = {
        kind: run.with_suffix(f".{kind}.jsonl") for kind in ["metrics", "validation"]
    }
    return {"checkpoint": run.with_suffix(".safetensors"), **logs}


def training_inputs(run) -> dict[str, Path]:
    """What a training with the settings `run` reads; without guidance that starts late there is no warm-up."""
    files = {"index": TRAIN_INDEX}
    if run.cosa.guidance == "gt":
        files["masks"] = MASKS
    elif (
        SCORED
    ):  # only looked at, by the validation: newer ones are no reason to train again
        files["masks"] = ancient(MASKS)
    if SCORED:
        files["validation_index"] = ancient(INDEX)
    if 0 < run.train.guidance_start < run.train.iterations:
        files["warmup"] = RESULTS / "warmups" / warmup_key(run)
    return files


def training_files(run, input) -> str:
    """Flags of the files that decide the result of a training."""
    names = ["index", "warmup"] + (["masks"] if run.cosa.guidance == "gt" else [])
    return path_flags({name: input[name] for name in names if name in input.keys()})


def training_flags(run) -> str:
    """The settings that do. Apart from the files: Snakemake compares no parameter that is made from the input."""
    return to_flags(run, *DECISIVE, rhythm=False)


def training_machine(run, input) -> str:
    """Flags of what does not: the machine, how often the state is saved, and what is only looked at."""
    files = {"validation_index": input.validation_index} if VALIDATED else {}
    if VALIDATED and run.cosa.guidance != "gt":
        files["masks"] = input.masks
    settings = CONFIG.model_copy(update={"validation": VALIDATION})
    flags = to_flags(settings, "loader", "validation", "runtime")
    return f"{path_flags(files)} {flags} {to_flags(CONFIG, 'train', rhythm=True)}"


def early(run):
    """The settings of a run's warm-up."""
    cosa, model = before_guidance(run.cosa, run.model)
    return run.model_copy(update={"cosa": cosa, "model": model})


def warmup_inputs(run) -> dict[str, Path]:
    """What the warm-up of a run reads."""
    files = training_inputs(early(run))
    return {name: path for name, path in files.items() if name != "warmup"}


def warmup_key(run) -> str:
    """Name of the warm-up that a run begins with."""
    return hashlib.sha256(
        to_flags(early(run), *DECISIVE, rhythm=False).encode()
    ).hexdigest()[:10]


# The settings of every training that may be asked for, by the name of the warm-up it begins with.
MAIN_WARMUP = warmup_key(CONFIG)
WARMUPS = {MAIN_WARMUP: CONFIG}

# On one machine the trainings of the studies run side by side, each process on one core; on a GPU they take turns.
WITHOUT_GPU = CONFIG.runtime.device == "cpu" or (
    CONFIG.runtime.device == "auto"
    and not any(map(shutil.which, ["nvidia-smi", "rocm-smi"]))
)


def threads_of_study(wildcards) -> int:
    """Threads of a study's training; a job of a cluster has its cores to itself."""
    return CONFIG.processes if WITHOUT_GPU and workflow.local_exec else THREADS


def stage_of_study(wildcards) -> int:
    """1 if nothing else may run beside a study's training."""
    return 0 if WITHOUT_GPU else 1


def threads_of_speed(wildcards) -> int:
    """All cores of this machine, so that nothing runs beside the measurement."""
    return workflow.cores if workflow.local_exec else CONFIG.threads


def path_flags(files) -> str:
    """`--name path` of each named file."""
    return " ".join(
        f"--{name.replace('_', '-')} {path}" for name, path in files.items()
    )


def stage_error(logs: Path) -> str:
    """What the stage that ran last had to say: Snakemake prints its whole command line after it."""
    files = sorted(logs.rglob("*.log"), key=lambda file: file.stat().st_mtime)
    text = files[-1].read_text() if files else ""
    return "".join(text.partition("\ncosa-fast ")[1:]).strip()
