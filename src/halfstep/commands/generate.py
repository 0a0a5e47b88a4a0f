"""`halfstep generate`: print texts of a checkpoint, show how they are denoised, or write them."""

import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.commands.samples import is_written, write_texts
from halfstep.commands.terminal import (
    LONG_ENOUGH_S,
    DenoisingView,
    print_title,
    terminal,
)
from halfstep.config import (
    DEFAULT_STEPS,
    GENERATE_STAGE,
    MOST_STEPS,
    DrawOptions,
    GenerateOptions,
    Machine,
    Positive,
    Steps,
)
from halfstep.data.tokenizer import EOS, encode_texts
from halfstep.diffusion.contracts import Denoiser, Draws, Samples
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.diffusion.watching import Show, watched
from halfstep.distributed.device import find_device
from halfstep.distributed.group import ALONE, Group, join_group
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import uniforms
from halfstep.kernels.precision import computing
from halfstep.metrics.rows import model_name
from halfstep.models.causal_lm import CachedDecoder, CausalLM
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt import GPT, Decoder
from halfstep.progress import Progress
from halfstep.records import provenance

MASK = "<|mask|>"
SPECIAL = re.compile(f"( ?{re.escape(MASK)}|{re.escape(EOS)})")

Writer = Callable[[Tensor, int], Samples]
"""(prompts[n, P], first) -> n texts that begin with the prompts, numbered from `first` on."""


@dataclass(frozen=True)
class SampleSet:
    """One set of samples: how it is drawn, and its folder (None: it is printed)."""

    steps: int
    options: GenerateOptions
    folder: Path | None

    @property
    def how(self) -> str:
        """The step count, and the temperature if it is not 1."""
        temperature = self.options.temperature
        words = f"{self.steps} steps"
        return words if temperature == 1 else f"{words}, temperature {temperature}"


def generate(  # noqa: PLR0913  the flags of the command
    checkpoint: Path,
    sampling: GenerateOptions,
    machine: Machine,
    output: Path | None = None,
    steps: Annotated[list[Steps], Field(min_length=1)] | None = None,
    temperatures: list[Positive] = [],  # noqa: B006
    prompt: str = "",
    watch: bool = False,
) -> None:
    """Print texts, or write them: samples.npy (ids [N, L]), samples.txt and samples.json.

    Without --output texts are printed, each micro-batch as soon as it is drawn. Several texts are
    printed as in samples.txt, each below a line `=== number`.

    With several step counts the name of the output has {steps} in it: samples/steps-{steps}.
    With --temperatures there is a set for each of them, in temperature-{temperature} inside that
    folder. Text i has the same random numbers in all sets. Finished sets of the same checkpoint and
    options are kept, so an interrupted call continues, and a further step count is drawn alone.

    An autoregressive checkpoint takes one step per token, whatever `steps` is.

    Args:
        checkpoint: checkpoint folder
        output: folder of the samples, with {steps} where there are several step counts; without it
            the texts are printed
        steps: numbers of sampling steps (default: 8)
        temperatures: divisors of the logits, in place of --temperature
        prompt: text that every sample begins with; each <|mask|> in it is one token to fill in,
            and each <|endoftext|> ends a document; a blank before a <|mask|>, or at the end, is
            part of the token that is written there
        watch: show how each text is revealed, step by step: on a terminal in the colors of the
            steps, otherwise one line per step
    """
    if watch and output:
        raise HalfstepError(
            f"--watch: found --output {output} too, which writes files and shows no text; "
            "leave one of them out"
        )
    group, device = join_group(machine), find_device(machine)
    sets = sample_sets(output, steps or [DEFAULT_STEPS], sampling, temperatures)
    model = load_checkpoint(checkpoint, sampling.weights, str(device), sampling.precision)
    if steps is None and model.denoiser is None:
        sets = sample_sets(output, [model.length], sampling, temperatures)
    if watch and group.size > 1:
        raise HalfstepError(
            f"--watch: found {group.size} processes, but one of them shows its texts; "
            "leave --processes out"
        )
    if watch and model.denoiser is None:
        raise HalfstepError(
            "--watch: found an autoregressive model, which writes from left to right, but only a "
            "diffusion model reveals its tokens in steps; leave it out"
        )
    prompts = encode_prompt(model, prompt).expand(sampling.num_samples, -1)
    for one in sets:  # a sampler may refuse a step count: before anything is drawn
        text_writer(model, model.length, one.steps, one.options)
    if group.is_main:
        note_unused_options(model, model.length, max(one.steps for one in sets), sampling)
    record = record_of(output) if output else None
    job = _Job(checkpoint, model, prompt, prompts, sets, machine.micro_batch, group)
    for one in sets:
        if one.folder:
            job.write_set(one, one.folder)
        elif watch:
            job.watch_set(one)
        else:
            job.print_set(one)
    if record and group.is_main:
        folders = [one.folder for one in sets if one.folder]
        write_record_of_sets(record, folders, checkpoint_files(checkpoint, sampling.weights))


