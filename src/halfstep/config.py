"""The configuration: one strict definition for YAML, command-line flags, JSON schema and --help.

A section is a frozen pydantic model. Commands take sections as arguments, so the flag `--lr` and
the key `lr:` are the same field. resolve.py turns the user's YAML into a `Config`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from halfstep.released import ROUND, name_of_round, read_student
from halfstep.sanitize import CONTROL, mask_secrets
from halfstep.seeds import REPEAT


def _number(value: Any) -> Any:
    """YAML 1.1 reads `6e-5` and `1_000.0` as text; a float field means a number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Float = Annotated[float, pydantic.BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, lt=1)]


def whole_number(value: Any) -> Any:
    """Take `1e6` and `1_000_000`, texts in YAML 1.1 or on a command line, for whole numbers."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d[\d_]{,99}", value):
        return int(value.replace("_", ""))
    number = _number(value)
    if isinstance(number, float) and number.is_integer() and abs(number) <= 2**53:
        return int(number)
    return value


# Every number has an upper bound: nothing may count to 10**12 before it is refused.
Whole = Annotated[int, pydantic.BeforeValidator(whole_number)]
Count = Annotated[Whole, Field(gt=0, le=10**9)]
TokenCount = Annotated[Whole, Field(ge=1, le=2**20)]
Threads = Annotated[Whole, Field(ge=1, le=2**16)]
Seed = Annotated[Whole, Field(ge=0, le=2**63 - 1)]


def _each_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("expected every seed once; remove the others")
    return seeds


Seeds = Annotated[
    list[Annotated[Whole, Field(ge=1, le=10**9)]],
    Field(min_length=1),
    pydantic.AfterValidator(_each_once),
]
"""Seeds of a training and of its repeats"""
MOST_ROUNDS = 20
MOST_STEPS = 2**MOST_ROUNDS
Steps = Annotated[Whole, Field(ge=1, le=MOST_STEPS)]
RoundNumber = Annotated[Whole, Field(ge=0, le=MOST_ROUNDS)]
TeacherSteps = Annotated[
    Steps,
    pydantic.WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MOST_STEPS}, {"const": "length"}]}
    ),
]
FEWEST_TOKENS = 0.3  # that a step of a round's teacher should reveal on average


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def check_path(path: str) -> str:
    """Refuse a path that Snakemake would change or print raw; it may begin as it likes."""
    if CONTROL.search(path) or "\n" in path or "\t" in path:
        raise ValueError("has a control character; rename the file or folder")
    if "{" in path or "}" in path:
        raise ValueError(
            "braces are not expanded: Snakemake takes them for a wildcard; "
            "give each file its own entry, or rename it"
        )
    return path


def _check_word(word: str) -> str:
    """Refuse what a rule's command would read as a flag, and what would show a secret."""
    if not word.strip():
        raise ValueError("expected a name or a path; fill it in, or leave the key out")
    if word.startswith("-"):
        raise ValueError(f"a command would read it as a flag; write ./{word} for a file")
    if mask_secrets(word) != word:
        raise ValueError(
            "holds a password or a token, which commands and logs would show; "
            "put it into the environment, such as HF_TOKEN"
        )
    return check_path(word)


Word = Annotated[str, pydantic.AfterValidator(_check_word)]
"""A name or a path that rules write into their commands"""
Names = Annotated[
    list[Word], pydantic.BeforeValidator(_list, json_schema_input_type=str | list[str])
]
Weights = Literal["ema", "raw", "best"]
Precision = Literal["float32", "bfloat16"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, and values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )


