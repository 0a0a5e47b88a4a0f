"""Tables, figures, curves in MLflow, the page to open first, and one record of all origins.

Inputs:
    results/metrics/                             rows of scores
    results/benchmarks/                          rows of seconds
    results/models/{model}/                      meta.json, and the journal next to it
    results/samples/                             texts
Outputs:
    results/tables/{table}                       .csv, .md, .html
    results/figures/{figure}                     .pdf, .svg, and .csv with the data behind it
    results/mlflow.synced                        empty, or a warning: why MLflow lacks the data
    results/index                                .html: the page to open first
    results/texts.html                           the median text of every model
    results/provenance.json                      the records of all jobs in one file
"""

# workflow/report/*.rst show the captions of the catalogue. These params take `output`, because
# Snakemake does not compare params that depend on outputs: a new caption makes no figure again.


rule tabulate:
    """Gather metric rows into one table, as CSV and Markdown."""
    input:
        lambda wildcards: TABLES[wildcards.table],
    output:
        multiext("results/tables/{table}", ".csv", ".md", ".provenance.json"),
        html=report(
            "results/tables/{table}.html",
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
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        caption=lambda wildcards, output: catalogue.TABLES[wildcards.table].caption,
        output=subpath(output.html, strip_suffix=".html"),
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
    """Draw one figure, with the data behind it as CSV."""
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
    localrule: True
    conda:
        "../envs/report.yaml"
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


# A server that is away must not make a finished graph fail, and Snakemake needs the output: `track`
# then succeeds and writes a warning into the file, which is empty when all was sent. A file with a
# warning is removed here, so that the next call that runs jobs tries again. What no later call can
# repair (a broken journal, a database that is none) fails the rule.
if unsent() and not only_looks(sys.argv[1:]):
    os.remove("results/mlflow.synced")


rule track:
    """Send the journals of all models to MLflow, with tables and figures."""
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
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        results=subpath(output[0], parent=True),
        experiment=flags(CONFIG, "experiment"),
        code=STAGE["track"],
    shell:
        r"""
        halfstep track \
            --results {params.results:q} \
            --output {output:q} \
            {params.experiment} \
            2>&1 | tee {log:q}
        """


rule start_page:
    """Write the page to open first, which shows what the tables say, and a page of texts."""
    input:
        expand("results/tables/{table}.csv", table=TABLES),
        expand("results/figures/{figure}.svg", figure=FIGURES),
    output:
        multiext("results/index", ".html", ".provenance.json"),
        texts=report(
            "results/texts.html",
            caption="../workflow/report/texts.rst",
            category="Texts",
            labels={"shows": "the median text of every model at every step count"},
        ),
    log:
        "results/logs/start_page.log",
    benchmark:
        "results/logs/start_page.tsv"
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        results=subpath(output[0], parent=True),
        preset=CONFIG.preset,
        code=STAGE["start_page"],
    shell:
        r"""
        halfstep start-page \
            --results {params.results:q} \
            --preset {params.preset:q} \
            2>&1 | tee {log:q}
        """


rule merge_provenance:
    """Merge the provenance records of all jobs into one file."""
    input:  # the ends of the graph: by then every job before them has written its record
        expand("results/tables/{table}.csv", table=TABLES),
        expand("results/figures/{figure}.svg", figure=FIGURES),
        "results/index.html",
    output:
        "results/provenance.json",
    log:
        "results/logs/merge_provenance.log",
    benchmark:
        "results/logs/merge_provenance.tsv"
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        results=subpath(output[0], parent=True),
        code=STAGE["merge_provenance"],
    shell:
        r"""
        halfstep merge-provenance \
            --results {params.results:q} \
            2>&1 | tee {log:q}
        """
