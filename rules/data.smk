"""Text to tokens: one folder of packed windows per corpus."""


def own_text(wildcards):
    """The user's files (kind: files), so that new text makes a new corpus."""
    import glob

    return sorted(file for pattern in CONFIG.corpora[wildcards.corpus].files for file in glob.glob(pattern, recursive=True))


rule prepare_corpus:
    input:
        own_text,
    output:  # corpora of stories add last_words.jsonl, the items of score_lambada
        multiext("results/data/{corpus}/", "train.bin", "validation.bin", "tokenizer.json", "validation.jsonl", manifest="manifest.json"),
    params:
        output=subpath(output.manifest, parent=True),
        corpus=lambda wildcards: flags(CONFIG.corpora[wildcards.corpus]),
        code=STAGE["corpus"],
    threads: 16
    resources:
        mem_mb=8000,
        runtime=360,
    log:
        "results/logs/prepare_corpus/{corpus}.log",
    benchmark:
        "results/logs/prepare_corpus/{corpus}.tsv"
    conda:
        "../envs/cpu.yaml"
    shell:
        r"""
        halfstep prepare-corpus \
            --output {params.output:q} \
            {params.corpus} \
            --workers {threads} \
            2>&1 | tee {log:q}
        """
