rule warmup:
    input:
        **warmup_inputs(CONFIG),
    output:
        state=directory(RESULTS / "warmups" / MAIN_WARMUP),
    log:
        RESULTS / "logs/warmup.log",
    benchmark:
        RESULTS / "benchmarks/warmup.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
        launch=launch,
        process_threads=threads_of_process,
        machine=lambda wildcards, input: training_machine(early(CONFIG), input),
    params:
        resume=str(RESUME / f"warmup_{MAIN_WARMUP}"),
        files=lambda wildcards, input: training_files(early(CONFIG), input),
        flags=training_flags(early(CONFIG)),
    message:
        "Training CoSA until its guidance starts"
    shell:
        "{resources.launch} warmup --threads {resources.process_threads} --log {log} {params.files}"
        " --output {output.state} --resume {params.resume} {params.flags} {resources.machine}"


rule train:
    input:
        **training_inputs(CONFIG),
    output:
        **run_files(RESULTS / "cosa"),
    log:
        RESULTS / "logs/train.log",
    benchmark:
        RESULTS / "benchmarks/train.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
        launch=launch,
        process_threads=threads_of_process,
        machine=lambda wildcards, input: training_machine(CONFIG, input),
    params:
        resume=RESUME / "cosa",
        files=lambda wildcards, input: training_files(CONFIG, input),
        flags=training_flags(CONFIG),
    message:
        "Training CoSA from image-level labels"
    shell:
        "{resources.launch} train --threads {resources.process_threads} --log {log} {params.files}"
        " --output {output.checkpoint} --resume {params.resume} {params.flags} {resources.machine}"
