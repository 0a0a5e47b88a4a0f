"""Speed: the time to write n tokens, students at each step count against the baseline with its KV cache."""


rule time_sampling:
    input:
        checkpoint="results/models/{teacher}/teacher/meta.json",  # a student has the same network
        baseline="results/models/{teacher}/baseline/meta.json",
    output:
        rows="results/benchmarks/{teacher}/sampling.json",
        record="results/benchmarks/{teacher}/sampling.provenance.json",
    log:
        "results/logs/time_sampling/{teacher}.log",
    benchmark:
        "results/logs/time_sampling/{teacher}.tsv"
    conda:
        "../envs/gpu.yaml"
    threads: alone  # all cores of a laptop: nothing runs beside a timing
    resources:
        gpu=need("gpu"),
        gpu_model=need("gpu_model"),
        mem_mb=need("mem_mb"),
        runtime=need("sample"),
    params:
        checkpoint=subpath(input.checkpoint, parent=True),
        baseline=subpath(input.baseline, parent=True),
        benchmark=flags(CONFIG.benchmark),
        code=STAGE["time"],
    shell:
        r"""
        halfstep time-sampling \
            --checkpoint {params.checkpoint:q} \
            --baseline {params.baseline:q} \
            --output {output.rows:q} \
            {params.benchmark} \
            --threads {threads} \
            2>&1 | tee {log:q}
        """
