"""Continuations of held-out prompts and their scores, where the config has `continuations`.

Inputs:
    results/models/{model}/meta.json
    results/models/{teacher}/baseline/hf/        only where the baseline is a judge
    results/data/{corpus}/manifest.json
    results/hub.json                             only where something comes from the hub
Outputs:
    results/continuations/{model}/provenance.json    written last; it stands for all continuations
    results/metrics/{model}/continuations.json   rows of MAUVE, self-BLEU and perplexity
    results/metrics/{model}/continuations.provenance.json

Next to the record of continuations, steps-{steps}/ has token ids, texts and samples.json. They are
not declared, as those of samples (generate.smk), so finished sets outlive an interrupted job.

On Slurm the two jobs of a model are one submission (`groups` in workflow/profiles/slurm).
"""


rule continue_prompts:
    """Continue held-out prompts with one model at all its step counts."""
    input:
        checkpoint="results/models/{model}/meta.json",
        corpus=targets.manifest,
        scorer=targets.scorer,
    output:
        record="results/continuations/{model}/provenance.json",
    log:
        "results/logs/continue_prompts/{model}.log",
    benchmark:
        "results/logs/continue_prompts/{model}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("continuations"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        corpus=subpath(input.corpus, parent=True),
        output=lambda wildcards, output: str(Path(output.record).parent / "steps-{steps}"),
        steps=lambda wildcards: targets.continuation_steps(wildcards.model),
        prompts=lambda wildcards: flags(subsection(CONFIG.continuations, Prompts)),
        drawing=lambda wildcards: flags(subsection(targets.sampling(wildcards), DrawOptions)),
        code=STAGE["continue_prompts"],
    shell:
        r"""
        {resources.srun}halfstep continue-prompts \
            --checkpoint {params.checkpoint:q} \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            --steps {params.steps} \
            {params.prompts} \
            {params.drawing} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_continuations:
    """Score a model's continuations: MAUVE, self-BLEU and perplexity."""
    input:
        samples="results/continuations/{model}/provenance.json",
        corpus=targets.manifest,
        judge=targets.judge_file,
        hub=fetched(targets.sources.judges_of_hub()),
    output:
        rows="results/metrics/{model}/continuations.json",
        record="results/metrics/{model}/continuations.provenance.json",
    log:
        "results/logs/score_continuations/{model}.log",
    benchmark:
        "results/logs/score_continuations/{model}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("continuations"),
    params:
        samples=targets.continuation_folders,
        corpus=subpath(input.corpus, parent=True),
        judge=targets.judges,
        evaluation=flags(CONFIG.evaluation, "bootstrap", "precision"),
        code=STAGE["score_continuations"],
    shell:
        r"""
        {resources.srun}halfstep score-continuations \
            --samples {params.samples:q} \
            --judge {params.judge:q} \
            --corpus {params.corpus:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
