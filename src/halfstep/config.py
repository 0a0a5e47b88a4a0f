"""The configuration: strict, typed, one definition for YAML, command-line flags, JSON schema and --help.

A section is a frozen pydantic model. Commands take sections as arguments, so a flag (`--lr`) and a key (`lr:`) are the same field.
resolve.py makes a `Config` of the user's YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator


def _number(value: Any) -> Any:
    """YAML 1.1 reads `6e-5` and `1_000.0` as text; a float field means a number."""
    try:
        return (
            float(value) if isinstance(value, str | int) and not isinstance(value, bool) else value
        )
    except ValueError:
        return value


Float = Annotated[float, pydantic.BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, lt=1)]
Names = Annotated[
    list[str],
    pydantic.BeforeValidator(
        lambda value: [value] if isinstance(value, str) else value,
        json_schema_input_type=str | list[str],
    ),
]
Weights = Literal["ema", "raw", "best"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Corpus(Section):
    """Which text, cut into windows of how many tokens."""

    kind: Literal["stories", "docs", "openwebtext", "files"]
    """stories: the embedded grammar; docs: documentation strings of the installed Python; files: your own text"""
    length: Annotated[int, Field(ge=8)] = 1024
    """tokens in one window, BOS and EOS included"""
    tokenizer: str = "bpe"
    """bpe: a byte-level BPE trained on the corpus; else a hub name (gpt2) or a folder with vocab.json and merges.txt"""
    vocab_size: Annotated[int, Field(ge=258)] = 8192
    """tokens of the trained BPE, EOS included (bpe only)"""
    files: list[str] = []
    """paths or globs of .txt, .jsonl, .jsonl.gz or .parquet (kind files only)"""
    text_field: str = "text"
    """the field that holds the text in .jsonl and .parquet"""
    num_documents: PositiveInt | None = None
    """stories: how many to write; elsewhere: read only the first so many"""
    validation_documents: PositiveInt | None = None
    """held out: the last so many documents (stories: so many with combinations never trained on); 1,000, of openwebtext 100,000"""
    corpus_seed: Annotated[int, Field(ge=0)] = 1
    """seed of the grammar (stories only)"""

    @model_validator(mode="after")
    def _agree(self):
        if (self.kind == "files") != bool(self.files):
            raise ValueError(
                f"`files` is given with kind: files and only then, found kind: {self.kind} and files: {self.files}"
            )
        if self.kind == "stories" and self.num_documents is None:
            raise ValueError("kind: stories needs num_documents, the number of stories to write")
        for key, used, where in (
            ("corpus_seed", self.kind == "stories", "kind: stories"), ("text_field", self.kind == "files", "kind: files"),
            ("vocab_size", self.tokenizer == "bpe", "tokenizer: bpe"),
        ):  # fmt: skip
            if not used and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: found {getattr(self, key)!r}, which is of use with {where} only; leave it out"
                )
        return self


SIZES: dict[
    str, tuple[int, int, int]
] = {  # blocks, width, heads: SDTT Table 2, and two for small machines
    "tiny": (3, 128, 8),
    "mini": (6, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (24, 1536, 16),
    "1.3B": (24, 2048, 32),
    "3B": (26, 3072, 32),
    "8B": (40, 4096, 32),
}


Size = Literal["tiny", "mini", "small", "medium", "large", "1.3B", "3B", "8B"]


class Network(Section):
    """The size of the denoiser and of its autoregressive peer."""

    size: Size = "small"
    """a row of SDTT Table 2 (small 169M, medium 424M, large 863M), or tiny and mini for small machines"""
    time_conditioning: bool = False
    """feed t to adaLN; the paper feeds zero"""
    schedule: Literal["loglinear", "cosine"] = "loglinear"
    """noise schedule alpha(t): loglinear (MDLM and the paper), or cosine (MaskGIT, MD4)"""

    @property
    def blocks(self) -> int:
        return SIZES[self.size][0]

    @property
    def width(self) -> int:
        return SIZES[self.size][1]

    @property
    def heads(self) -> int:
        return SIZES[self.size][2]


class Training(Section):
    """Pretraining of the teacher or of the baseline; the defaults are MDLM's on OpenWebText."""

    num_steps: PositiveInt = 1_000_000
    """optimiser steps"""
    batch_size: PositiveInt = 512
    """windows per optimiser step, over all devices and micro-batches"""
    lr: Positive = 3e-4
    """peak learning rate of AdamW"""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """what the learning rate does after the warm-up; linear and cosine end at a fiftieth of lr"""
    warmup_steps: Annotated[int, Field(ge=0)] = 2500
    """steps of linear warm-up"""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay"""
    beta2: Share = 0.999
    """AdamW's second-moment decay (the first is 0.9)"""
    grad_clip: Positive = 1.0
    """largest global norm of the gradient"""
    ema_decay: Share = 0.9999
    """decay of the moving average of the weights, ramped by (1+n)/(10+n)"""
    dropout: Share = 0.1
    """chance that a residual branch's element is dropped in training"""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """autocast of the network; divergences and losses are float32 always"""
    min_t: Share = 1e-3
    """smallest training time (MDLM's sampling_eps)"""
    validate_every: PositiveInt = 5000
    """optimiser steps between measurements of the held-out loss"""

    @model_validator(mode="after")
    def _agree(self):
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below num_steps ({self.num_steps})"
            )
        return self


