"""halfstep: text in, a model that writes in 8 steps and its figures out. This page is the table of contents.

snakemake                                    everything, at the scale that config.yaml names
snakemake results/figures/ppl_vs_steps.pdf   one file and whatever it needs
snakemake -np                                the plan, as commands that can be pasted and run
snakemake all --config preset=ci             another scale: laptop, laptop-losses, ci, docs, owt-small, owt-scaling
snakemake --profile slurm all                on a cluster, at the paper's scale
"""

from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


include: "rules/common.smk"  # the configuration, names, what a job asks of a machine
include: "rules/fetch.smk"  # fetch, where something comes from the hub
include: "rules/data.smk"  # prepare_corpus
include: "rules/pretrain.smk"  # pretrain, train_baseline
include: "rules/distill.smk"  # distill_round
include: "rules/generate.smk"  # generate
include: "rules/evaluate.smk"  # score_samples, score_corpus, score_lambada
include: "rules/benchmark.smk"  # latency
include: "rules/report.smk"  # tabulate, plot, track, merge_provenance


if CONFIG.continuations:

    include: "rules/continuations.smk"  # continue_prompts, score_continuations


localrules:
    all,
    fetch,
    tabulate,
    plot,
    track,
    merge_provenance,


report: "workflow/report/overview.rst"


rule all:
    default_target: True
    input:
        expand("results/figures/{figure}.{kind}", figure=FIGURES, kind=["pdf", "svg"]),
        expand("results/tables/{table}.{kind}", table=TABLES, kind=["csv", "md"]),
        "results/mlflow.synced",
        "results/provenance.json",


onstart:
    banner(
        f"preset {CONFIG.preset}: {len(DENOISERS)} denoisers, {len(list(workflow.dag.needrun_jobs()))} jobs to run",
        "results in results/, logs in results/logs/",
    )
    if ON_CLUSTER:
        banner(*priced(workflow.dag.needrun_jobs()))


onsuccess:
    banner(
        "done",
        "figures in results/figures/, tables in results/tables/",
        *unsent(),
        *(priced([]) if ON_CLUSTER else []),
        "halfstep summary --results results    mlflow ui --backend-store-uri sqlite:///results/mlflow.db",
    )


onerror:
    banner(
        "stopped; what failed:",
        *failures(Path(log[0])),
        f"log of the whole run: {' '.join(log)}",
        *tracked(),
        f"finished work is kept; to go on: {resume_command()}",
    )
