rule warmup:
    input:
        unpack(
            lambda wildcards: {
                name: path
                for name, path in training_inputs(
                    early(WARMUPS[wildcards.key])
                ).items()
                if name != "warmup"
            }
        ),
    output:
        state=directory(RESULTS / "warmups/{key}"),
    log:
        RESULTS / "logs/warmup_{key}.log",
    benchmark:
        RESULTS / "benchmarks/warmup_{key}.tsv"
    wildcard_constraints:
        key="[0-9a-f]{10}",
    conda:
        "../envs/cosa.yaml"
    threads: lambda wildcards: threads_of(wildcards.key == MAIN_WARMUP)
    resources:
        gpu=GPUS,
        machine=lambda wildcards, input: training_machine(
            early(WARMUPS[wildcards.key]), input
        ),
        stage=lambda wildcards: stage_of(wildcards.key == MAIN_WARMUP),
    params:
        resume=str(RESUME / "warmup_{key}"),
        files=lambda wildcards, input: training_files(
            early(WARMUPS[wildcards.key]), input
        ),
        flags=lambda wildcards: training_flags(early(WARMUPS[wildcards.key])),
    message:
        "Training CoSA until its guidance starts"
    shell:
        "cosa-fast warmup --threads {threads} --log {log} {params.files}"
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
    threads: CONFIG.threads
    resources:
        gpu=GPUS,
        machine=lambda wildcards, input: training_machine(CONFIG, input),
    params:
        resume=RESUME / "cosa",
        files=lambda wildcards, input: training_files(CONFIG, input),
        flags=lambda wildcards: training_flags(CONFIG),
    message:
        "Training CoSA from image-level labels"
    shell:
        "cosa-fast train --threads {threads} --log {log} {params.files}"
        " --output {output.checkpoint} --resume {params.resume} {params.flags} {resources.machine}"