class Corpus(Section):
    """The text, and the windows of tokens that it is cut into."""

    kind: Literal["stories", "docs", "openwebtext", "files"]
    """stories: written by the built-in grammar; docs: docstrings of the installed Python packages;
    openwebtext: from the hub; files: your own text"""
    length: Annotated[TokenCount, Field(ge=8)] = 1024
    """tokens per window, BOS and EOS included"""
    tokenizer: Word = "bpe"
    """bpe: a byte-level BPE trained on the corpus; otherwise a hub name (gpt2) or a folder with
    vocab.json and merges.txt"""
    vocab_size: Annotated[Whole, Field(ge=258, le=2**24)] = 8192
    """vocabulary size of the trained BPE, EOS included (only with tokenizer: bpe)"""
    files: list[Word] = []
    """paths or globs of .txt, .jsonl, .jsonl.gz or .parquet files (only with kind: files)"""
    text_field: Word = "text"
    """field of .jsonl and .parquet files that holds the text (only with kind: files)"""
    num_documents: Count | None = None
    """maximum number of documents to read; kind stories: number of stories to write"""
    validation_documents: Count | None = None
    """number of held-out documents (by default 1,000; openwebtext: 100,000): the last ones of the
    corpus, or stories with combinations that are never trained on"""
    corpus_seed: Seed = 1
    """seed of the grammar (only with kind: stories)"""

    @model_validator(mode="after")
    def _check_kind(self) -> Corpus:
        if (self.kind == "files") != bool(self.files):
            raise ValueError(
                "`files` and kind: files need each other, "
                f"found kind: {self.kind} and files: {self.files}"
            )
        if self.kind == "stories" and self.num_documents is None:
            raise ValueError("kind: stories needs num_documents, the number of stories to write")
        self._check_unused("corpus_seed", "kind", "stories")
        self._check_unused("text_field", "kind", "files")
        self._check_unused("vocab_size", "tokenizer", "bpe")
        return self

    def _check_unused(self, key: str, switch: str, wanted: str) -> None:
        """Refuse a value of `key` where another key makes it useless."""
        value = getattr(self, key)
        if getattr(self, switch) != wanted and value != type(self).model_fields[key].default:
            raise ValueError(
                f"{key}: found {value!r}, which is used only with {switch}: {wanted}; leave it out"
            )


# Blocks, width and heads: SDTT Table 2, and two sizes for small machines.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (3, 128, 8),
    "mini": (6, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (24, 1536, 16),
    "1.3B": (24, 2048, 32),
    "3B": (26, 3072, 32),
    "8B": (40, 4096, 32),
}
COND_WIDTH = 128  # of the vector that adaLN reads the noise level from, in every row of SIZES
SHAPE = r"(1\d\d|[1-9]\d?)(x[1-9]\d{0,4}){2,3}"  # blocks x width x heads, if need be x COND_WIDTH


def shape_of_size(size: str) -> tuple[int, int, int, int]:
    """(blocks, width, heads, width of adaLN's input) of a network size."""
    if size in SIZES:
        return (*SIZES[size], COND_WIDTH)
    blocks, width, heads, *rest = map(int, size.split("x"))
    return blocks, width, heads, rest[0] if rest else COND_WIDTH


def size_of_shape(blocks: int, width: int, heads: int, cond_width: int = COND_WIDTH) -> str:
    """The network size with this shape: a row of SIZES, or its numbers, as in 6x256x4."""
    if cond_width != COND_WIDTH:
        return f"{blocks}x{width}x{heads}x{cond_width}"
    names = [name for name, row in SIZES.items() if row == (blocks, width, heads)]
    return names[0] if names else f"{blocks}x{width}x{heads}"


def _check_size(size: str) -> str:
    """A network size in its only spelling: 3x128x8 is tiny."""
    if size in SIZES:
        return size
    if not re.fullmatch(SHAPE, size):  # an error like that of a Literal, which has a hint
        raise PydanticCustomError("literal_error", "Input should be {expected}", KNOWN_SIZES)
    blocks, width, heads, cond_width = shape_of_size(size)
    if width % (2 * heads):
        raise ValueError(f"the width {width} must be a multiple of 2 x {heads} heads")
    return size_of_shape(blocks, width, heads, cond_width)


KNOWN_SIZES = {
    "expected": f"{', '.join(map(repr, SIZES))} or blocks, width and heads as in '6x256x4'"
}
Size = Annotated[
    str,
    pydantic.AfterValidator(_check_size),
    pydantic.WithJsonSchema(
        {"type": "string", "anyOf": [{"enum": list(SIZES)}, {"pattern": f"^{SHAPE}$"}]}
    ),
]


