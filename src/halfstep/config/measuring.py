"""The sections of what is measured: samples, scores, continuations, timings; and the machine."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from halfstep.config.networks import Size
from halfstep.config.values import (
    Count,
    Float,
    Name,
    Names,
    Positive,
    Precision,
    RoundNumber,
    Section,
    Seed,
    StepCount,
    Steps,
    Threads,
    TokenCount,
    Weights,
    Whole,
    Word,
)

NAIVE = ("unigram", "bigram", "cut_and_paste")
"""samplers without a network (data/naive.py), rows of every table of quality"""

NOT_VARIANTS = ("default", "frontier", "naive")  # folders of samples, and what a table says


SAMPLER_OPTIONS: dict[str, tuple[str, ...]] = {
    "threshold": ("threshold",),
    "entropy_bounded": ("entropy_bound",),
    "remask": ("remasking", "eta", "by_confidence"),
    "energy": ("scorer", "candidates", "scored"),
    "speculative": ("scorer", "draft_tokens", "draft_passes", "relaxation"),
}
"""options that only one or two samplers have (diffusion/samplers.py)"""

OF_SAMPLERS = sorted({option for options in SAMPLER_OPTIONS.values() for option in options})


class DrawOptions(Section):
    """How texts are drawn."""

    sampler: Literal[
        "ancestral",
        "analytic",
        "first_hitting",
        "block",
        "ancestral_float32",
        "threshold",
        "entropy_bounded",
        "remask",
        "energy",
        "speculative",
    ] = "ancestral"
    """how a denoiser's positions are revealed; block: 16 tokens at a time from left to right, with
    the keys and values of all others cached (an approximation); ancestral_float32: with the
    truncated noise of the released code (slow); threshold: all positions that the network is sure
    of; entropy_bounded: as many as a bound on their joint error allows; remask: tokens may be taken
    back; energy: whole candidate texts, weighted by an autoregressive model; speculative: drafts
    that an autoregressive model accepts or corrects, so that the texts have its law"""
    threshold: Annotated[Float, Field(gt=0, le=1)] | None = None
    """sampler threshold: the probability of its likeliest token from which a position is revealed
    (0.9)"""
    entropy_bound: Annotated[Float, Field(ge=0)] | None = None
    """sampler entropy_bounded: nats of joint error that one pass may have (0.1)"""
    remasking: Literal["cap", "rescale", "loop"] | None = None
    """sampler remask: the schedule of ReMDM: cap (as by default), rescale or loop"""
    eta: Annotated[Float, Field(ge=0, le=1)] | None = None
    """sampler remask: the largest chance that a token is taken back in a step (0.02), or with
    rescale the share of the largest possible chance"""
    by_confidence: bool = False
    """sampler remask: tokens that were unlikely when they were drawn are taken back more often"""
    candidates: Count | None = None
    """sampler energy: texts per step among which the scorer chooses (8)"""
    scored: Annotated[Float, Field(gt=0, le=1)] | None = None
    """sampler energy: the share of the steps, the last ones, in which the scorer chooses (1)"""
    draft_tokens: Count | None = None
    """sampler speculative: tokens of a draft (4)"""
    draft_passes: Count | None = None
    """sampler speculative: passes of the denoiser for a draft (1)"""
    relaxation: Annotated[Float, Field(ge=0, lt=1)] | None = None
    """sampler speculative: probability of near tokens that may count for a drafted one; above 0 the
    texts no longer have the law of the autoregressive model (0)"""
    scorer: Word | None = None
    """samplers energy and speculative: checkpoint folder of the autoregressive model; in the
    workflow by default the baseline of the teacher"""
    weights: Weights = "ema"
    """weights of the checkpoint: moving average, raw, or the average at the lowest held-out loss"""
    temperature: Positive = 1.0
    """divisor of the logits before a draw"""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """nucleus of the baseline's draws (the paper uses 0.95); a denoiser has none"""
    sampling_seed: Seed = 1
    """seed of the draws; sample i depends only on this seed and i"""
    precision: Precision = "float32"
    """autocast dtype of the network; logits are always float32, and draws float64"""

    @model_validator(mode="after")
    def _check_sampler_options(self) -> Self:
        for name in OF_SAMPLERS:
            value, default = getattr(self, name), DrawOptions.model_fields[name].default
            if value != default and name not in SAMPLER_OPTIONS.get(self.sampler, ()):
                having = [key for key, options in SAMPLER_OPTIONS.items() if name in options]
                raise ValueError(
                    f"{name}: found {value}, but sampler {self.sampler} has no such option, it is "
                    f"one of {' and '.join(having)}; leave it out, or change the sampler"
                )
        return self

    @property
    def asks_scorer(self) -> bool:
        """True if the sampler needs an autoregressive model."""
        return "scorer" in SAMPLER_OPTIONS.get(self.sampler, ())


