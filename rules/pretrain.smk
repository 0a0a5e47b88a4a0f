"""The teacher, a masked diffusion language model, and the baseline, its autoregressive peer."""


rule pretrain:
    input:
        corpus=manifest,
    output:
        multiext("results/models/{teacher}/teacher/", *CHECKPOINT),
        meta="results/models/{teacher}/teacher/meta.json",
    log:
        "results/logs/pretrain/{teacher}.log",
    benchmark:
        "results/logs/pretrain/{teacher}.tsv"
    priority: 10  # everything waits for the teacher
    conda:
        "../envs/gpu.yaml"
    threads: need("threads")
    resources:
        gpu=need("gpu"),
        mem_mb=need("mem_mb"),
        micro_batch=need("micro_batch"),
        runtime=need("pretrain"),
    params:
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        network=lambda wildcards: flags(teacher(wildcards).network),
        training=lambda wildcards: flags(teacher(wildcards).pretraining),
        seed=CONFIG.seed,
        code=STAGE["pretrain"],
    shell:
        r"""
        halfstep pretrain \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            {params.network} \
            {params.training} \
            --seed {params.seed} \
            --threads {threads} --micro-batch {resources.micro_batch} \
            2>&1 | tee {log:q}
        """


rule train_baseline:
    input:
        corpus=manifest,
    output:
        multiext("results/models/{teacher}/baseline/", *CHECKPOINT),
        meta="results/models/{teacher}/baseline/meta.json",
        hf="results/models/{teacher}/baseline/hf/config.json",
        hf_weights="results/models/{teacher}/baseline/hf/model.safetensors",
    log:
        "results/logs/train_baseline/{teacher}.log",
    benchmark:
        "results/logs/train_baseline/{teacher}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: need("threads")
    resources:
        gpu=need("gpu"),
        mem_mb=need("mem_mb"),
        micro_batch=need("micro_batch"),
        runtime=need("pretrain"),
    params:
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        network=lambda wildcards: flags(teacher(wildcards).network),
        training=lambda wildcards: flags(teacher(wildcards).baseline),
        seed=CONFIG.seed,
        code=STAGE["baseline"],
    shell:
        r"""
        halfstep train-baseline \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            {params.network} \
            {params.training} \
            --seed {params.seed} \
            --threads {threads} --micro-batch {resources.micro_batch} \
            2>&1 | tee {log:q}
        """
