"""`halfstep distill-round`: one round of Self-Distillation Through Time."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halfstep import checkpoint
from halfstep.commands.adapter_round import (
    AdapterRound,
    check_adapters,
    lora_of,
    teacher_of_adapters,
)
from halfstep.commands.train import NEVER, DiffusionObjective
from halfstep.commands.training_job import (
    WATCHED_STEPS,
    HeldOut,
    TrainingJob,
    watch_empty,
    watched_texts,
)
from halfstep.config import Distillation, Machine, Seed
from halfstep.data.tokenizer import read_tokenizer
from halfstep.data.windows import Windows, corpus_files, corpus_tokenizer
from halfstep.diffusion.contracts import Denoiser
from halfstep.diffusion.masking import corrupt, mask_indices, to_device
from halfstep.diffusion.objective import stratified_times
from halfstep.diffusion.schedules import masked_share
from halfstep.distill.divergences import DIVERGENCES
from halfstep.distill.rounds import Round, plan_round
from halfstep.distill.targets import divergence_loss, teacher_targets
from halfstep.errors import HalfstepError
from halfstep.meta import framing_of
from halfstep.metrics.diversity import unigram_entropy
from halfstep.models import flops
from halfstep.models.denoiser import SubsDenoiser
from halfstep.records import provenance
from halfstep.training.blocks import prepare_blocks
from halfstep.training.ema import EMA
from halfstep.training.loop import fit
from halfstep.training.state import Start
from halfstep.training.step import Batch, Tensors

OF_ORIGIN = ("adapted", "transformers", "framing")  # entries of meta.json that students keep
ENTROPY_WINDOWS = 256  # held-out windows that they are compared with, or all there are


def distill_round(
    teacher: Path,
    corpus: Path,
    round: int,
    output: Path,
    run: Distillation,
    machine: Machine,
    seed: Seed = 1,
) -> None:
    """Teach a student to do in one step what its teacher does in `substeps` (SDTT Algorithm 2).

    Args:
        teacher: checkpoint folder: the pretrained teacher in round 1, then the last round's student
        corpus: folder of `halfstep prepare-corpus`
        round: 1 .. rounds; sets the size of the teacher's step
        output: folder of the student's checkpoint
        seed: of batches, masks, times and the teacher's draws
    """
    plan = plan_round(run, round)
    base, name = output.parent.parent.name, f"{output.parent.name}/round-{round}"
    job = TrainingJob.begin(f"distill-round/{base}/{name}", corpus, output, machine)
    source = checkpoint.read_meta(teacher)
    _check_teacher(source, teacher, job.windows, corpus, round)
    check_adapters(teacher, source, run)

    begin_with, lora = "ema" if round == 1 else "raw", lora_of(run)
    adapted = AdapterRound(teacher, source, begin_with, run) if lora else None
    if adapted:
        student, old, start = _begin_adapters(adapted, round, job, seed)
    else:
        student, old, start = _begin_round(teacher, source, begin_with, round, run, job, seed)
    held_out = HeldOut.read(corpus, job.device, machine, job.group)
    validation = DiffusionObjective(student, source["training"]["min_t"], held_out)
    shared = adapted is not None and job.group.shards(student.network)
    objective = DistillationObjective(student, old, plan, run, validation, seed, shared)
    meta = {
        **{key: source[key] for key in ("kind", "network", "vocab_size", "eos_id", "length")},
        **job.corpus_facts(),
        "run": run.model_dump(),
        "seed": seed,
        "round": round,
        "dt": plan.dt,
        "student_steps": plan.student_steps,
        "teacher_sha256": source["sha256"],
        **job.windows.framed,
        **{key: source[key] for key in OF_ORIGIN if key in source},
        "training": source["training"],
    }
    meta |= {"lora": lora} if lora else {}
    digest = source["sha256"][checkpoint.FILES[begin_with]]
    about = {"seed": seed, "round": round, "dt": plan.dt, "student_steps": plan.student_steps}
    tags = {"teacher": base, "run": output.parent.name, "round": round}
    read_weights = {"name": "teacher", "digest": digest, "source": str(teacher)}
    step_flops = flops_per_token(student, old, plan, run.batch_size, job.windows.length)
    with job.journal(name, {**about, **run.model_dump()}, tags, [read_weights]) as journal:
        batches = job.batches(run, seed + round)
        state = fit(student.network, objective, batches, run, start, job.run(journal, step_flops))
        merge = adapted and partial(adapted.files, student.network)
        job.finish(state, meta, journal, checkpoint.read_kept(teacher), merge)
    if not job.group.is_main:
        return
    read = [
        *corpus_files(corpus, "train", "validation"),
        *checkpoint.checkpoint_files(teacher, "raw", "ema"),
    ]
    if start.optimizer_state is not None:
        read.append(teacher / "optimizer.safetensors")
    written = [output, *(output / name for name in checkpoint.KEPT)]
    provenance.write_record(output / provenance.NAME, written, read)


def _begin_round(
    teacher: Path,
    source: dict,
    begin_with: str,
    round: int,
    run: Distillation,
    job: TrainingJob,
    seed: int,
) -> tuple[SubsDenoiser, SubsDenoiser, Start]:
    """Student and teacher of a round, and what its training begins from.

    Round 1 starts from the teacher's averaged weights, later rounds from its raw weights.
    """
    first = round == 1
    weights = {
        which: checkpoint.read_tensors(teacher, checkpoint.FILES[which], source)
        for which in ("raw", "ema")
    }
    network = checkpoint.build_network(source, run.dropout)
    checkpoint.load_weights(network, weights[begin_with], teacher)
    # Every rank has the whole teacher, because the passes of a teacher depend on its texts.
    whole = sum(tensor.nbytes for tensor in weights[begin_with].values())
    job.place(network, also=whole // 2 if run.precision == "bfloat16" else whole)
    teacher_weights, device = "ema" if first else run.next_teacher, str(job.device)
    old = checkpoint.load_checkpoint(teacher, teacher_weights, device, run.precision).denoiser
    assert old is not None  # _check_teacher has refused an autoregressive model
    prepare_blocks(old.network, job.machine, job.device)
    optimizer_state = None
    if not first and not run.reset_optimizer:
        optimizer_state = _read_optimizer_state(teacher, source)
    if first or run.reset_ema:
        ema = EMA(network, run.ema_decay)
    else:
        ema = EMA(network, run.ema_decay, weights["ema"], source["ema_updates"])
    start = Start(seed + 1000 * round, ema, optimizer_state, from_zero=True)
    return checkpoint.build_denoiser(network, source), old, start


def _begin_adapters(
    adapted: AdapterRound, round: int, job: TrainingJob, seed: int
) -> tuple[SubsDenoiser, SubsDenoiser, Start]:
    """As `_begin_round`: student and teacher are one network with two adapters."""
    network = adapted.network(seed)
    job.place(network)
    student = checkpoint.build_denoiser(network, adapted.source)
    ema, state = adapted.ema(network), adapted.optimizer_state
    start = Start(seed + 1000 * round, ema, state, from_zero=True)
    return student, teacher_of_adapters(student), start


@dataclass(frozen=True)
class DistillationObjective:
    """SDTT Algorithm 2: the divergence's mean over the masked positions of the global batch.

    validation: measures the student's held-out NELBO
    seed: of the samples behind val/entropy
    shared: the ranks share the teacher's network, so all of them take each of its passes
    """

    student: Denoiser
    teacher: Denoiser
    round: Round
    run: Distillation
    validation: DiffusionObjective
    seed: int
    shared: bool = False

    def corrupt(
        self,
        x0: Tensor,
        generator: torch.Generator,
        step: int | None = None,
        asked: Tensor | None = None,
    ) -> Batch:
        """Draw t, stratified over [min_t, 1), xt ~ q(xt | x0), and the teacher's uniforms.

        Only positions that are asked for are masked.
        """
        B, L = x0.shape
        u_time = torch.rand(B, generator=generator, dtype=torch.float64)
        t = stratified_times(u_time, self.run.min_t)
        u = torch.rand(3, B, L, generator=generator, dtype=torch.float64)
        u_mask = u[0] if asked is None else u[0].masked_fill(~asked, NEVER)
        xt = corrupt(x0, t, u_mask, self.student.schedule, self.student.mask_id)
        masked = int((xt == self.student.mask_id).sum())
        return Batch({"xt": xt, "t": t, "u_reveal": u[1], "u_token": u[2]}, max(1, masked))

    def loss(self, part: Tensors) -> Tensor:
        """The divergence, summed over the masked positions."""
        return sdtt_loss(self.student, self.teacher, part, self.round, self.run, self.shared)

    def validate(self) -> dict[str, float]:
        """Held-out NELBO of the student in nats per token, and entropy of its samples in nats."""
        figures = self.validation.validate()
        held_out, band = self.validation.held_out, self.run.entropy_band
        steps = min(WATCHED_STEPS, self.round.student_steps)
        texts = watched_texts(self.student, held_out, steps, self.seed)
        figures |= watch_empty(texts, held_out, self.run.max_empty_texts)
        return {**figures, "val/entropy": watch_entropy(texts, held_out, self.round, band)}


def sdtt_loss(
    student: Denoiser,
    teacher: Denoiser,
    part: Tensors,
    round: Round,
    run: Distillation,
    all_passes: bool = False,
) -> Tensor:
    """Divergence of the student from its teacher's targets, summed over the masked positions.

    part: xt[B, L] int64, t[B] and the uniforms u_reveal[B, L], u_token[B, L] float64, on the host.
    The result is a scalar on the student's device.
    """
    xt, t, device = part["xt"], part["t"].float(), student.readout[0].device
    masked = mask_indices(xt == student.mask_id, device)
    u_reveal, u_token = part["u_reveal"], part["u_token"]
    goal = teacher_targets(
        teacher, xt, t, round.dt, round.substeps, u_reveal, u_token, run.teacher_times, all_passes
    )
    h = student.features(to_device(xt, device), to_device(t, device), masked)
    divergence = DIVERGENCES[run.divergence]
    return divergence_loss(divergence, h, student.readout, goal, teacher.readout)


def watch_entropy(texts: Tensor, held_out: HeldOut, round: Round, band: float | None) -> float:
    """Unigram entropy of the student's texts[N, L] in nats; of pairs, that of the responses.

    Raises HalfstepError if it differs from held-out text's by more than the share `band`. A lower
    perplexity at a lower entropy is no success: a student that repeats itself is stopped before it
    becomes a teacher.
    """
    goal = _entropy(held_out.x0[:ENTROPY_WINDOWS], held_out)
    found = _entropy(texts, held_out)
    if band is not None and abs(found / goal - 1) > band:
        raise HalfstepError(
            f"round {round.index}: the samples' entropy is {found:.2f} nats, held-out text's "
            f"{goal:.2f}: outside entropy_band {band}, the student collapses; lower lr or "
            "num_steps, train a better teacher, or widen entropy_band"
        )
    return found


def _entropy(texts: Tensor, held_out: HeldOut) -> float:
    """Mean unigram entropy of texts[N, L], or of their responses up to the first end-of-text."""
    counted = [text.numpy() for text in held_out.responses(texts) or texts]
    return float(unigram_entropy(counted).mean())


def flops_per_token(
    student: SubsDenoiser, teacher: SubsDenoiser, round: Round, texts: int, length: int
) -> float:
    """Expected FLOPs of one update per token of its batch.

    Over all times the schedule masks `masked_share` of the tokens, and the first substep reveals
    the share that is no longer masked dt later.
    """
    masked = masked_share(teacher.schedule)
    update = flops.distillation_flops(
        flops.network_shape(student.network),
        flops.network_shape(teacher.network),
        texts,
        length,
        masked,
        masked - masked_share(teacher.schedule, round.dt),
        round.substeps,
        teacher.ignores_time,
    )
    return update / (texts * length)


def _check_teacher(meta: dict, teacher: Path, windows: Windows, corpus: Path, round: int) -> None:
    """Raise HalfstepError unless the checkpoint fits the corpus and is that of the last round."""
    if meta["kind"] != "diffusion":
        raise HalfstepError(
            f"--teacher {teacher}: is an {meta['kind']} model; "
            "name a diffusion checkpoint, results/models/<name>/teacher"
        )
    for key in ("vocab_size", "length"):
        expected = getattr(windows, key)
        if meta[key] != expected:
            raise HalfstepError(
                f"--teacher {teacher}: {key} {meta[key]}, but corpus {corpus} has {expected}; "
                "use the corpus it was trained on"
            )
    framing = windows.framed.get("framing")
    if framing is not None and framing_of(meta) != framing_of(windows.manifest):
        raise HalfstepError(
            f"--teacher {teacher}: its texts do not begin and end as those of corpus {corpus}, "
            f"which has {framing['begin']} and {framing['end']}; use the corpus it was trained on"
        )
    own = checkpoint.checked_file(teacher, "tokenizer.json", meta)
    if read_tokenizer(own).get_vocab() != corpus_tokenizer(corpus).get_vocab():
        raise HalfstepError(
            f"--teacher {teacher}: its tokenizer has other tokens than that of corpus {corpus}; "
            "use the corpus it was trained on"
        )
    if meta.get("round") != round - 1:
        raise HalfstepError(
            f"--round {round}: its teacher is the checkpoint of round {round - 1}, "
            f"but {teacher} is of round {meta.get('round')}"
        )
    if "min_t" not in meta.get("training", {}) or "ema_updates" not in meta:
        raise HalfstepError(
            f"--teacher {teacher}: its meta.json has no training.min_t or no ema_updates; "
            "name a checkpoint that halfstep trained or imported"
        )


def _read_optimizer_state(teacher: Path, meta: dict) -> dict[str, Tensor]:
    if checkpoint.OPTIMIZER not in meta["sha256"]:
        raise HalfstepError(
            f"--teacher {teacher}: has no optimizer state (imported checkpoints have none); "
            "set reset_optimizer: true"
        )
    return checkpoint.read_tensors(teacher, checkpoint.OPTIMIZER, meta)