GENERATE_STAGE = 4
"""version of what `halfstep generate` draws (STAGE in rules/common.smk); samples.json holds it, and
samples of another version are drawn again"""

CONTINUE_STAGE = 5
"""the same of `halfstep continue-prompts`"""


DEFAULT_STEPS = 8
"""sampling steps of one text for a person, whose call names none"""


class WriteOptions(DrawOptions):
    """How `halfstep write` writes the next text."""

    steps: Steps | None = None
    """number of sampling steps (8; as many as a text has tokens for a sampler that takes as many as
    it needs); an autoregressive model takes one per token"""


class GenerateOptions(DrawOptions):
    """How one set of samples is drawn."""

    num_samples: Count = 1
    """number of texts per step count and temperature"""


class SampledModels(GenerateOptions):
    """How samples are drawn for scoring, at which step counts, and of which rounds."""

    num_samples: Count = 1024
    """number of texts per model and step count"""
    steps: Annotated[list[StepCount], Field(min_length=1)] = [8, 16, 32, 64, 128, 256, 512, 1024]
    """step counts at which every denoiser is sampled; own: the count that a model was made for, and
    that of its student"""
    rounds: Annotated[list[RoundNumber], Field(min_length=1)] | None = None
    """rounds that are sampled (0 is the teacher); all by default. The baseline always is"""

    @field_validator("steps")
    @classmethod
    def _sorted(cls, steps: list[int | str]) -> list[int | str]:
        return sorted(set(steps), key=lambda count: (count == "own", count))

    @field_validator("rounds")
    @classmethod
    def _sorted_rounds(cls, rounds: list[int] | None) -> list[int] | None:
        return rounds and sorted(set(rounds))


class Sampling(SampledModels):
    """How samples are drawn for all tables and figures, on the frontier, and in other ways."""

    temperatures: list[Positive] = []
    """temperatures of the generative frontier, perplexity against entropy; `temperature` is always
    among them. Without any, there is no frontier"""
    frontier_steps: Annotated[list[Steps], Field(min_length=1)] | None = None
    """step counts of the frontier; by default those of `steps` but own"""
    frontier_rounds: Annotated[list[RoundNumber], Field(min_length=1)] | None = None
    """rounds on the frontier (0 is the teacher); by default the teacher and the last round of each
    run. The baseline always is"""
    variants: dict[Name, SampledModels] = {}
    """other ways to draw, by names of your choice, each with only the options that differ from
    these: `released-noise: {sampler: ancestral_float32}`. They have a table and two figures. With
    temperatures, those of the models on the frontier are on it too, at their own step counts, but
    for one in which only the temperature differs. The baseline, which has no sampler, is drawn
    again unless only the sampler and its own options differ"""

    @model_validator(mode="before")
    @classmethod
    def _fill_variants(cls, raw: Any) -> Any:
        """Give every variant the keys of the section that it does not set."""
        if not isinstance(raw, dict) or not isinstance(raw.get("variants"), dict):
            return raw
        shared = {key: value for key, value in raw.items() if key in SampledModels.model_fields}

        def filled(given: dict[str, Any]) -> dict[str, Any]:
            """With another sampler the options of the section's sampler do not apply."""
            other = given.get("sampler", raw.get("sampler")) != raw.get("sampler")
            left_out = OF_SAMPLERS if other else []
            return {key: shared[key] for key in shared if key not in left_out} | given

        variants = {
            name: filled(given or {}) if isinstance(given, dict | None) else given
            for name, given in raw["variants"].items()
        }
        return raw | {"variants": variants}

    @field_validator("temperatures", "frontier_steps", "frontier_rounds")
    @classmethod
    def _ascending(cls, values: list[Any] | None) -> list[Any] | None:
        return values if values is None else sorted(set(values))

    @model_validator(mode="after")
    def _check_frontier(self) -> Sampling:
        for key in ("frontier_steps", "frontier_rounds"):
            if getattr(self, key) and not self.temperatures:
                raise ValueError(
                    f"{key} is used only with temperatures; set temperatures, or leave it out"
                )
        if self.temperatures and not self.other_temperatures:
            raise ValueError(
                f"temperatures: found only {self.temperature:g}, which is `temperature` too, but "
                "a frontier needs two at least; add one, or leave temperatures out"
            )
        if self.temperatures and not self.frontier_counts:
            raise ValueError(
                "frontier_steps: found none, and steps has no number; add one to either"
            )
        return self

    @model_validator(mode="after")
    def _check_variants(self) -> Sampling:
        for name, variant in self.variants.items():
            if name in NOT_VARIANTS or name.startswith("steps-"):
                raise ValueError(
                    f"a variant cannot be called {name}: folders and tables use this name for "
                    "something else; choose another name"
                )
            if not self.changed_by(variant):
                raise ValueError(
                    f"variants.{name}: found no option of the draws that differs from those of "
                    "`sampling`; change one, such as the sampler, or leave it out"
                )
        return self

    def changed_by(self, variant: SampledModels) -> set[str]:
        """The options of the draws in which a variant differs from this section."""
        names = DrawOptions.model_fields
        return {name for name in names if getattr(variant, name) != getattr(self, name)}

    @property
    def frontier_counts(self) -> list[int]:
        """The step counts of the frontier."""
        return self.frontier_steps or [count for count in self.steps if count != "own"]

    @property
    def other_temperatures(self) -> list[float]:
        """The temperatures of the frontier that are not the temperature of all other tables."""
        return [value for value in self.temperatures if value != self.temperature]


