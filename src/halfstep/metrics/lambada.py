"""LAMBADA through lm-eval: halfstep's models as an lm-eval `LM`, and its stock task on hub data or on a local .jsonl.

Each protocol is a number of its own (arXiv 1606.06031 is the task; OpenAI's detokenised form is asked, last word = after the last space):

    accuracy    parallel     BOS + text + EOS with all tokens of the last word masked, one pass, argmax, all must match (the SDTT paper's)
                confidence   the most confident token first, one per pass
                ar           autoregressive models: argmax of every token, the former ones given
    perplexity  elbo-exact   exp(mean over items of the last word's NELBO given the rest), all masks of up to 7 tokens, 128 draws above
                elbo-mc      the same by the released code's Monte Carlo, 32 draws of time and mask for each item (the SDTT paper's)
                ar           exp(mean over items of the last word's -log p)

Perplexities are per word, as lm-eval's: the mean runs over items, not over tokens. What lm-eval itself computes, and what its tasks are
answered, is elbo-exact and the first accuracy, `parallel`. A mask's noise makes elbo-mc larger than elbo-exact on average (exp is convex).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from lm_eval.api.model import LM

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError, reason
from halfstep.metrics.likelihood import (
    DRAWS,
    EXACT,
    MC_DRAWS,
    Question,
    autoregressive_nll,
    confident_guess,
    diffusion_nll,
    monte_carlo_nll,
)
from halfstep.progress import Progress

if TYPE_CHECKING:
    from halfstep.checkpoint import Model

ACCURACY = {"diffusion": ("parallel", "confidence"), "autoregressive": ("ar",)}
PERPLEXITY = {"diffusion": ("elbo-exact", "elbo-mc"), "autoregressive": ("ar",)}


class Request(NamedTuple):
    """What HalfstepLM reads of an lm-eval Instance: (context, continuation)."""

    args: tuple[str, str]


class HalfstepLM(LM):
    """A halfstep checkpoint, diffusion or autoregressive, for any lm-eval task that asks for likelihoods.

    `accuracy` says what `is_greedy` means (a protocol above). Answers are kept, so asking again under another protocol costs no second
    likelihood. A text longer than the model's length keeps BOS and the last tokens that fit.

    Of several processes the first alone drives lm-eval; the others are in `serve`, and all share what is asked of the network.
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
                f"accuracy: found {accuracy!r}, a {model.kind} model has {', '.join(ACCURACY[model.kind])}"
            )
        self.model, self.accuracy, self.micro_batch, self.seed = model, accuracy, micro_batch, seed
        self._device, self.group = device, group
        self._answers: dict[tuple[str, str], tuple[float, dict[str, bool]]] = {}

    def question(self, context: str, continuation: str) -> Question:
        """BOS + context + continuation + EOS, the continuation asked for."""
        left, right = (
            e.ids
            for e in self.model.tokenizer.encode_batch(
                [context, continuation], add_special_tokens=False
            )
        )
        room = self.model.length - 2 - len(right)
        if room < 0 or not right:
            raise HalfstepError(
                f"lambada: {continuation!r} makes {len(right)} tokens, expected 1 to {self.model.length - 2} "
                f"in windows of {self.model.length}; mend the item or leave it out"
            )
        left = left[max(0, len(left) - room) :]
        eos = self.model.eos_id
        return Question((eos, *left, *right, eos), 1 + len(left), 1 + len(left) + len(right))

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, is it what the model would write?) of (context, continuation) requests."""
        asked = list(dict.fromkeys(request.args for request in requests))
        new = [args for args in asked if args not in self._answers]
        if new:
            nll, right = self._ask("likelihood", [self.question(*args) for args in new]).T
            first = ACCURACY[self.model.kind][0]
            self._answers |= {
                args: (-float(v), {first: bool(r)})
                for args, v, r in zip(new, nll, right, strict=True)
            }
        if unsure := [args for args in asked if self.accuracy not in self._answers[args][1]]:
            right = self._ask(self.accuracy, [self.question(*args) for args in unsure])
            for args, r in zip(unsure, right, strict=True):
                self._answers[args][1][self.accuracy] = bool(r)
        return [
            (self._answers[r.args][0], self._answers[r.args][1][self.accuracy]) for r in requests
        ]

    def loglikelihood_rolling(self, requests) -> list[float]:
        """Log-likelihood of whole texts, read in windows of the model's length one after another (for a diffusion model by 128 masks each)."""
        room, totals, questions, owner = self.model.length - 2, np.zeros(len(requests)), [], []
        for i, request in enumerate(requests):
            ids = self.model.tokenizer.encode(request.args[0], add_special_tokens=False).ids
            for part in (ids[at : at + room] for at in range(0, len(ids), room)):
                questions.append(
                    Question((self.model.eos_id, *part, self.model.eos_id), 1, 1 + len(part))
                )
                owner.append(i)
        if questions:
            np.subtract.at(totals, owner, self._ask("likelihood", questions)[:, 0])
        return totals.tolist()

    def _ask(self, what: str, questions: list[Question]) -> np.ndarray:
        """ANSWERS[what] of all questions, in the first process, which tells the others of them."""
        self.group.broadcast((what, questions))
        return self._answer(what, questions)

    def serve(self) -> None:
        """What the other processes do until the first has no more to ask."""
        while asked := self.group.broadcast():
            self._answer(*asked)

    def _answer(self, what: str, questions: list[Question]) -> np.ndarray | None:
        def own(rows: slice) -> np.ndarray:
            with Progress(what, rows.stop - rows.start, "item") as progress:
                return ANSWERS[what](self, questions[rows], rows.start, progress.update)

        return self.group.map_rows(len(questions), own)

    def _nll(self, questions: list[Question], first: int, tick) -> np.ndarray:
        if self.model.kind == "diffusion":
            return np.column_stack(
                diffusion_nll(
                    self.model.denoiser,
                    questions,
                    self.micro_batch,
                    self.seed,
                    self._device,
                    tick,
                    first,
                )
            )
        return np.column_stack(
            autoregressive_nll(self.model.network, questions, self.micro_batch, self._device, tick)
        )

    def _guess(self, questions: list[Question], first: int, tick) -> np.ndarray:
        return confident_guess(self.model.denoiser, questions, self.micro_batch, self._device, tick)

    def _drawn(self, questions: list[Question], first: int, tick) -> np.ndarray:
        return monte_carlo_nll(
            self.model.denoiser, questions, self.micro_batch, self.seed, self._device, tick, first
        )

    def monte_carlo(self, requests) -> np.ndarray:
        """Protocol elbo-mc's NELBO in nats of (context, continuation) requests, [N]; request i has its own draws."""
        return self._ask("elbo-mc", [self.question(*request.args) for request in requests])

    def passes(self, requests) -> dict[str, float]:
        """Calls of the network for one item under each protocol, the mean over the requests. elbo-mc: its draws, those that mask nothing too."""
        if self.model.kind == "autoregressive":
            return {"ar": 1.0}
        tokens = [
            question.end - question.start
            for question in (self.question(*request.args) for request in requests)
        ]
        exact = [2**n - 1 if n <= EXACT else DRAWS + 1 for n in tokens]
        return {
            "parallel": 1.0,
            "confidence": float(np.mean(tokens)),
            "elbo-exact": float(np.mean(exact)),
            "elbo-mc": float(MC_DRAWS),
        }

    def generate_until(self, requests):
        raise HalfstepError(
            "lm-eval: a generate_until task was asked for; halfstep answers likelihood tasks, and writes text by `halfstep generate`"
        )


