"""What the rules share, and no rule: the configuration, the names of models and files, and what a job asks of a machine."""

import glob
import json
import os
import re
import shlex
import sys
from pathlib import Path

from halfstep.workflow import slurm_plugin
from halfstep.commands import plan
from halfstep.config import DrawOptions, GenerateOptions, Prompts
from halfstep.report import catalogue
from halfstep.report.catalogue import figure_inputs, table_inputs
from halfstep.resolve import ConfigError, flags, resolve, subsection

# `halfstep` is found whether its environment is activated or not, and its lines reach the log when they are written.
os.environ.update(
    PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]),
    PYTHONUNBUFFERED="1",
)

slurm_plugin.patch_plugin()  # a controller that is away delays jobs and loses none


def typed(value):
    """Snakemake hands what is nested in `--config 'sampling={"steps": [8]}'` over as text: numbers, true, false and null read as such."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def counted(name, otherwise):
    """A whole number above zero from the environment."""
    if not (said := os.environ.get(name, str(otherwise))).isdecimal() or int(said) < 1:
        sys.exit(
            f"{name}: found {said!r}, expected a whole number above zero; set it to one, or not at all"
        )
    return int(said)


try:
    CONFIG = resolve(typed(config), Path(workflow.basedir) / "workflow" / "presets")
except ConfigError as error:
    sys.exit("\n".join(f"configuration: {line}" for line in str(error).splitlines()))

# A stage's version: bump it when the code changes what the stage writes, and everything from that stage on is made again.
# The text of a rule, its threads and its resources never make a finished file stale.
STAGE = dict(
    corpus=1,
    pretrain=3,
    baseline=3,
    import_teacher=1,
    distill=3,
    generate=3,
    continue_prompts=3,
    score_continuations=3,
    score=4,
    lambada=4,
    latency=5,
    tabulate=3,
    plot=3,
    track=1,
    merge_provenance=1,
    fetch=1,
)

# What a job asks of a machine, by size of the network. All of it is speed (but for the draws of dropout): `--set-resources distill_round:micro_batch=16`
# and `--set-threads` override it, and a machine with fewer GPUs or cores is asked for what it has. Threads and memory are a node's.
MACHINE = {
    # size   threads mem_mb micro_batch  GPUs and time for pretraining, one round, samples at one step count
    "tiny":   (1,   3000, 64,  0,  "1h",  0,  "1h", 0,  "1h"),
    "mini":   (2,   8000, 64,  1, "12h",  1,  "2h", 1,  "1h"),
    "small":  (8,  32000, 32,  8, "72h",  4,  "8h", 1,  "2h"),
    "medium": (8,  48000, 16,  8, "72h",  8, "16h", 1,  "4h"),
    "large":  (8,  64000,  8, 16, "72h",  8, "24h", 1,  "6h"),
    "1.3B":   (8,  96000,  8, 16, "72h",  8, "36h", 1,  "8h"),
    "3B":     (8, 192000,  4, 16, "72h", 16, "72h", 1, "12h"),
    "8B":     (8, 384000,  1, 32, "72h", 16, "72h", 1, "24h"),
}  # fmt: skip
COLUMNS = (
    "threads",
    "mem_mb",
    "micro_batch",
    "pretrain_gpu",
    "pretrain",
    "round_gpu",
    "round",
    "gpu",
    "sample",
)
LONGEST = counted(
    "HALFSTEP_SLURM_MAX_MINUTES", 72 * 60
)  # of a job; a training that needs more goes on in the next one
ON_CLUSTER = (
    any(word.startswith(("--profile", "--executor")) or word == "-e" for word in sys.argv)
    or "SNAKEMAKE_PROFILE" in os.environ
)
GPUS_PER_NODE = counted("HALFSTEP_SLURM_GPUS_PER_NODE", 4)

# Models are named by their folder: {teacher}/teacher, {teacher}/baseline, {teacher}/{run}/round-{round}.
ROUNDS = [
    f"{t}/{run}/round-{r}"
    for t in CONFIG.teachers
    for run, d in CONFIG.teachers[t].runs.items()
    for r in range(1, d.rounds + 1)
]
DENOISERS = [f"{t}/teacher" for t in CONFIG.teachers] + ROUNDS
MODELS = [f"{t}/baseline" for t in CONFIG.teachers] + DENOISERS

IMPORTED = [
    t for t in CONFIG.teachers if CONFIG.teachers[t].source
]  # their teachers are not trained here

# What the hub has to give: fetched once, where snakemake runs, for compute nodes have no internet.
HUB = sorted(
    {
        f"model:{c.tokenizer}"
        for c in CONFIG.corpora.values()
        if c.tokenizer != "bpe" and not Path(c.tokenizer).is_dir()
    }
    | {"dataset:Skylion007/openwebtext" for c in CONFIG.corpora.values() if c.kind == "openwebtext"}
    | {
        f"model:{name}"
        for name in CONFIG.evaluation.judge
        if name != "baseline" and not Path(name).is_dir()
    }
    | {
        f"dataset:{name}"
        for name in [CONFIG.evaluation.lambada]
        if name != "last_words" and not name.endswith(".jsonl")
    }
    | {
        f"model:{CONFIG.teachers[t].source}"
        for t in IMPORTED
        if not glob.glob(glob.escape(CONFIG.teachers[t].source))
    }
)
FETCHED = ["results/hub.json"] if HUB else []
if "SLURM_JOB_ID" in os.environ:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

# A model's folder. meta.json is written last, so it stands for the whole folder where a later rule asks for the model. The journal
# (run.json, journal.jsonl) and the state of an unfinished training are not declared: Snakemake would delete them before a restart.
CHECKPOINT = [
    "model.safetensors",
    "ema.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "provenance.json",
]


def continued(model):
    """Does this model continue prompts? Its round is its number, 0 for the teacher; the baseline always does."""
    name, rounds = model.split("/", 1)[1], CONFIG.continuations.continuation_rounds
    return (
        rounds is None
        or name == "baseline"
        or (0 if name == "teacher" else int(name.rpartition("-")[2])) in rounds
    )


TABLES = table_inputs(  # table: the metric rows it gathers
    CONFIG,
    model=MODELS,
    teacher=CONFIG.teachers,
    continued=[model for model in MODELS if CONFIG.continuations and continued(model)],
)
FIGURES = figure_inputs(TABLES, MODELS)  # figure: what it is drawn from


def one_of(names):
    """A pattern of exactly these names; of nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


