"""Scores: generative perplexity and entropy of samples and of held-out text, and LAMBADA.

Inputs:
    results/samples/{model}/provenance.json      stands for all samples of a model
    results/samples/{model}/frontier/provenance.json
                                                 the same at other temperatures, where there are any
    results/samples/{teacher}/naive/provenance.json
    results/models/{model}/meta.json             for infilling, and for last words all that
                                                 targets.last_words has for a {model}
    results/models/{teacher}/baseline/hf/        only where the baseline is a judge
    results/data/{corpus}/manifest.json
    results/hub.json                             only where something comes from the hub
Outputs:
    results/metrics/{model}/samples.json         rows of a model's samples, one for each step count
    results/metrics/{teacher}/data.json          rows of held-out text
    results/metrics/{model}/frontier             .json, rows of the frontier, and .npy, values of
                                                 single texts; not without temperatures
    results/metrics/{model}/lambada.json         rows of last words; not with `lambada: null`;
                                                 {model} is a teacher, a baseline, or a run with
                                                 all its rounds
    results/metrics/{model}/infilling.json       rows of filled-in positions; only with
                                                 `infilling_items`
    and next to each its .provenance.json

The {model} of samples and of filled-in positions may end in the name of a variant of `sampling`,
{model}/{variant}.
"""


rule score_samples:
    """Score samples of a model or of the naive samplers: perplexity, entropy, MAUVE, variety.

    The models on the frontier are left to score_frontier, which writes the same rows and more.
    """
    input:
        samples=targets.samples,
        corpus=targets.manifest,
        judge=targets.judge_file,
        hub=fetched(targets.sources.judges_of_hub()),
    output:
        rows="results/metrics/{model}/samples.json",
        record="results/metrics/{model}/samples.provenance.json",
    log:
        "results/logs/score_samples/{model}.log",
    benchmark:
        "results/logs/score_samples/{model}.tsv"
    wildcard_constraints:
        model=one_of(
            name for name in [*targets.scored, *targets.varied] if name not in targets.on_frontier
        ),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        samples=targets.sample_folders,
        corpus=subpath(input.corpus, parent=True),
        judge=targets.judges,
        evaluation=flags(CONFIG.evaluation, "bootstrap", "precision"),
        variant=targets.variant_flag,
        code=STAGE["score"],
    shell:
        r"""
        {resources.srun}halfstep score-samples \
            --samples {params.samples:q} \
            {params.variant} \
            --judge {params.judge:q} \
            --corpus {params.corpus:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_corpus:
    """Score held-out text of the corpus in the same way, as a reference for samples."""
    input:
        corpus=targets.manifest,
        judge=targets.judge_file,
        hub=fetched(targets.sources.judges_of_hub()),
    output:
        rows="results/metrics/{teacher}/data.json",
        record="results/metrics/{teacher}/data.provenance.json",
    log:
        "results/logs/score_corpus/{teacher}.log",
    benchmark:
        "results/logs/score_corpus/{teacher}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        corpus=subpath(input.corpus, parent=True),
        judge=targets.judges,
        evaluation=flags(CONFIG.evaluation, "bootstrap", "precision"),
        num_samples=flags(CONFIG.sampling, "num_samples"),
        code=STAGE["score"],
    shell:
        r"""
        {resources.srun}halfstep score-corpus \
            --corpus {params.corpus:q} \
            --judge {params.judge:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            {params.num_samples} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_frontier:
    """Score all samples of a model or variant on the frontier: perplexity against entropy too."""
    input:
        samples=targets.samples,
        swept="results/samples/{model}/frontier/provenance.json",
        held_out=targets.held_out_rows,
        teacher=lambda wildcards: targets.frontier_of_teacher(wildcards.model),
        corpus=targets.manifest,
        judge=targets.judge_file,
        hub=fetched(targets.sources.judges_of_hub()),
    output:
        rows="results/metrics/{model}/samples.json",
        record="results/metrics/{model}/samples.provenance.json",
        frontier=multiext("results/metrics/{model}/frontier", ".json", ".npy", ".provenance.json"),
    log:
        "results/logs/score_frontier/{model}.log",
    benchmark:
        "results/logs/score_frontier/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.on_frontier),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        samples=targets.sample_folders,
        frontier=lambda wildcards: targets.frontier_folders(wildcards.model),
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.rows, parent=True),
        teacher=lambda wildcards, input: ["--teacher", *input.teacher] if input.teacher else [],
        judge=targets.judges,
        evaluation=flags(CONFIG.evaluation, "bootstrap", "precision"),
        # With `input` Snakemake does not compare it: a model's path says it, and older scores stay.
        variant=lambda wildcards, input: targets.variant_flag(wildcards),
        code=STAGE["score"],
    shell:
        r"""
        {resources.srun}halfstep score-frontier \
            --samples {params.samples:q} \
            --frontier {params.frontier:q} \
            {params.variant} \
            --held-out {input.held_out:q} \
            {params.teacher} \
            --judge {params.judge:q} \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_lambada:
    """Let a model, or all rounds of a run, predict the last words of texts (LAMBADA).

    One job for all rounds starts once. It keeps the rows of a finished round in lambada.partial.
    """
    input:
        checkpoints=targets.last_words_checkpoints,
        corpus=targets.manifest,
        last_words=targets.sources.last_words(),
        hub=fetched(targets.sources.lambada_of_hub()),
    output:
        rows="results/metrics/{model}/lambada.json",
        record="results/metrics/{model}/lambada.provenance.json",
    log:
        "results/logs/score_lambada/{model}.log",
    benchmark:
        "results/logs/score_lambada/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.last_words if CONFIG.evaluation.lambada else []),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoints=lambda wildcards, input: [str(Path(file).parent) for file in input.checkpoints],
        corpus=subpath(input.corpus, parent=True),
        evaluation=flags(CONFIG.evaluation, "lambada", "lambada_items", "bootstrap", "precision"),
        weights=CONFIG.sampling.weights,
        code=STAGE["lambada"],
    shell:
        r"""
        {resources.srun}halfstep score-lambada \
            --checkpoint {params.checkpoints:q} \
            --weights {params.weights} \
            --corpus {params.corpus:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_infilling:
    """Let a denoiser fill in masked positions, at several numbers of tokens per forward."""
    input:
        checkpoint=targets.checkpoint,
        scorer=targets.scorer,
        corpus=targets.manifest,
        last_words=targets.sources.last_words(),
        hub=fetched(targets.sources.lambada_of_hub()),
    output:
        rows="results/metrics/{model}/infilling.json",
        record="results/metrics/{model}/infilling.provenance.json",
    log:
        "results/logs/score_infilling/{model}.log",
    benchmark:
        "results/logs/score_infilling/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.infilled()),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        corpus=subpath(input.corpus, parent=True),
        variant=targets.variant_flag,
        drawing=lambda wildcards: flags(subsection(targets.sampling(wildcards), DrawOptions)),
        evaluation=flags(CONFIG.evaluation, "lambada", "infilling_items", "bootstrap"),
        code=STAGE["infilling"],
    shell:
        r"""
        {resources.srun}halfstep score-infilling \
            --checkpoint {params.checkpoint:q} \
            --corpus {params.corpus:q} \
            --output {output.rows:q} \
            {params.variant} \
            {params.drawing} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
