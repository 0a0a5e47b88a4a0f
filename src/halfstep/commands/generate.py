"""`halfstep generate`: draw samples from a checkpoint at one step count."""

import io
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from halfstep import checkpoint
from halfstep.config import Machine, Writing
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_atomic, write_json
from halfstep.metrics.rows import model_name
from halfstep.models import gpt
from halfstep.progress import Progress
from halfstep.tracking import commit
from halfstep.training.loop import device_of

MASK = "<|mask|>"


def generate(checkpoint: Path, output: Path, steps: int, writing: Writing, machine: Machine, prompt: str = "") -> None:
    """Write samples.npy (ids [N, L]), samples.txt (the same as text) and samples.json (how they were made).

    An autoregressive checkpoint takes one step per token, whatever `steps` says.

    Args:
        checkpoint: a checkpoint folder
        output: folder of the samples
        steps: sampling steps
        prompt: text that every sample begins with; each <|mask|> in it is one token to be filled in
    """
    started, device = time.monotonic(), device_of(machine)
    model = load(checkpoint, writing, str(device))
    ids, evaluations = draw(model, steps, writing, machine, device, prompt, f"generate {model_name(checkpoint)} at {steps} steps")
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int32))
    write_atomic(output / "samples.npy", buffer.getvalue())
    texts = model.tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    write_atomic(output / "samples.txt", "".join(f"=== {i}\n{text}\n" for i, text in enumerate(texts)))
    write_json(output / "samples.json", {
        "model": model_name(checkpoint), "checkpoint": model.sha256, "kind": model.kind, "sampler": writing.sampler if model.denoiser else "autoregressive",
        "steps": steps, "network_evaluations": float(np.mean(evaluations)), "num_samples": len(ids), "seed": writing.sampling_seed,
        "weights": writing.weights, "draw_dtype": "float64", "temperature": writing.temperature, "top_p": writing.top_p if not model.denoiser else 1.0,
        "prompt": prompt, "elapsed_s": time.monotonic() - started, "sha256": sha256(output / "samples.npy"), "commit": commit(), "meta": model.meta,
    })  # fmt: skip


def load(folder: Path, writing: Writing, device: str) -> checkpoint.Model:
    return checkpoint.load(folder, writing.weights, device)


def draw(model, steps: int, writing: Writing, machine: Machine, device, prompt: str, label: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """ids [N, L] and network evaluations [N], micro_batch texts at a time; with a label it shows its progress."""
    given = _prompt(model, prompt)
    total, pieces, evaluations = writing.num_samples, [], []
    with Progress(label, total, "text") if label else nullcontext() as progress:
        for first in range(0, total, machine.micro_batch):
            count = min(machine.micro_batch, total - first)
            if model.denoiser:
                frame = torch.full((model.length,), model.mask_id)
                frame[: len(given)] = given
                out = sample(
                    model.denoiser, count, model.length, steps, schedule=LogLinear(), sampler=writing.sampler, seed=writing.sampling_seed, first=first,
                    temperature=writing.temperature, given=frame, device=device,
                )  # fmt: skip
                pieces.append(out.ids.cpu())
                evaluations.append(out.network_evaluations.cpu())
            else:
                start = given if len(given) else torch.tensor([model.eos_id])
                pieces.append(gpt.generate(
                    model.network, count, model.length, model.eos_id, seed=writing.sampling_seed, first=first, temperature=writing.temperature,
                    top_p=writing.top_p, prompt=start,
                ).cpu())  # fmt: skip
                evaluations.append(torch.full((count,), model.length - len(start)))
            if progress:
                progress.update(count)
    return torch.cat(pieces).numpy(), torch.cat(evaluations).numpy()


def _prompt(model, prompt: str) -> torch.Tensor:
    """BOS and the prompt's tokens, each MASK a position that is left open; empty without a prompt."""
    if not prompt:
        return torch.empty(0, dtype=torch.long)
    if MASK in prompt and not model.denoiser:
        raise HalfstepError(f"prompt: {MASK} leaves a position open, which an autoregressive model cannot fill; name a diffusion checkpoint")
    ids = [model.eos_id]
    for i, piece in enumerate(prompt.split(MASK)):
        ids += [model.mask_id] * (i > 0) + model.tokenizer.encode(piece).ids
    if len(ids) >= model.length:
        raise HalfstepError(f"prompt: {len(ids)} tokens with BOS, but a text of this model has {model.length}; shorten the prompt")
    return torch.tensor(ids)
