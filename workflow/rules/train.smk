rule train:
    input:
        index=INDEX if ORACLE else TRAIN_INDEX,
        masks=MASKS if ORACLE else [],
    output:
        checkpoint=CHECKPOINT,
    log:
        RESULTS / "logs/train.log",
    benchmark:
        RESULTS / "benchmarks/train.tsv"
    conda:
        "../envs/cosa.yaml"
    threads: CONFIG.threads
    resources:
        gpu=GPUS,
        machine=to_flags(CONFIG, "loader", "runtime"),
    params:
        resume=RESUME / "cosa",
        masks="--masks" if ORACLE else "",
        flags=to_flags(CONFIG, "augment", "model", "cosa", "optim", "train"),
    message:
        "Training CoSA from image-level labels"
    shell:
        "cosa-fast train --threads {threads} --log {log}"
        " --index {input.index} {params.masks} {input.masks}"
        " --output {output.checkpoint} --resume {params.resume} {params.flags} {resources.machine}"
