"""Generative perplexity with entropy beside it, the same of held-out text, and last words (LAMBADA)."""


rule score_samples:
    input:
        samples=lambda wildcards: expand(
            "results/samples/{model}/steps-{steps}/samples.json", model=wildcards.model, steps=step_counts(wildcards.model)
        ),
        corpus=manifest,
        judge=judge_file,
        hub=FETCHED,
    output:
        rows="results/metrics/{model}/samples.json",
        record="results/metrics/{model}/samples.provenance.json",
    log:
        "results/logs/score_samples/{model}.log",
    benchmark:
        "results/logs/score_samples/{model}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: need("threads")
    resources:
        **SPREAD,
        gpu=need("gpu"),
        gpu_model=need("gpu_model"),
        mem_mb=need("mem_mb"),
        micro_batch=need("micro_batch"),
        runtime=need("sample"),
    params:
        samples=lambda wildcards, input: [str(Path(file).parent) for file in input.samples],
        corpus=subpath(input.corpus, parent=True),
        judge=judge,
        evaluation=flags(CONFIG.evaluation, "bootstrap"),
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
    input:
        corpus=manifest,
        judge=judge_file,
        hub=FETCHED,
    output:
        rows="results/metrics/{teacher}/data.json",
        record="results/metrics/{teacher}/data.provenance.json",
    log:
        "results/logs/score_corpus/{teacher}.log",
    benchmark:
        "results/logs/score_corpus/{teacher}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: need("threads")
    resources:
        **SPREAD,
        gpu=need("gpu"),
        gpu_model=need("gpu_model"),
        mem_mb=need("mem_mb"),
        micro_batch=need("micro_batch"),
        runtime=need("sample"),
    params:
        corpus=subpath(input.corpus, parent=True),
        judge=judge,
        evaluation=flags(CONFIG.evaluation, "bootstrap"),
        code=STAGE["score"],
    shell:
        r"""
        {resources.srun}halfstep score-corpus \
            --corpus {params.corpus:q} \
            --judge {params.judge:q} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_lambada:
    input:
        checkpoint="results/models/{model}/meta.json",
        corpus=manifest,
        last_words=CONFIG.evaluation.lambada if CONFIG.evaluation.lambada.endswith(".jsonl") else [],
        hub=FETCHED,
    output:
        rows="results/metrics/{model}/lambada.json",
        record="results/metrics/{model}/lambada.provenance.json",
    log:
        "results/logs/score_lambada/{model}.log",
    benchmark:
        "results/logs/score_lambada/{model}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: need("threads")
    resources:
        **SPREAD,
        gpu=need("gpu"),
        gpu_model=need("gpu_model"),
        mem_mb=need("mem_mb"),
        micro_batch=need("micro_batch"),
        runtime=need("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        corpus=subpath(input.corpus, parent=True),
        evaluation=flags(CONFIG.evaluation, "lambada", "lambada_items", "bootstrap"),
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
