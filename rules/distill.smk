"""Self-Distillation Through Time: a round is a job from checkpoint to checkpoint.

The student of a round is trained here, or imported from published weights.

Inputs:
    results/models/{teacher}/teacher/meta.json   in round 1; later the previous round's meta.json
    results/data/{corpus}/manifest.json
    results/hub.json                             only where published students come from the hub
Outputs:
    results/models/{teacher}/{run}/round-{round}/    a checkpoint; meta.json is written last
    results/models/{model}/                          the same of an imported student
"""


rule distill_round:
    """Train the student of one round; it becomes the teacher of the next round."""
    input:
        teacher=targets.previous_round,
        corpus=targets.manifest,
    output:
        multiext("results/models/{teacher}/{run}/round-{round}/", *CHECKPOINT),
        meta="results/models/{teacher}/{run}/round-{round}/meta.json",
    log:
        "results/logs/distill_round/{teacher}/{run}/round-{round}.log",
    benchmark:
        "results/logs/distill_round/{teacher}/{run}/round-{round}.tsv"
    wildcard_constraints:
        teacher=one_of(targets.with_repeats),
    priority: 10  # the rounds are the longest path; samples and scores fill the other cores
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("round"),
    params:
        teacher=subpath(input.teacher, parent=True),
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        options=lambda wildcards: flags(targets.round_options(wildcards)),
        seed=targets.training_seed,
        code=STAGE["distill"],
    shell:
        r"""
        {resources.srun}halfstep distill-round \
            --teacher {params.teacher:q} \
            --corpus {params.corpus:q} \
            --round {wildcards.round} \
            --output {params.output:q} \
            {params.options} \
            --seed {params.seed} \
            --threads {threads} --micro-batch {resources.micro_batch} \
            {resources.processes} {resources.limit} {resources.blocks} \
            2>&1 | tee {log:q}
        """


ruleorder: import_round > distill_round  # of published students, the only ones it matches


rule import_round:
    """Convert published weights into the checkpoint of a student."""
    input:
        corpus=targets.manifest,
        source=lambda wildcards: local_file(targets.sources.published_round(wildcards.model)[0]),
        hub=lambda wildcards: fetched(targets.sources.round_of_hub(wildcards.model)),
    output:
        multiext(
            "results/models/{model}/",
            "model.safetensors",
            "ema.safetensors",
            "tokenizer.json",
            "provenance.json",
        ),
        meta="results/models/{model}/meta.json",
    log:
        "results/logs/import_round/{model}.log",
    benchmark:
        "results/logs/import_round/{model}.tsv"
    wildcard_constraints:
        model=one_of(targets.sources.imported_rounds),
    conda:
        "../envs/gpu.yaml"
    resources:
        **machine("import"),
    params:
        source=lambda wildcards: targets.sources.published_round(wildcards.model)[0],
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        size=targets.network_size,
        round=lambda wildcards: targets.sources.published_round(wildcards.model)[2],
        options=lambda wildcards: flags(
            targets.sources.published_round(wildcards.model)[1],
            "divergence",
            "teacher_steps",
            "substeps",
        ),
        code=STAGE["import_round"],
    shell:
        r"""
        halfstep import \
            --source {params.source:q} \
            --corpus {params.corpus:q} \
            --output {params.output:q} \
            --size {params.size} \
            --round {params.round} \
            {params.options} \
            2>&1 | tee {log:q}
        """
