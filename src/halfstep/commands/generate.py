"""`halfstep generate`: print texts of a checkpoint, show how they are denoised, or write them."""

import sys
import time
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
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
from halfstep.commands.writers import (
    Writer,
    default_steps,
    draw_texts,
    encode_prompt,
    load_scorer,
    note_costs,
    note_unused_options,
    sampler_name,
    separate_documents,
    text_writer,
)
from halfstep.config import (
    DEFAULT_STEPS,
    GENERATE_STAGE,
    DrawOptions,
    GenerateOptions,
    Machine,
    Positive,
    Steps,
)
from halfstep.data.windows import Windows, check_tokens, corpus_files, corpus_name
from halfstep.diffusion.contracts import Samples
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.diffusion.watching import Show
from halfstep.distributed.device import find_device
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.metrics.rows import model_name
from halfstep.records import provenance


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
    pairs: Path | None = None,
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
        checkpoint: checkpoint folder; its flag may be left out where it comes first
        output: folder of the samples, with {steps} where there are several step counts; without it
            the texts are printed
        steps: numbers of sampling steps (default: 8; as many as a text has tokens for a sampler
            that takes as many as it needs)
        temperatures: divisors of the logits, in place of --temperature
        prompt: text that every sample begins with; each <|mask|> in it is one token to fill in,
            and each <|endoftext|> ends a document; a blank before a <|mask|>, or at the end, is
            part of the token that is written there
        pairs: folder of a corpus of pairs; each sample answers a held-out prompt of it
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
    if steps is None:
        steps = [default_steps(model, sampling.sampler)]
        sets = sample_sets(output, steps, sampling, temperatures)
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
    if pairs and prompt:
        raise HalfstepError(f"--prompt: found it with --pairs {pairs}; leave one of them out")
    prompts = (
        held_out_prompts(model, sampling, pairs)
        if pairs
        else encode_prompt(model, prompt).expand(sampling.num_samples, -1)
    )
    for one in sets:  # a sampler may refuse a step count: before anything is drawn
        text_writer(model, model.length, one.steps, one.options)
    if group.is_main:
        note_unused_options(model, model.length, max(one.steps for one in sets), sampling)
    record = record_of(output) if output else None
    job = _Job(checkpoint, model, prompt, pairs, prompts, sets, machine.micro_batch, group)
    for one in sets:
        if one.folder:
            job.write_set(one, one.folder)
        elif watch:
            job.watch_set(one)
        else:
            job.print_set(one)
    if record and group.is_main:
        folders = [one.folder for one in sets if one.folder]
        read = checkpoint_files(checkpoint, sampling.weights)
        if pairs:
            read += corpus_files(pairs, "validation")
        write_record_of_sets(record, folders, read)


@dataclass(frozen=True)
class _Job:
    """What all sets of one call share: the model, and prompts[N, P], one row for each text."""

    checkpoint: Path
    model: Model
    prompt: str
    pairs: Path | None
    prompts: Tensor
    sets: list[SampleSet]
    micro_batch: int
    group: Group

    def write_set(self, one: SampleSet, folder: Path) -> None:
        """Write a set of samples, unless its folder holds it already."""
        model, group = self.model, self.group
        how: dict[str, Any] = {"prompt": self.prompt, "stage": GENERATE_STAGE}
        if self.pairs:
            how["pairs"] = corpus_name(self.pairs)
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
        if texts is not None:
            self._note_costs(texts, one)

    def watch_set(self, one: SampleSet) -> None:
        """Show how each text of a set is revealed; without a terminal the text itself follows."""
        model, console = self.model, terminal()

        def make(show: Show) -> Writer:
            return text_writer(model, model.length, one.steps, one.options, show=show)

        least_s = LONG_ENOUGH_S if console else 0
        by_time = SAMPLERS[one.options.sampler].by_time
        view = DenoisingView(model, one.steps, make, console, least_s, by_time=by_time)
        for i, prompt in enumerate(self.prompts.split(1)):
            print_title(self._title(one, i), console)
            texts = view(prompt, i)
            if console is None:
                print(*separate_documents(model, texts), flush=True)
            self._note_costs(texts, one)

    def _note_costs(self, texts: Samples, one: SampleSet) -> None:
        """Print what the texts took, on standard error."""
        if self.model.denoiser is not None:
            given = int((self.prompts[:1] != self.model.mask_id).sum())
            note_costs(texts, self.model.length - given, one.options)

    def _title(self, one: SampleSet, number: int) -> str:
        """The number of a text, if there are several, and how it is drawn, if several sets are."""
        if len(self.sets) == len(self.prompts) == 1:
            return ""
        return f"{number}, {one.how}" if len(self.sets) > 1 else str(number)


def held_out_prompts(model: Model, sampling: GenerateOptions, corpus: Path) -> Tensor:
    """Prompts of held-out pairs, one for each sample, with masks for responses: [num_samples, L].

    They come in the order of the corpus, again from the first where there are fewer. HalfstepError
    if the corpus has no pairs, or windows of another length.
    """
    windows = Windows(corpus, "validation")
    if not windows.is_pairs:
        raise HalfstepError(f"--pairs {corpus}: is no corpus of kind pairs; leave it out")
    check_tokens("--checkpoint", "this model", model.tokenizer, corpus)
    if windows.length != model.length:
        raise HalfstepError(
            f"--pairs {corpus}: its windows have {windows.length} tokens, texts of this model "
            f"{model.length}; name the corpus it was trained on"
        )
    rows = np.arange(sampling.num_samples) % len(windows)
    asked = windows.asked(rows)
    assert asked is not None
    return windows[rows].masked_fill(asked, model.mask_id)


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


def describe(
    checkpoint: Path, model: Model, steps: int, num_samples: int, options: DrawOptions
) -> dict[str, Any]:
    """What samples.json says of samples before they are drawn."""
    sampler: str = "autoregressive"
    draw_dtype, top_p = "float64", options.top_p
    if model.denoiser is not None:
        sampler, row = sampler_name(options), SAMPLERS[options.sampler]
        top_p = options.top_p if "top_p" in row.options else 1.0
        draw_dtype = row.draw_dtype
    about = {} if not options.asks_scorer else {"scorer": load_scorer(model, options).sha256}
    return about | {
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
    if texts.autoregressive_passes is not None:
        about["autoregressive_passes"] = float(np.mean(texts.autoregressive_passes.numpy()))
    write_texts(output, texts.ids.numpy(), model.tokenizer, about | how, model.meta)
