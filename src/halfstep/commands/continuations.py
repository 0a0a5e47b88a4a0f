"""`halfstep continue-prompts` and `score-continuations`: what a model writes after the beginnings of held-out documents, and its measures."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from halfstep.checkpoint import checkpoint_files as model_files
from halfstep.checkpoint import load_checkpoint
from halfstep.commands.evaluate import about_samples, corpus_name, judges, read_samples
from halfstep.commands.generate import draw_texts, note_idle_steps, save_samples, text_writer
from halfstep.config import DrawOptions, Evaluation, Machine, Prompts
from halfstep.data.pack import Windows, corpus_files, read_manifest, tokenizer_of
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.files import write_json
from halfstep.metrics.diversity import distinct, self_bleu
from halfstep.metrics.intervals import bootstrap
from halfstep.metrics.mauve import features, mauve
from halfstep.metrics.perplexity import ids_nll
from halfstep.metrics.rows import model_name, row
from halfstep.records import provenance

PROTOCOL = "continuations"
AT_ONCE = 1024  # windows read at a time in the search for documents


def continue_prompts(
    checkpoint: Path,
    corpus: Path,
    output: Path,
    steps: int,
    prompts: Prompts,
    drawing: DrawOptions,
    machine: Machine,
) -> None:
    """Write samples.npy (ids [num_prompts * per_prompt, prompt_tokens + continuation_tokens]), samples.txt and samples.json.

    The continuations of a prompt lie together. A denoiser has learnt windows between two EOS, so the last position of what it writes would be EOS,
    which no document here ends with: it is given an EOS behind each text, which is not kept. An autoregressive checkpoint takes one step
    per token, whatever `steps` says.

    Args:
        checkpoint: a checkpoint folder
        corpus: folder of `halfstep prepare-corpus`, whose held-out documents are continued
        output: folder of the continuations
        steps: sampling steps
    """
    started, group, device = time.monotonic(), join_group(machine), find_device(machine)
    model = load_checkpoint(checkpoint, drawing.weights, str(device))
    if model.tokenizer.get_vocab() != tokenizer_of(corpus).get_vocab():
        raise HalfstepError(
            f"{corpus}: its tokenizer is not that of {model_name(checkpoint)}; name the corpus that the model was trained on"
        )
    texts, P = references(corpus, prompts), prompts.prompt_tokens
    if texts.shape[1] >= model.length:
        raise HalfstepError(
            f"prompt_tokens + continuation_tokens: found {P} + {prompts.continuation_tokens}, but a text of {model_name(checkpoint)} has "
            f"{model.length} tokens, EOS at its end; lower one of them"
        )
    length = texts.shape[1]
    write = text_writer(model, length, steps, drawing, end=model.eos_id)
    if group.is_main:
        note_idle_steps(model, length, steps)
    given = texts[:, :P].repeat_interleave(prompts.per_prompt, 0)
    label = f"continue {model_name(checkpoint)} at {steps} steps"
    written = draw_texts(write, given, machine.micro_batch, label, group)
    if written is None:
        return
    save_samples(
        checkpoint,
        output,
        model,
        steps,
        written,
        drawing,
        prompts=prompts.model_dump(),
        elapsed_s=time.monotonic() - started,
    )
    provenance.write_record(
        output / provenance.NAME,
        output.glob("samples.*"),
        [*model_files(checkpoint, drawing.weights), *corpus_files(corpus, "validation")],
    )


def score_continuations(
    samples: list[Path], corpus: Path, output: Path, evaluation: Evaluation, machine: Machine
) -> None:
    """MAUVE, self-BLEU, distinct bigrams and, under a judge with the corpus's tokenizer, perplexity of one model's continuations.

    Perplexity is exp(mean over texts of the mean over continuation_tokens of -log p(token | all before it)).

    Args:
        samples: folders of `halfstep continue-prompts`, one per step count, all of the same prompts
        corpus: folder of `halfstep prepare-corpus` that holds the prompts
        output: JSON file of the rows
    """
    group, sets, human, found = join_group(machine), [], {}, []
    for folder in samples:
        ids, facts = read_samples(folder)
        if "prompts" not in facts:
            raise HalfstepError(
                f"{folder}: samples without prompts; name folders that halfstep continue-prompts wrote"
            )
        prompts = Prompts.model_validate(facts["prompts"])
        if prompts not in human:
            human[prompts] = references(corpus, prompts).numpy()
        given = human[prompts][:, : prompts.prompt_tokens].repeat(prompts.per_prompt, 0)
        if not np.array_equal(ids[:, : prompts.prompt_tokens], given):
            raise HalfstepError(
                f"{folder}: its prompts are not those of {corpus}; name the corpus of the samples, or continue its prompts again"
            )
        what = f"{corpus_name(corpus)}, {prompts.num_prompts} prompts of {prompts.prompt_tokens} tokens, documents of {prompts.document_tokens}"
        sets.append((ids, prompts, about_samples(facts) | {"data": what, "length": ids.shape[1]}))
    tokenizer, eos_id = tokenizer_of(corpus), read_manifest(corpus)["eos_id"]
    for judge in judges(evaluation, machine):
        states = {
            prompts: features(
                judge, texts, tokenizer, eos_id, machine.micro_batch, "judge, held-out text", group
            )
            for prompts, texts in human.items()
        }
        for ids, prompts, about in sets:
            label = f"{about['model']} at {about['steps'] or 'all'} steps: judge"
            written = features(
                judge, ids, tokenizer, eos_id, machine.micro_batch, f"{label}, features", group
            )
            nll = None
            if judge.shares(tokenizer):
                nll = ids_nll(
                    judge,
                    ids,
                    machine.micro_batch,
                    f"{label}, perplexity",
                    group,
                    prompts.prompt_tokens,
                )
            found.append((prompts, states[prompts], written, nll, about | judge.about))
        del judge  # before the next is loaded
    if not group.is_main:
        return
    rows = []
    for prompts, reference, written, nll, about in found:
        rows.append(row("mauve", PROTOCOL, *mauve(reference, written), **about))
        if nll is not None:
            of_prompt = nll.reshape(prompts.num_prompts, -1).mean(1)
            rows.append(
                over_prompts("continuation_perplexity", of_prompt, evaluation, about, np.exp)
            )
    for ids, prompts, about in sets:
        of_prompt = ids[:, prompts.prompt_tokens :].reshape(
            prompts.num_prompts, prompts.per_prompt, -1
        )
        rows.append(over_prompts("self_bleu", self_bleu(of_prompt), evaluation, about))
        rows.append(
            over_prompts("continuation_distinct_2", distinct(of_prompt, 2), evaluation, about)
        )
    write_json(output, rows)
    read = (folder / name for folder in samples for name in ("samples.json", "samples.npy"))
    provenance.write_record(
        output.with_suffix(f".{provenance.NAME}"),
        [output],
        [*read, *corpus_files(corpus, "validation"), *evaluation.judge],
    )


def over_prompts(
    metric: str, values: np.ndarray, evaluation: Evaluation, about: dict, statistic=float
) -> dict:
    """The row of values[num_prompts]: a prompt is the unit of the bootstrap, for its continuations are not independent of one another."""
    return row(
        metric,
        PROTOCOL,
        statistic(values.mean()),
        bootstrap(values, statistic, evaluation.bootstrap),
        **about,
    )


def references(corpus: Path, prompts: Prompts) -> torch.Tensor:
    """BOS and the beginnings of the corpus's first num_prompts held-out documents that are long enough, [num_prompts, L] int64.

    L is prompt_tokens + continuation_tokens: the first prompt_tokens of a row are a prompt, the rest is how its document goes on.
    """
    windows, new = (
        Windows(corpus, "validation"),
        prompts.prompt_tokens + prompts.continuation_tokens - 1,
    )
    long = list(
        islice(
            (text for text in held_out_documents(windows) if len(text) >= prompts.document_tokens),
            prompts.num_prompts,
        )
    )
    if len(long) < prompts.num_prompts:
        raise HalfstepError(
            f"{corpus}: found {len(long)} held-out documents of document_tokens ({prompts.document_tokens}) or more, expected num_prompts "
            f"({prompts.num_prompts}); lower one of the two, or raise the corpus's validation_documents"
        )
    return torch.cat(
        [torch.full((len(long), 1), windows.eos_id), torch.stack([text[:new] for text in long])], 1
    )


def held_out_documents(windows: Windows) -> Iterator[torch.Tensor]:
    """The documents of a split in their order, without EOS, put together from its windows (EOS + tokens + EOS); the last may be cut short."""
    rest = torch.empty(0, dtype=torch.long)
    for first in range(0, len(windows), AT_ONCE):
        stream = torch.cat([rest, windows[first : first + AT_ONCE][:, 1:-1].flatten()])
        ends = (stream == windows.eos_id).nonzero()[:, 0]
        *whole, rest = stream.tensor_split(ends + 1)
        yield from (text[:-1] for text in whole)
    yield rest
