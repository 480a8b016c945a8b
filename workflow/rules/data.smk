rule index:
    output:
        index=INDEX,
        train=TRAIN_INDEX,
    log:
        RESULTS / "logs/index.log",
    benchmark:
        RESULTS / "benchmarks/index.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: CONFIG.threads
    params:
        cache=CACHE,
        flags=to_flags(CONFIG, *DATASET_SECTIONS),
    message:
        "Indexing the dataset and checking its images"
    shell:
        "cosa-fast data index --threads {threads} --log {log}"
        " --output {output.index} --train-output {output.train} --cache {params.cache} {params.flags}"


rule masks:
    input:
        index=INDEX,
    output:
        masks=MASKS,
    log:
        RESULTS / "logs/masks.log",
    benchmark:
        RESULTS / "benchmarks/masks.tsv"
    # Before the training, so that a bad mask is found within seconds.
    priority: 10
    conda:
        "../envs/cosa.yaml"
    threads: CONFIG.threads
    params:
        cache=CACHE,
    message:
        "Checking the masks of the evaluation splits"
    shell:
        "cosa-fast data masks --threads {threads} --log {log}"
        " --index {input.index} --output {output.masks} --cache {params.cache}"
