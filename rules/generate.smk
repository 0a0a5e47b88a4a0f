"""All samples of one model. They are kept, so a new metric needs no new samples.

Inputs:
    results/models/{model}/meta.json
Outputs:
    results/samples/{model}/provenance.json      written last; it stands for all samples

Next to it, steps-{steps}/ has token ids, texts and samples.json, and temperature-{temperature}/ in
it the same at the temperatures of the frontier. They are not declared, because Snakemake deletes
declared outputs before it starts a job again. So a set that is finished is kept when the job was
interrupted, or when a step count is added.
"""


rule generate:
    """Draw samples of one model at all its step counts, and at the frontier's temperatures."""
    input:
        checkpoint="results/models/{model}/meta.json",
    output:
        record="results/samples/{model}/provenance.json",
    log:
        "results/logs/generate/{model}.log",
    benchmark:
        "results/logs/generate/{model}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        output=lambda wildcards, output: str(Path(output.record).parent / "steps-{steps}"),
        steps=lambda wildcards: targets.drawn_steps(wildcards.model),
        writing=lambda wildcards: flags(subsection(targets.sampling(wildcards), GenerateOptions)),
        frontier=lambda wildcards: flags(targets.frontier_options(wildcards.model)),
        code=STAGE["generate"],
    shell:
        r"""
        {resources.srun}halfstep generate \
            --checkpoint {params.checkpoint:q} \
            --output {params.output:q} \
            --steps {params.steps} \
            {params.writing} {params.frontier} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
