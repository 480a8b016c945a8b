rule page:
    input:
        page_inputs,
    output:
        page=report(
            PAGE, "../report/page.rst", category="Results", labels={"what": "Report"}
        ),
    log:
        RESULTS / "logs/report.log",
    localrule: True
    conda:
        "../envs/cosa.yaml"
    params:
        results=RESULTS,
        studies=study_stamps(),
    message:
        "Gathering everything into {output.page}"
    shell:
        "cosa-fast report --log {log} --results {params.results} --output {output.page}"


rule report:
    input:
        PAGE,
    message:
        "Report: {input}"
