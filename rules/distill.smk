"""Self-Distillation Through Time: a round is a job from checkpoint to checkpoint."""


def previous_round(wildcards):
    """The teacher of round r: the student of round r-1, and in round 1 the teacher itself."""
    before = f"{wildcards.run}/round-{int(wildcards.round) - 1}" if int(wildcards.round) > 1 else "teacher"
    return f"results/models/{wildcards.teacher}/{before}/meta.json"


rule distill_round:
    input:
        teacher=previous_round,
        corpus=manifest,
    output:
        multiext(
            "results/models/{teacher}/{run}/round-{round}/",
            "model.safetensors", "ema.safetensors", "optimizer.safetensors", "tokenizer.json", meta="meta.json",
        ),
    params:
        teacher=subpath(input.teacher, parent=True),
        corpus=subpath(input.corpus, parent=True),
        output=subpath(output.meta, parent=True),
        run=run,
        seed=CONFIG.seed,
        code=STAGE["distill"],
    threads: need("threads")
    resources:
        gpu=need("gpu"),
        mem_mb=need("mem_mb"),
        micro_batch=need("micro_batch"),
        runtime=need("runtime", hours="round"),
    log:
        "results/logs/distill_round/{teacher}/{run}/round-{round}.log",
    benchmark:
        "results/logs/distill_round/{teacher}/{run}/round-{round}.tsv"
    conda:
        "../envs/gpu.yaml"
    shell:
        r"""
        halfstep distill-round \
            --teacher {params.teacher:q} \
            --corpus {params.corpus:q} \
            --round {wildcards.round} \
            --output {params.output:q} \
            {params.run} \
            --seed {params.seed} \
            --threads {threads} --micro-batch {resources.micro_batch} \
            2>&1 | tee {log:q}
        """
