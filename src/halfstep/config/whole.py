"""The whole configuration: teachers, and what its sections must agree in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, field_validator, model_validator

from halfstep.config.measuring import (
    NAIVE,
    Benchmark,
    Continuations,
    Evaluation,
    SampledModels,
    Sampling,
)
from halfstep.config.networks import Corpus, Network
from halfstep.config.training import (
    OF_IMPORTED,
    BaselineOptions,
    Distillation,
    Pretraining,
    RunOptions,
)
from halfstep.config.values import Name, Section, Seed, Seeds, TokenCount, Word
from halfstep.released import name_of_round, read_student
from halfstep.seeds import REPEAT

FEWEST_TOKENS = 0.3  # that a step of a round's teacher should reveal on average


class Teacher(Section):
    """A corpus and a network size, with a teacher, a baseline and runs that distill the teacher."""

    corpus: Name
    """a key of `corpora`"""
    network: Network
    source: Word | None = Field(None, alias="from")
    """published weights instead of pretraining: a .ckpt file, a folder, or a hub name
    (kuleshov-group/mdlm-owt, jdeschena/sdtt@teacher_1M_sm); after hf: a model of transformers that
    fills in masks, by its hub name or folder (hf:answerdotai/ModernBERT-base)"""
    logits: Literal["same", "shifted"] | None = None
    """which output of an hf: model predicts a token: the one at its position (same) or at the
    position before (shifted); null: what is known of the family"""
    trust_remote_code: bool = False
    """run the Python files in the repository of an hf: model, as LLaDA and Dream need it: they can
    do whatever you can do, so read them first"""
    adapt: Word | None = None
    """pretraining starts from these autoregressive weights (DiffuGPT): baseline, the one of this
    teacher; the folder of a checkpoint of `halfstep train-baseline`; or a GPT-2 model of
    transformers: a hub name (gpt2) or a folder"""
    from_weights: Literal["ema", "raw"] = "ema"
    """weights of `from` that become the teacher; ema: the moving average if the file has one;
    raw: the raw weights, as the released code takes them"""
    fine_tune: bool = False
    """pretraining starts from the weights of `from`, which otherwise are the teacher as they are"""
    pretraining: Pretraining = Pretraining()
    """training of the teacher"""
    baseline: BaselineOptions | None = BaselineOptions()
    """the autoregressive baseline: options of its training; or {from: gpt2}, a published causal
    language model; null: no baseline"""
    distillation: Distillation = Distillation()
    """options that all runs share"""
    seeds: Seeds | None = None
    """training seeds: the teacher and its runs are trained, sampled and scored once with each of
    them (default: `seed`); all have the corpus, the baseline and the judges of the first"""
    runs: dict[Name, RunOptions] = {"kl_backward": RunOptions()}
    """the runs by name, each with only the options that differ from `distillation`; when absent,
    one run kl_backward with the options of `distillation`"""

    @property
    def published(self) -> str | None:
        """The weights of `from`, if they are the teacher as they are."""
        return None if self.fine_tune else self.source

    @property
    def is_transformers(self) -> bool:
        """Do its weights come from a model of transformers?"""
        return (self.source or "").startswith("hf:")

    @model_validator(mode="before")
    @classmethod
    def _fill_runs(cls, raw: Any) -> Any:
        """Give every run the keys of `distillation` that it does not set.

        null is the default, except that a baseline of null is none.
        """
        if not isinstance(raw, dict):
            return raw
        given = raw.items()
        raw = {key: value for key, value in given if value is not None or key == "baseline"}
        raw.setdefault("runs", {"kl_backward": {}})
        shared = raw.get("distillation", {})
        if isinstance(shared, Distillation):
            shared = shared.model_dump(exclude_unset=True)
        if not isinstance(raw["runs"], dict) or not isinstance(shared, dict):
            return raw
        runs = {}
        for name, run in raw["runs"].items():
            if isinstance(run, dict) and run.get("from") is not None:
                runs[name] = _fill_imported(name, run, shared)
            else:
                runs[name] = {**shared, **(run or {})} if isinstance(run, dict | None) else run
        return raw | {"runs": runs}

    @field_validator("runs")
    @classmethod
    def _check_names(cls, runs: dict[str, RunOptions]) -> dict[str, RunOptions]:
        for name in sorted({"teacher", "baseline", "naive", "data", *NAIVE} & runs.keys()):
            raise ValueError(
                f"a run cannot be called {name}: folders and tables use this name for something "
                "else; choose another name"
            )
        _check_endings("run", runs)
        return runs


class Config(Section):
    """Everything that `snakemake all` makes."""

    preset: Word = "laptop"
    """file of workflow/presets that the other keys override"""
    seed: Seed = 1
    """seed of the weights, batches, masks and times"""
    corpora: Annotated[dict[Name, Corpus], Field(min_length=1)]
    """the corpora by name"""
    teachers: Annotated[dict[Name, Teacher], Field(min_length=1)]
    """the teachers by name"""
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    continuations: Continuations | None = None
    """no continuations when absent"""
    benchmark: Benchmark = Benchmark()
    published: bool = False
    """show published values in figures and tables, in rows of their own with their source"""
    experiment: Name | None = None
    """experiment of MLflow; null: $MLFLOW_EXPERIMENT_NAME, else halfstep"""

    @model_validator(mode="before")
    @classmethod
    def _fill_teacher_steps(cls, raw: Any) -> Any:
        """Put the length of a teacher's corpus in place of `teacher_steps: length`."""
        teachers = raw.get("teachers") if isinstance(raw, dict) else None
        if not isinstance(teachers, dict):
            return raw
        filled = {}
        for name, teacher in teachers.items():
            corpus = _part(raw, "corpora", _part(teacher, "corpus"))
            length = _valid_length(_part(corpus, "length"))
            filled[name] = _with_teacher_steps(teacher, length)
        return raw | {"teachers": filled}

    def warnings(self) -> list[str]:
        """What is allowed and will disappoint, one line each, with its key and the reason."""
        found = []
        for name, teacher in self.teachers.items():
            length = self.corpora[teacher.corpus].length
            for key, run in teacher.runs.items():
                if run.source:
                    continue
                tokens = [length * run.substeps**n / run.teacher_steps for n in range(run.rounds)]
                few = sum(number < FEWEST_TOKENS for number in tokens)
                if few:
                    found.append(
                        f"teachers.{name}.runs.{key}.teacher_steps: found {run.teacher_steps} for "
                        f"windows of {length} tokens: in {few} of {run.rounds} rounds a step of "
                        f"the teacher reveals less than {FEWEST_TOKENS} of a token on average (in "
                        f"the first {tokens[0]:.2g}), and such a round learns more noise than it "
                        "learns from the teacher; set teacher_steps: length"
                    )
        return found

    @model_validator(mode="after")
    def _check_teachers(self) -> Config:
        for name, teacher in self.teachers.items():
            if teacher.corpus not in self.corpora:
                raise ValueError(
                    f"teachers.{name}.corpus is {teacher.corpus!r}, "
                    f"which is not a key of corpora: {', '.join(self.corpora)}"
                )
            if teacher.source and teacher.adapt:
                raise ValueError(
                    f"teachers.{name}: found `from` and `adapt`, but a teacher has one start; "
                    "leave one of them out"
                )
            if teacher.fine_tune and not teacher.source:
                raise ValueError(
                    f"teachers.{name}.fine_tune: found true without `from`, the weights to start "
                    "from; name them, or leave it out"
                )
            if teacher.fine_tune and teacher.network.time_conditioning and teacher.is_transformers:
                raise ValueError(
                    f"teachers.{name}.network.time_conditioning: found true, but a model of "
                    "transformers has no input for the time; leave it out"
                )
            if teacher.logits and not teacher.is_transformers:
                raise ValueError(
                    f"teachers.{name}.logits: found {teacher.logits}, but only a teacher with "
                    "from: hf:... has them; leave it out"
                )
            if teacher.trust_remote_code and not (teacher.source or "").startswith("hf:"):
                raise ValueError(
                    f"teachers.{name}.trust_remote_code: found true, but only a teacher with "
                    "from: hf:... brings code; leave it out"
                )
            if teacher.pretraining.anneal_attention and not teacher.adapt:
                raise ValueError(
                    f"teachers.{name}.pretraining.anneal_attention: found "
                    f"{teacher.pretraining.anneal_attention} without `adapt`, but only adapted "
                    "weights know causal attention; leave it out"
                )
            if (found := teacher.network.architecture) != "dit":
                follows = {"gpt2": "adapt: gpt2", "transformers": "baseline: {from: gpt2}"}[found]
                raise ValueError(
                    f"teachers.{name}.network.architecture: found {found}, which follows from "
                    f"`{follows}` and from nothing else; leave it out"
                )
            self._check_baseline(name, teacher)
            _check_seeds(name, teacher)
            self._check_corpus(teacher)
        _check_endings("teacher", self.teachers)
        return self

    @model_validator(mode="after")
    def _check_timed_variants(self) -> Config:
        for name in self.benchmark.timed_variants:
            if name not in self.sampling.variants:
                raise ValueError(
                    f"benchmark.timed_variants: found {name}, which is not a key of "
                    f"sampling.variants: {', '.join(self.sampling.variants) or 'it has none'}"
                )
        return self

    def _check_baseline(self, name: str, teacher: Teacher) -> None:
        """Refuse what needs a baseline where there is none, and weights that nobody chose."""
        if teacher.baseline is None and teacher.adapt == "baseline":
            raise ValueError(
                f"teachers.{name}.adapt: found baseline, but teachers.{name}.baseline is null; "
                "name other weights such as gpt2, or let it have a baseline"
            )
        if teacher.baseline is None and "baseline" in self.evaluation.judge:
            raise ValueError(
                f"evaluation.judge: found baseline, but teachers.{name}.baseline is null; "
                "name another judge such as gpt2-large, or let it have a baseline"
            )
        published = {"": teacher.published}
        published[".baseline"] = teacher.baseline and teacher.baseline.source
        published |= {f".runs.{key}": run.source for key, run in teacher.runs.items()}
        for key in [key for key, source in published.items() if source]:
            for place, sampling in self._ways_to_draw():
                if sampling.weights == "best":
                    raise ValueError(
                        f"{place}.weights is best, but teachers.{name}{key}.from has no best "
                        "weights, because halfstep did not validate it; choose ema or raw"
                    )

    def _ways_to_draw(self) -> list[tuple[str, SampledModels]]:
        """`sampling` and its variants, each with its place in the configuration."""
        variants = self.sampling.variants.items()
        return [("sampling", self.sampling)] + [
            (f"sampling.variants.{name}", variant) for name, variant in variants
        ]

    def _check_corpus(self, teacher: Teacher) -> None:
        """Refuse options that the kind or the length of the teacher's corpus rules out."""
        corpus = self.corpora[teacher.corpus]
        of = f"of corpus {teacher.corpus!r}"
        if self.evaluation.lambada == "last_words" and corpus.kind != "stories":
            raise ValueError(
                f"evaluation.lambada is last_words, but the kind {of} is {corpus.kind}: "
                "only stories have them; name a hub data set or a .jsonl file, "
                "or leave the task out with null"
            )
        runs = teacher.runs.values() or [teacher.distillation]
        own = max(run.teacher_steps for run in runs)
        for place, sampling in self._ways_to_draw():
            most = max(own if count == "own" else count for count in sampling.steps)
            if most > corpus.length and sampling.sampler != "ancestral":  # spares torch's import
                _check_steps(f"{place}.steps", sampling.sampler, most, corpus.length, of)
            if sampling.asks_scorer and sampling.scorer is None and not teacher.baseline:
                raise ValueError(
                    f"{place}.sampler: found {sampling.sampler}, which asks an autoregressive "
                    f"model, but a teacher {of} has baseline: null; give it a baseline, or name "
                    f"a checkpoint folder in {place}.scorer"
                )
        prompts = self.continuations
        if prompts and self.sampling.sampler != "ancestral":
            written = prompts.prompt_tokens + prompts.continuation_tokens
            most = max(prompts.continuation_steps)
            key = "continuations.continuation_steps"
            _check_steps(key, self.sampling.sampler, most, written, "of prompts")
        if prompts and prompts.prompt_tokens + prompts.continuation_tokens >= corpus.length:
            raise ValueError(
                "continuations: prompt_tokens + continuation_tokens are "
                f"{prompts.prompt_tokens} + {prompts.continuation_tokens}, but a window {of} has "
                f"{corpus.length} tokens, EOS at its end; lower one of them"
            )