class Evaluation(Section):
    """The judges of the samples, the last-word task (LAMBADA), other tasks, and zero-shot texts."""

    judge: Annotated[Names, Field(min_length=1)] = ["gpt2-large"]
    """one judge or a list; baseline: the autoregressive model of the corpus; otherwise a hub name
    or a folder for transformers (the paper's judges: gpt2-large, meta-llama/Meta-Llama-3-8B)"""
    lambada: Word | None = "EleutherAI/lambada_openai"
    """last_words: items of the corpus's stories; otherwise a hub name or a .jsonl file of
    {"text": ...} lines; null: no last-word task"""
    lambada_items: Count | None = None
    """maximum number of items; all by default"""
    infilling_items: Count | None = None
    """number of windows of each infilling task: held-out windows with masked positions, and windows
    of last-word items. The denoisers that are sampled fill them in, each in all ways to draw; null:
    no such task"""
    tasks: Names = []
    """tasks of lm-eval by name, or paths of .yaml files that define one: multiple choice, answered
    by the ELBO of the whole text, others that ask for likelihoods, and with task_steps those whose
    answers are written (gsm8k). The baseline, the teacher and the last round of each run answer
    them (the paper's table 1: arc_easy, arc_challenge, hellaswag, mathqa, piqa, winogrande)"""
    task_steps: list[StepCount] = []
    """step counts at which denoisers write answers to the tasks that want them written
    (generate_until), with the sampler of `sampling`; own: as in sampling.steps. Temperature, length
    and end of an answer are those of the task"""
    task_draws: Count = 128
    """masks of each text by which its ELBO is estimated; the released harness draws 1,024"""
    perplexity: Names = []
    """texts whose perplexity per token is measured, by the same models: ptb, wikitext, lm1b,
    lambada, ag_news, pubmed, arxiv (MDLM's table 3); or data sets of the hub as
    owner/name[:configuration[/split]], .txt, .jsonl and .parquet files, and tasks of lm-eval of
    type loglikelihood_rolling"""
    perplexity_draws: Count = 8
    """masks of each window by which its ELBO is estimated; MDLM draws one"""
    task_items: Count | None = None
    """maximum number of questions of each task, and of windows of each text; all by default"""
    bootstrap: Annotated[Whole, Field(ge=100, le=10**6)] = 1000
    """bootstrap resamples for each 95% interval"""
    precision: Precision = "float32"
    """autocast dtype of the judges, and of the models in the last-word task; log-probabilities are
    always float32"""

    @model_validator(mode="after")
    def _check_task_steps(self) -> Self:
        if self.task_steps and not self.tasks:
            raise ValueError(
                "task_steps: found step counts, but no tasks; name in tasks one whose answers are "
                "written, or leave task_steps out"
            )
        return self