class Network(Section):
    """The network of the denoiser and of its autoregressive baseline."""

    size: Size = "small"
    """tiny, mini; SDTT Table 2: small 169M, medium 424M, large 863M, 1.3B, 3B, 8B; or any other
    shape as blocks x width x heads: 6x256x4"""
    time_conditioning: bool = False
    """feed the time t to adaLN (the paper feeds zero)"""
    shifted: bool = False
    """predict each token from the output at the position before it, as the teachers do that are
    adapted from autoregressive models (DiffuGPT)"""
    architecture: Literal["dit", "gpt2", "transformers"] = "dit"
    """dit: the paper's, with RoPE and adaLN; gpt2: that of teachers which are adapted from GPT-2;
    transformers: that of baselines with `from`. The last two follow from the weights"""
    schedule: Literal["loglinear", "cosine"] = "loglinear"
    """noise schedule alpha(t): loglinear (MDLM and the paper), or cosine (MaskGIT, MD4)"""

    @model_validator(mode="after")
    def _check_time(self) -> Network:
        if self.time_conditioning and self.architecture == "gpt2":
            raise ValueError(
                "found time_conditioning, but the architecture gpt2 has no input for the time; "
                "leave it out"
            )
        return self

    @property
    def blocks(self) -> int:
        return shape_of_size(self.size)[0]

    @property
    def width(self) -> int:
        return shape_of_size(self.size)[1]

    @property
    def heads(self) -> int:
        return shape_of_size(self.size)[2]

    @property
    def cond_width(self) -> int:
        return shape_of_size(self.size)[3]


class Training(Section):
    """Training of a network. The defaults are those of MDLM on OpenWebText."""

    num_steps: Count = 1_000_000
    """optimizer steps"""
    batch_size: Count = 512
    """windows per optimizer step, over all devices and micro-batches"""
    lr: Positive = 3e-4
    """peak learning rate of AdamW"""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """shape of the learning rate after the warm-up; linear and cosine end at lr / 50"""
    warmup_steps: Annotated[Whole, Field(ge=0, le=10**9)] = 2500
    """steps of linear warm-up"""
    weight_decay: Annotated[Float, Field(ge=0)] = 0.0
    """decoupled weight decay of AdamW"""
    beta2: Share = 0.999
    """decay of AdamW's second moment (the first moment's is 0.9)"""
    grad_clip: Positive = 1.0
    """maximum global norm of the gradient"""
    ema_decay: Share = 0.9999
    """decay of the moving average of the weights, ramped by (1+n)/(10+n)"""
    dropout: Share = 0.1
    """probability that an element of a residual branch is dropped in training"""
    precision: Precision = "bfloat16"
    """autocast dtype of the network; divergences and losses are always float32"""
    min_t: Share = 1e-3
    """smallest training time (MDLM's sampling_eps)"""
    validate_every: Count = 5000
    """optimizer steps between evaluations of the held-out loss"""

    @model_validator(mode="after")
    def _check_warmup(self) -> Training:
        if self.warmup_steps >= self.num_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be below num_steps ({self.num_steps})"
            )
        return self


class BaselineOptions(Training):
    """The autoregressive baseline: its training, or a published model in its place."""

    source: Word | None = Field(None, alias="from")
    """a causal language model that transformers loads, instead of training: a hub name (gpt2,
    gpt2@revision) or a folder; its tokenizer must be that of the corpus"""

    @model_validator(mode="before")
    @classmethod
    def _check_source(cls, raw: Any) -> Any:
        unused = sorted(map(str, raw.keys() - {"from"})) if isinstance(raw, dict) else []
        if unused and raw.get("from"):
            raise ValueError(
                f"found `from` and {', '.join(unused)}, but a published model is not trained here; "
                "leave one or the other out"
            )
        return raw


