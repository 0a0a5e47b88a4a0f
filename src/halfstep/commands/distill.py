"""`halfstep distill-round`: one round of Self-Distillation Through Time, from checkpoint to checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from halfstep import checkpoint
from halfstep.commands.train import datasets, diffusion_loss, finish, held_out
from halfstep.config import Distillation, Machine
from halfstep.data.batches import batch_indices
from halfstep.data.pack import Windows, corpus_files
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.masking import corrupt as mask
from halfstep.diffusion.masking import mask_indices
from halfstep.diffusion.objective import stratified_times
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import masked_share
from halfstep.distill.divergences import DIVERGENCES
from halfstep.distill.rounds import Round, plan_round
from halfstep.distill.targets import divergence_loss, teacher_targets
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.metrics.diversity import unigram_entropy
from halfstep.models import flops
from halfstep.models.denoiser import SubsDenoiser
from halfstep.records import provenance
from halfstep.records.journal import Journal
from halfstep.training.ema import EMA
from halfstep.training.loop import find_device, fit

WATCHED, WATCHED_STEPS = 16, 32  # texts and steps of a measurement of entropy in a round


def distill_round(
    teacher: Path,
    corpus: Path,
    round: int,
    output: Path,
    run: Distillation,
    machine: Machine,
    seed: int = 1,
) -> None:
    """Teach a student to land in one step where its teacher lands in `substeps` (SDTT Algorithm 2, one round).

    Args:
        teacher: checkpoint folder: the pretrained teacher in round 1, the former round's student after it
        corpus: folder of `halfstep prepare-corpus`
        round: 1 .. rounds; sets the size of the teacher's step
        output: folder of the student's checkpoint
        seed: of batches, masks, times and the teacher's draws
    """
    plan_ = plan_round(run, round)
    group, device, windows = join_group(machine), find_device(machine), Windows(corpus, "train")
    source = checkpoint.read_meta(teacher)
    _fits(source, teacher, windows, corpus, round)

    student = checkpoint.build_network(source, run.dropout)
    weights = {
        name: checkpoint.read_tensors(teacher, file, source)
        for name, file in checkpoint.FILES.items()
        if name != "best"
    }
    first = (
        round == 1
    )  # the pretrained teacher hands over its average; a student goes on as it stands
    checkpoint.load_weights(student, weights["ema" if first else "raw"], teacher)
    student.to(device)
    group.shard(
        student
    )  # the teacher, who keeps no gradients and no moments, is whole in every process: its passes depend on its texts
    old = checkpoint.load_checkpoint(
        teacher, "ema" if first else run.next_teacher, str(device)
    ).denoiser

    if not first and not run.reset_optimizer and "optimizer.safetensors" not in source["sha256"]:
        raise HalfstepError(
            f"--teacher {teacher}: comes without the moments of its optimiser, as what was imported does; set reset_optimizer: true"
        )
    moments = (
        None
        if first or run.reset_optimizer
        else checkpoint.read_tensors(teacher, "optimizer.safetensors", source)
    )
    fresh = first or run.reset_ema
    ema = EMA(
        student,
        run.ema_decay,
        None if fresh else weights["ema"],
        0 if fresh else source["ema_updates"],
    )
    meta = {
        **{k: source[k] for k in ("kind", "network", "vocab_size", "eos_id", "length")},
        "corpus": corpus.name, "corpus_sha256": windows.facts["sha256"], "run": run.model_dump(), "seed": seed, "round": round, "dt": plan_.dt,
        "student_steps": plan_.student_steps, "teacher_sha256": source["sha256"],
        "training": source["training"],
    }  # fmt: skip
    objective = sdtt_loss(student, old, plan_, run, meta)
    nelbo = held_out(
        diffusion_loss(student, meta),
        "val/nelbo",
        Windows(corpus, "validation"),
        device,
        machine.micro_batch,
        group,
    )
    entropy = watch_entropy(
        student, meta, Windows(corpus, "validation"), run.entropy_band, device, seed
    )
    base, name = output.parent.parent.name, f"{output.parent.name}/round-{round}"
    tags = {"teacher": base, "run": output.parent.name, "round": round}
    params = {
        "seed": seed,
        "round": round,
        "dt": plan_.dt,
        "student_steps": plan_.student_steps,
        **run.model_dump(),
    }
    fed = [
        *datasets(corpus, windows),
        {
            "name": "teacher",
            "digest": source["sha256"][checkpoint.FILES["ema" if first else "raw"]],
            "source": str(teacher),
        },
    ]
    with Journal(
        output,
        name=name,
        node=f"distill-round/{base}/{name}",
        params=params,
        tags=tags,
        datasets=fed,
        writes=group.is_main,
    ) as journal:
        fitted = fit(
            student, lambda step: windows[batch_indices(len(windows), run.batch_size, seed + round, step)], *objective, lambda: nelbo() | entropy(), run,
            seed=seed + 1000 * round, device=device, micro_batch=machine.micro_batch, state=output / "state", label=f"distill-round {base}/{name}",
            journal=journal, warm=moments is None, carried=moments, ema=ema, group=group, time_limit=machine.time_limit, from_zero=True,
            flops_per_token=flops_per_token(student, old, plan_, run.batch_size, windows.length),
        )  # fmt: skip
        finish(output, student, fitted, meta, corpus, group)
        journal.close(checkpoint=output if group.is_main else None)
    if not group.is_main:
        return
    carried = [] if moments is None else [teacher / "optimizer.safetensors"]
    provenance.write_record(
        output / provenance.NAME,
        [output],
        [
            *corpus_files(corpus, "train", "validation"),
            *checkpoint.checkpoint_files(teacher, "raw", "ema"),
            *carried,
        ],
    )


def sdtt_loss(student, teacher, round: Round, run: Distillation, meta: dict):
    """Algorithm 2: x0 from data, t stratified over [min_t, 1), xt ~ q(xt | x0); the divergence's mean over the masked positions of the global batch."""
    own, divergence = (
        checkpoint.build_denoiser(student, meta),
        DIVERGENCES[run.divergence],
    )

    def corrupt(x0: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], float]:
        B, L = x0.shape
        t = stratified_times(torch.rand(B, generator=random, dtype=torch.float64), run.min_t)
        u = torch.rand(3, B, L, generator=random, dtype=torch.float64)
        xt = mask(x0, t, u[0], own.schedule, own.mask_id)
        return {"xt": xt, "t": t, "u_reveal": u[1], "u_token": u[2]}, max(
            1, int((xt == own.mask_id).sum())
        )

    def loss(part: dict[str, Tensor]) -> Tensor:
        xt, t = part["xt"], part["t"].float()
        masked = mask_indices((xt == own.mask_id).cpu(), xt.device)
        goal = teacher_targets(
            teacher,
            xt,
            t,
            round.dt,
            round.substeps,
            part["u_reveal"],
            part["u_token"],
            run.teacher_times,
        )
        h = own.features(xt, t, masked)
        return divergence_loss(divergence, h, own.readout, goal, teacher.readout)

    return corrupt, loss


