if SCORED:

    rule evaluate:
        input:
            index=INDEX,
            masks=MASKS,
            checkpoint=CHECKPOINT,
            segmenter=SEGMENTER,
            store=STORE,
        output:
            output=report(
                MIOU, "../report/miou.rst", category="Results", labels={"what": "mIoU"}
            ),
            csv=report(
                PER_CLASS,
                "../report/per_class.rst",
                category="Results",
                labels={"what": "IoU per class"},
            ),
            panel=report(
                PANEL,
                "../report/panel.rst",
                category="Results",
                labels={"what": "Panel"},
            ),
            gallery=directory(GALLERY),
        log:
            RESULTS / "logs/evaluate.log",
        benchmark:
            RESULTS / "benchmarks/evaluate.tsv"
        conda:
            "../envs/cosa.yaml"
        threads: THREADS
        resources:
            gpu=GPUS,
            launch=launch,
            process_threads=threads_of_process,
            machine=to_flags(CONFIG, "runtime"),
        params:
            files=lambda wildcards, input: path_flags(input),
            outputs=lambda wildcards, output: path_flags(output),
            flags=to_flags(CONFIG, "eval"),
        message:
            "Measuring mIoU"
        shell:
            "{resources.launch} evaluate --threads {resources.process_threads} --log {log}"
            " {params.files} {params.outputs} {params.flags} {resources.machine}"
