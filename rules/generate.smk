"""All samples of one model. They are kept, so a new metric needs no new samples.

Inputs:
    results/models/{model}/meta.json
    results/data/{corpus}/manifest.json          only of a corpus of pairs, for its prompts
Outputs:
    results/samples/{model}/provenance.json      written last; it stands for all samples
    results/samples/{model}/frontier/provenance.json
                                                 the same of the frontier's other temperatures

The {model} of a sample may end in the name of a variant of `sampling`, {model}/{variant}: the same
model, drawn in another way.

Next to a record, steps-{steps}/ has token ids, texts and samples.json, on the frontier for each
temperature in temperature-{temperature}/. They are not declared, because Snakemake deletes declared
outputs before it starts a job again. So a set that is finished is kept when the job was
interrupted, or when a step count is added.
"""


rule generate:
    """Draw samples of one model at all its step counts, for a variant in another way."""
    input:
        checkpoint=targets.checkpoint,
        scorer=targets.scorer,
        pairs=targets.pairs,
    output:
        record="results/samples/{model}/provenance.json",
    log:
        "results/logs/generate/{model}.log",
    benchmark:
        "results/logs/generate/{model}.tsv"
    wildcard_constraints:
        model=one_of([*MODELS, *targets.varied]),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        pairs=lambda wildcards, input: [
            f"--pairs {Path(manifest).parent}" for manifest in input.pairs
        ],
        output=lambda wildcards, output: str(Path(output.record).parent / "steps-{steps}"),
        steps=lambda wildcards: targets.drawn_steps(wildcards.model),
        writing=lambda wildcards: flags(subsection(targets.sampling(wildcards), GenerateOptions)),
        code=STAGE["generate"],
    shell:
        r"""
        {resources.srun}halfstep generate \
            --checkpoint {params.checkpoint:q} \
            --output {params.output:q} \
            --steps {params.steps} \
            {params.writing} {params.pairs} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule generate_frontier:
    """Draw samples of one model, or of a variant, at the other temperatures of the frontier."""
    input:
        checkpoint=targets.checkpoint,
        scorer=targets.scorer,
        pairs=targets.pairs,
    output:
        record="results/samples/{model}/frontier/provenance.json",
    log:
        "results/logs/generate_frontier/{model}.log",
    benchmark:
        "results/logs/generate_frontier/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.on_frontier),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        pairs=lambda wildcards, input: [
            f"--pairs {Path(manifest).parent}" for manifest in input.pairs
        ],
        output=lambda wildcards, output: str(Path(output.record).parent / "steps-{steps}"),
        steps=lambda wildcards: targets.frontier_steps(wildcards.model),
        temperatures=lambda wildcards: targets.other_temperatures(wildcards.model),
        writing=lambda wildcards: flags(
            subsection(targets.sampling(wildcards), GenerateOptions).model_copy(
                update={"temperature": 1.0}
            )
        ),
        code=STAGE["generate"],
    shell:
        r"""
        {resources.srun}halfstep generate \
            --checkpoint {params.checkpoint:q} \
            --output {params.output:q} \
            --steps {params.steps} \
            --temperatures {params.temperatures} \
            {params.writing} {params.pairs} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
