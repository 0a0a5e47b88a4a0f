"""`halfstep generate`: draw samples from a checkpoint at one step count."""

import io
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from halfstep import checkpoint
from halfstep.checkpoint import checkpoint_files as model_files
from halfstep.config import DrawOptions, GenerateOptions, Machine
from halfstep.data.tokenizer import vocabulary_sha256
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distributed.group import ALONE, Group, join_group
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_atomic, write_json
from halfstep.metrics.rows import model_name
from halfstep.models import gpt
from halfstep.progress import Progress
from halfstep.records import provenance
from halfstep.records.journal import commit
from halfstep.training.loop import find_device

MASK = "<|mask|>"


def generate(
    checkpoint: Path,
    output: Path,
    steps: int,
    writing: GenerateOptions,
    machine: Machine,
    prompt: str = "",
) -> None:
    """Write samples.npy (ids [N, L]), samples.txt (the same as text) and samples.json (how they were made).

    An autoregressive checkpoint takes one step per token, whatever `steps` says.

    Args:
        checkpoint: a checkpoint folder
        output: folder of the samples
        steps: sampling steps
        prompt: text that every sample begins with; each <|mask|> in it is one token to be filled in
    """
    started, group, device = time.monotonic(), join_group(machine), find_device(machine)
    model = load(checkpoint, writing, str(device))
    drawn = draw_texts(
        model,
        steps,
        writing,
        machine,
        device,
        prompt,
        f"generate {model_name(checkpoint)} at {steps} steps",
        group,
    )
    if not group.is_main:
        return
    ids, evaluations = drawn
    save_samples(
        checkpoint,
        output,
        model,
        steps,
        ids,
        evaluations,
        writing,
        prompt=prompt,
        elapsed_s=time.monotonic() - started,
    )
    provenance.write_record(
        output / provenance.NAME, output.glob("samples.*"), model_files(checkpoint, writing.weights)
    )


def save_samples(
    folder: Path,
    output: Path,
    model,
    steps: int,
    ids: np.ndarray,
    evaluations: np.ndarray,
    drawing: DrawOptions,
    **more,
) -> None:
    """Write samples.npy, samples.txt and, last, samples.json with `more` in it."""
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int32))
    write_atomic(output / "samples.npy", buffer.getvalue())
    texts = model.tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    write_atomic(
        output / "samples.txt", "".join(f"=== {i}\n{text}\n" for i, text in enumerate(texts))
    )
    write_json(output / "samples.json", {
        "model": model_name(folder), "checkpoint": model.sha256, "kind": model.kind, "sampler": drawing.sampler if model.denoiser else "autoregressive",
        "steps": steps, "network_evaluations": float(np.mean(evaluations)), "num_samples": len(ids), "seed": drawing.sampling_seed,
        "weights": drawing.weights, "draw_dtype": drawing.draw_dtype if model.denoiser else "float64", "temperature": drawing.temperature, "top_p": drawing.top_p if not model.denoiser else 1.0,
        **more, "vocabulary": vocabulary_sha256(model.tokenizer), "sha256": sha256(output / "samples.npy"), "commit": commit(), "meta": model.meta,
    })  # fmt: skip


def load(folder: Path, drawing: DrawOptions, device: str) -> checkpoint.Model:
    return checkpoint.load_checkpoint(folder, drawing.weights, device)


def draw_texts(
    model,
    steps: int,
    writing: GenerateOptions,
    machine: Machine,
    device,
    prompt: str,
    label: str | None = None,
    group: Group = ALONE,
) -> tuple[np.ndarray, np.ndarray] | None:
    """ids [N, L] and network evaluations [N] of writing.num_samples texts of the model's length; shared and gathered as `fill` does."""
    return fill_texts(
        model,
        steps,
        writing,
        machine,
        device,
        _prompt(model, prompt).expand(writing.num_samples, -1),
        model.length,
        label,
        group=group,
    )


def fill_texts(
    model,
    steps: int,
    drawing: DrawOptions,
    machine: Machine,
    device,
    given: torch.Tensor,
    length: int,
    label: str | None = None,
    end: int | None = None,
    group: Group = ALONE,
) -> tuple[np.ndarray, np.ndarray] | None:
    """ids [N, length], text i beginning with given[i] of given[N, P], and network evaluations [N]; micro_batch texts at a time.

    Each process of the group writes its own texts, and the first returns all in order, the others None. With a label it shows its progress.
    A denoiser sees `end` to the right of each text, a token that is given and not kept.
    """
    (total, begun), pieces, evaluations, decoder = given.shape, [], [], None
    if model.denoiser and steps > length:
        if drawing.sampler == "first_hitting":
            raise HalfstepError(
                f"steps: found {steps}, but first_hitting reveals at least one of the {length} positions in each step; give at most {length} steps"
            )
        if label and group.is_main:
            print(
                f"note: {steps} steps for texts of {length} tokens: at most {length} of them reveal anything, the others take no pass",
                file=sys.stderr,
            )
    own = group.local_slice(total)
    with (
        Progress(label, own.stop - own.start, "text")
        if label and group.is_main
        else nullcontext() as progress
    ):
        for first in range(own.start, own.stop, machine.micro_batch):
            count = min(machine.micro_batch, own.stop - first)
            if model.denoiser:
                frame = torch.full((count, length + (end is not None)), model.mask_id)
                frame[:, :begun] = given[first : first + count]
                frame[:, length:] = model.mask_id if end is None else end
                out = sample(
                    model.denoiser.replayed, count, frame.shape[1], steps, schedule=LogLinear(), sampler=drawing.sampler, seed=drawing.sampling_seed, first=first,
                    temperature=drawing.temperature, given=frame, device=device, draw_dtype=drawing.draw_dtype,
                )  # fmt: skip
                pieces.append(out.ids[:, :length].cpu())
                evaluations.append(out.network_evaluations.cpu())
            else:
                if (
                    decoder is None or len(decoder.ids) != count
                ):  # its memory, matrices and graphs serve every full batch
                    decoder = gpt.Decoder(
                        model.network, count, length, drawing.temperature, drawing.top_p
                    )
                pieces.append(gpt.decode(
                    model.network, count, length, model.eos_id, seed=drawing.sampling_seed, first=first, temperature=drawing.temperature,
                    top_p=drawing.top_p, prompt=given[first : first + count] if begun else None, decoder=decoder,
                ).cpu())  # fmt: skip
                evaluations.append(
                    torch.full((count,), length - max(begun, 1))
                )  # BOS, where nothing is given, costs no pass
            if progress:
                progress.update(count)
    if not (gathered := group.gather((pieces, evaluations))):
        return None
    ids, evaluations = (
        torch.cat([piece for process in gathered for piece in process[which]]).numpy()
        for which in (0, 1)
    )
    return ids, evaluations


def _prompt(model, prompt: str) -> torch.Tensor:
    """BOS and the prompt's tokens, each MASK a position that is left open; empty without a prompt."""
    if not prompt:
        return torch.empty(0, dtype=torch.long)
    if MASK in prompt and not model.denoiser:
        raise HalfstepError(
            f"prompt: {MASK} leaves a position open, which an autoregressive model cannot fill; name a diffusion checkpoint"
        )
    ids = [model.eos_id]
    for i, piece in enumerate(prompt.split(MASK)):
        ids += [model.mask_id] * (i > 0) + model.tokenizer.encode(piece).ids
    if len(ids) >= model.length:
        raise HalfstepError(
            f"prompt: {len(ids)} tokens with BOS, but a text of this model has {model.length}; shorten the prompt"
        )
    return torch.tensor(ids)
