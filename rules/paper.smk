"""The figures and tables of the SDTT paper by their numbers, and the reproduction report.

Inputs:
    results/tables/{table}.csv
    results/metrics/                             rows of scores, for tables
Outputs:
    results/paper/{item}                         figures: .pdf, .svg, .csv; tables: .csv, .md, .html
    results/paper/table-2                        .csv, .md
    results/paper/report                         .md, .html
"""

from halfstep.report.paper import ITEMS
from halfstep.workflow.paper_targets import PaperTargets

paper = PaperTargets(targets)
try:
    for word in sys.argv[1:]:
        paper.check(word)
except ConfigError as error:
    sys.exit(f"configuration: {error}")
PAPER_FIGURES, PAPER_TABLES = paper.named(is_figure=True), paper.named(is_figure=False)


rule paper_figure:
    """Draw a figure of the paper from our tables."""
    input:
        lambda wildcards: paper.sources(wildcards.item),
    output:
        multiext("results/paper/{item}", ".pdf", ".svg", ".csv", ".provenance.json"),
    log:
        "results/logs/paper/{item}.log",
    benchmark:
        "results/logs/paper/{item}.tsv"
    wildcard_constraints:
        item=one_of(PAPER_FIGURES),
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        figure=lambda wildcards: ITEMS[wildcards.item].shows,
        where=lambda wildcards: paper.rows(wildcards.item),
        output=subpath(output[0], strip_suffix=".pdf"),
        published="--published" if CONFIG.published else "",
        code=STAGE["plot"],
    shell:
        r"""
        halfstep plot \
            --figure {params.figure} \
            --tables {input:q} \
            --where {params.where:q} \
            --output {params.output:q} \
            {params.published} \
            2>&1 | tee {log:q}
        """


rule paper_table:
    """Write a table of the paper from our metric rows."""
    input:
        lambda wildcards: paper.sources(wildcards.item),
    output:
        multiext("results/paper/{item}", ".csv", ".md", ".html", ".provenance.json"),
    log:
        "results/logs/paper/{item}.log",
    benchmark:
        "results/logs/paper/{item}.tsv"
    wildcard_constraints:
        item=one_of(PAPER_TABLES),
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        table=lambda wildcards: ITEMS[wildcards.item].shows,
        where=lambda wildcards: paper.rows(wildcards.item),
        output=subpath(output[0], strip_suffix=".csv"),
        published="--published" if CONFIG.published else "",
        code=STAGE["tabulate"],
    shell:
        r"""
        halfstep tabulate \
            --table {params.table} \
            --metrics {input:q} \
            --where {params.where:q} \
            --output {params.output:q} \
            {params.published} \
            2>&1 | tee {log:q}
        """


rule list_sizes:
    """Write the network sizes of the paper with their parameters (table 2)."""
    output:
        multiext("results/paper/table-2", ".csv", ".md", ".provenance.json"),
    log:
        "results/logs/paper/table-2.log",
    benchmark:
        "results/logs/paper/table-2.tsv"
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        output=subpath(output[0], strip_suffix=".csv"),
        code=STAGE["paper_report"],
    shell:
        r"""
        halfstep list-sizes \
            --output {params.output:q} \
            2>&1 | tee {log:q}
        """


rule paper_report:
    """Compare published numbers and the paper's claims with ours."""
    input:
        expand("results/tables/{table}.csv", table=TABLES),
    output:
        multiext("results/paper/report", ".md", ".html", ".provenance.json"),
    log:
        "results/logs/paper/report.log",
    benchmark:
        "results/logs/paper/report.tsv"
    localrule: True
    conda:
        "../envs/report.yaml"
    params:
        output=subpath(output[0], strip_suffix=".md"),
        teacher=paper.compared_teacher(),
        preset=CONFIG.preset,
        code=STAGE["paper_report"],
    shell:
        r"""
        halfstep compare-published \
            --tables {input:q} \
            {params.teacher} \
            --preset {params.preset:q} \
            --output {params.output:q} \
            2>&1 | tee {log:q}
        """


rule paper:
    """Make every figure and table of the paper that this configuration can make, and the report."""
    input:
        expand("results/paper/{item}.{kind}", item=PAPER_FIGURES, kind=["pdf", "svg"]),
        expand("results/paper/{item}.{kind}", item=PAPER_TABLES, kind=["csv", "md"]),
        "results/paper/table-2.md",
        "results/paper/report.md",
    localrule: True
