"""Texts of naive samplers without a network, which show what a metric is worth.

Inputs:
    results/data/{corpus}/manifest.json
Outputs:
    results/samples/{teacher}/naive/             token ids, texts; samples.json, for each sampler
"""

SAMPLES = ["samples.npy", "samples.txt", "samples.json"]


rule draw_naive:
    """Draw texts by unigrams, by bigrams, and by pasting training sentences."""
    input:
        corpus=targets.manifest,
    output:
        multiext("results/samples/{teacher}/naive/unigram/", *SAMPLES),
        multiext("results/samples/{teacher}/naive/bigram/", *SAMPLES),
        multiext("results/samples/{teacher}/naive/cut_and_paste/", *SAMPLES),
        record="results/samples/{teacher}/naive/provenance.json",
    log:
        "results/logs/draw_naive/{teacher}.log",
    benchmark:
        "results/logs/draw_naive/{teacher}.tsv"
    conda:
        "../envs/cpu.yaml"
    resources:
        mem_mb=8000,
        runtime=60,
    params:
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.record, parent=True),
        drawing=flags(CONFIG.sampling, "num_samples", "sampling_seed"),
        code=STAGE["draw_naive"],
    shell:
        r"""
        halfstep draw-naive \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            {params.drawing} \
            2>&1 | tee {log:q}
        """
