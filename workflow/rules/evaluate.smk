if SCORED:

    rule evaluate:
        input:
            index=INDEX,
            masks=MASKS,
            checkpoint=CHECKPOINT,
            segmenter=SEGMENTER,
            store=STORE,
        output:
            miou=report(MIOU, "../report/miou.rst"),
            per_class=report(PER_CLASS, "../report/per_class.rst"),
            panel=report(PANEL, "../report/panel.rst"),
        log:
            RESULTS / "logs/evaluate.log",
        benchmark:
            RESULTS / "benchmarks/evaluate.tsv"
        conda:
            "../envs/cosa.yaml"
        threads: CONFIG.threads
        resources:
            gpu=GPUS,
            machine=to_flags(CONFIG, "runtime"),
        params:
            flags=to_flags(CONFIG, "eval"),
        message:
            "Measuring mIoU"
        shell:
            "cosa-fast evaluate --threads {threads} --log {log}"
            " --index {input.index} --masks {input.masks} --checkpoint {input.checkpoint}"
            " --segmenter {input.segmenter} --store {input.store}"
            " --output {output.miou} --csv {output.per_class} --panel {output.panel} {params.flags} {resources.machine}"