def _check_steps(key: str, sampler: str, steps: int, length: int, of: str) -> None:
    """ValueError if a sampler has fewer steps than these for texts of a length."""
    from halfstep.diffusion.samplers import SAMPLERS  # imports torch; rarely needed
    from halfstep.errors import HalfstepError

    try:
        SAMPLERS[sampler].check_steps(sampler, steps, length)
    except HalfstepError as error:
        raise ValueError(f"{str(error).replace('steps', key, 1)} ({of})") from None


def _fill_imported(name: str, run: dict, shared: dict) -> dict:
    """A run of published students with the facts of `distillation` that it does not set.

    The divergence is the one in a released name. ValueError for an option of training.
    """
    for key in run.keys() & RunOptions.model_fields.keys() - {*OF_IMPORTED}:
        if run[key] is not None:
            raise ValueError(
                f"runs.{name}.{key}: found {run[key]}, but the students of `from` are published, "
                "and nothing is trained here; leave it out"
            )
    facts = {key: value for key, value in shared.items() if key in OF_IMPORTED}
    known = read_student(name_of_round(str(run["from"]), 1))
    if known:
        facts["divergence"] = known.divergence
    return facts | run


def _check_endings(kind: str, names: Iterable[str]) -> None:
    """ValueError if a teacher or a run is called as a repeat of a training is."""
    for name in names:
        if REPEAT.search(name):
            raise ValueError(
                f"a {kind} cannot be called {name}: repeats of a training end in -seed and a "
                "number; choose another name, or set seeds"
            )


