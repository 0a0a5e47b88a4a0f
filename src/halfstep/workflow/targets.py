"""Names of models, their inputs and the files of the graph, as the configuration asks for them.

A model is named by its folder below results/models: {teacher}/teacher, {teacher}/baseline or
{teacher}/{run}/round-{round}. Methods that take `wildcards` are input functions of the rules.

`seeds` of a teacher or of a run repeats its training. A repeat is a model with its own folder: its
teacher or run is called by the name in the configuration and the ending -seed-2. Repeats have the
corpus, the judges and the baseline of the first training, because the measuring instrument must be
the same for all. So a repeat of a teacher has no baseline, no held-out text and no timings. A
teacher with `baseline: null` has no baseline either.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from halfstep.config import (
    NAIVE,
    OF_SAMPLERS,
    Config,
    Distillation,
    DrawOptions,
    RunOptions,
    SampledModels,
    StepCount,
    Teacher,
)
from halfstep.data.files import find_files
from halfstep.report import catalogue
from halfstep.resolve import flags, subsection
from halfstep.seeds import first_training, repeat_names, repeat_seed
from halfstep.workflow.sources import Sources, is_hub_name, local_file
from halfstep.workflow.timed import Timings
from halfstep.workflow.timings import TRAINED

CHECKPOINT = [
    "model.safetensors",
    "ema.safetensors",
    "best.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "provenance.json",
]
"""Files of a trained model besides meta.json, which is written last and stands for all of them.

The journal (run.json, journal.jsonl) and the state of an unfinished training are not declared as
outputs, because Snakemake would delete them before it starts a job again.
"""


class Wildcards(Protocol):
    """Snakemake's wildcards of a job: attributes by name, of which a rule has some."""

    teacher: str
    model: str
    run: str
    round: str
    corpus: str
    size: str
    cases: str


def teacher_name(wildcards: Wildcards) -> str:
    """The key of `teachers` that a job belongs to."""
    name = getattr(wildcards, "teacher", None) or wildcards.model.split("/")[0]
    return first_training(name)