class Pretraining(Training):
    """Training of the teacher. The defaults are those of MDLM on OpenWebText."""

    anneal_attention: Annotated[Whole, Field(ge=0, le=10**9)] = 0
    """only with `adapt`: optimizer steps in which attention grows from causal to full, with more
    pairs of positions in every step (DiffuGPT); 0: full at once"""

    @model_validator(mode="after")
    def _check_annealing(self) -> Pretraining:
        if self.anneal_attention > self.num_steps:
            raise ValueError(
                f"anneal_attention ({self.anneal_attention}) must be at most num_steps "
                f"({self.num_steps}), because a denoiser is used with full attention"
            )
        return self


Divergence = Literal["kl_backward", "kl_forward", "mse", "tvd", "l1_log_p"]


class Distillation(Training):
    """One run of Self-Distillation Through Time. The defaults are the paper's."""

    num_steps: Count = 10_000
    """optimizer steps in one round"""
    batch_size: Count = 128
    """windows per optimizer step, over all devices and micro-batches"""
    lr: Positive = 6e-5
    """peak learning rate of AdamW"""
    warmup_steps: Annotated[Whole, Field(ge=0, le=10**9)] = 500
    """steps of linear warm-up in the first round and after a reset of the optimizer"""
    min_t: Share = 1e-5
    """smallest training time"""
    divergence: Divergence = "kl_backward"
    """divergence between student and teacher; kl_backward: KL(student || teacher), the paper's KLD;
    l1_log_p: what the released code calls tvd"""
    teacher_steps: TeacherSteps = 1024
    """sampling steps of the first teacher; in config.yaml also `length`: as many as a window of the
    corpus has tokens"""
    rounds: Annotated[Whole, Field(ge=1, le=MOST_ROUNDS)] = 7
    """number of rounds; each divides the sampling steps by `substeps`"""
    substeps: Annotated[Steps, Field(ge=2)] = 2
    """teacher steps that one student step replaces (the paper's m/k)"""
    teacher_times: Literal["exact", "released"] = "exact"
    """times of the teacher's substeps: exact (Algorithm 1) or released (the released code)"""
    next_teacher: Literal["raw", "ema"] = "raw"
    """weights of the student that become the next teacher"""
    reset_optimizer: bool = False
    """start every round with a fresh optimizer state"""
    reset_ema: bool = False
    """start the moving average of every round at the student's weights"""
    entropy_band: Positive | None = None
    """stop a round when the unigram entropy of its samples differs from that of held-out text by
    more than this fraction"""

    @model_validator(mode="after")
    def _check_rounds(self) -> Distillation:
        most = 0
        while self.teacher_steps % self.substeps ** (most + 1) == 0:
            most += 1
        if self.rounds > most:
            raise ValueError(
                f"{self.rounds} rounds of {self.substeps} substeps do not divide "
                f"teacher_steps {self.teacher_steps}: at most {most} rounds do, "
                f"or choose a multiple of {self.substeps**self.rounds}"
            )
        return self


class RunOptions(Distillation):
    """A run of the configuration: the options of its rounds, and how often they are trained."""

    source: Word | None = Field(None, alias="from")
    """published students instead of training: a .ckpt file, a folder or a hub name, with <round> in
    place of the number of the round (jdeschena/sdtt@baselines_kld_step_<round>0000)"""
    seeds: Seeds | None = None
    """training seeds: the rounds are trained, sampled and scored once with each of them
    (default: the seed of the teacher)"""

    @model_validator(mode="after")
    def _check_source(self) -> RunOptions:
        if not self.source:
            return self
        if ROUND not in self.source:
            raise ValueError(
                f"from: found {self.source!r}, which is the same for every round; write {ROUND} "
                "in place of the number of the round"
            )
        for number in range(1, self.rounds + 1):
            name = name_of_round(self.source, number)
            known = read_student(name)
            own = (number, self.divergence, self.teacher_steps, self.substeps)
            if known and known != own:
                raise ValueError(
                    f"from: {name} is round {known.round} of {known.divergence} from "
                    f"{known.teacher_steps} steps by {known.substeps} substeps, but this run has "
                    f"it as round {number} of {self.divergence} from {self.teacher_steps} steps "
                    f"by {self.substeps} substeps; change one of them"
                )
        return self


