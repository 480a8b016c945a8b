rule pseudo_labels:
    input:
        index=TRAIN_INDEX,
        checkpoint=CHECKPOINT,
    output:
        store=directory(STORE),
    log:
        RESULTS / "logs/pseudo_labels.log",
    benchmark:
        RESULTS / "benchmarks/pseudo_labels.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
        launch=launch,
        process_threads=threads_of_process,
        machine=to_flags(CONFIG, "runtime"),
    params:
        flags=to_flags(CONFIG, "pseudo"),
    message:
        "Writing the pseudo-labels of the training images"
    shell:
        "{resources.launch} pseudo-labels --threads {resources.process_threads} --log {log}"
        " --index {input.index} --checkpoint {input.checkpoint} --output {output.store} {params.flags} {resources.machine}"


# On request: snakemake --cores all results/pseudo_labels_png
rule export:
    input:
        store=STORE,
    output:
        folder=directory(RESULTS / "pseudo_labels_png"),
    log:
        RESULTS / "logs/export.log",
    conda:
        "../envs/cosa.yaml"
    message:
        "Exporting the pseudo-labels as PNG"
    shell:
        "cosa-fast export --log {log} --store {input.store} --output {output.folder}"
