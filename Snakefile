"""halfstep: from text to a model that writes in 8 steps, and its figures. A page of contents.

snakemake                                    everything, at the scale that config.yaml names
snakemake results/figures/ppl_vs_steps.pdf   one file and whatever it needs
snakemake -np                                the plan, as commands that can be pasted and run
snakemake all --config preset=ci             another scale: one of workflow/presets
snakemake --profile slurm all                on a cluster, at the paper's scale

Another workflow uses these rules as a module; results go to its own folder results/:

module halfstep:
    snakefile: "path/to/halfstep/Snakefile"
    config: {"preset": "ci"}
use rule * from halfstep
"""

from snakemake.utils import min_version

min_version("9.27")


include: "rules/common.smk"  # config.yaml, versions, what a job asks of its machine
include: "rules/fetch.smk"  # fetch, where something comes from the hub
include: "rules/data.smk"  # prepare_corpus
include: "rules/pretrain.smk"  # pretrain, train_baseline, import_teacher, import_baseline
include: "rules/distill.smk"  # distill_round
include: "rules/generate.smk"  # generate
include: "rules/naive.smk"  # draw_naive
include: "rules/evaluate.smk"  # score_samples, score_corpus, score_lambada, score_infilling
include: "rules/tasks.smk"  # score_tasks, score_perplexity
include: "rules/benchmark.smk"  # latency
include: "rules/report.smk"  # tabulate, plot, track, start_page, merge_provenance
include: "rules/paper.smk"  # paper_figure, paper_table, paper_report


if CONFIG.continuations:

    include: "rules/continuations.smk"  # continue_prompts, score_continuations


report: "workflow/report/overview.rst"


rule all:
    """Make all figures and tables, send the journals to MLflow, and merge the records."""
    default_target: True
    input:
        expand("results/figures/{figure}.{kind}", figure=FIGURES, kind=["pdf", "svg"]),
        expand("results/tables/{table}.{kind}", table=TABLES, kind=["csv", "md", "html"]),
        "results/index.html",
        "results/mlflow.synced",
        "results/provenance.json",
    localrule: True


onstart:
    jobs = list(workflow.dag.needrun_jobs())
    banner(
        f"preset {CONFIG.preset}: {len(targets.denoisers)} denoisers, {len(jobs)} jobs to run",
        "results in results/, logs in results/logs/",
    )
    priced = plan.PricedJobs(graph_jobs(jobs), Path("results"))
    devices = (None, 0) if ON_CLUSTER else devices_of(workflow)
    timeline.CURRENT = timeline.Timeline(priced.expected(), len(jobs), *devices)
    if ON_CLUSTER:
        cheaper = plan.cheaper_presets(CONFIG.preset, presets)
        banner(*plan.price_lines(priced), *plan.late_lines(priced), *cheaper)
    elif slow := plan.slow_lines(priced):
        banner(*slow)


onsuccess:
    banner(
        "done",
        "open results/index.html; figures in results/figures/, tables in results/tables/",
        *unsent(),
        *(plan.price_lines(plan.PricedJobs([], Path("results"))) if ON_CLUSTER else []),
        "halfstep summary --results results    halfstep ui --results results",
    )


onerror:
    banner(
        "stopped; what failed:",
        *failures(Path(log[0])),
        f"log of the whole run: {' '.join(log)}",
        *curves(os.environ),
        f"finished work is kept; to continue: {resume_command(sys.argv[1:])}",
    )