def flops_per_token(
    student: nn.Module, teacher: SubsDenoiser, round: Round, texts: int, length: int
) -> float:
    """Expected FLOPs of one update per token of its batch.

    Over all times the schedule masks `masked_share` of the tokens, and the first substep reveals what it masks less after dt. A text
    in which nothing is revealed takes no further pass of a teacher that ignores time.
    """
    masked = masked_share(teacher.schedule)
    revealed = masked - masked_share(teacher.schedule, round.dt)
    again = 1 - (1 - revealed) ** length if teacher.ignores_time else 1.0
    passes = texts * (1 + (round.substeps - 1) * again)
    drawn = texts * (round.substeps - 1) * revealed * length
    rows = texts * length * masked
    levels = (1, 1) if teacher.ignores_time else (texts, passes)
    own = flops.training_flops(student, texts, length, rows, levels[0])
    targets = flops.forward_flops(
        teacher.network, passes, length, rows + drawn, levels[1], rows * passes / texts
    )
    return (own + targets) / (texts * length)


def watch_entropy(
    student, meta: dict, held_out: Windows, band: float | None, device, seed: int
) -> Callable[[], dict[str, float]]:
    """A measurement of the student's unigram entropy in nats; HalfstepError when it leaves the band around held-out text's.

    A fall of perplexity with a fall of entropy is no success: a student that repeats itself is stopped before it becomes a teacher.
    """
    denoiser, steps = (
        checkpoint.build_denoiser(student, meta),
        min(WATCHED_STEPS, meta["student_steps"]),
    )
    goal = unigram_entropy(held_out[torch.arange(min(256, len(held_out)))].numpy()).mean()

    def measure() -> dict[str, float]:
        out = sample(denoiser, WATCHED, meta["length"], steps, draws=Draws(seed), device=device)
        found = unigram_entropy(out.ids.cpu().numpy()).mean()
        if band is not None and abs(found / goal - 1) > band:
            raise HalfstepError(
                f"round {meta['round']}: the samples' entropy is {found:.2f} nats, held-out text's {goal:.2f}: outside entropy_band {band}, the student "
                "collapses; lower lr or num_steps, train a better teacher, or widen entropy_band"
            )
        return {"val/entropy": float(found)}

    return measure


def _fits(meta: dict, teacher: Path, windows: Windows, corpus: Path, round: int) -> None:
    if meta["kind"] != "diffusion":
        raise HalfstepError(
            f"--teacher {teacher}: is an {meta['kind']} model; name a diffusion checkpoint, results/models/<name>/teacher"
        )
    for key in ("vocab_size", "length"):
        if meta[key] != getattr(windows, key):
            raise HalfstepError(
                f"--teacher {teacher}: {key} {meta[key]}, but corpus {corpus} has {getattr(windows, key)}; use the corpus it was trained on"
            )
    files = corpus / "tokenizer.json", checkpoint.checked_file(teacher, "tokenizer.json", meta)
    words, known = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    if words != known:
        raise HalfstepError(
            f"--teacher {teacher}: its tokenizer has other tokens than that of corpus {corpus}; use the corpus it was trained on"
        )
    if meta["round"] != round - 1:
        raise HalfstepError(
            f"--round {round}: its teacher is the checkpoint of round {round - 1}, but {teacher} is of round {meta['round']}"
        )
