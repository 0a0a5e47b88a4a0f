"""Speed: the time to write n tokens, for students and for autoregressive baselines.

Inputs:
    results/models/{teacher}/teacher/meta.json   a student has the same network
    results/models/{model}/meta.json             of each model that a timed variant draws, instead
    results/models/{teacher}/baseline/           its checkpoint, and hf/ for other engines
Outputs, for `trained` and for each size that is timed with untrained weights:
    results/benchmarks/{teacher}/{size}/{cases}.json
                                                 rows of seconds, one for each timed case; {cases}
                                                 is length-N, length-N-M or length-N-batch-B, and
                                                 variant-V for a variant of `sampling`
    and next to it its .provenance.json
    While a job runs, {cases}.partial has the rows that are finished. It is no output of the rule,
    so Snakemake does not delete it after a stopped job, and the next try continues there.
"""


rule latency:
    """Time how long students and baselines take to write texts of one length."""
    input:
        checkpoint=targets.timings.models,
        scorer=targets.timings.scorer,
        baseline=lambda wildcards: [
            f"{folder}/{file}"
            for folder in targets.timings.baseline(wildcards)
            for file in ("meta.json", "hf/config.json")  # hf/ is what other engines load
        ],
    output:
        rows="results/benchmarks/{teacher}/{size}/{cases}.json",
        record="results/benchmarks/{teacher}/{size}/{cases}.provenance.json",
    log:
        "results/logs/latency/{teacher}/{size}/{cases}.log",
    benchmark:
        "results/logs/latency/{teacher}/{size}/{cases}.tsv"
    wildcard_constraints:
        size=one_of({name.split("/")[1] for name in targets.timings.jobs}),
        cases=one_of({name.split("/")[2] for name in targets.timings.jobs}),
    conda:
        "../envs/gpu.yaml"
    threads: all_cores  # nothing else may run during a timing
    resources:
        **machine("latency"),
    params:
        checkpoint=lambda wildcards: [
            str(Path(file).parent) for file in targets.timings.models(wildcards)
        ],
        network=targets.timings.network,
        benchmark=lambda wildcards: flags(targets.timings.options(wildcards)),
        code=STAGE["latency"],
    shell:
        r"""
        halfstep latency \
            --checkpoint {params.checkpoint:q} \
            {params.network} \
            --output {output.rows:q} \
            {params.benchmark} \
            --threads {threads} \
            2>&1 | tee {log:q}
        """