OF_IMPORTED = ("from", "divergence", "teacher_steps", "rounds", "substeps")
"""Keys of a run whose students are published: what they were trained for"""


class PublishedStudent(Section):
    """What a published student was trained for."""

    round: RoundNumber | None = None
    """number of the round (0: a teacher); by default, round and other options are those that the
    name of a revision of jdeschena/sdtt says, and any other name is that of a teacher"""
    divergence: Divergence = "kl_backward"
    """divergence between student and teacher"""
    teacher_steps: Steps = 1024
    """sampling steps of the first teacher"""
    substeps: Annotated[Steps, Field(ge=2)] = 2
    """teacher steps that one student step replaces"""


NAIVE = ("unigram", "bigram", "cut_and_paste")
"""samplers without a network (data/naive.py), rows of every table of quality"""


class DrawOptions(Section):
    """How texts are drawn."""

    sampler: Literal["ancestral", "analytic", "first_hitting", "block", "ancestral_float32"] = (
        "ancestral"
    )
    """how a denoiser's positions are revealed; block: 16 tokens at a time from left to right, with
    the keys and values of all others cached (an approximation); ancestral_float32: with the
    truncated noise of the released code (slow)"""
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


GENERATE_STAGE = 4
"""version of what `halfstep generate` draws (STAGE in rules/common.smk); samples.json holds it, and
samples of another version are drawn again"""


class GenerateOptions(DrawOptions):
    """How one set of samples is drawn."""

    num_samples: Count = 1024
    """number of texts per model and step count"""


class FrontierOptions(Section):
    """Further temperatures, for the generative frontier."""

    temperatures: list[Positive] = []
    """temperatures of the generative frontier, perplexity against entropy; `temperature` is always
    among them. Without any, there is no frontier"""
    frontier_steps: Annotated[list[Steps], Field(min_length=1)] | None = None
    """step counts of the frontier; by default those of `steps` but own"""


def _step_count(value: Any) -> int | str:
    count = whole_number(value)
    if value == "own" or (type(count) is int and 0 < count <= MOST_STEPS):
        return count
    if type(count) is int and count > MOST_STEPS:
        raise ValueError(f"expected at most {MOST_STEPS} steps, or own")
    raise ValueError("expected a whole number above zero, or own")


StepCount = Annotated[
    Any,
    pydantic.PlainValidator(_step_count),
    pydantic.WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MOST_STEPS},
                {"const": "own"},
            ]
        }
    ),
]


class Sampling(GenerateOptions, FrontierOptions):
    """How samples are drawn for scoring, and at which step counts."""

    steps: Annotated[list[StepCount], Field(min_length=1)] = [8, 16, 32, 64, 128, 256, 512, 1024]
    """step counts at which every denoiser is sampled; own: the count that a model was made for, and
    that of its student"""
    rounds: Annotated[list[RoundNumber], Field(min_length=1)] | None = None
    """rounds that are sampled (0 is the teacher); all by default. The baseline always is"""
    frontier_rounds: Annotated[list[RoundNumber], Field(min_length=1)] | None = None
    """rounds on the frontier (0 is the teacher); by default the teacher and the last round of each
    run. The baseline always is"""

    @field_validator("steps")
    @classmethod
    def _sorted(cls, steps: list[int | str]) -> list[int | str]:
        return sorted(set(steps), key=lambda count: (count == "own", count))

    @field_validator("rounds", "temperatures", "frontier_steps", "frontier_rounds")
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
    tasks: Names = []
    """tasks of lm-eval by name, or paths of .yaml files that define one: multiple choice, answered
    by the ELBO of the whole text, and others that ask for likelihoods. The baseline, the teacher
    and the last round of each run answer them (the paper's table 1: arc_easy, arc_challenge,
    hellaswag, mathqa, piqa, winogrande)"""
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
    sizes: list[Size] = []
    """further network sizes, timed with untrained weights and the vocabulary of the first teacher;
    their rows say so"""


