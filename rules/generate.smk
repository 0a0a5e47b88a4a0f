"""Samples of one model. They are kept, so a new metric needs no new samples.

Inputs:
    results/models/{model}/meta.json
Outputs:
    results/samples/{model}/steps-{steps}/       token ids, texts; samples.json
    results/samples/{model}/frontier             folders steps-{steps}/temperature-{temperature}
                                                 with the same files; not without temperatures
    and next to the latter its .provenance.json
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


rule generate_frontier:
    """Draw samples of one model at the other temperatures of the frontier."""
    input:
        checkpoint="results/models/{model}/meta.json",
    output:
        folder=directory("results/samples/{model}/frontier"),
        record="results/samples/{model}/frontier.provenance.json",
    log:
        "results/logs/generate_frontier/{model}.log",
    benchmark:
        "results/logs/generate_frontier/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.frontier_models()),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        steps=lambda wildcards: targets.frontier_steps(wildcards.model),
        temperatures=CONFIG.sampling.other_temperatures,
        writing=lambda wildcards: flags(
            subsection(targets.sampling(wildcards), GenerateOptions).model_copy(
                update={"temperature": 1.0}
            )
        ),
        code=STAGE["generate"],
    shell:
        r"""
        {resources.srun}halfstep generate-frontier \
            --checkpoint {params.checkpoint:q} \
            --output {output.folder:q} \
            --steps {params.steps} \
            --temperatures {params.temperatures} \
            {params.writing} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
