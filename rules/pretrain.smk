"""The teacher, a masked diffusion language model, and its autoregressive baseline.

Each of them is trained here, or imported from published weights, or, with `fine_tune`, trained from
these; there may be no baseline.

Inputs:
    results/data/{corpus}/manifest.json
    results/hub.json                             only where something comes from the hub
Outputs:
    results/models/{teacher}/teacher/            a checkpoint; meta.json is written last; of hf:...,
                                                 source/ has the files of its tokenizer, and
                                                 code/ the Python files that it brings
    results/models/{teacher}/baseline/           a checkpoint; in hf/ the same for transformers
"""


rule pretrain:
    """Train a teacher, from random weights or from those of `adapt`, or of `from` to fine-tune."""
    input:
        corpus=targets.manifest,
        start=targets.start_file,
        hub=lambda wildcards: fetched(targets.sources.source_of_hub(wildcards.teacher)),
    output:
        multiext("results/models/{teacher}/teacher/", *CHECKPOINT),
        meta="results/models/{teacher}/teacher/meta.json",
    log:
        "results/logs/pretrain/{teacher}.log",
    benchmark:
        "results/logs/pretrain/{teacher}.tsv"
    wildcard_constraints:
        teacher=one_of(targets.trained),
    priority: 10  # everything waits for the teacher
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("pretrain"),
    params:
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        network=lambda wildcards: flags(targets.teacher(wildcards).network),
        training=lambda wildcards: flags(targets.teacher(wildcards).pretraining),
        start=targets.start,
        logits=lambda wildcards: flags(targets.teacher(wildcards), "logits"),
        runs_code=targets.runs_code,
        seed=targets.training_seed,
        code=STAGE["pretrain"],
    shell:
        r"""
        {resources.srun}halfstep pretrain \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            {params.network} \
            {params.training} \
            {params.start:q} \
            {params.logits} {params.runs_code} \
            --seed {params.seed} \
            --threads {threads} --micro-batch {resources.micro_batch} \
            {resources.processes} {resources.limit} {resources.blocks} \
            2>&1 | tee {log:q}
        """


rule import_teacher:
    """Convert published weights into a teacher's checkpoint."""
    input:
        corpus=targets.manifest,
        source=lambda wildcards: local_file(targets.teacher(wildcards).source),
        hub=lambda wildcards: fetched(targets.sources.source_of_hub(wildcards.teacher)),
    output:
        multiext(
            "results/models/{teacher}/teacher/",
            "model.safetensors",
            "ema.safetensors",
            "tokenizer.json",
            "provenance.json",
        ),
        meta="results/models/{teacher}/teacher/meta.json",
    log:
        "results/logs/import_teacher/{teacher}.log",
    benchmark:
        "results/logs/import_teacher/{teacher}.tsv"
    wildcard_constraints:
        teacher=one_of(targets.imported),
    conda:
        "../envs/gpu.yaml"
    resources:
        **machine("import"),
    params:
        source=lambda wildcards: targets.teacher(wildcards).source,
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        weights=lambda wildcards: targets.teacher(wildcards).from_weights,
        size=targets.network_size,
        logits=lambda wildcards: flags(targets.teacher(wildcards), "logits"),
        runs_code=targets.runs_code,
        code=STAGE["import_teacher"],
    shell:
        r"""
        halfstep import \
            --source {params.source:q} \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            --weights {params.weights} \
            --size {params.size} \
            {params.logits} {params.runs_code} \
            2>&1 | tee {log:q}
        """


rule train_baseline:
    """Train the autoregressive baseline of a teacher: same corpus, same size."""
    input:
        corpus=targets.manifest,
    output:
        multiext("results/models/{teacher}/baseline/", *CHECKPOINT),
        meta="results/models/{teacher}/baseline/meta.json",
        hf="results/models/{teacher}/baseline/hf/config.json",
        hf_weights="results/models/{teacher}/baseline/hf/model.safetensors",
    log:
        "results/logs/train_baseline/{teacher}.log",
    benchmark:
        "results/logs/train_baseline/{teacher}.tsv"
    wildcard_constraints:
        teacher=one_of(set(targets.with_baseline) - set(targets.published)),
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("pretrain"),
    params:
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        network=lambda wildcards: flags(targets.teacher(wildcards).network),
        training=lambda wildcards: flags(targets.teacher(wildcards).baseline),
        seed=CONFIG.seed,
        code=STAGE["baseline"],
    shell:
        r"""
        {resources.srun}halfstep train-baseline \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            {params.network} \
            {params.training} \
            --seed {params.seed} \
            --threads {threads} --micro-batch {resources.micro_batch} \
            {resources.processes} {resources.limit} {resources.blocks} \
            2>&1 | tee {log:q}
        """


rule import_baseline:
    """Convert a published causal language model into a teacher's autoregressive baseline."""
    input:
        corpus=targets.manifest,
        source=targets.baseline_file,
        hub=lambda wildcards: fetched(targets.sources.baseline_of_hub(wildcards.teacher)),
    output:
        multiext("results/models/{teacher}/baseline/", "tokenizer.json", "provenance.json"),
        meta="results/models/{teacher}/baseline/meta.json",
        hf="results/models/{teacher}/baseline/hf/config.json",
        hf_weights="results/models/{teacher}/baseline/hf/model.safetensors",
    log:
        "results/logs/import_baseline/{teacher}.log",
    benchmark:
        "results/logs/import_baseline/{teacher}.tsv"
    wildcard_constraints:
        teacher=one_of(targets.published),
    conda:
        "../envs/gpu.yaml"
    resources:
        **machine("import"),
    params:
        source=lambda wildcards: targets.sources.baseline_source(wildcards.teacher),
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        code=STAGE["import_baseline"],
    shell:
        r"""
        halfstep import-baseline \
            --source {params.source:q} \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            2>&1 | tee {log:q}
        """