ANSWERS = {  # what the network can be asked, its progress's name: answers of questions `first`, first + 1, ...; likelihood's are [Q, 2]: nats, is it right?
    "likelihood": HalfstepLM._nll,
    "confidence": HalfstepLM._guess,
    "elbo-mc": HalfstepLM._drawn,
}


def context_of(doc: dict) -> str:
    """All but the last word; what the stock template `{{text.split(' ')[:-1]|join(' ')}}` gives, 100 times as fast."""
    return doc["text"].rpartition(" ")[0]


def word_of(doc: dict) -> str:
    """The last word with its space; what the stock template `{{' '+text.split(' ')[-1]}}` gives."""
    return " " + doc["text"].rpartition(" ")[2]


def task(data: str, cache: Path) -> dict:
    """lm-eval's stock lambada_openai as a complete inline task, on a hub data set or on a local .jsonl of {"text": ...} lines."""
    import lm_eval
    import yaml

    stock = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks/lambada/lambada_openai.yaml").read_text()
    )
    stock.pop("tag")
    stock |= {"doc_to_text": context_of, "doc_to_target": word_of}
    if not data.endswith(".jsonl"):
        return stock | {"dataset_path": data}
    files = {"data_files": {"test": str(Path(data).resolve())}, "cache_dir": str(cache)}
    return stock | {
        "task": "lambada_local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": files,
    }


