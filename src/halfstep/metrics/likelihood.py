"""Likelihood and guesses of a suffix in its context, by a denoiser or an autoregressive network.

This is the arithmetic of LAMBADA (lambada.py).

Many questions share a batch. A batch holds windows of one length only, so nothing is padded, and
logits are computed at masked positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser
from halfstep.kernels.categorical import uniforms

EXACT = 7  # suffixes up to this length: all 2^n - 1 masks; longer ones: DRAWS masks
DRAWS = 128
MC_DRAWS = 32  # masks of the released code's Monte Carlo estimate
MC_MIN_T = 1e-5  # its smallest time
ROWS = 1 << 23  # numbers in one chunk of log-probabilities (32 MiB)

Tick = Callable[[int], None] | None
"""Called with the number of questions that were just finished."""
Plan = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Masks [M, n], weights [M] and times [M] of a suffix of n tokens."""


class AutoregressiveNetwork(Protocol):
    """x[B, L] -> h[B, L, D], where position l predicts token l + 1; log_p(h[N, D]) -> [N, V]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def log_p(self, h: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Question:
    """A window of token ids: ids[start:end] is asked for, the rest (context, EOS) is given.

    `number` is that of its random masks (elbo.py): windows with one number share them. Where
    ids[start:end] is to be written (answers.py), ids end before it, `number` is that of the text,
    and `temperature` that of its draws.
    """

    ids: tuple[int, ...]
    start: int
    end: int
    number: int = 0
    temperature: float = 1.0


def suffix_masks(n: int, u: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Masks [M, n] of a suffix of n tokens, and weights [M], that give its NELBO.

        NELBO = sum_m weight_m sum_{l in mask m} -log p(x_l | rest)

    The continuous-time NELBO of MDLM (eq. 10) for the suffix alone. Its context is always visible,
    and a suffix token is masked with chance t:

        int_0^1 dt/t sum_S t^k (1 - t)^(n - k) sum_{l in S} -log p(x_l | x masked on S),  k = |S|
        = sum_S B(k, n - k + 1) sum_{l in S} ...,   B(k, n - k + 1) = 1 / (k C(n, k))

    for a denoiser that ignores t, under any schedule that ends with all tokens masked. Up to
    n = EXACT it is exact: every non-empty mask once. Above, there are DRAWS masks, from
    u[DRAWS, n + 1]: sizes k stratified over 1..n, positions uniform, weight n / (k DRAWS). The
    first mask is always the full one, which `parallel` needs (with weight 0 if it was not drawn).
    """
    if n <= EXACT:
        sets = [s for k in range(n, 0, -1) for s in combinations(range(n), k)]
        masks = np.zeros((len(sets), n), bool)
        for mask, s in zip(masks, sets, strict=True):
            mask[list(s)] = True
        return masks, np.array([1 / (len(s) * comb(n, len(s))) for s in sets])
    u = u.numpy()
    k = 1 + ((np.arange(len(u)) + u[:, 0]) / len(u) * n).astype(int)
    ranks = u[:, 1:].argsort(1).argsort(1)
    masks = np.concatenate([np.ones((1, n), bool), ranks < k[:, None]])
    return masks, np.concatenate([[0.0], n / (k * len(u))])


def drawn_masks(u: Tensor) -> Plan:
    """Masks [M, n], weights [M] and times [M] of a Monte Carlo estimate of a suffix's NELBO.

    u[K, n + 1] are its uniforms. The estimate is sum_m weight_m sum_{l in mask m} -log p. As in the
    released code, the K times are a lattice with one offset, t_i = eps + (1 - eps)(i + u_00) / K
    with eps = MC_MIN_T; each suffix token is masked with chance t_i; the weight is 1 / (K t_i). A
    draw that masks nothing adds nothing and is left out. The mean over u is the NELBO without its
    share below eps. Two details of the released code change a thousandth at most and are not
    repeated: its mask chance (1 - 1e-3) t, and its float32 uniforms. Chance t at time t belongs to
    the log-linear schedule, as in `diffusion_nll`.
    """
    u = u.numpy()
    t = MC_MIN_T + (1 - MC_MIN_T) * (np.arange(len(u)) + u[0, 0]) / len(u)
    masks = u[:, 1:] < t[:, None]
    some = masks.any(1)
    return masks[some], 1 / (len(u) * t[some]), t[some]