class Distillation(Training):
    """One run of Self-Distillation Through Time; the defaults are the paper's."""

    num_steps: PositiveInt = 10_000
    """optimiser steps in one round"""
    batch_size: PositiveInt = 128
    """windows per optimiser step, over all devices and micro-batches"""
    lr: Positive = 6e-5
    """peak learning rate of AdamW"""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    """steps of linear warm-up, in the first round and after a reset of the optimiser"""
    min_t: Share = 1e-5
    """smallest training time"""
    divergence: Literal["kl_backward", "kl_forward", "mse", "tvd", "l1_log_p"] = "kl_backward"
    """between student and teacher; kl_backward is the paper's KLD, KL(student || teacher); l1_log_p is what the released code calls tvd"""
    teacher_steps: PositiveInt = 1024
    """sampling steps of the first teacher"""
    rounds: PositiveInt = 7
    """each round divides the steps by `substeps`"""
    substeps: Annotated[int, Field(ge=2)] = 2
    """teacher steps that one student step replaces (the paper's m/k)"""
    teacher_times: Literal["exact", "released"] = "exact"
    """times of the teacher's substeps: Algorithm 1's, or those of the released code"""
    next_teacher: Literal["raw", "ema"] = "raw"
    """which weights of the student become the next teacher"""
    reset_optimizer: bool = False
    """start every round with fresh optimiser moments"""
    reset_ema: bool = False
    """start every round's moving average at the student's weights"""
    entropy_band: Positive | None = None
    """stop a round when the unigram entropy of its samples leaves held-out text's by more than this share"""

    @model_validator(mode="after")
    def _whole_steps(self):
        if self.teacher_steps % self.substeps**self.rounds:
            most = 0
            while self.teacher_steps % self.substeps ** (most + 1) == 0:
                most += 1
            raise ValueError(
                f"{self.rounds} rounds of {self.substeps} substeps do not divide teacher_steps {self.teacher_steps}: "
                f"at most {most} rounds do, or choose a multiple of {self.substeps**self.rounds}"
            )
        return self


class DrawOptions(Section):
    """How a text is drawn."""

    sampler: Literal["ancestral", "analytic", "first_hitting", "block", "ancestral_float32"] = (
        "ancestral"
    )
    """which positions are revealed when; block: 16 tokens at a time from left to right, keys and values of the others kept (an approximation);
    ancestral_float32: the released code's truncated noise (slow)"""
    weights: Weights = "ema"
    """which weights of the checkpoint write"""
    temperature: Positive = 1.0
    """divides the logits before the draw"""
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """nucleus of the baseline's draw (the paper uses 0.95)"""
    sampling_seed: Annotated[int, Field(ge=0)] = 1
    """sample i depends on this and i alone"""


class GenerateOptions(DrawOptions):
    """How one set of samples is drawn."""

    num_samples: PositiveInt = 1024
    """texts per model and step count"""


def _step_count(value: Any) -> int | str:
    if value == "own" or type(value) is int and value > 0:
        return value
    raise ValueError("expected a whole number above zero, or own")


StepCount = Annotated[
    Any,
    pydantic.PlainValidator(_step_count),
    pydantic.WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "own"}]}),
]


