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
from typing import Protocol

from halfstep.config import (
    NAIVE,
    BenchmarkOptions,
    Config,
    Distillation,
    FrontierOptions,
    RunOptions,
    Sampling,
    Teacher,
    check_path,
)
from halfstep.data.files import find_files
from halfstep.errors import ConfigError, HalfstepError
from halfstep.released import name_of_round
from halfstep.report import catalogue, paper
from halfstep.resolve import subsection
from halfstep.seeds import first_training, repeat_names, repeat_seed
from halfstep.texts import check_regular, items_file
from halfstep.workflow.task_sources import faults_of_tasks, tasks_of_hub, texts_of_hub
from halfstep.workflow.timings import TRAINED, latency_jobs, latency_minutes

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


HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?"


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


def local_file(source: str) -> list[str]:
    """This path where it exists; else it is a name on the hub, and no file is needed."""
    return [source] if os.path.lexists(source) else []


def check_sources(config: Config) -> None:
    """Raise ConfigError, a line per fault, if a text, tokenizer or item file is not there."""
    faults = []
    for name, corpus in config.corpora.items():
        try:
            for path in find_files(corpus.files):
                _check_name(path, "files")
        except HalfstepError as error:
            faults.append(f"corpora.{name}.{error}")
        tokenizer = corpus.tokenizer
        if tokenizer.startswith((".", "/", "~")) and not is_folder(tokenizer):
            faults.append(
                f"corpora.{name}.tokenizer: {tokenizer} is not a folder; "
                "name a folder with vocab.json and merges.txt, a hub name, or bpe"
            )
    for name, teacher in config.teachers.items():
        source = teacher.baseline and teacher.baseline.source
        if source and not is_folder(source) and not is_hub_name(source):
            faults.append(
                f"teachers.{name}.baseline.from: {source} is not a folder; "
                "name a hub name such as gpt2, or a folder that save_pretrained wrote"
            )
    try:
        if items := items_file(config.evaluation.lambada):
            check_regular(items, "lambada")
            _check_name(items, "lambada")
    except HalfstepError as error:
        faults.append(f"evaluation.{error}")
    faults += faults_of_tasks(config.evaluation)
    for name, teacher in config.teachers.items():
        faults += [f"teachers.{name}.{fault}" for fault in _absent_weights(teacher)]
    if faults:
        raise ConfigError("\n".join(faults))


def _absent_weights(teacher: Teacher) -> list[str]:
    """A line for the teacher and for each run whose `from` names nothing."""
    named = [("from", [teacher.source])]
    for key, run in teacher.runs.items():
        numbers = range(1, run.rounds + 1)
        names = [run.source and name_of_round(run.source, number) for number in numbers]
        named.append((f"runs.{key}.from", names))
    faults = []
    for key, sources in named:
        for source in filter(None, sources):
            if not local_file(source) and not re.fullmatch(HUB_NAME, source):
                faults.append(
                    f"{key}: {source} is no file, no folder and no name on the hub; check the path"
                )
                break
    return faults


def _check_name(path: Path, key: str) -> None:
    """HalfstepError for a name that Snakemake would change or print raw."""
    try:
        check_path(str(path))
    except ValueError as error:
        raise HalfstepError(f"{key}: found {str(path)!r}: {error}") from None


def is_folder(name: str) -> bool:
    """Is this a folder of this machine, and not a name on the hub?"""
    return os.path.isdir(os.path.expanduser(name))


def is_hub_name(name: str) -> bool:
    """Is this the name of a model on the hub, such as gpt2, and nothing on this machine?

    A path of two folders that does not exist counts as such a name.
    """
    known = os.path.lexists(os.path.expanduser(name))
    return not known and re.fullmatch(HUB_NAME, name) is not None


