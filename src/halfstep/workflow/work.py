"""The work of each halfstep command, from its flags: FLOPs, bytes, and seconds of the host.

To price another command, write a function of its call and add a row to WORK.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

from halfstep.config import (
    Benchmark,
    Distillation,
    DrawOptions,
    Evaluation,
    GenerateOptions,
    Pretraining,
    Prompts,
    SampledModels,
    Training,
)
from halfstep.models import flops
from halfstep.workflow.calls import STORY_TOKENS, Call
from halfstep.workflow.drawing import BYTES, decode_work, draw_work, nonempty_steps
from halfstep.workflow.rates import Work

MASKED = {"loglinear": 1 / 2, "cosine": 2 / math.pi}
"""Share of tokens that training masks on average, by noise schedule"""
VALIDATION_WINDOWS = 512  # of each validation of a training
WATCHED, WATCHED_STEPS = 16, 32  # texts and steps of a round's val/entropy
DATA_WINDOWS = 500  # held-out windows behind the rows of data
MAUVE_TEXTS = 50  # fewest texts that have a MAUVE


class Items(NamedTuple):
    """Items of a last-word task: their number, and tokens and passes of each."""

    number: int
    tokens: int
    passes: float
    """of a denoiser that ignores time: 2^n - 1 masks of n tokens, those among them that occur in 32
    draws, and n guesses"""


LAST_WORDS = Items(1000, 45, 3)  # of stories with 640 tokens in the vocabulary
LAMBADA = Items(5153, 90, 5)  # the test split on the hub, words of 1.3 tokens on average


STORY_MASKED = 0.05  # share of a window of stories that is masked for infilling
LAMBADA_MASKED = 1.3 / LAMBADA.tokens


class Questions(NamedTuple):
    """A task of lm-eval: its number of questions, the answers to each, tokens of a whole text."""

    number: int
    answers: int
    tokens: int


# Splits that lm-eval evaluates, with the lengths that their texts have on average by GPT-2's
# tokenizer, roughly; a task that is not here counts as ANY_TASK.
TASKS = {
    "arc_easy": Questions(2376, 4, 40),
    "arc_challenge": Questions(1172, 4, 45),
    "hellaswag": Questions(10_042, 4, 105),
    "mathqa": Questions(2985, 5, 75),
    "piqa": Questions(1838, 2, 45),
    "winogrande": Questions(1267, 2, 28),
}
ANY_TASK = Questions(2500, 4, 60)
WRITTEN_TASK = Questions(1319, 1, 1100)  # gsm8k: five examples, a question, 256 tokens of an answer
# Tokens of the splits of MDLM's table 3, roughly: sentences or articles times their mean length.
ZERO_SHOT_TOKENS = {
    "ptb": 1e5, "wikitext": 2.5e5, "lm1b": 8e6, "lambada": 4.5e5, "ag_news": 4e5, "pubmed": 2.7e7,
    "arxiv": 5.8e7,
}  # fmt: skip
ANY_TEXT = 1e6

# Tokens of corpora whose size does not follow from their flags: GPT-2's of OpenWebText
# (nanoGPT counts 9.04e9), and those of 22 MB of docstrings.
CORPUS_TOKENS = {"openwebtext": 9.0e9, "docs": 6e6}
BYTES_PER_TOKEN = 4  # of English text in files
TOKENIZE_S = 3e-6  # CPU seconds per token of prepare-corpus, measured on 2 cores
DOCSTRINGS_S = 80  # seconds in which docstrings are found, measured on 2 cores
HOST_S = 1e-3  # seconds per block and token of transformers' generate: its host's time, assumed
READ_S = 5e-9  # seconds per byte of weights that are read, converted and written


def training_work(call: Call) -> Iterator[Work]:
    """Pretraining of a teacher, or training of a baseline."""
    section = Pretraining if call.name == "pretrain" else Training
    network, texts = call.network, call.number("batch_size", section)
    length, steps = call.length, call.number("num_steps", section)
    share = MASKED[call.text("schedule", "loglinear")] if call.name == "pretrain" else 1
    update = flops.training_flops(network, texts, length, texts * length * share)
    precision = call.text("precision", section)
    yield Work(steps * update, network.width, precision)
    yield _validation_work(call, section, share, precision)


def round_work(call: Call) -> Iterator[Work]:
    """A round of distillation: student and teacher, validations, and samples behind val/entropy."""
    network, length, section = call.network, call.length, Distillation
    substeps, texts = call.number("substeps", section), call.number("batch_size", section)
    teacher_steps, number = call.number("teacher_steps", section), call.number("round")
    dt = substeps ** (number - 1) / teacher_steps
    revealed = dt - dt**2 / 2  # on average over all times, with the log-linear schedule
    masked = MASKED["loglinear"]
    update = flops.distillation_flops(network, network, texts, length, masked, revealed, substeps)
    precision = call.text("precision", section)
    yield Work(call.number("num_steps", section) * update, network.width, precision)
    yield _validation_work(call, section, masked, precision)
    steps = min(WATCHED_STEPS, teacher_steps // substeps**number)
    for work in draw_work(call, WATCHED, length, length, steps, "ancestral", alike=True):
        yield work.times(_validations(call, section))


def _validations(call: Call, section: type[Training]) -> int:
    return math.ceil(call.number("num_steps", section) / call.number("validate_every", section))


def _validation_work(call: Call, section: type[Training], share: float, precision: str) -> Work:
    windows = min(VALIDATION_WINDOWS, call.held_out)
    rows = windows * call.length * share
    once = flops.forward_flops(call.network, windows, call.length, rows)
    return Work(once, call.network.width, precision).times(_validations(call, section))


def sampling_work(call: Call) -> Iterator[Work]:
    """Samples at one or several step counts and temperatures."""
    number, length = call.number("num_samples", GenerateOptions), call.length
    sampler = call.text("sampler", DrawOptions)
    for steps in map(int, call.values("steps") * max(1, len(call.values("temperatures")))):
        yield from draw_work(call, number, length, length, steps, sampler, alike=True)


def continuation_work(call: Call) -> Iterator[Work]:
    """Continuations of prompts; a denoiser reads an EOS to the right of each text."""
    number = call.number("num_prompts", Prompts) * call.number("per_prompt", Prompts)
    given, new = call.number("prompt_tokens", Prompts), call.number("continuation_tokens", Prompts)
    sampler, length = call.text("sampler", DrawOptions), given + new + (not call.is_baseline)
    for steps in map(int, call.values("steps")):
        yield from draw_work(call, number, length, new, steps, sampler)


def score_work(call: Call) -> Iterator[Work]:
    """Perplexities of sets of texts, and features of samples and of held-out text for MAUVE."""
    number, samples = call.number_of_samples, call.values("samples")
    features = _compared(len(samples) * number, number, call)
    sets = {*samples, *call.values("frontier")}  # each is read once
    yield from judge_work(call, len(sets) * number, features, call.length)


def corpus_score_work(call: Call) -> Iterator[Work]:
    """Perplexities of held-out windows, and features of two halves."""
    half = min(call.number("num_samples", SampledModels), call.held_out // 2)
    scored = min(DATA_WINDOWS, call.held_out)
    yield from judge_work(call, scored, _compared(half, half, call), call.length)


def _compared(texts: int, number: int, call: Call) -> int:
    """Texts and held-out windows that have features, in sets of `number`; 0 for small sets."""
    windows = min(number, -(-call.held_out // 2))
    return texts + windows if min(number, windows) >= MAUVE_TEXTS else 0


def continuation_score_work(call: Call) -> Iterator[Work]:
    """Perplexities and features of continuations, and features of their documents."""
    prompts, per_prompt, length = call.prompts
    number = len(call.values("samples")) * prompts * per_prompt
    yield from judge_work(call, number, number + prompts, length, retokenized=False)


def judge_work(
    call: Call, scored: int, features: int, length: int, retokenized: bool = True
) -> Iterator[Work]:
    """What the judges read: texts with all their logits, once by each protocol, and features.

    Protocol `ids` needs the corpus's vocabulary.
    """
    for network, precision in call.judges():
        times = (network.vocabulary == call.vocabulary) + retokenized
        rows = times * scored * length
        work = flops.forward_flops(network, times * scored + features, length, rows)
        yield Work(work, network.width, precision)


def lambada_work(call: Call) -> Iterator[Work]:
    """Last words: each denoiser reads an item under all its masks, a baseline once."""
    items, number = LAMBADA, LAMBADA.number
    if call.text("lambada", "") == "last_words":  # one for each held-out story
        items, number = LAST_WORDS, call.held_out_documents
    number = min(number, call.number("lambada_items", number))
    texts = number * (1 if call.is_baseline else items.passes) * len(call.values("checkpoint"))
    tokens = min(items.tokens, call.length)
    work = flops.forward_flops(call.network, texts, tokens, 2 * texts)
    yield Work(work, call.network.width, call.inference_precision)


def infilling_work(call: Call) -> Iterator[Work]:
    """Windows of last words, and held-out windows with masked positions, at each limit of steps."""
    from halfstep.metrics.infilling import step_limits

    number, length = call.number("infilling_items"), call.length
    items = call.text("lambada", "")
    free = {length // 2}
    if items == "last_words":
        free = {length // LAST_WORDS.tokens, round(length * STORY_MASKED)}
    elif items:
        free.add(math.ceil(length * LAMBADA_MASKED))
    for positions in free:
        for steps in step_limits(max(1, positions)):
            sampler = call.text("sampler", DrawOptions)
            yield from draw_work(call, number, length, max(1, positions), steps, sampler)


def tasks_work(call: Call) -> Iterator[Work]:
    """Tasks of lm-eval: a denoiser reads each answer under many masks, a baseline once.

    Where there are step counts, a denoiser writes the answers to a task that is not in TASKS.
    """
    most = call.number("task_items", 0) or None
    passes = 1 if call.is_baseline else call.number("task_draws", Evaluation)
    counts, sampler = list(map(int, call.values("steps"))), call.text("sampler", DrawOptions)
    for name in call.values("tasks"):
        if counts and name not in TASKS:
            number = min(WRITTEN_TASK.number, most or WRITTEN_TASK.number)
            length = min(WRITTEN_TASK.tokens, call.length)
            for steps in counts:
                yield from draw_work(call, number, length, min(256, length // 2), steps, sampler)
            continue
        asked = TASKS.get(name, ANY_TASK)
        texts = min(asked.number, most or asked.number) * asked.answers * passes
        tokens = min(asked.tokens, call.length)
        work = flops.forward_flops(call.network, texts, tokens, texts * tokens / 2)
        yield Work(work, call.network.width, call.inference_precision)


def zero_shot_work(call: Call) -> Iterator[Work]:
    """Windows of texts: a denoiser reads each under several masks, a baseline once."""
    most = call.number("task_items", 0) or None
    passes = 1 if call.is_baseline else call.number("perplexity_draws", Evaluation)
    for name in call.values("perplexity"):
        windows = ZERO_SHOT_TOKENS.get(name, ANY_TEXT) / call.length
        texts = min(windows, most or windows) * passes
        work = flops.forward_flops(call.network, texts, call.length, texts * call.length / 2)
        yield Work(work, call.network.width, call.inference_precision)


def latency_work(call: Call) -> Iterator[Work]:
    """Timed texts of students and baselines at each size, length and batch size."""
    precision, calls = call.text("timed_dtype", Benchmark), 1 + call.number("repeats", Benchmark)
    sizes = call.values("size") or [call.size, *call.values("sizes")]
    decoders = call.values("baselines") or Benchmark.model_fields["baselines"].default
    if not (call.values("baseline") or call.values("size")):
        decoders = []
    for size, length, batch in product(
        sizes, _counts(call, "lengths"), _counts(call, "batch_sizes")
    ):
        student, baseline = call.denoiser_of(size), call.causal_of(size)
        for steps in _counts(call, "benchmark_steps"):
            if call.values("variant"):
                sampler, times = call.text("sampler", DrawOptions), len(call.values("checkpoint"))
                for work in draw_work(call, batch, length, length, steps, sampler, alike=True):
                    yield work.times(times * calls)
                continue
            passes = nonempty_steps(steps, length)
            texts = 1 + batch * (passes - 1)
            work = flops.forward_flops(student, texts, length, batch * length)
            moved = passes * student.weights * BYTES[precision]
            yield Work(work, student.width, precision, moved).times(calls)
        for name in decoders:
            work = decode_work(baseline, batch, 1, length, length, precision).times(calls)
            if name == "transformers":  # with either of two caches
                work = work._replace(host=calls * HOST_S * baseline.blocks * length).times(2)
            yield work


def _counts(call: Call, flag: str) -> list[int]:
    return list(map(int, call.values(flag) or Benchmark.model_fields[flag].default))


def corpus_work(call: Call) -> Iterator[Work]:
    """Tokenization on several processes."""
    workers, before = max(1, call.number("workers", 1)), 0
    if call.text("kind", "") == "docs":
        before = DOCSTRINGS_S
    yield Work(0, 1, host=before + corpus_tokens(call) * TOKENIZE_S / workers)


def corpus_tokens(call: Call) -> float:
    """Tokens of the corpus that a call prepares, as far as they are known before."""
    kind = call.text("kind", "")
    if kind == "stories":
        return STORY_TOKENS * float(call.number("num_documents", 0))
    return CORPUS_TOKENS.get(kind, call.bytes_read / BYTES_PER_TOKEN)


def import_work(call: Call) -> Iterator[Work]:
    """Weights that are read, converted and written: raw and averaged ones."""
    yield Work(0, 1, host=READ_S * 2 * 4 * call.network.parameters)


def no_work(call: Call) -> Iterator[Work]:
    """Nothing that takes longer than the start of the command."""
    yield from ()


WORK: dict[str, Callable[[Call], Iterator[Work]]] = {
    "prepare-corpus": corpus_work,
    "pretrain": training_work,
    "train-baseline": training_work,
    "import": import_work,
    "import-baseline": import_work,
    "distill-round": round_work,
    "generate": sampling_work,
    "draw-naive": no_work,
    "continue-prompts": continuation_work,
    "score-samples": score_work,
    "score-corpus": corpus_score_work,
    "score-frontier": score_work,
    "score-continuations": continuation_score_work,
    "score-lambada": lambada_work,
    "score-infilling": infilling_work,
    "score-tasks": tasks_work,
    "score-perplexity": zero_shot_work,
    "latency": latency_work,
    "tabulate": no_work,
    "plot": no_work,
    "track": no_work,
    "start-page": no_work,
    "merge-provenance": no_work,
}
"""The work of a call, by the name of its command; one that is not here counts as its time limit"""