def diffusion_nll(
    denoiser: Denoiser,
    questions: list[Question],
    micro_batch: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick: Tick = None,
    first: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """NELBO of each suffix in nats [Q] float64, and whether the parallel guess is right [Q] bool.

    The parallel guess is the argmax of every suffix token in one pass with the whole suffix masked.

    A pass with k of the n suffix tokens masked gives the denoiser the time t = k / (n + 1). This
    time belongs to the log-linear schedule, where a token is masked with chance t: it is the mean
    of t given k. The result is a bound under any other schedule too (cosine), and for a denoiser
    that uses t. Any function of k may be fed to the network: k can be read off xt, so the network
    is then a denoiser of xt alone, and this is its NELBO. The choice of the function changes how
    tight the bound is. A denoiser that ignores t has the same NELBO in any case.

    The questions have the numbers first, first + 1, ... of the seed; each has its own masks
    in any batch.
    """

    def plan(i: int, n: int) -> Plan:
        u = None
        if n > EXACT:
            u = uniforms(seed, first + i, 1, DRAWS * (n + 1))[0].view(DRAWS, n + 1)
        masks, weights = suffix_masks(n, u)
        return masks, weights, masks.sum(1) / (n + 1)

    return _weighted_nll(denoiser, questions, plan, micro_batch, device, tick)


def monte_carlo_nll(
    denoiser: Denoiser,
    questions: list[Question],
    micro_batch: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick: Tick = None,
    first: int = 0,
) -> np.ndarray:
    """The released code's estimate of each suffix's NELBO in nats, [Q] float64.

    It uses MC_DRAWS masks (`drawn_masks`). It is unbiased, but noisier than enumeration: exp of a
    mean of such estimates is on average above exp of the mean bound.
    """

    def plan(i: int, n: int) -> Plan:
        return drawn_masks(
            uniforms(seed, first + i, 1, MC_DRAWS * (n + 1))[0].view(MC_DRAWS, n + 1)
        )

    return _weighted_nll(denoiser, questions, plan, micro_batch, device, tick)[0]


def _weighted_nll(
    denoiser: Denoiser,
    questions: list[Question],
    plan: Callable[[int, int], Plan],
    micro_batch: int,
    device: str | torch.device,
    tick: Tick,
) -> tuple[np.ndarray, np.ndarray]:
    """sum_m weight_m sum_{l in mask m} -log p of each suffix, [Q].

    Also whether every token is right in the pass that masks the whole suffix, [Q] bool.
    plan(i, n) gives the masks of question i with a suffix of n tokens. A denoiser that ignores time
    reads a mask once, however often it was drawn.
    """
    nelbo, right = np.zeros(len(questions)), np.ones(len(questions), bool)

    def passes(same_length: list[int]) -> Iterator[tuple[int, np.ndarray, float, float, bool]]:
        """Question, mask, weight, time of each pass, and whether it is the question's last one."""
        for i in same_length:
            masks, weights, times = plan(i, questions[i].end - questions[i].start)
            if denoiser.ignores_time:
                masks, first, which = np.unique(
                    masks, axis=0, return_index=True, return_inverse=True
                )
                weights, times = np.bincount(which.ravel(), weights), times[first]
            for m, (mask, weight, t) in enumerate(zip(masks, weights, times, strict=True)):
                yield i, mask, weight, t, m == len(masks) - 1

    for same_length in _by_length(questions):
        stream = passes(same_length)
        while batch := list(islice(stream, micro_batch)):
            index, masks, weights, times, last = zip(*batch, strict=True)
            x0, hidden = _stack([questions[i] for i in index], device, masks)
            log_p, guess, row = _read_masked(denoiser, x0, hidden, list(times))
            np.subtract.at(nelbo, np.array(index)[row], np.array(weights)[row] * log_p)
            wrong = set(row[guess != x0[hidden].cpu().numpy()])
            right[[index[r] for r in wrong if masks[r].all()]] = False
            if tick:
                tick(sum(last))
    return nelbo, right


def confident_guess(
    denoiser: Denoiser,
    questions: list[Question],
    micro_batch: int,
    device: str | torch.device = "cpu",
    tick: Tick = None,
) -> np.ndarray:
    """Is each suffix right if one pass after the other writes its most confident token? [Q] bool.

    Greedy decoding as LLaDA has it: each pass sees the tokens written before. A suffix with a wrong
    token takes no further pass.
    """
    right = np.ones(len(questions), bool)
    for same_length in _by_length(questions):
        for batch in _chunks(same_length, micro_batch):
            alive = np.array(batch)
            x0, hidden = _stack([questions[i] for i in batch], device)
            total = hidden.sum(1)
            while len(alive):
                t = (hidden.sum(1) / (total + 1)).tolist()
                log_p, guess, row = _read_masked(denoiser, x0, hidden, t, of_guess=True)
                # The most confident position of each row: the first of the row in this order.
                order = np.lexsort((-log_p, row))
                best = order[np.unique(row, return_index=True)[1]]
                hit = guess[best] == x0[hidden].cpu().numpy()[best]
                right[alive[~hit]] = False
                hidden[tuple(hidden.nonzero()[best].T)] = False
                on = torch.from_numpy(hit).to(device) & hidden.any(1)
                alive, x0, hidden, total = alive[on.cpu().numpy()], x0[on], hidden[on], total[on]
            if tick:
                tick(len(batch))
    return right


def autoregressive_nll(
    network: AutoregressiveNetwork,
    questions: list[Question],
    micro_batch: int,
    device: str | torch.device = "cpu",
    tick: Tick = None,
) -> tuple[np.ndarray, np.ndarray]:
    """-log p of each suffix in nats [Q] float64, and whether greedy decoding writes it [Q] bool.

    Greedy: each token is the argmax, given the true tokens before it. What is right of the suffix
    is not seen.
    """
    nll, right = np.zeros(len(questions)), np.ones(len(questions), bool)
    for same_length in _by_length(questions):
        for batch in _chunks(same_length, micro_batch):
            x, asked = _stack([questions[i] for i in batch], device)
            with torch.no_grad():
                h = network(x)[:, :-1][asked[:, 1:]]
                log_p, guess = _read_chunks(network.log_p, h, x[asked])
            row = asked.nonzero()[:, 0].cpu().numpy()
            np.subtract.at(nll, np.array(batch)[row], log_p)
            wrong = set(row[guess != x[asked].cpu().numpy()])
            right[[batch[r] for r in wrong]] = False
            if tick:
                tick(len(batch))
    return nll, right


def _by_length(questions: list[Question]) -> Iterator[list[int]]:
    """Indices of the questions, those with windows of one length together."""
    lengths = np.array([len(question.ids) for question in questions])
    for length in np.unique(lengths):
        yield np.flatnonzero(lengths == length).tolist()


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _stack(
    questions: list[Question],
    device: str | torch.device,
    masks: Sequence[np.ndarray] | None = None,
) -> tuple[Tensor, Tensor]:
    """Windows [B, L] int64, and which of their tokens are asked for [B, L] bool.

    These are the tokens of each suffix, or those under its mask.
    """
    x0 = torch.tensor([question.ids for question in questions])
    hidden = torch.zeros_like(x0, dtype=torch.bool)
    for i, question in enumerate(questions):
        mask = True if masks is None else torch.from_numpy(masks[i])
        hidden[i, question.start : question.end] = mask
    return x0.to(device), hidden.to(device)


@torch.no_grad()
def _read_masked(
    denoiser: Denoiser, x0: Tensor, hidden: Tensor, t: list[float], of_guess: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read all hidden positions in one pass, [N] each: log p, the likeliest token, and the row.

    log p is that of the true token, or with `of_guess` that of the likeliest token.
    """
    xt = x0.masked_fill(hidden, denoiser.mask_id)
    h = denoiser.features(xt, torch.tensor(t, dtype=torch.float32, device=x0.device), hidden)
    log_p, guess = _read_chunks(denoiser.log_p, h, None if of_guess else x0[hidden])
    return log_p, guess, hidden.nonzero()[:, 0].cpu().numpy()


def _read_chunks(
    log_p: Callable[[Tensor], Tensor], h: Tensor, wanted: Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """log p of the wanted tokens (None: of the likeliest) and the likeliest tokens, [N] each.

    A chunk of rows is read at a time.
    """
    values, guesses, rows, at = [], [], 16, 0
    while at < len(h):
        table = log_p(h[at : at + rows])
        best, guess = table.max(-1)
        if wanted is not None:
            best = table.gather(-1, wanted[at : at + rows, None])[:, 0]
        values.append(best)
        guesses.append(guess)
        at += rows
        rows = max(16, ROWS // table.shape[1])
    return torch.cat(values).double().cpu().numpy(), torch.cat(guesses).cpu().numpy()