class Sampling(GenerateOptions):
    """How samples are drawn for scoring, and at which step counts."""

    steps: Annotated[list[StepCount], Field(min_length=1)] = [8, 16, 32, 64, 128, 256, 512, 1024]
    """step counts at which every model writes; own: at the count it was made for, and at its student's"""

    @field_validator("steps")
    @classmethod
    def _sorted(cls, steps):
        return sorted(set(steps), key=lambda count: (count == "own", count))


class Evaluation(Section):
    """Who judges the samples, and on which last words the models are examined."""

    judge: Annotated[Names, Field(min_length=1)] = ["gpt2-large"]
    """one or several (the paper's: gpt2-large, meta-llama/Meta-Llama-3-8B): baseline, the corpus's own autoregressive model; else a hub name or a folder
    that transformers loads"""
    lambada: str = "EleutherAI/lambada_openai"
    """last_words: items from the corpus's own held-out stories; else a hub name or a .jsonl with {"text": ...} lines"""
    lambada_items: PositiveInt | None = None
    """examine only the first so many"""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """resamples behind each 95% interval"""


class Prompts(Section):
    """Beginnings of held-out documents, and how much is written after them; the defaults are the paper's."""

    num_prompts: Annotated[int, Field(ge=2)] = 1024
    """the first so many held-out documents that are long enough"""
    per_prompt: Annotated[int, Field(ge=2)] = 5
    """continuations of each prompt"""
    prompt_tokens: Annotated[int, Field(ge=2)] = 50
    """tokens of a prompt, BOS the first"""
    continuation_tokens: Annotated[int, Field(ge=4)] = 50
    """tokens written after the prompt"""
    document_tokens: PositiveInt = 1024
    """a document is long enough with so many tokens, EOS not counted"""

    @model_validator(mode="after")
    def _room(self):
        needed = self.prompt_tokens + self.continuation_tokens - 1
        if self.document_tokens < needed:
            raise ValueError(
                f"document_tokens ({self.document_tokens}) must be at least {needed}: a text is BOS and "
                f"prompt_tokens + continuation_tokens - 1 tokens of its document ({self.prompt_tokens} + {self.continuation_tokens} - 1)"
            )
        return self


class Continuations(Prompts):
    """Continuations of held-out prompts: MAUVE, self-BLEU and the judge's perplexity of what is written after them."""

    continuation_steps: Annotated[list[PositiveInt], Field(min_length=1)] = [8, 16, 32, 64, 128]
    """step counts at which prompts are continued"""
    continuation_rounds: (
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None
    ) = None
    """which rounds continue them, 0 being the teacher; all when absent. The baseline always does"""


class Benchmark(Section):
    """What is timed: every student step count against autoregressive baselines."""

    lengths: Annotated[list[PositiveInt], Field(min_length=1)] = [64, 128, 256, 512, 1024]
    """tokens written"""
    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 8]
    """texts at once"""
    benchmark_steps: Annotated[list[PositiveInt], Field(min_length=1)] = [4, 8, 16, 32, 64]
    """sampling steps of the timed students"""
    baselines: Annotated[list[Literal["halfstep", "transformers", "vllm"]], Field(min_length=1)] = [
        "halfstep",
        "transformers",
    ]
    """who writes one token at a time: our decoder (static KV cache, CUDA graphs), transformers' generate with its static cache, vLLM where installed"""
    sizes: list[Size] = []
    """network sizes that are timed too, with untrained weights and the checkpoint's vocabulary; their rows say so"""
    timed_dtype: Literal["float32", "bfloat16"] = "float32"
    """of the blocks of all that is timed; readouts and draws stay as they are"""
    repeats: Annotated[int, Field(ge=3)] = 10
    """timed runs per case, after one warm-up; three where one run of each case takes more than a minute together"""


class Machine(Section):
    """Speed only: nothing here changes a result, so nothing here makes a finished artefact stale."""

    device: str = "auto"
    """auto: the first CUDA device, else the CPU"""
    threads: PositiveInt | None = None
    """CPU threads of torch, shared by this machine's processes; all cores when absent"""
    micro_batch: PositiveInt = 32
    """windows per forward pass; gradients are accumulated up to batch_size"""
    processes: PositiveInt | None = None
    """how many processes share this job, one for each GPU: they are started, through torchrun, unless torchrun has done so; any number when absent"""
    time_limit: Positive | None = None
    """minutes that a training may take: it keeps its state in time and leaves with exit code 75; the same command goes on"""


