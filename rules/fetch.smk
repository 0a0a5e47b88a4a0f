"""What comes from the hub, on the node where snakemake itself runs; all jobs of a cluster run with the hub switched off."""


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
