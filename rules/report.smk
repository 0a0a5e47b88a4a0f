"""Tables, figures, the journals' way into MLflow, and where everything comes from."""

# workflow/report/*.rst show the captions of the catalogue. These params take `output`, because
# Snakemake does not compare params that depend on outputs: a new caption makes no figure again.


rule tabulate:
    input:
        lambda wildcards: TABLES[wildcards.table],
    output:
        multiext("results/tables/{table}", ".md", ".provenance.json"),
        csv=report(
            "results/tables/{table}.csv",
            caption="../workflow/report/table.rst",
            category="Tables",
            labels=lambda wildcards: {
                "table": wildcards.table,
                "shows": catalogue.TABLES[wildcards.table].title,
            },
        ),
    log:
        "results/logs/tabulate/{table}.log",
    benchmark:
        "results/logs/tabulate/{table}.tsv"
    conda:
        "../envs/cpu.yaml"
    params:
        caption=lambda wildcards, output: catalogue.TABLES[wildcards.table].caption,
        output=subpath(output.csv, strip_suffix=".csv"),
        published="--published" if CONFIG.published else "",
        code=STAGE["tabulate"],
    shell:
        r"""
        halfstep tabulate \
            --table {wildcards.table} \
            --metrics {input:q} \
            --output {params.output:q} \
            {params.published} \
            2>&1 | tee {log:q}
        """


rule plot:
    input:
        lambda wildcards: [
            source.replace("journal.jsonl", "meta.json") for source in FIGURES[wildcards.figure]
        ],
    output:
        multiext("results/figures/{figure}", ".pdf", ".csv", ".provenance.json"),
        svg=report(
            "results/figures/{figure}.svg",
            caption="../workflow/report/figure.rst",
            category="Figures",
            labels=lambda wildcards: {
                "figure": wildcards.figure,
                "shows": catalogue.FIGURES[wildcards.figure].title,
            },
        ),
    log:
        "results/logs/plot/{figure}.log",
    benchmark:
        "results/logs/plot/{figure}.tsv"
    conda:
        "../envs/cpu.yaml"
    params:
        tables=lambda wildcards: FIGURES[wildcards.figure],
        caption=lambda wildcards, output: catalogue.FIGURES[wildcards.figure].caption,
        output=subpath(output.svg, strip_suffix=".svg"),
        published="--published" if CONFIG.published else "",
        code=STAGE["plot"],
    shell:
        r"""
        halfstep plot \
            --figure {wildcards.figure} \
            --tables {params.tables:q} \
            --output {params.output:q} \
            {params.published} \
            2>&1 | tee {log:q}
        """


# A server that is away must not make a finished graph red, and Snakemake wants its output: `track` then succeeds with a warning, which it
# writes into the file. The file is empty when all was sent. One with a warning is taken away here, so that the next call that works tries again.
if unsent() and not any(
    re.fullmatch(r"-\w*n\w*|--dry-?run|--report.*|--lint.*", word) for word in sys.argv[1:]
):
    os.remove("results/mlflow.synced")


rule track:
    input:
        expand("results/models/{model}/meta.json", model=MODELS),
        expand("results/tables/{table}.csv", table=TABLES),
        expand("results/figures/{figure}.svg", figure=FIGURES),
    output:
        "results/mlflow.synced",
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
            --output {output:q} \
            2>&1 | tee {log:q}
        """


rule merge_provenance:
    input:  # the ends of the graph: by then every job before them has written its record
        expand("results/tables/{table}.csv", table=TABLES),
        expand("results/figures/{figure}.svg", figure=FIGURES),
    output:
        "results/provenance.json",
    log:
        "results/logs/merge_provenance.log",
    benchmark:
        "results/logs/merge_provenance.tsv"
    conda:
        "../envs/cpu.yaml"
    params:
        results=subpath(output[0], parent=True),
        code=STAGE["merge_provenance"],
    shell:
        r"""
        halfstep merge-provenance \
            --results {params.results:q} \
            2>&1 | tee {log:q}
        """