@dataclass(frozen=True)
class _Job:
    """What all sets of one call share: the model, and prompts[N, P], one row for each text."""

    checkpoint: Path
    model: Model
    prompt: str
    prompts: Tensor
    sets: list[SampleSet]
    micro_batch: int
    group: Group

    def write_set(self, one: SampleSet, folder: Path) -> None:
        """Write a set of samples, unless its folder holds it already."""
        model, group = self.model, self.group
        how: dict[str, Any] = {"prompt": self.prompt, "stage": GENERATE_STAGE}
        about = describe(self.checkpoint, model, one.steps, len(self.prompts), one.options) | how
        label = f"generate {model_name(self.checkpoint)} at {one.how}"
        if group.broadcast(group.is_main and is_written(folder, about, model.tokenizer)):
            if group.is_main:
                print(f"{label}: kept, all {len(self.prompts)} texts are there", file=sys.stderr)
            return
        started = time.monotonic()
        write = text_writer(model, model.length, one.steps, one.options)
        texts = draw_texts(write, self.prompts, self.micro_batch, label, group)
        if texts is not None:
            how["elapsed_s"] = time.monotonic() - started
            save_samples(self.checkpoint, folder, model, one.steps, texts, one.options, **how)

    def print_set(self, one: SampleSet) -> None:
        """Print the texts of a set as they are drawn; rank 0 prints those of all ranks, in order.

        On a terminal the texts themselves are the progress.
        """
        model, console, printed = self.model, terminal(), 0

        def show(texts: Samples) -> None:
            nonlocal printed
            for text in separate_documents(model, texts):
                print_title(self._title(one, printed), console)
                print(text, flush=True)
                printed += 1

        write = text_writer(model, model.length, one.steps, one.options)
        label = None if console else f"generate {model_name(self.checkpoint)} at {one.how}"
        texts = draw_texts(write, self.prompts, self.micro_batch, label, self.group, show)
        if texts is not None and printed < len(self.prompts):
            show(Samples(texts.ids[printed:], texts.network_evaluations[printed:]))

    def watch_set(self, one: SampleSet) -> None:
        """Show how each text of a set is revealed; without a terminal the text itself follows."""
        model, console = self.model, terminal()

        def make(show: Show) -> Writer:
            return text_writer(model, model.length, one.steps, one.options, show=show)

        view = DenoisingView(model, one.steps, make, console, LONG_ENOUGH_S if console else 0)
        for i, prompt in enumerate(self.prompts.split(1)):
            print_title(self._title(one, i), console)
            texts = view(prompt, i)
            if console is None:
                print(*separate_documents(model, texts), flush=True)

    def _title(self, one: SampleSet, number: int) -> str:
        """The number of a text, if there are several, and how it is drawn, if several sets are."""
        if len(self.sets) == len(self.prompts) == 1:
            return ""
        return f"{number}, {one.how}" if len(self.sets) > 1 else str(number)


STEPS = "{steps}"  # in the name of an output


def sample_sets(
    output: Path | None,
    steps: list[int],
    sampling: GenerateOptions,
    temperatures: list[float],
) -> list[SampleSet]:
    """The sets of samples that `generate` draws, each with its folder."""
    counts = list(dict.fromkeys(steps))
    folders = step_folders(output, counts) if output else dict.fromkeys(counts)
    if temperatures and sampling.temperature != 1:
        raise HalfstepError(
            f"temperature: found {sampling.temperature:g}, expected only --temperatures, which "
            "name all; leave it out"
        )
    sets = []
    for count, folder in folders.items():
        if not temperatures:
            sets.append(SampleSet(count, sampling, folder))
        for temperature in dict.fromkeys(temperatures):
            options = sampling.model_copy(update={"temperature": temperature})
            below = folder / f"temperature-{temperature}" if folder else None
            sets.append(SampleSet(count, options, below))
    return sets