class Prompts(Section):
    """Prompts from held-out documents, and their continuations. The defaults are the paper's."""

    num_prompts: Annotated[Count, Field(ge=2)] = 1024
    """number of prompts, from the first held-out documents that are long enough"""
    per_prompt: Annotated[Count, Field(ge=2)] = 5
    """continuations per prompt"""
    prompt_tokens: Annotated[TokenCount, Field(ge=2)] = 50
    """tokens per prompt, BOS included"""
    continuation_tokens: Annotated[TokenCount, Field(ge=4)] = 50
    """tokens written after the prompt"""
    document_tokens: TokenCount = 1024
    """minimum length of a document in tokens, EOS not counted"""

    @model_validator(mode="after")
    def _check_length(self) -> Prompts:
        needed = self.prompt_tokens + self.continuation_tokens - 1
        if self.document_tokens < needed:
            raise ValueError(
                f"document_tokens ({self.document_tokens}) must be at least {needed}: "
                "a text is BOS and prompt_tokens + continuation_tokens - 1 tokens of its document "
                f"({self.prompt_tokens} + {self.continuation_tokens} - 1)"
            )
        return self


class Continuations(Prompts):
    """Continuations of held-out prompts, scored by MAUVE, self-BLEU and the judge's perplexity."""

    continuation_steps: Annotated[list[Steps], Field(min_length=1)] = [8, 16, 32, 64, 128]
    """step counts at which prompts are continued"""
    continuation_rounds: Annotated[list[RoundNumber], Field(min_length=1)] | None = None
    """rounds that continue prompts (0 is the teacher); all by default. The baseline always does"""


Baseline = Literal["halfstep", "transformers", "vllm"]


class BenchmarkOptions(Section):
    """What one job of `halfstep latency` times."""

    lengths: Annotated[list[TokenCount], Field(min_length=1)] = [64, 128, 256, 512, 1024]
    """tokens per text"""
    batch_sizes: Annotated[list[Threads], Field(min_length=1)] = [1, 8]
    """texts per batch, at every length"""
    benchmark_steps: Annotated[list[Steps], Field(min_length=1)] = [4, 8, 16, 32, 64]
    """sampling steps of the timed students, at every length"""
    baselines: Annotated[list[Baseline], Field(min_length=1)] = ["halfstep", "transformers"]
    """autoregressive decoders; halfstep: ours (static KV cache, CUDA graphs); transformers: its
    `generate` with a static or a dynamic cache, whichever is faster; vllm: where it is installed"""
    timed_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of the matrices of everything timed; draws, and what a denoiser reads out, are
    unaffected"""
    repeats: Annotated[Count, Field(ge=3)] = 10
    """timed runs per case, after one warm-up; the interval of a time is that of its quartiles, and
    of fewer than eight runs from the shortest to the longest"""


class Benchmark(BenchmarkOptions):
    """What is timed: the students at each step count, and autoregressive baselines.

    The trained network is always timed at the length of its samples, which is that of its corpus.
    """

    more_batch_sizes: list[Threads] = []
    """further batch sizes of the trained network, only at the length of its samples"""
    more_steps: list[Steps] = []
    """further step counts of the trained network, only at the length of its samples and in the
    batches of batch_sizes"""
    timed_variants: list[Name] = []
    """other ways to draw, by their names in `sampling.variants`, that are timed too: the models
    that a variant draws, by default teachers and the last round of each run, at its step counts and
    at the length of the samples, in all batch sizes, in turns with the baseline in one process"""
    sizes: list[Size] = []
    """further network sizes, timed with untrained weights and the vocabulary of the first teacher;
    their rows say so"""


class Device(Section):
    """Where a command computes; this changes no result."""

    device: str = "auto"
    """auto: the first CUDA device, or the CPU if there is none; otherwise a torch device (cpu)"""
    threads: Threads | None = None
    """CPU threads of torch, shared by the processes on this machine; all cores by default"""


class Machine(Device):
    """Speed only: these options change no result, so they make no finished artifact stale."""

    micro_batch: Count = 32
    """windows per forward pass; training accumulates gradients up to batch_size"""
    recompute: bool = False
    """a training computes the activations of each block again in the backward pass instead of
    keeping them: less memory, about a third more time, the same bits"""
    compile: bool = False
    """a training compiles the blocks of its networks (torch.compile), for a GPU: the first steps
    take minutes, all others less time; results differ by rounding"""
    processes: Annotated[Whole, Field(ge=1, le=9999)] | None = None
    """number of processes that share this job, one per GPU; they are started through torchrun,
    unless torchrun started this process (default: one, or as many as torchrun started)"""
    time_limit: Positive | None = None
    """time limit of a training in minutes; before it ends, the training saves its state and exits
    with code 75; the same command resumes it"""
