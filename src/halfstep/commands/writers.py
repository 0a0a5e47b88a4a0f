"""Texts of a checkpoint: prompts as ids, functions that write batches, and ids as words."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from halfstep.checkpoint import Model, load_checkpoint
from halfstep.config import DEFAULT_STEPS, MOST_STEPS, DrawOptions
from halfstep.data.pairs import encode_prompts
from halfstep.data.tokenizer import EOS, encode_texts
from halfstep.diffusion.contracts import Denoiser, Draws, Samples
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.diffusion.watching import Show, watched
from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import uniforms
from halfstep.kernels.precision import computing
from halfstep.models.causal_lm import CachedDecoder, CausalLM
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt import GPT, Decoder
from halfstep.models.readers import autoregressor
from halfstep.progress import Progress

MASK = "<|mask|>"
OTHER_MASKS = ("[MASK]", "<mask>")  # of the families of Bert and of Roberta
SPECIAL = re.compile(f"( ?{re.escape(MASK)}|{re.escape(EOS)})")

Writer = Callable[[Tensor, int], Samples]
"""(prompts[n, P], first) -> n texts that begin with the prompts, numbered from `first` on."""


def encode_prompt(model: Model, prompt: str) -> Tensor:
    """What begins a text of the model (BOS, or its frame), and a prompt's tokens: [P]; "" has none.

    MASK becomes the mask token and EOS its own id; other special tokens are text. Words of a BPE
    begin with their blank. So a blank before a position that the model writes, which is a MASK or
    the end of the prompt, is left out: the token there brings it. A model that was trained on pairs
    gets the prompt in its turn, unless MASK or EOS is in it.
    """
    for other in OTHER_MASKS:
        if other in prompt:
            note = f"note: {other} is taken as text; a token to fill in is written {MASK}"
            print(note, file=sys.stderr)
    ids = prompt_ids(model, prompt) if prompt else []
    most = model.framing.inside(model.length).stop if model.is_framed else model.length
    if len(ids) >= most:
        raise HalfstepError(
            f"prompt: {len(ids)} tokens with BOS, but a text of this model has {most}; "
            "shorten the prompt"
        )
    return torch.tensor(ids, dtype=torch.long)


def prompt_ids(model: Model, prompt: str) -> list[int]:
    """The tokens of `encode_prompt`, however many there are; those that begin a text for ""."""
    if MASK in prompt and model.denoiser is None:
        raise HalfstepError(
            f"prompt: found {MASK}, but an autoregressive model cannot fill in a position; "
            "use a diffusion model"
        )
    ids, turn = list(model.framing.begin), model.turn
    if turn and not SPECIAL.search(prompt):
        (ids,) = encode_prompts(model.tokenizer, turn, ids, [prompt])
        prompt = ""
    for piece in SPECIAL.split(prompt.removesuffix(" ")):
        if piece.endswith(MASK):
            ids.append(model.mask_id)
        elif piece == EOS:
            ids.append(model.eos_id)
        elif piece:
            ids += encode_texts(model.tokenizer, [piece])[0]
    return ids


def text_writer(
    model: Model,
    length: int,
    steps: int,
    options: DrawOptions,
    end: Sequence[int] | None = None,
    show: Show | None = None,
    scorer: Model | None = None,
) -> Writer:
    """A function that writes one batch of texts of `length` tokens.

    The frame of a model of transformers is given, and not written. A denoiser can be given tokens
    `end` to the right of each text, in place of the end of its frame; the result leaves them out.
    It can be given a function `show`, which is called with the texts and their times before each
    pass. Where the sampler asks a scorer, it is given, or the options name its checkpoint. Raises
    HalfstepError if there are more steps than the sampler can use, or no such scorer.
    """
    if not 1 <= steps <= MOST_STEPS:
        raise HalfstepError(f"steps: found {steps}, expected 1 to {MOST_STEPS}; change it")
    if model.denoiser is None:
        return _PromptByPrompt(_AutoregressiveWriter(model, length, options, end is None), model)
    SAMPLERS[options.sampler].check_steps(options.sampler, steps, length)
    own = sampler_options(options)
    if options.asks_scorer:
        scorer = load_scorer(model, options, scorer)
        own["scorer"] = autoregressor(cast(GPT | CausalLM, scorer.network))
    write = _DiffusionWriter(model, model.denoiser, length, steps, options, own, end, show)
    return _PromptByPrompt(write, model) if SAMPLERS[options.sampler].needs_first else write


def default_steps(model: Model, sampler: str) -> int:
    """The steps of a call that names none; a sampler that takes what it needs may take them all."""
    own_pace = sampler in SAMPLERS and SAMPLERS[sampler].own_pace
    return model.length if model.denoiser is None or own_pace else DEFAULT_STEPS


def sampler_options(options: DrawOptions) -> dict[str, Any]:
    """The sampler's own options, those that are left out with their defaults; no scorer."""
    own = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in SAMPLERS[options.sampler].options.items()
    }
    own.pop("scorer", None)
    return own


