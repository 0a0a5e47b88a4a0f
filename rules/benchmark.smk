"""Speed: the time to write n tokens, for students and for autoregressive baselines.

Inputs:
    results/models/{teacher}/teacher/meta.json   a student has the same network
    results/models/{teacher}/baseline/           its checkpoint, and hf/ for other engines
Outputs, for `trained` and for each size that is timed with untrained weights:
    results/benchmarks/{teacher}/{size}/length-{lengths}.json
                                                 rows of seconds, one for each timed case
    and next to it its .provenance.json
    While a job runs, length-{lengths}.partial has the rows that are finished. No output of the
    rule, it is still there after the job was stopped, and the next try begins with it.
"""


rule latency:
    """Time how long students and baselines take to write texts of one length."""
    input:
        checkpoint="results/models/{teacher}/teacher/meta.json",  # a student has the same network
        baseline=lambda wildcards: [
            f"{folder}/{file}"
            for folder in targets.timed_baseline(wildcards)
            for file in ("meta.json", "hf/config.json")  # hf/ is what other engines load
        ],
    output:
        rows="results/benchmarks/{teacher}/{size}/length-{lengths}.json",
        record="results/benchmarks/{teacher}/{size}/length-{lengths}.provenance.json",
    log:
        "results/logs/latency/{teacher}/{size}/length-{lengths}.log",
    benchmark:
        "results/logs/latency/{teacher}/{size}/length-{lengths}.tsv"
    wildcard_constraints:
        size=one_of(name.split("/")[1] for name in targets.timings),
        lengths=one_of(name.rpartition("/length-")[2] for name in targets.timings),
    conda:
        "../envs/gpu.yaml"
    threads: all_cores  # nothing else may run during a timing
    resources:
        **machine("latency"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        network=targets.timed_network,
        benchmark=lambda wildcards: flags(targets.timed(wildcards)),
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
