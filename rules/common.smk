"""Configuration, versions of stages, wildcards, and what a job asks of its machine.

Everything else that the rules share is plain Python in src/halfstep/workflow.
"""

import os
import sys
from pathlib import Path

from halfstep.commands import plan
from halfstep.config import CONTINUE_STAGE, GENERATE_STAGE
from halfstep.config import DrawOptions, GenerateOptions, Prompts
from halfstep.errors import ConfigError
from halfstep.report import catalogue
from halfstep.resolve import check_size, flags, read_yaml, resolve, subsection
from halfstep.workflow import locks, slurm_plugin, task_sources, timeline
from halfstep.workflow.graph import devices_of, graph_jobs
from halfstep.workflow.machine import RESOURCES, SPREAD, demand_of, fewest_nodes, names_cluster
from halfstep.workflow.machine import base_resources, read_site, spread_resources
from halfstep.workflow.messages import banner, curves, failures, only_looks, typed, unsent
from halfstep.workflow.packaged import pip_argument, resume_command
from halfstep.workflow.sources import check_sources, local_file
from halfstep.workflow.targets import CHECKPOINT, Targets, one_of

# Jobs find `halfstep` without an activated environment, and its lines reach their logs at once.
# The scripts in envs/ install it into conda environments.
path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
os.environ.update(PATH=path, PYTHONUNBUFFERED="1", HALFSTEP_SOURCE=pip_argument())
if "SLURM_JOB_ID" in os.environ:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
slurm_plugin.patch_plugin()

try:
    files = [] if workflow.modifier.skip_configfile else ["config.yaml", *workflow.configfiles]
    for file in filter(os.path.lexists, files):
        read_yaml(Path(file))  # refuses what Snakemake would wait for or accept in silence
except ConfigError as error:
    sys.exit(f"configuration: {error}")


if os.path.lexists("config.yaml") or "preset" not in config:

    configfile: "config.yaml"


try:
    presets = Path(workflow.current_basedir).parent / "workflow" / "presets"
    quiet = not workflow.is_main_process  # a job of a cluster reads the configuration again
    check_size("configuration", config)
    CONFIG, SITE = resolve(typed(config), presets, quiet), read_site(os.environ)
    if not quiet and "--unlock" not in sys.argv:
        check_sources(CONFIG)
    targets = Targets(CONFIG)
except ConfigError as error:
    sys.exit("\n".join(f"configuration: {line}" for line in str(error).splitlines()))
ON_CLUSTER = names_cluster(sys.argv, os.environ)
if workflow.is_main_process and not only_looks(sys.argv[1:]):
    if said := locks.take_over(on_cluster=ON_CLUSTER):
        banner(said)

# The version of each stage. Raise it when a change of the code changes what the stage writes:
# Snakemake then makes everything again from that stage on. The text of a rule, its threads and
# its resources never make a finished file stale.
STAGE = dict(
    corpus=2,
    pretrain=4,
    baseline=4,
    import_teacher=3,
    import_baseline=1,
    import_round=1,
    distill=4,
    generate=GENERATE_STAGE,
    draw_naive=1,
    continue_prompts=CONTINUE_STAGE,
    score_continuations=5,
    score=7,
    lambada=7,
    infilling=1,
    tasks=1,
    zero_shot=1,
    latency=6,
    tabulate=9,
    plot=9,
    paper_report=1,
    track=3,
    start_page=3,
    merge_provenance=1,
    fetch=1,
)

MODELS = targets.models
TABLES, FIGURES = targets.table_inputs(), targets.figure_inputs()
HUB = targets.sources.hub_repositories()


def fetched(repositories):
    """The file that says that these are fetched; a job that needs none of them waits for none."""
    return ["results/hub.json"] if repositories else []


wildcard_constraints:
    corpus=one_of(CONFIG.corpora),
    teacher=one_of(CONFIG.teachers),
    model=one_of(MODELS),
    run=r"(?!teacher/|baseline/)[^/]+",
    round=r"[1-9]\d*",
    figure=one_of(FIGURES),
    table=one_of(TABLES),


def threads_by_size(wildcards):
    """Threads of a job on each node, by the size of its network."""
    return demand_of(targets.network_size(wildcards)).threads


def all_cores(wildcards):
    """All cores of this machine, or the threads of a Slurm job, where Snakemake knows no cores."""
    cores = None if "SLURM_JOB_ID" in os.environ else workflow.resource_settings.cores
    return cores or threads_by_size(wildcards)


def machine(kind):
    """The resources of a rule, by the kind of its jobs: a key of RESOURCES in machine.py."""
    return {name: resource(kind, name) for name in RESOURCES[kind]}


def resource(kind, name):
    """One resource as a function, which Snakemake evaluates for each job."""

    def base(wildcards, attempt):
        minutes = targets.timings.minutes(wildcards) if kind == "latency" else None
        return base_resources(targets.network_size(wildcards), kind, attempt, SITE, minutes)[name]

    def spread(wildcards, input, attempt, threads, rulename):
        def asked(other):
            """Another resource of the job, as --set-resources overrides and --resources caps it."""
            known = dict(input=input, attempt=attempt, threads=threads, rulename=rulename)
            found = workflow.get_rule(rulename).resources[other]
            found = found.evaluate(wildcards, async_run=workflow.async_run, **known)
            return found.constrain(workflow.global_resources.get(other)).value

        gpus = asked("gpu") or 0
        if workflow.is_main_process and not ON_CLUSTER:
            nodes = 1  # this machine
        elif name == "nodes":
            nodes = fewest_nodes(gpus, SITE.gpus_per_node)
        else:
            nodes = asked("nodes") or 1
        return spread_resources(gpus, nodes, asked("gpu_model") or "", threads, rulename)[name]

    return spread if name in SPREAD else base