def sampler_name(options: DrawOptions) -> str:
    """The sampler with its own options, as rows of metrics name it: threshold(threshold=0.9)."""
    chosen = sampler_options(options)
    chosen.pop("top_p", None)  # rows have a column for it
    own = ", ".join(f"{name}={value}" for name, value in chosen.items())
    return f"{options.sampler}({own})" if own else options.sampler


def load_scorer(model: Model, options: DrawOptions, given: Model | None = None) -> Model:
    """The autoregressive model that the sampler asks: a given one, or the options' checkpoint.

    It computes in the precision of the model, and on its device. HalfstepError if there is none, or
    if it does not fit.
    """
    sampler, name = options.sampler, options.scorer or "a model"
    if given is None and options.scorer is None:
        raise HalfstepError(
            f"scorer: found none, but sampler {sampler} asks an autoregressive model; "
            "name its checkpoint folder"
        )
    here = str(model.device), model.precision
    scorer = given or _checkpoint_of_scorer(name, *here)
    if scorer.denoiser is not None:
        raise HalfstepError(
            f"scorer: found {name}, a diffusion model, but sampler {sampler} asks an "
            "autoregressive one; `halfstep import-baseline` makes one of a model of transformers"
        )
    if scorer.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise HalfstepError(
            f"scorer: found {name} with a vocabulary of {scorer.vocab_size:,} tokens, "
            f"but the diffusion model has another one, of {model.vocab_size:,}; choose a scorer "
            "with the same tokenizer"
        )
    if (str(scorer.device), scorer.precision) != here:
        raise HalfstepError(
            f"scorer: found {name} on {scorer.device} in {scorer.precision}, but the diffusion "
            f"model is on {' in '.join(here)}; load both alike"
        )
    return scorer


@lru_cache(1)
def _checkpoint_of_scorer(folder: str, device: str, precision: str) -> Model:
    return load_checkpoint(Path(folder), "ema", device, precision)


@dataclass
class _DiffusionWriter:
    """A Writer that fills in masked texts with a sampler."""

    model: Model
    denoiser: SubsDenoiser
    length: int
    steps: int
    options: DrawOptions
    own: dict[str, Any]
    end: Sequence[int] | None
    show: Show | None

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        count, given = prompts.shape
        frame = torch.full((count, self.length), self.model.mask_id)
        frame[:, :given] = prompts
        framing = self.model.framing
        from_left = SAMPLERS[self.options.sampler].needs_first
        if not given and (from_left or self.model.is_framed):
            begin = framing.begin or [self.model.eos_id] * from_left
            frame[:, : len(begin)] = torch.tensor(begin, dtype=torch.long)
        if self.end and not from_left:
            frame = torch.cat([frame, torch.tensor(self.end).expand(count, -1)], 1)
        elif self.model.is_framed and self.end is None and not from_left:
            stop = framing.inside(self.length).stop
            frame[:, stop:] = torch.tensor(framing.end, dtype=torch.long)
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
                **self.own,
            )
        asked = written.autoregressive_passes
        ids = written.ids[:, : self.length].cpu()
        if self.model.turn:
            ids = end_responses(ids, written_places(self.model, prompts, self.length), self.model)
        if self.end is None:
            ids = _with_end(self.model, ids)
        return Samples(
            ids,
            written.network_evaluations.cpu(),
            None if asked is None else asked.cpu(),
        )


@dataclass
class _AutoregressiveWriter:
    """A Writer that appends token by token; batches of one size share a decoder and its memory."""

    model: Model
    length: int
    options: DrawOptions
    whole: bool
    decoder: Decoder | CachedDecoder | None = None

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        count, given = prompts.shape
        options = self.options
        start = prompts if given else torch.tensor(self.model.framing.begin)
        u = uniforms(options.sampling_seed, first, count, self.length)
        with computing(self.model.device, self.model.precision):
            if self.decoder is None or len(self.decoder.ids) != count:
                network = cast(GPT | CausalLM, self.model.network)
                draws = options.temperature, options.top_p
                self.decoder = network.decoder(count, self.length, *draws)
            ids = self.decoder.write(start, u)
        evaluations = self.length - start.shape[-1]  # the first token takes no pass
        ids = ids.cpu()
        if self.model.turn:
            ids = end_responses(ids, written_places(self.model, prompts, self.length), self.model)
        if self.whole:
            ids = _with_end(self.model, ids)
        return Samples(ids, torch.full((count,), evaluations))


@dataclass(frozen=True)
class _PromptByPrompt:
    """A Writer from left to right whose prompts may differ in length: the rest of each is masks.

    Then every text is drawn alone.
    """

    write: Writer
    model: Model

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        stop = self.model.framing.inside(self.model.length).stop if self.model.is_framed else None
        masked = prompts[:, :stop] == self.model.mask_id
        given = masked.shape[1] - masked.sum(1)
        if not masked.any() or masked[:, 0].any() or not masked[:, -1].all() or _has_gaps(masked):
            return self.write(prompts, first)
        texts = [
            self.write(prompts[i : i + 1, :count], first + i)
            for i, count in enumerate(given.tolist())
        ]
        asked = [text.autoregressive_passes for text in texts]
        return Samples(
            torch.cat([text.ids for text in texts]),
            torch.cat([text.network_evaluations for text in texts]),
            None if asked[0] is None else torch.cat(asked),  # type: ignore[arg-type]
        )


