"""The sections of trainings: pretraining, the baseline, and the rounds of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from halfstep.config.values import (
    MOST_ROUNDS,
    Count,
    Float,
    Names,
    Positive,
    Precision,
    RoundNumber,
    Section,
    Seeds,
    Share,
    Steps,
    TeacherSteps,
    Whole,
    Word,
)
from halfstep.released import ROUND, name_of_round, read_student


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
    max_empty_texts: Annotated[Float, Field(ge=0, le=1)] | None = None
    """only with a corpus of pairs: stop when more than this share of the responses that are drawn
    in a validation are only end-of-text"""

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
    max_empty_texts: Annotated[Float, Field(ge=0, le=1)] | None = None
    """only with a corpus of pairs: stop when more than this share of the responses that are drawn
    in a validation are only end-of-text"""
    lora_rank: Annotated[Whole, Field(ge=1, le=2**16)] | None = None
    """train adapters of this rank (LoRA) instead of the network, in less memory: teacher and
    student are one network with two adapters; null: the whole network"""
    lora_alpha: Positive = 32.0
    """adapters are multiplied by lora_alpha / lora_rank (only with lora_rank)"""
    lora_targets: Names = []
    """linear layers that have adapters, by name or the end of it: [q_proj, v_proj] (only with
    lora_rank); []: all but the readout"""

    @model_validator(mode="after")
    def _check_rounds(self) -> Distillation:
        for key in ("lora_alpha", "lora_targets"):
            value = getattr(self, key)
            if self.lora_rank is None and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: found {value}, which is used only with lora_rank; leave it out, or "
                    "set lora_rank: 16"
                )
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
