"""Text to tokens: a folder of packed windows for each corpus.

Inputs:
    text files of the user                       only for corpora of kind files
    results/hub.json                             only where something comes from the hub
Outputs:
    results/data/{corpus}/                       windows, tokenizer, held-out text; manifest.json
"""


rule prepare_corpus:
    """Tokenize a corpus and pack it into windows of equal length."""
    input:
        targets.own_text,
        hub=lambda wildcards: fetched(targets.sources.corpus_of_hub(wildcards.corpus)),
    output:  # corpora of stories add last_words.jsonl, the items of score_lambada
        multiext(
            "results/data/{corpus}/",
            "train.bin",
            "validation.bin",
            "tokenizer.json",
            "validation.jsonl",
            "provenance.json",
        ),
        manifest="results/data/{corpus}/manifest.json",
    log:
        "results/logs/prepare_corpus/{corpus}.log",
    benchmark:
        "results/logs/prepare_corpus/{corpus}.tsv"
    conda:
        "../envs/cpu.yaml"
    threads: 8
    resources:
        mem_mb=8000,
        runtime=360,
    params:
        output=subpath(output.manifest, parent=True),
        corpus=lambda wildcards: flags(CONFIG.corpora[wildcards.corpus]),
        code=STAGE["corpus"],
    shell:
        r"""
        halfstep prepare-corpus \
            --output {params.output:q} \
            {params.corpus} \
            --workers {threads} \
            2>&1 | tee {log:q}
        """
