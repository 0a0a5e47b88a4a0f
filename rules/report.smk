"""Tables, figures and the journals' way into MLflow."""


rule tabulate:
    input:
        expand("results/metrics/{model}/samples.json", model=MODELS),
        expand("results/metrics/{model}/lambada.json", model=MODELS),
        expand("results/metrics/{teacher}/data.json", teacher=CONFIG.teachers),
        expand("results/benchmarks/{teacher}/sampling.json", teacher=CONFIG.teachers),
    output:
        report(
            expand("results/tables/{table}.csv", table=TABLES),
            caption="../workflow/report/table.rst",
            category="Tables",
        ),
        expand("results/tables/{table}.md", table=TABLES),
    log:
        "results/logs/tabulate.log",
    benchmark:
        "results/logs/tabulate.tsv"
    conda:
        "../envs/cpu.yaml"
    params:
        output=subpath(output[0], parent=True),
        code=STAGE["tabulate"],
    shell:
        r"""
        halfstep tabulate \
            --metrics {input:q} \
            --output {params.output:q} \
            2>&1 | tee {log:q}
        """


rule plot:
    input:
        lambda wildcards: [source.replace("journal.jsonl", "meta.json") for source in FIGURES[wildcards.figure]],
    output:
        multiext("results/figures/{figure}", ".pdf", ".csv", ".json"),
        svg=report(
            "results/figures/{figure}.svg",
            caption="../workflow/report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        "results/logs/plot/{figure}.log",
    benchmark:
        "results/logs/plot/{figure}.tsv"
    conda:
        "../envs/cpu.yaml"
    params:
        tables=lambda wildcards: FIGURES[wildcards.figure],
        output=subpath(output.svg, strip_suffix=".svg"),
        code=STAGE["plot"],
    shell:
        r"""
        halfstep plot \
            --figure {wildcards.figure} \
            --tables {params.tables:q} \
            --output {params.output:q} \
            2>&1 | tee {log:q}
        """


rule track:
    input:
        expand("results/models/{model}/meta.json", model=MODELS),
        expand("results/tables/{table}.csv", table=TABLES),
        expand("results/figures/{figure}.svg", figure=FIGURES),
    output:
        touch("results/mlflow.synced"),
    log:
        "results/logs/track.log",
    benchmark:
        "results/logs/track.tsv"
    conda:
        "../envs/cpu.yaml"
    params:
        results=subpath(output[0], parent=True),
        code=STAGE["track"],
    shell:
        r"""
        halfstep track \
            --results {params.results:q} \
            2>&1 | tee {log:q}
        """
