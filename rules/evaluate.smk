"""Scores: generative perplexity and entropy of samples and of held-out text, and LAMBADA.

Inputs:
    results/samples/{model}/steps-{steps}/samples.json
    results/samples/{model}/frontier             only where temperatures are set
    results/samples/{teacher}/naive/{sampler}/samples.json
    results/models/{model}/meta.json             for LAMBADA
    results/models/{teacher}/baseline/hf/        only where the baseline is a judge
    results/data/{corpus}/manifest.json
    results/hub.json                             only where something comes from the hub
Outputs:
    results/metrics/{model}/samples.json         rows of a model's samples, one for each step count
    results/metrics/{teacher}/data.json          rows of held-out text
    results/metrics/{model}/frontier.json        rows of the frontier; not without temperatures
    results/metrics/{model}/frontier.npy         values of its single texts
    results/metrics/{model}/lambada.json         rows of last words; not with `lambada: null`
    and next to each its .provenance.json
"""


rule score_samples:
    """Score samples of a model or of the naive samplers: perplexity, entropy, MAUVE, variety."""
    input:
        samples=targets.samples,
        corpus=targets.manifest,
        judge=targets.judge_file,
        hub=fetched(targets.judges_of_hub()),
    output:
        rows="results/metrics/{model}/samples.json",
        record="results/metrics/{model}/samples.provenance.json",
    log:
        "results/logs/score_samples/{model}.log",
    benchmark:
        "results/logs/score_samples/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.scored),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        samples=lambda wildcards, input: [str(Path(file).parent) for file in input.samples],
        corpus=subpath(input.corpus, parent=True),
        judge=targets.judges,
        evaluation=flags(CONFIG.evaluation, "bootstrap", "precision"),
        code=STAGE["score"],
    shell:
        r"""
        {resources.srun}halfstep score-samples \
            --samples {params.samples:q} \
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
        hub=fetched(targets.judges_of_hub()),
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
    """Score a model's samples at several temperatures: perplexity against entropy."""
    input:
        samples=lambda wildcards: expand(
            "results/samples/{model}/steps-{steps}/samples.json",
            model=wildcards.model,
            steps=targets.frontier_steps(wildcards.model),
        ),
        frontier="results/samples/{model}/frontier",
        held_out=targets.held_out_rows,
        teacher=lambda wildcards: targets.frontier_of_teacher(wildcards.model),
        corpus=targets.manifest,
        judge=targets.judge_file,
        hub=fetched(targets.judges_of_hub()),
    output:
        rows="results/metrics/{model}/frontier.json",
        values="results/metrics/{model}/frontier.npy",
        record="results/metrics/{model}/frontier.provenance.json",
    log:
        "results/logs/score_frontier/{model}.log",
    benchmark:
        "results/logs/score_frontier/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.frontier_models()),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        samples=lambda wildcards: targets.frontier_samples(wildcards.model),
        corpus=subpath(input.corpus, parent=True),
        teacher=lambda wildcards, input: ["--teacher", *input.teacher] if input.teacher else [],
        judge=targets.judges,
        evaluation=flags(CONFIG.evaluation, "bootstrap", "precision"),
        code=STAGE["score"],
    shell:
        r"""
        {resources.srun}halfstep score-frontier \
            --samples {params.samples:q} \
            --held-out {input.held_out:q} \
            {params.teacher} \
            --judge {params.judge:q} \
            --corpus {params.corpus:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_lambada:
    """Let a model predict the last words of texts (LAMBADA)."""
    input:
        checkpoint="results/models/{model}/meta.json",
        corpus=targets.manifest,
        last_words=targets.last_words(),
        hub=fetched(targets.lambada_of_hub()),
    output:
        rows="results/metrics/{model}/lambada.json",
        record="results/metrics/{model}/lambada.provenance.json",
    log:
        "results/logs/score_lambada/{model}.log",
    benchmark:
        "results/logs/score_lambada/{model}.tsv"
    wildcard_constraints:
        model=one_of(MODELS if CONFIG.evaluation.lambada else []),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        corpus=subpath(input.corpus, parent=True),
        evaluation=flags(CONFIG.evaluation, "lambada", "lambada_items", "bootstrap", "precision"),
        weights=CONFIG.sampling.weights,
        code=STAGE["lambada"],
    shell:
        r"""
        {resources.srun}halfstep score-lambada \
            --checkpoint {params.checkpoint:q} \
            --weights {params.weights} \
            --corpus {params.corpus:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