def check_items(path: Path) -> int:
    """Number of items of a local .jsonl; HalfstepError names the first bad line."""
    if not path.is_file():
        raise HalfstepError(
            f'lambada: no file {path}; expected one {{"text": ...}} per line, or a hub name such as EleutherAI/lambada_openai'
        )
    count = 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                text = json.loads(line)["text"]
                good = isinstance(text, str) and bool(text.split(" ")[-1])
            except (ValueError, KeyError, TypeError):
                good = False
            if not good:
                raise HalfstepError(
                    f'lambada: {path}:{number} is not {{"text": "... word"}} with a word after the last space; mend the line'
                )
            count += 1
    if not count:
        raise HalfstepError(
            f'lambada: {path} holds no items; expected one {{"text": ...}} per line'
        )
    return count


def examine(
    model: Model,
    data: str,
    items: int | None = None,
    micro_batch: int = 32,
    device: str = "cpu",
    seed: int = 0,
    group: Group = ALONE,
) -> dict | None:
    """Run lm-eval: {"nll": {protocol: [N] nats per item}, "hits": {protocol: [N] bool}, "passes": {protocol: network calls per item},
    "data": name[number of items]@sha256 of their texts, "lm_eval": its own results under the first protocols}.

    data: hub name or local .jsonl; items: only the first so many. Further protocols answer the requests that lm-eval made.
    Of the group's processes the first examines; the others answer their share of its questions, and get None.
    """
    from datasets import disable_progress_bars
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    local = data.endswith(".jsonl")
    if local:
        count = check_items(Path(data))
        items = min(items or count, count)
    first, *others = ACCURACY[model.kind]
    lm = HalfstepLM(model, first, micro_batch, device, seed, group)
    if not group.is_main:
        return lm.serve()
    disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as cache:
        try:
            tasks = list(
                TaskManager(include_defaults=False)
                .load([task(data, Path(cache))])["tasks"]
                .values()
            )
        except (OSError, ValueError) as error:
            where = (
                "mend the file"
                if local
                else "download it where there is a network, or name a .jsonl"
            )
            raise HalfstepError(
                f"lambada: cannot load {data!r} ({type(error).__name__}: {reason(error)}); {where}"
            ) from error
        found = simple_evaluate(
            model=lm, tasks=tasks, task_manager=TaskManager(include_defaults=False), limit=items, bootstrap_iters=0, log_samples=True,
            random_seed=None, numpy_random_seed=None, torch_random_seed=None,
        )  # fmt: skip
    ((name, samples),) = found["samples"].items()
    samples = sorted(samples, key=lambda s: s["doc_id"])
    requests = [Request(s["arguments"][0]) for s in samples]
    hits = {first: np.array([s["acc"] for s in samples], bool)}
    for lm.accuracy in others:
        hits[lm.accuracy] = np.array([hit for _, hit in lm.loglikelihood(requests)])
    exact, *drawn = PERPLEXITY[model.kind]
    nll = {exact: -np.array([s["perplexity"] for s in samples])} | {
        protocol: lm.monte_carlo(requests) for protocol in drawn
    }
    group.broadcast(None)
    texts = hashlib.sha256("\0".join(s["doc"]["text"] for s in samples).encode()).hexdigest()
    asked = f"{Path(data).name if local else data}[{len(samples)}]@{texts[:12]}"
    return {
        "nll": nll,
        "hits": hits,
        "passes": lm.passes(requests),
        "data": asked,
        "lm_eval": found["results"][name],
    }