def _check_seeds(name: str, teacher: Teacher) -> None:
    """ValueError if there is nothing to repeat, or if teacher and runs both have seeds."""
    if teacher.seeds and teacher.published:
        raise ValueError(
            f"teachers.{name}: found `from` and `seeds`, but published weights are not trained "
            "here; give the seeds to its runs"
        )
    if teacher.seeds is None or len(teacher.seeds) == 1:
        return
    for key, run in teacher.runs.items():
        if run.seeds:
            raise ValueError(
                f"teachers.{name}.runs.{key}.seeds: found {run.seeds}, but the seeds "
                f"{teacher.seeds} of the teacher repeat its runs too; leave one of them out"
            )


def _part(tree: Any, *keys: Any) -> Any:
    """What is at these keys of nested dicts, as far as they are dicts; else None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) and isinstance(key, str) else None
    return tree


def _valid_length(length: object) -> object:
    """The length of a corpus, or the default where there is none, or one that is refused anyway."""
    try:
        return pydantic.TypeAdapter(TokenCount).validate_python(length)
    except pydantic.ValidationError:
        return Corpus.model_fields["length"].default


def _with_teacher_steps(part: Any, length: object) -> Any:
    """The part of a teacher with `length` in place of the word in each `teacher_steps`."""
    if not isinstance(part, dict):
        return part
    return {
        key: length
        if (key, value) == ("teacher_steps", "length")
        else _with_teacher_steps(value, length)
        for key, value in part.items()
    }
