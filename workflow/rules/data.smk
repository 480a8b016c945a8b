rule train_index:
    output:
        index=TRAIN_INDEX,
    log:
        RESULTS / "logs/train_index.log",
    benchmark:
        RESULTS / "benchmarks/train_index.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: CONFIG.threads
    params:
        cache=CACHE,
        flags=to_flags(TRAIN_CONFIG, *DATASET_SECTIONS),
    message:
        "Indexing the training images"
    shell:
        "cosa-fast data index --threads {threads} --log {log}"
        " --output {output.index} --cache {params.cache} {params.flags}"


rule index:
    output:
        index=INDEX,
    log:
        RESULTS / "logs/index.log",
    benchmark:
        RESULTS / "benchmarks/index.tsv"
    # Before the training, so that a bad file is found at once; the same goes for the masks.
    priority: 10
    conda:
        "../envs/cosa.yaml"
    threads: CONFIG.threads
    params:
        cache=CACHE,
        flags=to_flags(CONFIG, *DATASET_SECTIONS),
    message:
        "Indexing the images to evaluate on"
    shell:
        "cosa-fast data index --threads {threads} --log {log}"
        " --output {output.index} --cache {params.cache} {params.flags}"


rule masks:
    input:
        index=INDEX,
    output:
        masks=MASKS,
    log:
        RESULTS / "logs/masks.log",
    benchmark:
        RESULTS / "benchmarks/masks.tsv"
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
