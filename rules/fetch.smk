"""Downloads from the hub, where snakemake itself runs; all jobs of a cluster run offline.

Inputs:
    none: the names of the repositories follow from the configuration
Outputs:
    results/hub.json                             repositories, files and their checksums
    results/hub.provenance.json
"""


rule fetch:
    """Download tokenizers, data sets, judges and published weights, and record their checksums."""
    output:
        about="results/hub.json",
        record="results/hub.provenance.json",
    log:
        "results/logs/fetch.log",
    benchmark:
        "results/logs/fetch.tsv"
    localrule: True
    conda:
        "../envs/cpu.yaml"
    params:
        repositories=HUB,
        code=STAGE["fetch"],
    shell:
        r"""
        halfstep fetch \
            --repositories {params.repositories:q} \
            --output {output.about:q} \
            2>&1 | tee {log:q}
        """