wildcard_constraints:
    corpus=one_of(CONFIG.corpora),
    teacher=one_of(CONFIG.teachers),
    model=one_of(MODELS),
    run=r"(?!teacher/|baseline/)[^/]+",
    round=r"[1-9]\d*",
    steps=r"[1-9]\d*",
    figure=one_of(FIGURES),
    table=one_of(TABLES),


def teacher(wildcards):
    """The section of `teachers` that a path belongs to."""
    return CONFIG.teachers[wildcards.get("teacher") or wildcards.model.split("/")[0]]


def round_options(wildcards):
    """One round's options. Rounds after this one are none of its business, so that `rounds: 5 -> 7` trains two rounds, not seven."""
    return flags(
        teacher(wildcards).runs[wildcards.run].model_copy(update={"rounds": int(wildcards.round)})
    )


def manifest(wildcards):
    return f"results/data/{teacher(wildcards).corpus}/manifest.json"


def own_text(wildcards):
    """The user's files (kind: files), so that new text makes a new corpus."""
    return sorted(
        file
        for pattern in CONFIG.corpora[wildcards.corpus].files
        for file in glob.glob(pattern, recursive=True)
    )


def previous_round(wildcards):
    """The teacher of round r: the student of round r-1, and in round 1 the teacher itself."""
    before = (
        f"{wildcards.run}/round-{int(wildcards.round) - 1}"
        if int(wildcards.round) > 1
        else "teacher"
    )
    return f"results/models/{wildcards.teacher}/{before}/meta.json"


def step_counts(model):
    """Where a model writes: a denoiser at every step count of the config, the baseline one token at a time.

    `own` is the count that a model was made for, and its student's: where the two are compared.
    """
    name, kind = model.split("/", 1)
    if kind == "baseline":
        return [CONFIG.corpora[CONFIG.teachers[name].corpus].length]
    steps = set(CONFIG.sampling.steps)
    for run, how in CONFIG.teachers[name].runs.items() if "own" in steps else ():
        line = ["teacher", *(f"{run}/round-{round}" for round in range(1, how.rounds + 1))]
        if kind in line:
            at = line.index(kind)
            steps |= {
                how.teacher_steps // how.substeps**round
                for round in range(at, min(at + 1, how.rounds) + 1)
            }
    return sorted(steps - {"own"})


def continuation_steps(model):
    """Step counts at which a model continues prompts: a denoiser's are in the config, the baseline's is one for each token."""
    how, (_, kind) = CONFIG.continuations, model.split("/", 1)
    return [how.continuation_tokens] if kind == "baseline" else how.continuation_steps


def judge(wildcards):
    """The judges that score-samples is told, names or folders for transformers; `baseline` is the corpus's own autoregressive model."""
    own = judge_file(wildcards)
    return [
        str(Path(own[0]).parent) if name == "baseline" else name for name in CONFIG.evaluation.judge
    ]


def judge_file(wildcards):
    name = wildcards.get("teacher") or wildcards.model.split("/")[0]
    return (
        [f"results/models/{name}/baseline/hf/config.json"]
        if "baseline" in CONFIG.evaluation.judge
        else []
    )


def need(what):
    """A column of MACHINE in the row of the job's network; a retry asks for half as much memory and time again."""

    def value(wildcards, attempt=1):
        row = dict(zip(COLUMNS, MACHINE[teacher(wildcards).network.size]))
        if what == "gpu_model":
            return os.environ.get("HALFSTEP_SLURM_GPU_MODEL", "") if row["gpu"] else ""
        if what == "mem_mb":
            return row[what] * (attempt + 1) // 2
        if what in ("pretrain", "round", "sample"):
            return min(int(row[what][:-1]) * 30 * (attempt + 1), LONGEST)
        return row[what]

    return value


