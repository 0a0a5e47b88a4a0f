"""LAMBADA through lm-eval: halfstep's models as an lm-eval `LM`, and the stock LAMBADA task.

The task is that of arXiv 1606.06031, in OpenAI's detokenized form, from the hub or from a local
.jsonl. The last word is what follows the last space. Each protocol gives a different number:

    accuracy    parallel     BOS + text + EOS (or the frame of an imported model) with all tokens
                             of the last word masked, one pass, argmax; all must match (the SDTT
                             paper's)
                confidence   one pass per token, each writing the most confident one
                ar           autoregressive models: argmax of each token, given those before it
    perplexity  elbo-exact   exp(mean over items of the NELBO of the last word given the rest),
                             by all masks of up to 7 tokens, by 128 drawn masks of longer words
                elbo-mc      the same by the released code's Monte Carlo, 32 draws of time and
                             mask for each item (the SDTT paper's)
                ar           exp(mean over items of -log p of the last word)

Perplexities are per word, as in lm-eval: the mean runs over items, not over tokens. lm-eval's own
numbers, and the answers to its tasks, are elbo-exact and the first accuracy, `parallel`. The noise
of the masks makes elbo-mc larger than elbo-exact on average, because exp is convex.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from lm_eval.api.model import LM

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError, reason
from halfstep.kernels.precision import computing
from halfstep.metrics.likelihood import (
    DRAWS,
    EXACT,
    MC_DRAWS,
    Question,
    Tick,
    autoregressive_nll,
    confident_guess,
    diffusion_nll,
    monte_carlo_nll,
)
from halfstep.progress import Progress, only_our_bars
from halfstep.texts import check_regular, items_file, read_lines, reading, row_text

if TYPE_CHECKING:
    from halfstep.checkpoint import Model

ACCURACY = {"diffusion": ("parallel", "confidence"), "autoregressive": ("ar",)}
PERPLEXITY = {"diffusion": ("elbo-exact", "elbo-mc"), "autoregressive": ("ar",)}


class Request(NamedTuple):
    """What HalfstepLM reads of an lm-eval Instance: args = (context, continuation) or (text,)."""

    args: tuple[str, ...]


class HalfstepLM(LM):
    """A halfstep checkpoint for any lm-eval task that asks for likelihoods.

    `accuracy` is the protocol (see above) that decides `is_greedy`. Answers are cached, so that
    another protocol needs no second likelihood. Of a text longer than the model's length, BOS and
    the last tokens that fit are kept.

    With several ranks, rank 0 alone drives lm-eval; the others are in `serve`. All of them share
    the network's passes.
    """

    def __init__(
        self,
        model: Model,
        accuracy: str,
        micro_batch: int = 32,
        device: str = "cpu",
        seed: int = 0,
        group: Group = ALONE,
    ):
        super().__init__()
        if accuracy not in ACCURACY[model.kind]:
            raise HalfstepError(
                f"accuracy: found {accuracy!r}, expected one of {', '.join(ACCURACY[model.kind])} "
                f"for a model of kind {model.kind}"
            )
        self.model, self.accuracy = model, accuracy
        self.micro_batch, self.seed, self.group = micro_batch, seed, group
        self._device = device
        # (context, continuation) -> log-likelihood, and is_greedy under each protocol asked so far.
        self._answers: dict[tuple[str, ...], tuple[float, dict[str, bool]]] = {}

    def question(self, context: str, continuation: str) -> Question:
        """The framed window of context + continuation, in which the continuation is asked for."""
        left, right = self.token_ids(context, continuation)
        framing = self.model.framing
        most = self.model.length - len(framing.around([]))
        room = most - len(right)
        if room < 0 or not right:
            raise HalfstepError(
                f"lambada: {continuation[:40]!r} has {len(right)} tokens, expected 1 to "
                f"{most} in windows of {self.model.length}; "
                "shorten the item or leave it out"
            )
        left = left[max(0, len(left) - room) :]
        start = len(framing.begin) + len(left)
        return Question(framing.around([*left, *right]), start, start + len(right))

    def token_ids(self, *texts: str) -> list[list[int]]:
        """The tokens of each text, without its frame."""
        encoded = self.model.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [text.ids for text in encoded]

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether the model would write it."""
        asked = list(dict.fromkeys(request.args for request in requests))
        if new := [args for args in asked if args not in self._answers]:
            nll, right = self._ask("likelihood", [self.question(*args) for args in new]).T
            first = ACCURACY[self.model.kind][0]
            for args, value, hit in zip(new, nll, right, strict=True):
                self._answers[args] = -float(value), {first: bool(hit)}
        if new := [args for args in asked if self.accuracy not in self._answers[args][1]]:
            right = self._ask(self.accuracy, [self.question(*args) for args in new])
            for args, hit in zip(new, right, strict=True):
                self._answers[args][1][self.accuracy] = bool(hit)
        answers = [self._answers[request.args] for request in requests]
        return [(value, hits[self.accuracy]) for value, hits in answers]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Log-likelihood of whole texts, read in consecutive windows of the model's length.

        A diffusion model reads a window under 128 masks.
        """
        framing = self.model.framing
        room, start = self.model.length - len(framing.around([])), len(framing.begin)
        questions, owner = [], []
        for i, request in enumerate(requests):
            ids = self.model.tokenizer.encode(request.args[0], add_special_tokens=False).ids
            for at in range(0, len(ids), room):
                part = ids[at : at + room]
                questions.append(Question(framing.around(part), start, start + len(part)))
                owner.append(i)
        totals = np.zeros(len(requests))
        if questions:
            np.subtract.at(totals, owner, self._ask("likelihood", questions)[:, 0])
        return totals.tolist()

    def monte_carlo(self, requests: Sequence[Request]) -> np.ndarray:
        """Protocol elbo-mc: each continuation's NELBO in nats, [N]; request i has its own draws."""
        return self._ask("elbo-mc", [self.question(*request.args) for request in requests])

    def passes(self, requests: Sequence[Request]) -> dict[str, float]:
        """Network calls per item under each protocol, the mean over the requests.

        elbo-mc counts all its draws, even those that mask nothing or repeat a mask.
        """
        if self.model.kind == "autoregressive":
            return {"ar": 1.0}
        questions = [self.question(*request.args) for request in requests]
        tokens = [question.end - question.start for question in questions]
        exact = [2**n - 1 if n <= EXACT else DRAWS + 1 for n in tokens]
        return {
            "parallel": 1.0,
            "confidence": float(np.mean(tokens)),
            "elbo-exact": float(np.mean(exact)),
            "elbo-mc": float(MC_DRAWS),
        }

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        raise HalfstepError(
            "lm-eval: the task asks for generate_until; halfstep answers likelihood tasks only, "
            "and writes text with `halfstep generate`"
        )

    def serve(self) -> None:
        """On the other ranks: answer what rank 0 broadcasts, until it broadcasts None."""
        while asked := self.group.broadcast():
            what, windows = asked
            self._answer(what, [Question(tuple(ids), *others) for ids, *others in windows])

    def _ask(self, what: str, questions: list[Question]) -> np.ndarray:
        """answers[what] of all questions, on rank 0, which broadcasts them to the other ranks."""
        self.group.broadcast((what, list(map(astuple, questions))))
        return self._answer(what, questions)

    def _answer(self, what: str, questions: list[Question]) -> np.ndarray | None:
        def of_rows(rows: slice) -> np.ndarray:
            with (
                Progress(what, rows.stop - rows.start, "item") as progress,
                computing(self.model.device, self.model.precision),
            ):
                return self.answers[what](questions[rows], rows.start, progress.update)

        return self.group.map_rows(len(questions), of_rows)

    @property
    def answers(self) -> dict[str, Callable[[list[Question], int, Tick], np.ndarray]]:
        """What can be asked of the network, which is also the label of the progress.

        Each gives the answers to questions first, first + 1, ... [Q]; those to `likelihood` are
        [Q, 2]: nats, and whether the model would write it.
        """
        return {
            "likelihood": self._likelihood,
            "confidence": self._confidence,
            "elbo-mc": self._monte_carlo,
        }

    def _likelihood(self, questions: list[Question], first: int, tick: Tick) -> np.ndarray:
        model, batch, device = self.model, self.micro_batch, self._device
        if model.kind == "diffusion":
            found = diffusion_nll(model.denoiser, questions, batch, self.seed, device, tick, first)
        else:
            found = autoregressive_nll(model.network, questions, batch, device, tick)
        return np.column_stack(found)

    def _confidence(self, questions: list[Question], first: int, tick: Tick) -> np.ndarray:
        return confident_guess(self.model.denoiser, questions, self.micro_batch, self._device, tick)

    def _monte_carlo(self, questions: list[Question], first: int, tick: Tick) -> np.ndarray:
        return monte_carlo_nll(
            self.model.denoiser, questions, self.micro_batch, self.seed, self._device, tick, first
        )