def _has_gaps(masked: Tensor) -> bool:
    """Is there a row of masked[N, L] with something given after a mask?"""
    return bool((masked[:, :-1] & ~masked[:, 1:]).any())


def written_places(model: Model, prompts: Tensor, length: int) -> Tensor:
    """The positions of texts that begin with prompts[N, P] and are not given: bool [N, length]."""
    count, given = prompts.shape
    written = torch.ones(count, length, dtype=torch.bool)
    written[:, :given] = prompts == model.mask_id
    if model.is_framed:
        inside = model.framing.inside(length)
        written[:, : inside.start] = written[:, inside.stop :] = False
    elif not given:
        written[:, 0] = False  # BOS
    return written


def end_responses(ids: Tensor, written: Tensor, model: Model) -> Tensor:
    """Texts ids[N, L] with EOS alone after the first EOS of a response.

    A response is what is written[N, L] of a text; where something is given to its right, the text
    stays as it is.
    """
    stop = model.framing.inside(ids.shape[1]).stop if model.is_framed else ids.shape[1]
    first = written.int().argmax(1)
    is_last = written.sum(1) == stop - first
    ended = ((ids == model.eos_id) & written).cumsum(1) > 0
    return ids.masked_fill(ended & written & is_last[:, None], model.eos_id)


def _with_end(model: Model, ids: Tensor) -> Tensor:
    """Whole texts ids[N, L] with the end of the model's frame, which is never learned.

    A sampler that writes from left to right is not given it.
    """
    if model.is_framed:
        stop, ids = model.framing.inside(ids.shape[1]).stop, ids.clone()
        ids[:, stop:] = torch.tensor(model.framing.end, dtype=torch.long)
    return ids


def note_costs(texts: Samples, tokens: int, options: DrawOptions) -> None:
    """Tell the user the passes of a text, if they do not follow from the step count.

    `tokens` are those that the model has written of each text.
    """
    asked = texts.autoregressive_passes
    if asked is None and not SAMPLERS[options.sampler].own_pace:
        return
    evaluations = float(texts.network_evaluations.double().mean())
    text = f"{round(evaluations, 1):,g} network evaluations a text"
    if evaluations:
        text += f" ({round(tokens / evaluations, 1):,g} tokens each)"
    if asked is not None:
        passes = round(float(asked.double().mean()), 1)
        text += f", {passes:,g} passes of the autoregressive model"
    print(text, file=sys.stderr)


def note_unused_options(model: Model, length: int, steps: int, options: DrawOptions) -> None:
    """Tell the user about options that have no effect on this kind of model."""
    notes = []
    if model.denoiser is not None:
        if steps > length and not SAMPLERS[options.sampler].own_pace:
            notes.append(
                f"{steps} steps for texts of {length} tokens: at most {length} steps reveal "
                "a token, and the others take no pass"
            )
        if options.top_p != 1 and "top_p" not in SAMPLERS[options.sampler].options:
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
    asked = [batch.autoregressive_passes for batch in batches]
    # Only samplers that ask an autoregressive model have these, on all ranks that have texts.
    passes = _gathered([one for one in asked if one is not None], group)
    return None if ids is None or evaluations is None else Samples(ids, evaluations, passes)


def _gathered(batches: list[Tensor], group: Group) -> Tensor | None:
    rows = group.gather_rows(torch.cat(batches).numpy() if batches else None)
    return None if rows is None else torch.from_numpy(rows)


def separate_documents(model: Model, texts: Samples) -> list[str]:
    """The texts without BOS and EOS; a line <|endoftext|> is between two documents of a text."""
    decoded = []
    for ids in texts.ids.tolist():
        documents: list[list[int]] = [[]]
        if model.is_framed:
            ids = _without_frame(model, ids)
        for token in ids:
            if token == model.eos_id:
                documents.append([])
            else:
                documents[-1].append(token)
        if not documents[0]:
            documents = documents[1:]  # BOS
        if model.turn:
            documents = documents[:1]  # EOS follows the response
        elif not documents[-1]:
            documents = documents[:-1]  # EOS
        decoded.append(f"\n{EOS}\n".join(model.tokenizer.decode_batch(documents)))
    return decoded


def _without_frame(model: Model, ids: list[int]) -> list[int]:
    """The tokens of a text without its frame; the end of a text may have been cut off before."""
    begin, end = model.framing.begin, model.framing.end
    if begin and ids[: len(begin)] == begin:
        ids = ids[len(begin) :]
    if end and ids[-len(end) :] == end:
        ids = ids[: -len(end)]
    return ids