def step_folders(output: Path, steps: list[int]) -> dict[int, Path]:
    """The folder of each step count: the output with the count in place of {steps}."""
    counts = list(dict.fromkeys(steps))
    if len(counts) > 1 and STEPS not in str(output):
        raise HalfstepError(
            f"--output {output}: found {len(counts)} step counts for one folder, expected "
            f"{STEPS} in its name; write {output}/steps-{STEPS}"
        )
    return {count: Path(str(output).replace(STEPS, str(count))) for count in counts}


def record_of(output: Path) -> Path:
    """The provenance record of all sets: in the folder above the first {steps} of their name."""
    plain = takewhile(lambda part: STEPS not in part, output.parts)
    return Path(*plain, provenance.NAME)


def write_record_of_sets(record: Path, folders: list[Path], inputs: list[Path]) -> None:
    """Write the provenance record of all sets; an earlier one inside a set is removed."""
    for folder in folders:
        if folder != record.parent:  # a file has one record, that of its last job
            (folder / provenance.NAME).unlink(missing_ok=True)
    files = [file for folder in folders for file in folder.glob("samples.*")]
    provenance.write_record(record, files, inputs)


def encode_prompt(model: Model, prompt: str) -> Tensor:
    """BOS and the tokens of a prompt, int64 [P]; none for "".

    MASK becomes the mask token and EOS its own id; other special tokens are text. Words of a BPE
    begin with their blank. So a blank before a position that the model writes, which is a MASK or
    the end of the prompt, is left out: the token there brings it.
    """
    if not prompt:
        return torch.empty(0, dtype=torch.long)
    if MASK in prompt and model.denoiser is None:
        raise HalfstepError(
            f"prompt: found {MASK}, but an autoregressive model cannot fill in a position; "
            "use a diffusion model"
        )
    ids = [model.eos_id]
    for piece in SPECIAL.split(prompt.removesuffix(" ")):
        if piece.endswith(MASK):
            ids.append(model.mask_id)
        elif piece == EOS:
            ids.append(model.eos_id)
        elif piece:
            ids += encode_texts(model.tokenizer, [piece])[0]
    if len(ids) >= model.length:
        raise HalfstepError(
            f"prompt: {len(ids)} tokens with BOS, but a text of this model has {model.length}; "
            "shorten the prompt"
        )
    return torch.tensor(ids)