def one_of(names: Iterable[str]) -> str:
    """A pattern that matches exactly these names, and nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


class Targets:
    """The models of a configuration, and what each of them needs."""

    def __init__(self, config: Config):
        self.config, self.sources = config, Sources(config)
        self.teachers = list(config.teachers)
        self.imported = [name for name in self.teachers if config.teachers[name].published]
        """teachers whose weights are published, and not trained here"""
        repeats = {
            name: repeat_names(name, teacher.seeds) for name, teacher in config.teachers.items()
        }
        self.with_repeats = [repeat for names in repeats.values() for repeat in names]
        """all teachers, with the repeats of their trainings"""
        self.trained = [name for name in self.with_repeats if name not in self.imported]
        rounds = [
            f"{repeat}/{run}/round-{number}"
            for name, teacher in config.teachers.items()
            for repeat in repeats[name]
            for key, options in teacher.runs.items()
            if not options.source or repeat == name
            for run in repeat_names(key, options.seeds)
            for number in range(1, options.rounds + 1)
        ]
        self.denoisers = [f"{name}/teacher" for name in self.with_repeats] + rounds
        self.with_baseline = [name for name in self.teachers if config.teachers[name].baseline]
        """teachers with a baseline, trained or published"""
        self.published = [name for name in self.with_baseline if self.sources.baseline_source(name)]
        """teachers whose baseline is published, and not trained here"""
        self.models = [f"{name}/baseline" for name in self.with_baseline] + self.denoisers
        self.last_words: dict[str, list[str]] = {}
        """the models that one job asks for last words: one model, or all rounds of a run, whose
        name in paths is {teacher}/{run}"""
        for model in self.models:
            job = model.rpartition("/")[0] if _round_of(model) else model
            self.last_words.setdefault(job, []).append(model)
        self.scored = self.models + [f"{name}/naive" for name in self.teachers]
        """models whose samples are scored, and the naive samplers of each teacher's corpus"""
        self.varied = {
            f"{model}/{name}": (model, name)
            for name, variant in config.sampling.variants.items()
            for model in self._of_rounds(variant.rounds)
            if not model.endswith("/baseline")
            or config.sampling.changed_by(variant) - {"sampler", *OF_SAMPLERS}
        }
        """model and variant of `sampling` by their name in paths: {model}/{variant}"""
        swept = set(self.frontier_models())
        self.varied_frontier = [
            name
            for name, (model, variant) in self.varied.items()
            if model in swept
            and config.sampling.changed_by(config.sampling.variants[variant]) != {"temperature"}
        ]
        """variants on the frontier, each of a model that is there; one that changes only the
        temperature is a point of its model's curve, and has none itself"""
        self.on_frontier = [*self.frontier_models(), *self.varied_frontier]
        """all whose samples are on the frontier, models and variants"""
        self.timings = Timings(self)
        """the jobs that time"""

    def teacher(self, wildcards: Wildcards) -> Teacher:
        """The section of `teachers` that a job belongs to."""
        return self.config.teachers[teacher_name(wildcards)]

    def run(self, wildcards: Wildcards) -> RunOptions:
        """The section of `runs` that a round belongs to."""
        return self.teacher(wildcards).runs[first_training(wildcards.run)]

    def training_seed(self, wildcards: Wildcards) -> int:
        """The seed of a teacher's training or of a round: of a repeat, the one in its name."""
        run = getattr(wildcards, "run", None)
        if found := repeat_seed(wildcards.teacher) or repeat_seed(run or ""):
            return found
        of_run = self.run(wildcards).seeds if run else None
        seeds = of_run or self.teacher(wildcards).seeds or [self.config.seed]
        return seeds[0]

    def _drawn(self, model: str) -> tuple[str, SampledModels]:
        """The model of a name of samples, which may end in a variant, and how it is drawn."""
        name, variant = self.varied.get(model, (model, ""))
        sampling = self.config.sampling
        return name, sampling.variants[variant] if variant else sampling

    def checkpoint(self, wildcards: Wildcards) -> str:
        """The file that stands for the weights of the model that draws."""
        return f"results/models/{self._drawn(wildcards.model)[0]}/meta.json"

    def last_words_checkpoints(self, wildcards: Wildcards) -> list[str]:
        """The files that stand for the models that one job asks for last words."""
        return [f"results/models/{model}/meta.json" for model in self.last_words[wildcards.model]]

    def variant_flag(self, wildcards: Wildcards) -> str:
        """The flag with the name of the variant, if the samples are of one."""
        name = self.varied.get(wildcards.model, ("", ""))[1]
        return f"--variant {name}" if name else ""

    def sampling(self, wildcards: Wildcards) -> SampledModels:
        """How a model's samples are drawn: each repeat draws with another seed.

        It is sampling_seed + the training seed; the first training has sampling_seed.
        """
        model, options = self._drawn(wildcards.model)
        seed = (options.sampling_seed + (repeat_seed(model) or 0)) % 2**63
        changed: dict[str, Any] = {"sampling_seed": seed}
        if model.endswith("/baseline"):  # it has no sampler
            fields = SampledModels.model_fields
            changed |= {name: fields[name].default for name in ("sampler", *OF_SAMPLERS)}
        elif options.asks_scorer and options.scorer is None:
            changed["scorer"] = f"results/models/{teacher_name(wildcards)}/baseline"
        return options.model_copy(update=changed)

    def scorer(self, wildcards: Wildcards) -> list[str]:
        """The file that stands for the baseline that a sampler asks, if it asks one of ours."""
        return self.scorer_file(self.sampling(wildcards).scorer)

    def scorer_file(self, folder: str | None) -> list[str]:
        """The file that stands for this scorer, if it is a model of the graph."""
        return [f"{folder}/meta.json"] if folder and folder.startswith("results/models/") else []

    def network_size(self, wildcards: Wildcards) -> str:
        """The size of the networks that a job trains, samples from, scores or times."""
        size = getattr(wildcards, "size", TRAINED)
        return self.teacher(wildcards).network.size if size == TRAINED else size

    def baseline_file(self, wildcards: Wildcards) -> list[str]:
        """The file that stands for a published baseline, unless it comes from the hub."""
        source = self.sources.baseline_source(wildcards.teacher)
        if source is None or is_hub_name(source):
            return []
        return [os.path.join(os.path.expanduser(source), "config.json")]

    def start(self, wildcards: Wildcards) -> list[str]:
        """The flag and the name of the weights that pretraining starts from; random if empty."""
        teacher = self.teacher(wildcards)
        if teacher.fine_tune:
            assert teacher.source is not None
            return ["--from", teacher.source, "--from-weights", teacher.from_weights]
        if teacher.adapt == "baseline":
            return ["--adapt", f"results/models/{teacher_name(wildcards)}/baseline"]
        return ["--adapt", teacher.adapt] if teacher.adapt else []

    def runs_code(self, wildcards: Wildcards) -> str:
        """The flag that lets a model of transformers run its own code, where the user says so."""
        return "--trust-remote-code" if self.teacher(wildcards).trust_remote_code else ""

    def start_file(self, wildcards: Wildcards) -> list[str]:
        """The file or folder that stands for these weights, unless they come from the hub."""
        match self.start(wildcards):
            case ["--from", source, *_]:
                return local_file(source)
            case [_, source]:
                config = f"{source}/config.json"  # of transformers
                if os.path.isfile(config) and not os.path.lexists(f"{source}/meta.json"):
                    return [config]
                return [] if is_hub_name(source) else [f"{source}/meta.json"]
        return []

    def manifest(self, wildcards: Wildcards) -> str:
        """The file that stands for the job's corpus."""
        return f"results/data/{self.teacher(wildcards).corpus}/manifest.json"

    def pairs(self, wildcards: Wildcards) -> list[str]:
        """The corpus of pairs whose held-out prompts are answered in samples, if there is one."""
        drawn, _ = self._drawn(wildcards.model)
        corpus = self.config.teachers[first_training(drawn).split("/")[0]].corpus
        if self.config.corpora[corpus].kind != "pairs":
            return []
        return [f"results/data/{corpus}/manifest.json"]

    def own_text(self, wildcards: Wildcards) -> list[str]:
        """The user's files of a corpus (kind: files): new text makes a new corpus."""
        patterns = self.config.corpora[wildcards.corpus].files
        return sorted(map(str, find_files(patterns)))

    def round_options(self, wildcards: Wildcards) -> Distillation:
        """Options of one round. Later rounds are not among them, so that `rounds: 5 -> 7` trains
        two rounds and not seven."""
        options = subsection(self.run(wildcards), Distillation)
        return options.model_copy(update={"rounds": int(wildcards.round)})

    def previous_round(self, wildcards: Wildcards) -> str:
        """The teacher of round r: the student of round r-1; in round 1 the pretrained teacher."""
        before = int(wildcards.round) - 1
        model = f"{wildcards.run}/round-{before}" if before else "teacher"
        return f"results/models/{wildcards.teacher}/{model}/meta.json"

    def judge_file(self, wildcards: Wildcards) -> list[str]:
        """The baseline's file for transformers, where the baseline is among the judges."""
        if "baseline" not in self.config.evaluation.judge:
            return []
        return [f"results/models/{teacher_name(wildcards)}/baseline/hf/config.json"]

    def judges(self, wildcards: Wildcards) -> list[str]:
        """Names on the hub or folders of all judges; for `baseline` the folder of `judge_file`."""
        baseline = [str(Path(file).parent) for file in self.judge_file(wildcards)]
        names = self.config.evaluation.judge
        return [baseline[0] if name == "baseline" else name for name in names]

    def step_counts(self, model: str) -> list[int]:
        """Numbers of sampling steps at which a model, or a variant of its samples, is scored.

        A denoiser samples at every step count of the config; `own` stands for the count that the
        model was made for and its student's count, where the two are compared. The baseline
        writes one token at a time.
        """
        drawn, sampling = self._drawn(model)
        if drawn.endswith("/baseline"):
            teacher = self.config.teachers[first_training(drawn).split("/")[0]]
            return [self.config.corpora[teacher.corpus].length]
        return self._with_own(drawn, sampling.steps)

    def _with_own(self, model: str, counts: Iterable[StepCount]) -> list[int]:
        """Step counts of a denoiser, with its own numbers in place of `own`."""
        name, kind = first_training(model).split("/", 1)
        steps = set(counts) - {"own"}
        if "own" in counts:
            for run, options in self.config.teachers[name].runs.items():
                steps |= _own_steps(run, options, kind)
        return sorted(map(int, steps))

    def answering(self, wildcards: Wildcards) -> list[str]:
        """The flags with which a model writes answers to tasks; none where no task wants them."""
        steps, model = self.config.evaluation.task_steps, wildcards.model
        if not steps:
            return []
        same = {"weights": "ema", "temperature": 1.0, "precision": "float32"}  # of other flags
        drawing = subsection(self.sampling(wildcards), DrawOptions).model_copy(update=same)
        counts = [] if model.endswith("/baseline") else self._with_own(model, steps)
        words = [f"--steps {' '.join(map(str, counts))}"] if counts else []
        return list(filter(None, [*words, flags(drawing)]))

    def answer_scorer(self, wildcards: Wildcards) -> list[str]:
        """The file that stands for the baseline that a sampler of written answers asks."""
        return self.scorer(wildcards) if self.config.evaluation.task_steps else []

    def samples(self, wildcards: Wildcards) -> str:
        """The file that stands for all samples of a model, or of the naive samplers."""
        return f"results/samples/{wildcards.model}/provenance.json"

    def sample_folders(self, wildcards: Wildcards) -> list[str]:
        """The folders of a model's samples at each step count, or of the naive samplers'."""
        model = wildcards.model
        is_naive = model.endswith("/naive")
        folders = NAIVE if is_naive else [f"steps-{steps}" for steps in self.step_counts(model)]
        return [f"results/samples/{model}/{folder}" for folder in folders]

    def sampled_models(self) -> list[str]:
        """The models whose samples are scored: baselines, and denoisers of the chosen rounds."""
        return self._of_rounds(self.config.sampling.rounds)

    def _of_rounds(self, rounds: list[int] | None) -> list[str]:
        """Baselines, and the denoisers of these rounds (0 is the teacher); None for all of them."""
        return [
            model for model in self.models if rounds is None or _round_of(model) in [None, *rounds]
        ]

    def frontier_models(self) -> list[str]:
        """The models on the generative frontier: baselines, and denoisers of the chosen rounds."""
        sampling = self.config.sampling
        if not sampling.temperatures:
            return []
        rounds = sampling.frontier_rounds
        return self.final_models() if rounds is None else self._of_rounds(rounds)

    def infilled(self) -> list[str]:
        """The denoisers that are sampled, and the variants of their samples, that fill in items.

        A draft is written from left to right, and so fills in nothing.
        """
        if self.config.evaluation.infilling_items is None:
            return []
        drawn = {name: self._drawn(name) for name in (*self.sampled_models(), *self.varied)}
        return [
            name
            for name, (model, options) in drawn.items()
            if not model.endswith("/baseline") and options.sampler != "speculative"
        ]

    def final_models(self) -> list[str]:
        """Baselines, teachers, and the last round of each run."""
        last = {
            f"{name}/{run}/round-{options.rounds}"
            for name, teacher in self.config.teachers.items()
            for run, options in teacher.runs.items()
        }
        return [
            model for model in self.models if not _round_of(model) or first_training(model) in last
        ]

    def frontier_steps(self, model: str) -> list[int]:
        """Numbers of sampling steps at which a model, or a variant of it, is on the frontier.

        A variant that names its step counts is there at these.
        """
        drawn, options = self._drawn(model)
        sampling = self.config.sampling
        if drawn.endswith("/baseline") or options.steps != sampling.steps:
            return self.step_counts(model)
        return sampling.frontier_counts

    def other_temperatures(self, model: str) -> list[float]:
        """The temperatures of a model's frontier that are not the temperature of its samples."""
        sampling = self.config.sampling
        return sorted(
            {*sampling.temperatures, sampling.temperature} - {self._drawn(model)[1].temperature}
        )

    def drawn_steps(self, model: str) -> list[int]:
        """Numbers of sampling steps at which a model is sampled, for its scores and the frontier.

        A model that is on the frontier alone is sampled only at the step counts of the frontier.
        """
        swept = self.frontier_steps(model) if model in self.on_frontier else []
        if swept and model not in [*self.sampled_models(), *self.varied]:
            return swept
        return sorted({*self.step_counts(model), *swept})

    def frontier_folders(self, model: str) -> list[str]:
        """Folders of samples at all temperatures. Those of `temperature` are all other tables'.

        `model` may end in a variant.
        """
        folder, folders = f"results/samples/{model}", []
        for steps in self.frontier_steps(model):
            folders.append(f"{folder}/steps-{steps}")
            for temperature in self.other_temperatures(model):
                folders.append(f"{folder}/frontier/steps-{steps}/temperature-{temperature}")
        return folders

    def frontier_of_teacher(self, model: str) -> list[str]:
        """The scores of a student's first teacher on the frontier, to which it is compared.

        A variant is compared with its model's ordinary samples, in the table `variants`, instead.
        """
        teacher = f"{model.split('/')[0]}/teacher"
        is_student = model not in self.varied and _round_of(model)
        if not is_student or teacher not in self.frontier_models():
            return []
        return [f"results/metrics/{teacher}/frontier.json"]

    def held_out_rows(self, wildcards: Wildcards) -> str:
        """The scores of held-out text by the judges of the job's teacher."""
        return f"results/metrics/{teacher_name(wildcards)}/data.json"

    def continuation_steps(self, model: str) -> list[int]:
        """Numbers of sampling steps at which a model continues prompts.

        A denoiser's are in the config; the baseline takes one step for each token.
        """
        options = self.config.continuations
        if options is None:
            return []
        if model.endswith("/baseline"):
            return [options.continuation_tokens]
        return options.continuation_steps

    def continuation_folders(self, wildcards: Wildcards) -> list[str]:
        """The folders of a model's continuations at each step count."""
        folder = f"results/continuations/{wildcards.model}"
        return [f"{folder}/steps-{steps}" for steps in self.continuation_steps(wildcards.model)]

    def continued_models(self) -> list[str]:
        """The models that continue prompts: baselines, and the denoisers of the chosen rounds."""
        options = self.config.continuations
        return self._of_rounds(options.continuation_rounds) if options else []

    def table_inputs(self) -> dict[str, list[str]]:
        """For each table the files of metric rows that it gathers."""
        return catalogue.table_inputs(
            self.config,
            model=self.models,
            last_words=self.last_words,
            teacher=self.teachers,
            continued=self.continued_models(),
            sampled=self.sampled_models(),
            swept=self.frontier_models(),
            varied=self.varied,
            varied_frontier=self.varied_frontier,
            infilled=self.infilled(),
            examined=self.final_models(),
            timed=self.timings.jobs,
        )

    def figure_inputs(self) -> dict[str, list[str]]:
        """For each figure the tables and journals that it is drawn from."""
        imported = {*self.sources.imported_rounds, *(f"{name}/teacher" for name in self.imported)}
        imported |= {f"{name}/baseline" for name in self.published}
        trained = [model for model in self.models if model not in imported]
        return catalogue.figure_inputs(self.config, self.table_inputs(), self.models, trained)


def _round_of(model: str) -> int | None:
    """Number of a denoiser's round, 0 for the teacher; None for a baseline."""
    name = model.rpartition("/")[2]
    if name == "baseline":
        return None
    return 0 if name == "teacher" else int(name.removeprefix("round-"))


def _own_steps(run: str, options: Distillation, kind: str) -> set[int]:
    """The step count a model was made for and its student's; empty if it is not of this run."""
    line = ["teacher", *(f"{run}/round-{number}" for number in range(1, options.rounds + 1))]
    if kind not in line:
        return set()
    number = line.index(kind)
    last = min(number + 1, options.rounds)
    return {options.teacher_steps // options.substeps**r for r in range(number, last + 1)}
