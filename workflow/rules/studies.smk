# The paper's tables and figures: trainings of variants, tables of the main run, and one small job per study.


use rule warmup as study_warmup with:
    input:
        unpack(lambda wildcards: warmup_inputs(WARMUPS[wildcards.key])),
    output:
        state=directory(RESULTS / "warmups/{key}"),
    log:
        RESULTS / "logs/studies/warmup_{key}.log",
    benchmark:
        RESULTS / "benchmarks/studies/warmup_{key}.tsv"
    wildcard_constraints:
        key=f"(?!{MAIN_WARMUP})[0-9a-f]{{10}}",
    threads: threads_of_study
    resources:
        gpu=GPUS,
        launch=launch,
        process_threads=threads_of_process,
        machine=lambda wildcards, input: training_machine(
            early(WARMUPS[wildcards.key]), input
        ),
        stage=stage_of_study,
    params:
        resume=str(RESUME / "warmup_{key}"),
        files=lambda wildcards, input: training_files(
            early(WARMUPS[wildcards.key]), input
        ),
        flags=lambda wildcards: training_flags(early(WARMUPS[wildcards.key])),


use rule train as study_train with:
    input:
        unpack(
            lambda wildcards: training_inputs(RUNS[wildcards.variant, wildcards.seed])
        ),
    output:
        **run_files(FOLDER / "runs/{variant}/{seed}/cosa"),
    log:
        RESULTS / "logs/studies/{variant}_{seed}.log",
    benchmark:
        RESULTS / "benchmarks/studies/{variant}_{seed}.tsv"
    wildcard_constraints:
        variant="|".join(sorted({re.escape(name) for name, _ in RUNS})),
        seed="|".join(sorted({seed for _, seed in RUNS})),
    threads: threads_of_study
    resources:
        gpu=GPUS,
        launch=launch,
        process_threads=threads_of_process,
        machine=lambda wildcards, input: training_machine(
            RUNS[wildcards.variant, wildcards.seed], input
        ),
        stage=stage_of_study,
    params:
        resume=str(RESUME / "studies/{variant}_{seed}"),
        files=lambda wildcards, input: training_files(
            RUNS[wildcards.variant, wildcards.seed], input
        ),
        flags=lambda wildcards: training_flags(RUNS[wildcards.variant, wildcards.seed]),
    message:
        "Training the variant {wildcards.variant} with seed {wildcards.seed}"


if SCORED:

    # CAM pseudo-labels of the training images too (Table 2).
    use rule evaluate as study_cpl with:
        input:
            index=INDEX,
            masks=MASKS,
            checkpoint=CHECKPOINT,
        output:
            output=FOLDER / "tables/cpl.txt",
            csv=TABLES["cpl"],
        log:
            RESULTS / "logs/studies/cpl.log",
        benchmark:
            RESULTS / "benchmarks/studies/cpl.tsv"
        params:
            files=lambda wildcards, input: path_flags(input),
            outputs=lambda wildcards, output: path_flags(output),
            flags=f"--splits {DATASET_TRAIN_SPLIT} {FIRST_SPLIT} {to_flags(CONFIG, 'eval')}",
        message:
            "Measuring the CAM pseudo-labels of the training images"

    use rule evaluate as study_crf with:
        input:
            index=INDEX,
            masks=MASKS,
            checkpoint=CHECKPOINT,
            segmenter=SEGMENTER,
        output:
            output=FOLDER / "tables/crf_{preset}.txt",
            csv=FOLDER / "tables/crf_{preset}.csv",
        log:
            RESULTS / "logs/studies/crf_{preset}.log",
        benchmark:
            RESULTS / "benchmarks/studies/crf_{preset}.tsv"
        wildcard_constraints:
            preset="release|standard",
        params:
            files=lambda wildcards, input: path_flags(input),
            outputs=lambda wildcards, output: path_flags(output),
            flags=lambda wildcards: to_flags(
                CONFIG.model_copy(
                    update={
                        "eval": CONFIG.eval.model_copy(
                            update={"crf": wildcards.preset}
                        )
                    }
                ),
                "eval",
            ),
        message:
            "Measuring mIoU with the {wildcards.preset} CRF"

    # The main run's images as CoSA without contrastive separation sees them (Fig. 7).
    use rule evaluate as study_gallery with:
        input:
            index=INDEX,
            masks=MASKS,
            checkpoint=run_prefix(
                CONFIG, "no_csc", CONFIG.studies.seeds[0]
            ).with_suffix(".safetensors"),
        output:
            output=FOLDER / "galleries/no_csc.txt",
            csv=FOLDER / "galleries/no_csc.csv",
            gallery=directory(GALLERIES["no_csc"]),
        log:
            RESULTS / "logs/studies/gallery.log",
        benchmark:
            RESULTS / "benchmarks/studies/gallery.tsv"
        params:
            files=lambda wildcards, input: path_flags(input),
            outputs=lambda wildcards, output: path_flags(output),
            flags=f"--splits {FIRST_SPLIT} {to_flags(CONFIG, 'eval')}",
        message:
            "Drawing CAMs without contrastive separation"

    rule study_speed:
        input:
            index=INDEX,
            checkpoint=CHECKPOINT,
            segmenter=SEGMENTER,
        output:
            table=SPEED,
        log:
            RESULTS / "logs/studies/speed.log",
        benchmark:
            RESULTS / "benchmarks/studies/speed.tsv"
        # When nothing else runs: it measures time.
        priority: -1
        conda:
            "../envs/cosa.yaml"
        threads: threads_of_speed
        resources:
            gpu=min(GPUS, 1),
        params:
            flags=to_flags(CONFIG, "eval", "runtime"),
            threads=CONFIG.threads,
        message:
            "Measuring the speed of inference"
        shell:
            "cosa-fast speed --threads {params.threads} --log {log}"
            " --index {input.index} --checkpoint {input.checkpoint} --segmenter {input.segmenter}"
            " --output {output.table} {params.flags}"

    rule study:
        input:
            unpack(lambda wildcards: study_inputs(wildcards.study)),
            index=INDEX,
        output:
            csv=FOLDER / "{study}.csv",
            figure=report(
                FOLDER / "{study}.svg",
                "../report/study.rst",
                category="Studies",
                labels={"study": "{study}"},
            ),
        log:
            RESULTS / "logs/studies/{study}.log",
        wildcard_constraints:
            study="[a-z_]+",
        localrule: True
        conda:
            "../envs/cosa.yaml"
        params:
            flags=lambda wildcards: study_flags(wildcards.study),
        message:
            "Study: {wildcards.study}"
        shell:
            "cosa-fast study --name {wildcards.study} --log {log} --index {input.index}"
            " --csv {output.csv} --figure {output.figure} {params.flags}"

    use rule study as study_pictures with:
        output:
            csv=FOLDER / "{study}.csv",
            figure=report(
                FOLDER / "{study}.png",
                "../report/study.rst",
                category="Studies",
                labels={"study": "{study}"},
            ),
        wildcard_constraints:
            study="qualitative",

    ruleorder: study_pictures > study

    rule studies:
        input:
            study_files(),
        message:
            f"Studies: {FOLDER}"
