# The trainings that the studies need beside the main one, by (variant, seed).
RUNS = {
    (name, seed): variant(CONFIG, name, seed)
    for name in [*VARIANTS, *map(threshold_variant, CONFIG.studies.thresholds)]
    for seed in CONFIG.studies.seeds
}
# Each is as quick on one core; on a GPU they take turns.
SIDE_BY_SIDE = CONFIG.runtime.device == "cpu" or shutil.which("nvidia-smi") is None

WARMUPS |= {warmup_key(run): run for run in RUNS.values()}


use rule train as study_train with:
    input:
        unpack(
            lambda wildcards: training_inputs(
                RUNS[wildcards.variant, int(wildcards.seed)]
            )
        ),
    output:
        **run_files(RESULTS / "studies/runs/{variant}/{seed}/cosa"),
    log:
        RESULTS / "logs/studies/{variant}_{seed}.log",
    benchmark:
        RESULTS / "benchmarks/studies/{variant}_{seed}.tsv"
    threads: 1 if SIDE_BY_SIDE else CONFIG.threads
    resources:
        gpu=GPUS,
        machine=MACHINE,
        stage=0 if SIDE_BY_SIDE else 1,
    params:
        resume=str(RESUME / "studies/{variant}_{seed}"),
        files=lambda wildcards, input: path_flags(input),
        flags=lambda wildcards: to_flags(
            RUNS[wildcards.variant, int(wildcards.seed)], *DECISIVE
        ),
    message:
        "Training the variant {wildcards.variant} with seed {wildcards.seed}"


rule studies:
    input:
        [
            run_prefix(CONFIG, name, seed).with_suffix(".safetensors")
            for name, seed in RUNS
        ],