class Teacher(Section):
    """A corpus and a size, its teacher, its baseline, and the distillation runs that start from it."""

    corpus: Name
    """a key of `corpora`"""
    network: Network
    source: str | None = Field(None, alias="from")
    """published weights instead of pretraining: a .ckpt, a folder or a hub name, kuleshov-group/mdlm-owt or jdeschena/sdtt@teacher_1M_sm"""
    from_weights: Literal["ema", "raw"] = "ema"
    """which weights of `from` are the teacher: the average where it has one, or the raw ones (as the released code does)"""
    pretraining: Training = Training()
    baseline: Training = Training()
    """training of the autoregressive peer"""
    distillation: Distillation = Distillation()
    """what all runs share"""
    runs: dict[Name, Distillation] = {"kl_backward": Distillation()}
    """one row per run: only what differs from `distillation`"""

    @model_validator(mode="before")
    @classmethod
    def _rows(cls, raw):
        if isinstance(raw, dict) and isinstance(raw.get("runs"), dict):
            shared = raw.get("distillation") or {}
            if isinstance(shared, dict):
                return {
                    **raw,
                    "runs": {
                        k: {**shared, **(v or {})} if isinstance(v, dict | None) else v
                        for k, v in raw["runs"].items()
                    },
                }
        return raw

    @field_validator("runs")
    @classmethod
    def _reserved(cls, runs):
        for name in {"teacher", "baseline"} & runs.keys():
            raise ValueError(
                f"a run may not be called {name}: results/models/<teacher>/{name} is taken; choose another name"
            )
        return runs


class Config(Section):
    """Everything that `snakemake all` makes."""

    preset: str = "laptop"
    """which file of workflow/presets the rest overrides"""
    seed: Annotated[int, Field(ge=0)] = 1
    """of weights, batches, masks and times"""
    corpora: Annotated[dict[Name, Corpus], Field(min_length=1)]
    teachers: Annotated[dict[Name, Teacher], Field(min_length=1)]
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    continuations: Continuations | None = None
    """off when absent"""
    benchmark: Benchmark = Benchmark()
    published: bool = False
    """lay published values under figures and tables, in rows of their own that name their source"""

    @model_validator(mode="after")
    def _agree(self):
        for name, teacher in self.teachers.items():
            if teacher.corpus not in self.corpora:
                raise ValueError(
                    f"teachers.{name}.corpus is {teacher.corpus!r}, which is not a key of corpora: {', '.join(self.corpora)}"
                )
            corpus, how = self.corpora[teacher.corpus], self.continuations
            of = f"of corpus {teacher.corpus!r}"
            if self.evaluation.lambada == "last_words" and corpus.kind != "stories":
                raise ValueError(
                    f"evaluation.lambada is last_words, but the kind {of} is {corpus.kind}: only stories have them; name a hub data set or a .jsonl"
                )
            if teacher.source and self.sampling.weights == "best":
                raise ValueError(
                    f"sampling.weights is best, but teachers.{name}.from brings no best weights, for it was not validated here; choose ema or raw"
                )
            runs = teacher.runs.values() or [teacher.distillation]
            most = max(
                run.teacher_steps if count == "own" else count
                for count in self.sampling.steps
                for run in runs
            )
            if most > corpus.length and self.sampling.sampler != "ancestral":
                self._check_steps(most, corpus.length, of)
            if how and how.prompt_tokens + how.continuation_tokens >= corpus.length:
                raise ValueError(
                    f"continuations: prompt_tokens + continuation_tokens are {how.prompt_tokens} + {how.continuation_tokens}, "
                    f"but a window {of} has {corpus.length} tokens, EOS at its end; lower one of them"
                )
        return self

    def _check_steps(self, steps: int, length: int, of: str) -> None:
        from halfstep.diffusion.samplers import SAMPLERS  # torch; rarely needed
        from halfstep.errors import HalfstepError

        try:
            SAMPLERS[self.sampling.sampler].check_steps(self.sampling.sampler, steps, length)
        except HalfstepError as error:
            raise ValueError(f"sampling.{error} ({of})") from None
