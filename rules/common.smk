"""What the rules share, and no rule: the configuration, the names of models and files, and what a job asks of a machine."""

import os
import re
import shlex
import sys
from pathlib import Path

from halfstep.config import ConfigError, flags, resolve

os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `halfstep` of this environment, activated or not
os.environ["PYTHONUNBUFFERED"] = "1"  # lines reach the log when they are written

try:
    CONFIG = resolve(config, Path(workflow.basedir) / "workflow" / "presets")
except ConfigError as error:
    sys.exit("\n".join(f"configuration: {line}" for line in str(error).splitlines()))

# A stage's version: bump it when the code changes what the stage writes, and everything from that stage on is made again.
# The text of a rule, its threads and its resources never make a finished file stale.
STAGE = dict(corpus=1, pretrain=1, baseline=1, distill=1, generate=1, score=1, lambada=1, time=1, tabulate=1, plot=1, track=1)

# What a job asks of a machine, by size of the network. All of it is speed: `--set-resources distill_round:micro_batch=16`
# and `--set-threads` override it, and a machine with fewer GPUs or cores is asked for what it has.
#  size      gpu  threads  mem_mb  micro_batch   hours for pretraining, one round, samples at one step count
MACHINE = {
    "tiny":   (0,       1,   3000,          64,    1,  1, 1),
    "mini":   (1,       2,   8000,          64,   12,  2, 1),
    "small":  (1,       8,  32000,          32,   72,  8, 2),
    "medium": (1,       8,  48000,          16,   72, 16, 4),
    "large":  (1,       8,  64000,           8,   72, 24, 6),
    "1.3B":   (1,       8,  96000,           8,   72, 36, 8),
    "3B":     (1,       8, 192000,           4,   72, 72, 12),
    "8B":     (1,       8, 384000,           1,   72, 72, 24),
}  # fmt: skip
COLUMNS = ("gpu", "threads", "mem_mb", "micro_batch", "pretrain", "round", "sample")

# Models are named by their folder: {teacher}/teacher, {teacher}/baseline, {teacher}/{run}/round-{round}.
ROUNDS = [f"{t}/{run}/round-{r}" for t in CONFIG.teachers for run, d in CONFIG.teachers[t].runs.items() for r in range(1, d.rounds + 1)]
DENOISERS = [f"{t}/teacher" for t in CONFIG.teachers] + ROUNDS
MODELS = [f"{t}/baseline" for t in CONFIG.teachers] + DENOISERS

TABLES = ["steps", "lambada", "speed"]
FIGURES = {  # figure: what it is drawn from; a journal lies beside its model's meta.json, undeclared, so that it outlives a restart
    "ppl_vs_steps": ["results/tables/steps.csv"],
    "entropy_vs_steps": ["results/tables/steps.csv"],
    "ppl_vs_latency": ["results/tables/steps.csv", "results/tables/speed.csv"],
    "lambada_vs_round": ["results/tables/lambada.csv"],
    "latency_vs_length": ["results/tables/speed.csv"],
    "loss_curves": [f"results/models/{model}/journal.jsonl" for model in MODELS],
}


wildcard_constraints:
    corpus="|".join(map(re.escape, CONFIG.corpora)),
    teacher="|".join(map(re.escape, CONFIG.teachers)),
    model="|".join(map(re.escape, MODELS)),
    run=r"(?!teacher/|baseline/)[^/]+",
    round=r"[1-9]\d*",
    steps=r"[1-9]\d*",
    figure="|".join(FIGURES),


def teacher(wildcards):
    """The section of `teachers` that a path belongs to."""
    return CONFIG.teachers[wildcards.get("teacher") or wildcards.model.split("/")[0]]


def run(wildcards):
    """One round's options. Rounds after this one are none of its business, so that `rounds: 5 -> 7` trains two rounds, not seven."""
    return flags(teacher(wildcards).runs[wildcards.run].model_copy(update={"rounds": int(wildcards.round)}))


def manifest(wildcards):
    return f"results/data/{teacher(wildcards).corpus}/manifest.json"


def step_counts(model):
    """Where a model writes: a denoiser at every step count of the config, the baseline one token at a time."""
    name, kind = model.split("/", 1)
    return [CONFIG.corpora[CONFIG.teachers[name].corpus].length] if kind == "baseline" else CONFIG.sampling.steps


def judge(wildcards):
    """What score-samples is told: a name or folder for transformers; `baseline` is the corpus's own autoregressive model."""
    return judge_file(wildcards)[0].removesuffix("/config.json") if judge_file(wildcards) else CONFIG.evaluation.judge


def judge_file(wildcards):
    own = f"results/models/{wildcards.get('teacher') or wildcards.model.split('/')[0]}/baseline/hf/config.json"
    return [own] if CONFIG.evaluation.judge == "baseline" else []


def need(what, hours=None):
    """A column of MACHINE for the job's size of network; `hours` names the column that `runtime` (minutes) is read from."""

    def value(wildcards):
        cell = MACHINE[teacher(wildcards).network.size][COLUMNS.index(hours or what)]
        return 60 * cell if hours else cell

    return value


def resume_command():
    return shlex.join(["snakemake", *sys.argv[1:]])


def banner(*lines):
    print("", *(f"  halfstep | {line}" for line in lines), "", sep="\n", file=sys.stderr)