class Machine(Section):
    """Speed only: these options change no result, so they make no finished artifact stale."""

    device: str = "auto"
    """auto: the first CUDA device, or the CPU if there is none; otherwise a torch device (cpu)"""
    threads: Threads | None = None
    """CPU threads of torch, shared by the processes on this machine; all cores by default"""
    micro_batch: Count = 32
    """windows per forward pass; training accumulates gradients up to batch_size"""
    processes: Annotated[Whole, Field(ge=1, le=9999)] | None = None
    """number of processes that share this job, one per GPU; they are started through torchrun,
    unless torchrun started this process (default: one, or as many as torchrun started)"""
    time_limit: Positive | None = None
    """time limit of a training in minutes; before it ends, the training saves its state and exits
    with code 75; the same command resumes it"""


class Teacher(Section):
    """A corpus and a network size, with a teacher, a baseline and runs that distill the teacher."""

    corpus: Name
    """a key of `corpora`"""
    network: Network
    source: Word | None = Field(None, alias="from")
    """published weights instead of pretraining: a .ckpt file, a folder, or a hub name
    (kuleshov-group/mdlm-owt, jdeschena/sdtt@teacher_1M_sm)"""
    adapt: Word | None = None
    """pretraining starts from these autoregressive weights (DiffuGPT): baseline, the one of this
    teacher; the folder of a checkpoint of `halfstep train-baseline`; or a GPT-2 model of
    transformers: a hub name (gpt2) or a folder"""
    from_weights: Literal["ema", "raw"] = "ema"
    """weights of `from` that become the teacher; ema: the moving average if the file has one;
    raw: the raw weights, as the released code takes them"""
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
                    f"teachers.{name}: found `from` and `adapt`, but published weights are not "
                    "trained here; leave one of them out"
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
        published: dict[str, Any] = {"": teacher, ".baseline": teacher.baseline}
        published |= {f".runs.{key}": run for key, run in teacher.runs.items()}
        for key in [key for key, part in published.items() if part and part.source]:
            if self.sampling.weights == "best":
                raise ValueError(
                    f"sampling.weights is best, but teachers.{name}{key}.from has no best weights, "
                    "because halfstep did not validate it; choose ema or raw"
                )

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
        most = max(own if count == "own" else count for count in self.sampling.steps)
        if most > corpus.length and self.sampling.sampler != "ancestral":  # spares torch's import
            self._check_steps("sampling.steps", most, corpus.length, of)
        prompts = self.continuations
        if prompts and self.sampling.sampler != "ancestral":
            written = prompts.prompt_tokens + prompts.continuation_tokens
            most = max(prompts.continuation_steps)
            self._check_steps("continuations.continuation_steps", most, written, "of prompts")
        if prompts and prompts.prompt_tokens + prompts.continuation_tokens >= corpus.length:
            raise ValueError(
                "continuations: prompt_tokens + continuation_tokens are "
                f"{prompts.prompt_tokens} + {prompts.continuation_tokens}, but a window {of} has "
                f"{corpus.length} tokens, EOS at its end; lower one of them"
            )

    def _check_steps(self, key: str, steps: int, length: int, of: str) -> None:
        from halfstep.diffusion.samplers import SAMPLERS  # imports torch; rarely needed
        from halfstep.errors import HalfstepError

        try:
            SAMPLERS[self.sampling.sampler].check_steps(self.sampling.sampler, steps, length)
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
    if teacher.seeds and teacher.source:
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


def section_type(annotation: Any) -> type[Section] | None:
    """The section that a field holds: directly, optionally, or as the values of a dict."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def flag_name(key: str) -> str:
    """The flag of a key: `num_steps` -> `--num-steps`."""
    return "--" + key.replace("_", "-")


def negated_flag(name: str) -> str:
    """The flag that sets a switch to false: `--x` -> `--no-x`."""
    return "--no-" + name.removeprefix("--")