def context_of(doc: dict[str, str]) -> str:
    """All but the last word.

    Equal to the stock template `{{text.split(' ')[:-1]|join(' ')}}`, and 100 times as fast.
    """
    return doc["text"].rpartition(" ")[0]


def last_word_of(doc: dict[str, str]) -> str:
    """The last word with its space, equal to the stock template `{{' '+text.split(' ')[-1]}}`."""
    return " " + doc["text"].rpartition(" ")[2]


def lambada_task(data: str) -> dict[str, Any]:
    """lm-eval's stock lambada_openai as a complete inline task.

    `data` is a hub data set, or a local .jsonl or .jsonl.gz of {"text": ...} lines.
    """
    import lm_eval
    import yaml
    from datasets import Dataset

    source = Path(lm_eval.__file__).parent / "tasks/lambada/lambada_openai.yaml"
    stock = yaml.safe_load(source.read_text())
    stock.pop("tag")
    stock |= {"doc_to_text": context_of, "doc_to_target": last_word_of}
    path = items_file(data)
    if path is None:
        return stock | {"dataset_path": data}

    def items(**_: object) -> dict[str, Dataset]:
        """The items as our reader reads them, not as `datasets` would."""
        return {"test": Dataset.from_dict({"text": list(read_items(path))})}

    return stock | {
        "task": "lambada_local",
        "dataset_path": None,
        "dataset_name": None,
        "custom_dataset": items,
    }


