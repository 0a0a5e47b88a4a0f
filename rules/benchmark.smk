"""Speed: the time to write n tokens, for students and for autoregressive baselines.

Inputs:
    results/models/{teacher}/teacher/meta.json   a student has the same network
    results/models/{teacher}/baseline/           its checkpoint, and hf/ for other engines
Outputs:
    results/benchmarks/{teacher}/latency.json    rows of seconds, one for each timed case
    results/benchmarks/{teacher}/latency.provenance.json
"""


rule latency:
    """Time how long students and baselines take to write texts."""
    input:
        checkpoint="results/models/{teacher}/teacher/meta.json",  # a student has the same network
        baseline="results/models/{teacher}/baseline/meta.json",
        hf="results/models/{teacher}/baseline/hf/config.json",  # what other engines load
    output:
        rows="results/benchmarks/{teacher}/latency.json",
        record="results/benchmarks/{teacher}/latency.provenance.json",
    log:
        "results/logs/latency/{teacher}.log",
    benchmark:
        "results/logs/latency/{teacher}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: all_cores  # nothing else may run during a timing
    resources:
        **machine("latency"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        baseline=subpath(input.baseline, parent=True),
        benchmark=flags(CONFIG.benchmark),
        code=STAGE["latency"],
    shell:
        r"""
        halfstep latency \
            --checkpoint {params.checkpoint:q} \
            --baseline {params.baseline:q} \
            --output {output.rows:q} \
            {params.benchmark} \
            --threads {threads} \
            2>&1 | tee {log:q}
        """
