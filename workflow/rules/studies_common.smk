# What the studies read and how they are called.

FOLDER = RESULTS / "studies"

# Every training that a study may ask for, by (variant, seed).
RUNS = {
    (name, str(seed)): variant(CONFIG, name, seed)
    for name in [*VARIANTS, *map(threshold_variant, CONFIG.studies.thresholds)]
    for seed in CONFIG.studies.seeds
}
WARMUPS |= {warmup_key(run): run for run in RUNS.values()}


TABLES = {
    "main": PER_CLASS,
    **{
        name: FOLDER / f"tables/{name}.csv"
        for name in ["cpl", "crf_release", "crf_standard"]
    },
}
SPEED = FOLDER / "tables/speed.csv"
GALLERIES = {"main": GALLERY, "no_csc": FOLDER / "galleries/no_csc"}
FILES = {"cosa": CHECKPOINT, "segmenter": SEGMENTER}


def study_inputs(name) -> dict[str, list]:
    """What a study reads, by the flag that names it."""
    need = needs(name, CONFIG.studies)
    if need.runs and not VALIDATED:
        raise WorkflowError(
            f"the study {name} is drawn from validations: set validation.every, for example to 2000"
        )
    return {
        "run": [
            run_prefix(CONFIG, *run).with_suffix(".validation.jsonl")
            for run in need.runs
        ],
        "table": [TABLES[table] for table in need.tables],
        "checkpoint": [FILES[kind] for kind in need.checkpoints],
        "speed": [SPEED] if need.speed else [],
        "gallery": [GALLERIES[gallery] for gallery in need.galleries],
    }


def study_flags(name) -> str:
    """The same as flags of `cosa-fast study`."""
    need = needs(name, CONFIG.studies)
    words = [
        f"--run {variant}:{seed}:{run_prefix(CONFIG, variant, seed)}"
        for variant, seed in need.runs
    ]
    for flag, names, paths in [
        ("table", need.tables, TABLES),
        ("checkpoint", need.checkpoints, FILES),
        ("gallery", need.galleries, GALLERIES),
    ]:
        words += [f"--{flag} {key}:{paths[key]}" for key in names]
    return " ".join(
        [*words, f"--speed {SPEED}" if need.speed else "", to_flags(CONFIG, "studies")]
    )


def study_files() -> list[Path]:
    """Table and figure of every study."""
    return [
        FOLDER / f"{name}{suffix}"
        for name in STUDIES
        for suffix in [".csv", needs(name, CONFIG.studies).suffix]
    ]


def page_inputs(wildcards) -> list[Path]:
    """The results, and the studies if they are asked for in the same command."""
    asked = "studies" in (workflow.dag_settings.targets or [])
    return [*PRODUCTS, *(study_files() if asked else [])]


def study_stamps() -> list[str]:
    """Which studies there are, and of when: a page without a newer one is out of date."""
    return [
        f"{file.name} {file.stat().st_mtime_ns}"
        for file in study_files()
        if file.exists()
    ]
