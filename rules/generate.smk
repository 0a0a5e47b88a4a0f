"""Samples of one model at one step count. They are kept, so a new metric needs no new samples.

Inputs:
    results/models/{model}/meta.json
Outputs:
    results/samples/{model}/steps-{steps}/       token ids, texts; samples.json
"""


rule generate:
    """Draw samples of one model at one number of sampling steps."""
    input:
        checkpoint="results/models/{model}/meta.json",
    output:
        multiext(
            "results/samples/{model}/steps-{steps}/",
            "samples.npy",
            "samples.txt",
            "provenance.json",
        ),
        about="results/samples/{model}/steps-{steps}/samples.json",
    log:
        "results/logs/generate/{model}/steps-{steps}.log",
    benchmark:
        "results/logs/generate/{model}/steps-{steps}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        output=subpath(output.about, parent=True),
        writing=lambda wildcards: flags(subsection(targets.sampling(wildcards), GenerateOptions)),
        code=STAGE["generate"],
    shell:
        r"""
        {resources.srun}halfstep generate \
            --checkpoint {params.checkpoint:q} \
            --output {params.output:q} \
            --steps {wildcards.steps} \
            {params.writing} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
