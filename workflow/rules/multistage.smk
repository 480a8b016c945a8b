rule multistage:
    input:
        index=TRAIN_INDEX,
        store=STORE,
    output:
        segmenter=SEGMENTER,
        metrics=SEGMENTER.with_suffix(".metrics.jsonl"),
    log:
        RESULTS / "logs/multistage.log",
    benchmark:
        RESULTS / "benchmarks/multistage.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: THREADS
    resources:
        gpu=GPUS,
        launch=launch,
        process_threads=threads_of_process,
        machine=" ".join(
            (to_flags(CONFIG, "runtime"), to_flags(CONFIG, "multistage", rhythm=True))
        ),
    params:
        resume=RESUME / "segmenter",
        flags=to_flags(CONFIG, "multistage", rhythm=False),
    message:
        "Training a segmentation network on the pseudo-labels"
    shell:
        "{resources.launch} multistage --threads {resources.process_threads} --log {log}"
        " --index {input.index} --store {input.store}"
        " --output {output.segmenter} --resume {params.resume} {params.flags} {resources.machine}"