def spread(word):
    """What a job of more than one GPU asks for and says besides: as many processes, on as many nodes. None asks for nothing."""

    def value(wildcards, input, attempt, threads, rulename):
        def asked(name):
            """As --set-resources leaves it, and no more than this machine has."""
            found = workflow.get_rule(rulename).resources[name]
            known = dict(
                input=input,
                attempt=attempt,
                threads=threads,
                rulename=rulename,
                async_run=workflow.async_run,
            )
            return (
                found.evaluate(wildcards, **known)
                .constrain(workflow.global_resources.get(name))
                .value
                or 0
            )

        gpus = asked("gpu")
        if gpus < 2:
            return "" if word in ("srun", "processes") else None
        shares = (
            n for n in range(-(-gpus // GPUS_PER_NODE), gpus + 1) if gpus % n == 0
        )  # nodes with as many each
        nodes = next(shares) if word == "nodes" else asked("nodes")
        if nodes < 2 or workflow.is_main_process and not ON_CLUSTER:  # all on this machine
            return {"nodes": 1, "srun": "", "processes": f"--processes {gpus}"}.get(word)
        if gpus % nodes:
            raise ValueError(
                f"gpu: found {gpus} for {nodes} nodes, which do not share them evenly; name others with --set-resources {rulename}:gpu=..."
            )
        each, model = gpus // nodes, asked("gpu_model")
        return {
            "nodes": nodes,
            "mpi": "srun",  # the plugin's word for: the command starts srun itself
            "tasks": nodes,
            "tasks_per_gpu": 0,
            "gres": ":".join(filter(None, ["gpu", model, str(each)])),  # as many on each node
            "srun": f"srun --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={each} --cpus-per-task={threads} --kill-on-bad-exit=1 ",
            "processes": f"--processes {gpus}",
        }[word]

    return value


SPREAD = {
    word: spread(word)
    for word in ("nodes", "mpi", "tasks", "tasks_per_gpu", "gres", "srun", "processes")
}


def limit(what):
    """Words for a training's command: inside a Slurm job its time limit, by which it keeps its state; nothing elsewhere. A resource, for
    parameters decide what is made again."""

    def words(wildcards, attempt=1):
        return f"${{SLURM_JOB_ID:+--time-limit {need(what)(wildcards, attempt)}}}"

    return words


def alone(wildcards):
    """All cores of this machine, or of a cluster's the job's own: `workflow.cores` is an error there."""
    own = None if "SLURM_JOB_ID" in os.environ else workflow.resource_settings.cores
    return own or need("threads")(wildcards)


def resume_command():
    return shlex.join(["snakemake", *sys.argv[1:]])


def priced(jobs):
    """Lines of `halfstep plan` about these jobs of the graph."""

    def keys(job):
        return dict(
            rule=job.rule.name, input=[*map(str, job.input)], output=[*map(str, job.output)]
        )

    shells = [
        (
            job,
            re.search(
                r"halfstep .*?(?=2>&1)", (job.shellcmd or "").replace("\\\n", " "), re.DOTALL
            ),
        )
        for job in jobs
    ]
    return plan.lines(
        [
            keys(job)
            | dict(
                gpu=job.resources.get("gpu", 0),
                runtime=job.resources.get("runtime", 0),
                command=shlex.split(shell[0]),
            )
            for job, shell in shells
            if shell
        ],
        Path("results"),
    )


def failures(log):
    """Of every failed job the rule, the last lines of its log, and where that and Slurm's own lie."""
    blocks = re.findall(
        r"^Error in rule\s(\w+)[^\n]*:\n((?: .*\n?)+)",
        log.read_text(errors="replace"),
        re.MULTILINE,
    )
    last = {}
    for rule, facts in blocks:
        own = re.search(r"^ +log: ([^\s,]+)", facts, re.MULTILINE)
        last.setdefault((rule, own and own[1]), []).extend(
            re.findall(r"\S*logs/slurm/\S+\.log", facts)
        )
    for (rule, own), slurm_logs in last.items():
        yield f"rule {rule}"
        if own:
            yield f"  log: {own}"
            yield from (
                f"  | {line}"
                for line in (
                    Path(own).read_text(errors="replace").splitlines()[-8:]
                    if Path(own).is_file()
                    else ["no such file: the job did not start"]
                )
            )
        yield from (f"  Slurm's log: {name}" for name in slurm_logs[-1:])


def tracked():
    uri = os.environ.get("MLFLOW_TRACKING_URI") or (
        "sqlite:///results/mlflow.db" if Path("results/mlflow.db").exists() else ""
    )
    return (
        [
            (
                f"curves: {uri}"
                if uri.startswith("http")
                else f"curves: mlflow ui --backend-store-uri {uri}"
            )
        ]
        if uri
        else []
    )


def unsent():
    """Why MLflow could not be brought up to date, if it could not."""
    marker = Path("results/mlflow.synced")
    return marker.read_text().splitlines() if marker.exists() else []


def banner(*lines):
    print("", *(f"  halfstep | {line}" for line in lines), "", sep="\n", file=sys.stderr)