def read_items(path: Path) -> Iterator[str]:
    """The texts of a local .jsonl or .jsonl.gz, read as corpora are; blank lines do not count.

    HalfstepError names the first line that is not an item.
    """
    if not path.exists():
        raise HalfstepError(
            f'lambada: no file {path}; expected one {{"text": ...}} per line, '
            "or a hub name such as EleutherAI/lambada_openai"
        )
    check_regular(path, "lambada")
    count = 0
    with reading(path) as file:
        for number, line in read_lines(path, file):
            if line.strip():
                count += 1
                yield _item(line, f"{path}:{number}")
    if not count:
        raise HalfstepError(
            f'lambada: {path} holds no items; expected one {{"text": ...}} per line'
        )


def _item(line: str, where: str) -> str:
    try:
        text = row_text(line, "text", where)
    except HalfstepError:
        text = ""
    if not text or text != text.rstrip():
        raise HalfstepError(
            f'lambada: {where} is not {{"text": "... word"}} with a word after the last space; '
            "correct the line"
        )
    return text


def count_items(path: Path) -> int:
    """Number of items in a local file; HalfstepError names the first bad line."""
    return sum(1 for _ in read_items(path))


def evaluate_lambada(
    model: Model,
    data: str,
    items: int | None = None,
    micro_batch: int = 32,
    device: str = "cpu",
    seed: int = 0,
    group: Group = ALONE,
) -> dict[str, Any] | None:
    """Run lm-eval's LAMBADA on `data`, a hub data set or a local .jsonl, under every protocol.

    Only the first `items` items are asked (None: all). The first protocols are lm-eval's own
    run; the others answer the same requests.

    Returns {"nll": {protocol: [N] nats per item}, "hits": {protocol: [N] bool}, "passes":
    {protocol: network calls per item}, "data": name[number of items]@sha256 of their texts,
    "lm_eval": its own results under the first protocols}.

    Rank 0 of the group evaluates; the other ranks answer their share of its questions and return
    None.
    """
    path = items_file(data)
    first, *others = ACCURACY[model.kind]
    lm = HalfstepLM(model, first, micro_batch, device, seed, group)
    if path is not None:
        count = count_items(path)
        items = min(items or count, count)
        for text in islice(read_items(path), items):  # an item that is too long is found at once
            lm.question(context_of({"text": text}), last_word_of({"text": text}))
    if not group.is_main:
        lm.serve()
        return None
    samples, results = _run_lm_eval(lm, data, items)
    requests = [Request(sample["arguments"][0]) for sample in samples]
    hits = {first: np.array([sample["acc"] for sample in samples], bool)}
    for lm.accuracy in others:
        hits[lm.accuracy] = np.array([hit for _, hit in lm.loglikelihood(requests)])
    exact, *drawn = PERPLEXITY[model.kind]
    nll = {exact: -np.array([sample["perplexity"] for sample in samples])}
    nll |= {protocol: lm.monte_carlo(requests) for protocol in drawn}
    group.broadcast(None)
    texts = "\0".join(sample["doc"]["text"] for sample in samples)
    digest = hashlib.sha256(texts.encode()).hexdigest()
    name = data if path is None else path.name
    return {
        "nll": nll,
        "hits": hits,
        "passes": lm.passes(requests),
        "data": f"{name}[{len(samples)}]@{digest[:12]}",
        "lm_eval": results,
    }


def lambada_texts(data: str) -> Iterator[str]:
    """The texts of a last-word task in order: of a local .jsonl, or of a hub data set."""
    path = items_file(data)
    if path is not None:
        yield from read_items(path)
        return
    (task,) = _load_task(data)["tasks"].values()
    for doc in task.eval_docs:
        yield doc["text"]


def _load_task(data: str) -> dict[str, Any]:
    """What lm-eval loads for the task; HalfstepError where it cannot be loaded."""
    from datasets import disable_progress_bars
    from lm_eval.tasks import TaskManager

    disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return TaskManager(include_defaults=False).load([lambada_task(data)])
    except (OSError, ValueError) as error:
        remedy = "download it where there is a network, or name a .jsonl"
        if items_file(data):
            remedy = "correct the file"
        raise HalfstepError(
            f"lambada: cannot load {data!r} ({type(error).__name__}: {reason(error)}); {remedy}"
        ) from error


def _run_lm_eval(lm: HalfstepLM, data: str, items: int | None) -> tuple[list[dict], dict]:
    """lm-eval's record of each item, in order, and its results.

    lm-eval's `simple_evaluate` would do the same, and then import transformers and start programs
    to describe the machine, which takes each model a second.
    """
    from lm_eval.evaluator import evaluate

    loaded = _load_task(data)
    (task,) = loaded["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    with only_our_bars():
        found: Any = evaluate(lm, loaded, limit=items, bootstrap_iters=0)
    ((name, samples),) = found["samples"].items()
    return sorted(samples, key=lambda sample: sample["doc_id"]), found["results"][name]