class Targets:
    """The models of a configuration, and what each of them needs."""

    def __init__(self, config: Config):
        self.config = config
        self.teachers = list(config.teachers)
        self.imported = [name for name in self.teachers if config.teachers[name].source]
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
        self.imported_rounds = [
            f"{name}/{key}/round-{number}"
            for name, teacher in config.teachers.items()
            for key, options in teacher.runs.items()
            if options.source
            for number in range(1, options.rounds + 1)
        ]
        """students whose weights are published"""
        self.denoisers = [f"{name}/teacher" for name in self.with_repeats] + rounds
        self.with_baseline = [name for name in self.teachers if config.teachers[name].baseline]
        """teachers with a baseline, trained or published"""
        self.published = [name for name in self.with_baseline if self.baseline_source(name)]
        """teachers whose baseline is published, and not trained here"""
        self.models = [f"{name}/baseline" for name in self.with_baseline] + self.denoisers
        self.scored = self.models + [f"{name}/naive" for name in self.teachers]
        """models whose samples are scored, and the naive samplers of each teacher's corpus"""
        self.timings = {
            f"{name}/{job}": options
            for name in self.teachers
            for job, options in latency_jobs(config, name).items()
        }
        """what is timed, by the name of the job: {teacher}/{size}/{cases}"""

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

    def sampling(self, wildcards: Wildcards) -> Sampling:
        """How a model's samples are drawn: each repeat draws with another seed.

        It is sampling_seed + the training seed; the first training has sampling_seed.
        """
        options, repeat = self.config.sampling, repeat_seed(wildcards.model) or 0
        seed = (options.sampling_seed + repeat) % 2**63
        return options.model_copy(update={"sampling_seed": seed})

    def network_size(self, wildcards: Wildcards) -> str:
        """The size of the networks that a job trains, samples from, scores or times."""
        size = getattr(wildcards, "size", TRAINED)
        return self.teacher(wildcards).network.size if size == TRAINED else size

    def timed(self, wildcards: Wildcards) -> BenchmarkOptions:
        """What a job of `latency` times."""
        return self.timings[f"{wildcards.teacher}/{wildcards.size}/{wildcards.cases}"]

    def timed_baseline(self, wildcards: Wildcards) -> list[str]:
        """The folder of the baseline that is timed together with a trained network."""
        model = f"{wildcards.teacher}/baseline"
        is_timed = wildcards.size == TRAINED and model in self.models
        return [f"results/models/{model}"] if is_timed else []

    def timed_network(self, wildcards: Wildcards) -> str:
        """The flags of `latency` that name what is timed beside the checkpoint, if anything."""
        if wildcards.size != TRAINED:
            return f"--size {wildcards.size}"
        return " ".join(f"--baseline {folder}" for folder in self.timed_baseline(wildcards))

    def minutes(self, wildcards: Wildcards, kind: str) -> int | None:
        """Time limit of a job where it depends on more than the size of its network."""
        if kind != "latency":
            return None
        return latency_minutes(self.network_size(wildcards), self.timed(wildcards))

    def baseline_source(self, name: str) -> str | None:
        """The folder or hub name of a teacher's published baseline."""
        baseline = self.config.teachers[first_training(name)].baseline
        return baseline and baseline.source

    def baseline_file(self, wildcards: Wildcards) -> list[str]:
        """The file that stands for a published baseline, unless it comes from the hub."""
        source = self.baseline_source(wildcards.teacher)
        if source is None or is_hub_name(source):
            return []
        return [os.path.join(os.path.expanduser(source), "config.json")]

    def adapt_source(self, wildcards: Wildcards) -> list[str]:
        """The folder or hub name of the weights that pretraining starts from; random if empty."""
        source = self.teacher(wildcards).adapt
        if source == "baseline":
            return [f"results/models/{teacher_name(wildcards)}/baseline"]
        return [source] if source else []

    def adapted_from(self, wildcards: Wildcards) -> list[str]:
        """The file that stands for these weights, unless they come from the hub."""
        found = []
        for source in self.adapt_source(wildcards):
            config = f"{source}/config.json"  # of transformers
            if os.path.isfile(config) and not os.path.lexists(f"{source}/meta.json"):
                found.append(config)
            elif not is_hub_name(source):
                found.append(f"{source}/meta.json")
        return found

    def manifest(self, wildcards: Wildcards) -> str:
        """The file that stands for the job's corpus."""
        return f"results/data/{self.teacher(wildcards).corpus}/manifest.json"

    def own_text(self, wildcards: Wildcards) -> list[str]:
        """The user's files of a corpus (kind: files): new text makes a new corpus."""
        patterns = self.config.corpora[wildcards.corpus].files
        return sorted(map(str, find_files(patterns)))

    def published_round(self, model: str) -> tuple[str, RunOptions, int]:
        """Source, run and number of a round whose student is published."""
        teacher, run, folder = model.split("/")
        options, number = self.config.teachers[teacher].runs[run], _round_of(folder) or 0
        assert options.source is not None
        return name_of_round(options.source, number), options, number

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

    def last_words(self) -> list[str]:
        """The user's file of last words, where LAMBADA is not a data set of the hub or corpus."""
        items = items_file(self.config.evaluation.lambada)
        return [str(items)] if items else []

    def step_counts(self, model: str) -> list[int]:
        """Numbers of sampling steps at which a model is scored.

        A denoiser samples at every step count of the config; `own` stands for the count that the
        model was made for and its student's count, where the two are compared. The baseline
        writes one token at a time.
        """
        name, kind = first_training(model).split("/", 1)
        teacher, steps = self.config.teachers[name], set(self.config.sampling.steps)
        if kind == "baseline":
            return [self.config.corpora[teacher.corpus].length]
        if "own" in steps:
            steps.remove("own")
            for run, options in teacher.runs.items():
                steps |= _own_steps(run, options, kind)
        return sorted(steps)

    def samples(self, wildcards: Wildcards) -> str:
        """The file that stands for all samples of a model, or of the naive samplers."""
        return f"results/samples/{wildcards.model}/provenance.json"

    def sample_folders(self, wildcards: Wildcards) -> list[str]:
        """The folders of a model's samples at each step count, or of the naive samplers'."""
        model = wildcards.model
        if model.endswith("/naive"):
            folders = list(NAIVE)
        else:
            folders = [f"steps-{steps}" for steps in self.step_counts(model)]
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
        if rounds is not None:
            return self._of_rounds(rounds)
        return self.final_models()

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
        """Numbers of sampling steps at which a model is on the frontier."""
        if model.endswith("/baseline"):
            return self.step_counts(model)
        return self.config.sampling.frontier_counts

    def frontier_options(self, model: str) -> FrontierOptions:
        """The temperatures at which a model is sampled besides `temperature`, and where."""
        if model not in self.frontier_models():
            return FrontierOptions()
        return FrontierOptions(
            temperatures=self.config.sampling.other_temperatures,
            frontier_steps=self.frontier_steps(model),
        )

    def drawn_steps(self, model: str) -> list[int]:
        """Numbers of sampling steps at which a model is sampled, for its scores and the frontier.

        A model that is on the frontier alone is sampled only at the step counts of the frontier.
        """
        swept = self.frontier_steps(model) if model in self.frontier_models() else []
        if swept and model not in self.sampled_models():
            return swept
        return sorted({*self.step_counts(model), *swept})

    def frontier_folders(self, model: str) -> list[str]:
        """Folders of samples at all temperatures. Those of `temperature` are all other tables'."""
        folders = []
        for steps in self.frontier_steps(model):
            folder = f"results/samples/{model}/steps-{steps}"
            folders.append(folder)
            for temperature in self.config.sampling.other_temperatures:
                folders.append(f"{folder}/temperature-{temperature}")
        return folders

    def frontier_of_teacher(self, model: str) -> list[str]:
        """The scores of a student's first teacher on the frontier, to which it is compared."""
        teacher = f"{model.split('/')[0]}/teacher"
        if not _round_of(model) or teacher not in self.frontier_models():
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

    def continued_models(self) -> list[str]:
        """The models that continue prompts: baselines, and the denoisers of the chosen rounds."""
        options = self.config.continuations
        if options is None:
            return []
        return self._of_rounds(options.continuation_rounds)

    def hub_repositories(self) -> list[str]:
        """What the hub must provide, as `model:name` or `dataset:name`.

        It is fetched once, where snakemake runs, because compute nodes have no internet.
        """
        found = {*self.judges_of_hub(), *self.lambada_of_hub()}
        found |= {*tasks_of_hub(self.config.evaluation), *texts_of_hub(self.config.evaluation)}
        for name in self.config.corpora:
            found.update(self.corpus_of_hub(name))
        for name in self.config.teachers:
            found.update(self.source_of_hub(name) + self.baseline_of_hub(name))
        for model in self.imported_rounds:
            found.update(self.round_of_hub(model))
        return sorted(found)

    def corpus_of_hub(self, name: str) -> list[str]:
        """What a corpus needs from the hub; own text with an own tokenizer needs nothing."""
        corpus, found = self.config.corpora[name], []
        if corpus.tokenizer != "bpe" and not is_folder(corpus.tokenizer):
            found.append(f"model:{corpus.tokenizer}")
        if corpus.kind == "openwebtext":
            found.append("dataset:Skylion007/openwebtext")
        return found

    def judges_of_hub(self) -> list[str]:
        """The judges that come from the hub."""
        names = self.config.evaluation.judge
        return [f"model:{name}" for name in names if name != "baseline" and not os.path.isdir(name)]

    def lambada_of_hub(self) -> list[str]:
        """The data set of last words, where it comes from the hub."""
        name = self.config.evaluation.lambada
        return [] if name in (None, "last_words") or self.last_words() else [f"dataset:{name}"]

    def source_of_hub(self, name: str) -> list[str]:
        """The weights that a teacher has or starts from, where they come from the hub."""
        teacher = self.config.teachers[first_training(name)]
        source, adapt = teacher.source, teacher.adapt
        if adapt and adapt != "baseline" and is_hub_name(adapt):
            return [f"model:{adapt}"]
        return [f"model:{source}"] if source and not local_file(source) else []

    def baseline_of_hub(self, name: str) -> list[str]:
        """The published baseline of a teacher, where it comes from the hub."""
        source = self.baseline_source(name)
        return [f"model:{source}"] if source and is_hub_name(source) else []

    def round_of_hub(self, model: str) -> list[str]:
        """The published weights of a round, where they come from the hub."""
        source, _, _ = self.published_round(model)
        return [] if local_file(source) else [f"model:{source}"]

    def table_inputs(self) -> dict[str, list[str]]:
        """For each table the files of metric rows that it gathers."""
        return catalogue.table_inputs(
            self.config,
            model=self.models,
            teacher=self.teachers,
            continued=self.continued_models(),
            sampled=self.sampled_models(),
            swept=self.frontier_models(),
            examined=self.final_models(),
            timed=self.timings,
        )

    def figure_inputs(self) -> dict[str, list[str]]:
        """For each figure the tables and journals that it is drawn from."""
        imported = {*self.imported_rounds, *(f"{name}/teacher" for name in self.imported)}
        imported |= {f"{name}/baseline" for name in self.published}
        trained = [model for model in self.models if model not in imported]
        return catalogue.figure_inputs(self.table_inputs(), self.models, trained)

    def paper_items(self) -> dict[str, paper.Where]:
        """The figures and tables of the paper that this configuration can make."""
        return paper.paper_items(self.config, self.table_inputs())

    def paper_sources(self, name: str) -> list[str]:
        """The files that a figure or table of the paper is made from."""
        item = paper.ITEMS[name]
        if item.is_figure:
            return [f"results/tables/{table}.csv" for table in item.tables]
        return self.table_inputs()[item.shows]

    def paper_rows(self, name: str) -> list[str]:
        """Which rows a figure or table of the paper shows, as `column=value,value`."""
        where = self.paper_items()[name]
        return [f"{column}={','.join(values)}" for column, values in where.items()]

    def compared_teacher(self) -> str:
        """Flags for the teacher whose numbers are compared with published ones of 169M."""
        sizes = {name: teacher.network.size for name, teacher in self.config.teachers.items()}
        name = next((name for name, size in sizes.items() if size == "small"), self.teachers[0])
        return f"--teacher {name} --size {sizes[name]}"

    def check_paper_target(self, target: str) -> None:
        """Raise ConfigError for a target in results/paper that this configuration cannot make."""
        path = Path(target)
        name = path.name.partition(".")[0]
        if path.parent != Path("results/paper") or name in ("report", "table-2"):
            return
        if name not in paper.ITEMS:
            raise ConfigError(
                f"{target}: found {name}, expected one of {', '.join(paper.ITEMS)}; "
                "docs/paper.md says what became of the others"
            )
        item = paper.ITEMS[name]
        if lacking := paper.missing(item, self.config, self.table_inputs()):
            raise ConfigError(
                f"{target}: found no {lacking}, which it shows; "
                f"use a preset that has them: --config preset={item.preset}"
            )


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