def text_writer(
    model: Model,
    length: int,
    steps: int,
    options: DrawOptions,
    end: int | None = None,
    show: Show | None = None,
) -> Writer:
    """A function that writes one batch of texts of `length` tokens.

    A denoiser can be given a token `end` to the right of each text, which the result leaves out,
    and a function `show`, which is called with the texts and their times before each pass.
    Raises HalfstepError if there are more steps than the sampler can use.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise HalfstepError(f"steps: found {steps}, expected 1 to {MOST_STEPS}; change it")
    if model.denoiser is None:
        return _AutoregressiveWriter(model, length, options)
    SAMPLERS[options.sampler].check_steps(options.sampler, steps, length)
    return _DiffusionWriter(model, model.denoiser, length, steps, options, end, show)


@dataclass
class _DiffusionWriter:
    """A Writer that fills in masked texts with a sampler."""

    model: Model
    denoiser: SubsDenoiser
    length: int
    steps: int
    options: DrawOptions
    end: int | None
    show: Show | None

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        count, given = prompts.shape
        frame = torch.full((count, self.length), self.model.mask_id)
        frame[:, :given] = prompts
        if self.end is not None:
            frame = torch.cat([frame, torch.full((count, 1), self.end)], 1)
        denoiser: Denoiser = self.denoiser.inference_copy
        if self.show:
            denoiser = watched(denoiser, self.show)
        with computing(self.model.device, self.model.precision):
            written = sample(
                denoiser,
                count,
                frame.shape[1],
                self.steps,
                sampler=self.options.sampler,
                draws=Draws(self.options.sampling_seed, first, self.options.temperature),
                given=frame,
                device=self.model.device,
            )
        return Samples(written.ids[:, : self.length].cpu(), written.network_evaluations.cpu())


@dataclass
class _AutoregressiveWriter:
    """A Writer that appends token by token; batches of one size share a decoder and its memory."""

    model: Model
    length: int
    options: DrawOptions
    decoder: Decoder | CachedDecoder | None = None

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        count, given = prompts.shape
        options = self.options
        start = prompts if given else torch.tensor([self.model.eos_id])
        u = uniforms(options.sampling_seed, first, count, self.length)
        with computing(self.model.device, self.model.precision):
            if self.decoder is None or len(self.decoder.ids) != count:
                network = cast(GPT | CausalLM, self.model.network)
                draws = options.temperature, options.top_p
                self.decoder = network.decoder(count, self.length, *draws)
            ids = self.decoder.write(start, u)
        evaluations = self.length - start.shape[-1]  # the first token takes no pass
        return Samples(ids.cpu(), torch.full((count,), evaluations))


def note_unused_options(model: Model, length: int, steps: int, options: DrawOptions) -> None:
    """Tell the user about options that have no effect on this kind of model."""
    notes = []
    if model.denoiser is not None:
        if steps > length:
            notes.append(
                f"{steps} steps for texts of {length} tokens: at most {length} steps reveal "
                "a token, and the others take no pass"
            )
        if options.top_p != 1:
            notes.append(f"--top-p {options.top_p} has no effect on a diffusion model")
    else:
        if steps != length:
            notes.append(f"--steps {steps} has no effect: this model takes one step per token")
        if options.sampler != "ancestral":
            notes.append(f"--sampler {options.sampler} has no effect on an autoregressive model")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def draw_texts(
    write: Writer,
    prompts: Tensor,
    micro_batch: int,
    label: str | None = None,
    group: Group = ALONE,
    show: Callable[[Samples], None] | None = None,
) -> Samples | None:
    """Write one text for each row of prompts[N, P], micro_batch texts at a time.

    Each rank of the group writes its own rows. Rank 0 returns all texts in order, the others None.
    With a label, progress is shown. Rank 0 calls `show` with each of its batches.
    """
    rows, batches = group.local_slice(len(prompts)), []
    total = rows.stop - rows.start
    bar = Progress(label, total, "text") if label and group.is_main else nullcontext()
    with bar as progress:
        for first in range(rows.start, rows.stop, micro_batch):
            batch = prompts[first : min(first + micro_batch, rows.stop)]
            batches.append(write(batch, first))
            if show and group.is_main:
                show(batches[-1])
            if progress:
                progress.update(len(batch))
    ids = _gathered([batch.ids for batch in batches], group)
    evaluations = _gathered([batch.network_evaluations for batch in batches], group)
    return None if ids is None or evaluations is None else Samples(ids, evaluations)


def _gathered(batches: list[Tensor], group: Group) -> Tensor | None:
    rows = group.gather_rows(torch.cat(batches).numpy() if batches else None)
    return None if rows is None else torch.from_numpy(rows)


def separate_documents(model: Model, texts: Samples) -> list[str]:
    """The texts without BOS and EOS; a line <|endoftext|> is between two documents of a text."""
    decoded = []
    for ids in texts.ids.tolist():
        documents: list[list[int]] = [[]]
        for token in ids:
            if token == model.eos_id:
                documents.append([])
            else:
                documents[-1].append(token)
        if not documents[0]:
            documents = documents[1:]  # BOS
        if not documents[-1]:
            documents = documents[:-1]  # EOS
        decoded.append(f"\n{EOS}\n".join(model.tokenizer.decode_batch(documents)))
    return decoded


def describe(
    checkpoint: Path, model: Model, steps: int, num_samples: int, options: DrawOptions
) -> dict[str, Any]:
    """What samples.json says of samples before they are drawn."""
    sampler: str = "autoregressive"
    draw_dtype, top_p = "float64", options.top_p
    if model.denoiser is not None:
        sampler, top_p = options.sampler, 1.0
        draw_dtype = SAMPLERS[options.sampler].draw_dtype
    return {
        "model": model_name(checkpoint),
        "checkpoint": model.sha256,
        "kind": model.kind,
        "sampler": sampler,
        "steps": steps,
        "num_samples": num_samples,
        "seed": options.sampling_seed,
        "weights": model.weights,
        "draw_dtype": draw_dtype,
        "precision": model.precision,
        "temperature": options.temperature,
        "top_p": top_p,
    }


def save_samples(
    checkpoint: Path,
    output: Path,
    model: Model,
    steps: int,
    texts: Samples,
    options: DrawOptions,
    **how: object,
) -> None:
    """Write the samples of a model; `how` are further entries of samples.json."""
    about = describe(checkpoint, model, steps, len(texts.ids), options)
    about["network_evaluations"] = float(np.mean(texts.network_evaluations.numpy()))
    write_texts(output, texts.ids.numpy(), model.tokenizer, about | how, model.meta)
