"""Samples of one model at one step count; they are kept, so that a new metric needs no new samples."""


rule generate:
    input:
        checkpoint="results/models/{model}/meta.json",
    output:
        multiext(
            "results/samples/{model}/steps-{steps}/",
            "samples.npy",
            "samples.txt",
            "provenance.json",
        ),
        about="results/samples/{model}/steps-{steps}/samples.json",
    log:
        "results/logs/generate/{model}/steps-{steps}.log",
    benchmark:
        "results/logs/generate/{model}/steps-{steps}.tsv"
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
        output=subpath(output.about, parent=True),
        writing=flags(subsection(CONFIG.sampling, GenerateOptions)),
        code=STAGE["generate"],
    shell:
        r"""
        {resources.srun}halfstep generate \
            --checkpoint {params.checkpoint:q} \
            --output {params.output:q} \
            --steps {wildcards.steps} \
            {params.writing} \
            --threads {threads} --micro-batch {resources.micro_batch} {resources.processes} \
            2>&1 | tee {log:q}
        """
