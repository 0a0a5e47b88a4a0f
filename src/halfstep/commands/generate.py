"""`halfstep generate`: draw samples from a checkpoint at one step count."""

import io
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.config import DrawOptions, GenerateOptions, Machine
from halfstep.data.tokenizer import vocabulary_sha256
from halfstep.diffusion.contracts import Draws, Samples
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.distributed.device import find_device
from halfstep.distributed.group import ALONE, Group, join_group
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_atomic, write_json
from halfstep.metrics.rows import model_name
from halfstep.models import gpt
from halfstep.progress import Progress
from halfstep.records import provenance
from halfstep.records.journal import commit

MASK = "<|mask|>"


def generate(
    checkpoint: Path,
    output: Path,
    steps: int,
    options: GenerateOptions,
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
    model = load_checkpoint(checkpoint, options.weights, str(device))
    texts = draw_texts(
        model,
        encode_prompt(model, prompt).expand(options.num_samples, -1),
        model.length,
        steps,
        options,
        machine,
        device,
        label=f"generate {model_name(checkpoint)} at {steps} steps",
        group=group,
    )
    if texts is None:
        return
    elapsed_s = time.monotonic() - started
    save_samples(
        checkpoint, output, model, steps, texts, options, prompt=prompt, elapsed_s=elapsed_s
    )
    provenance.write_record(
        output / provenance.NAME,
        output.glob("samples.*"),
        checkpoint_files(checkpoint, options.weights),
    )


def save_samples(
    checkpoint: Path,
    output: Path,
    model: Model,
    steps: int,
    texts: Samples,
    options: DrawOptions,
    **more: object,
) -> None:
    """Write samples.npy (ids), samples.txt (text) and, last, samples.json, which says how they were made; `more` are further entries of it."""
    ids = texts.ids.numpy()
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int32))
    write_atomic(output / "samples.npy", buffer.getvalue())
    decoded = model.tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    write_atomic(
        output / "samples.txt", "".join(f"=== {i}\n{text}\n" for i, text in enumerate(decoded))
    )
    if model.denoiser:
        sampler, top_p = options.sampler, 1.0
        draw_dtype = SAMPLERS[options.sampler].draw_dtype
    else:
        sampler, top_p = "autoregressive", options.top_p
        draw_dtype = "float64"
    about = {
        "model": model_name(checkpoint),
        "checkpoint": model.sha256,
        "kind": model.kind,
        "sampler": sampler,
        "steps": steps,
        "network_evaluations": float(np.mean(texts.network_evaluations.numpy())),
        "num_samples": len(ids),
        "seed": options.sampling_seed,
        "weights": options.weights,
        "draw_dtype": draw_dtype,
        "temperature": options.temperature,
        "top_p": top_p,
        **more,
        "vocabulary": vocabulary_sha256(model.tokenizer),
        "sha256": sha256(output / "samples.npy"),
        "commit": commit(),
        "meta": model.meta,
    }
    write_json(output / "samples.json", about)


def draw_texts(
    model: Model,
    prompts: Tensor,
    length: int,
    steps: int,
    options: DrawOptions,
    machine: Machine,
    device: torch.device,
    *,
    label: str | None = None,
    end: int | None = None,
    group: Group = ALONE,
) -> Samples | None:
    """Write one text of `length` tokens for each row of prompts[N, P], micro_batch texts at a time.

    Each rank of the group writes its own rows; rank 0 returns all of them in order, the other ranks return None. A denoiser may be
    given a token `end` to the right of each text, which is not kept. With a label, progress is shown.
    """
    if model.denoiser:
        SAMPLERS[options.sampler].check_steps(options.sampler, steps, length)
        if steps > length and label and group.is_main:
            print(
                f"note: {steps} steps for texts of {length} tokens: at most {length} of them reveal anything, "
                "the others take no pass",
                file=sys.stderr,
            )
        write = partial(_write_diffusion, model, length, steps, options, device, end)
    else:
        write = _AutoregressiveWriter(model, length, options)
    mine, batches = group.local_slice(len(prompts)), []
    show = label is not None and group.is_main
    with Progress(label, mine.stop - mine.start, "text") if show else nullcontext() as progress:
        for first in range(mine.start, mine.stop, machine.micro_batch):
            batch = prompts[first : min(first + machine.micro_batch, mine.stop)]
            batches.append(write(batch, first))
            if progress:
                progress.update(len(batch))
    gathered = group.gather(batches)
    if gathered is None:
        return None
    every = [batch for batches in gathered for batch in batches]
    return Samples(
        torch.cat([batch.ids for batch in every]),
        torch.cat([batch.network_evaluations for batch in every]),
    )


def _write_diffusion(
    model: Model,
    length: int,
    steps: int,
    options: DrawOptions,
    device: torch.device,
    end: int | None,
    prompts: Tensor,
    first: int,
) -> Samples:
    """Texts [n, length] that begin with prompts[n, P]; they are numbers first, first + 1, ... of the seed."""
    frame = torch.full((len(prompts), length + (end is not None)), model.mask_id)
    frame[:, : prompts.shape[1]] = prompts
    if end is not None:
        frame[:, length] = end
    written = sample(
        model.denoiser.inference_copy,
        *frame.shape,
        steps,
        sampler=options.sampler,
        draws=Draws(options.sampling_seed, first, options.temperature),
        given=frame,
        device=device,
    )
    return Samples(written.ids[:, :length].cpu(), written.network_evaluations.cpu())


class _AutoregressiveWriter:
    """Writes texts token by token; full batches share one decoder, with its memory, packed matrices and CUDA graphs."""

    def __init__(self, model: Model, length: int, options: DrawOptions):
        self.model, self.length, self.options = model, length, options
        self.decoder: gpt.Decoder | None = None

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        count, given = prompts.shape
        options = self.options
        if self.decoder is None or len(self.decoder.ids) != count:
            self.decoder = gpt.Decoder(
                self.model.network, count, self.length, options.temperature, options.top_p
            )
        ids = gpt.decode(
            self.model.network,
            count,
            self.length,
            self.model.eos_id,
            seed=options.sampling_seed,
            first=first,
            temperature=options.temperature,
            top_p=options.top_p,
            prompt=prompts if given else None,
            decoder=self.decoder,
        )
        evaluations = self.length - max(
            given, 1
        )  # without a prompt, BOS is given and takes no pass
        return Samples(ids.cpu(), torch.full((count,), evaluations))


def encode_prompt(model: Model, prompt: str) -> Tensor:
    """BOS and the tokens of the prompt, int64 [P], with the mask token for each MASK; empty without a prompt."""
    if not prompt:
        return torch.empty(0, dtype=torch.long)
    if MASK in prompt and not model.denoiser:
        raise HalfstepError(
            f"prompt: {MASK} leaves a position open, which an autoregressive model cannot fill; name a diffusion checkpoint"
        )
    ids = [model.eos_id]
    for i, piece in enumerate(prompt.split(MASK)):
        if i > 0:
            ids.append(model.mask_id)
        ids += model.tokenizer.encode(piece).ids
    if len(ids) >= model.length:
        raise HalfstepError(
            f"prompt: {len(ids)} tokens with BOS, but a text of this model has {model.length}; shorten the prompt"
        )
    return torch.tensor(ids)
