"""Tasks of lm-eval, and zero-shot perplexity, of baselines, teachers and last rounds.

Inputs:
    results/models/{model}/meta.json
    results/models/{teacher}/baseline/meta.json  only where a sampler of written answers asks it
    results/hub.json                             only where something comes from the hub
Outputs:
    results/metrics/{model}/tasks.json           rows of tasks; not without `tasks`
    results/metrics/{model}/zero_shot.json       rows of texts; not without `perplexity`
    and next to each its .provenance.json
"""

EXAMINED = one_of(targets.final_models())


rule score_tasks:
    """Let a model answer tasks of lm-eval: multiple choice by the ELBO of whole texts, or write."""
    input:
        checkpoint="results/models/{model}/meta.json",
        scorer=targets.answer_scorer,
        files=task_sources.files_of(CONFIG.evaluation.tasks),
        hub=fetched(task_sources.tasks_of_hub(CONFIG.evaluation)),
    output:
        rows="results/metrics/{model}/tasks.json",
        record="results/metrics/{model}/tasks.provenance.json",
    log:
        "results/logs/score_tasks/{model}.log",
    benchmark:
        "results/logs/score_tasks/{model}.tsv"
    wildcard_constraints:
        model=EXAMINED if CONFIG.evaluation.tasks else "(?!)",
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("tasks"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        evaluation=flags(CONFIG.evaluation, "tasks", "task_draws", "task_items", "precision"),
        weights=CONFIG.sampling.weights,
        writing=targets.answering,
        code=STAGE["tasks"],
    shell:
        r"""
        {resources.srun}halfstep score-tasks \
            --checkpoint {params.checkpoint:q} \
            --weights {params.weights} \
            --output {output.rows:q} \
            {params.evaluation} \
            {params.writing} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """


rule score_perplexity:
    """Measure the perplexity of texts that the model was not trained on."""
    input:
        checkpoint="results/models/{model}/meta.json",
        files=task_sources.files_of(CONFIG.evaluation.perplexity),
        hub=fetched(task_sources.texts_of_hub(CONFIG.evaluation)),
    output:
        rows="results/metrics/{model}/zero_shot.json",
        record="results/metrics/{model}/zero_shot.provenance.json",
    log:
        "results/logs/score_perplexity/{model}.log",
    benchmark:
        "results/logs/score_perplexity/{model}.tsv"
    wildcard_constraints:
        model=EXAMINED if CONFIG.evaluation.perplexity else "(?!)",
    conda:
        "../envs/gpu.yaml"
    threads: threads_by_size
    resources:
        **machine("tasks"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        evaluation=flags(
            CONFIG.evaluation,
            "perplexity",
            "perplexity_draws",
            "task_items",
            "bootstrap",
            "precision",
        ),
        weights=CONFIG.sampling.weights,
        code=STAGE["zero_shot"],
    shell:
        r"""
        {resources.srun}halfstep score-perplexity \
            --checkpoint {params.checkpoint:q} \
            --weights {params.weights} \
            --output {output.rows:q} \
            {params.evaluation} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
