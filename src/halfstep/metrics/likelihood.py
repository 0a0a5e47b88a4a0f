"""Likelihood and guesses of a suffix in its context, by a denoiser or by an autoregressive network: the arithmetic under LAMBADA.

Everything is asked of many questions at once. A batch holds windows of one length only, so nothing is padded, and vocabulary rows
are read at masked positions only.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, islice, repeat
from math import comb

import numpy as np
import torch
from torch import Tensor

from halfstep.kernels.categorical import uniforms

EXACT = 7  # suffixes up to this length: all 2^7 - 1 masks; longer ones: DRAWS masks
DRAWS = 128
MC_DRAWS = 32  # of the released code's Monte Carlo estimate
MC_MIN_T = 1e-5  # its smallest time
ROWS = 1 << 23  # numbers in one chunk of log-probabilities (32 MiB)


@dataclass(frozen=True)
class Question:
    """A window of token ids; the suffix ids[start:end] is asked for, all the rest (context, EOS on the right) is given."""

    ids: tuple[int, ...]
    start: int
    end: int


def suffix_masks(n: int, u: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Masks [M, n] of a suffix of n tokens and their weights [M], so that NELBO = sum_m weight_m sum_{l in mask m} -log p(x_l | rest).

    The continuous-time NELBO of MDLM (eq. 10) for the suffix alone, its context always visible, with chance t of being masked:

        int_0^1 dt/t sum_S t^k (1 - t)^(n - k) sum_{l in S} -log p(x_l | x masked on S),  k = |S|
        = sum_S B(k, n - k + 1) sum_{l in S} ...,   B(k, n - k + 1) = 1 / (k C(n, k))

    for a denoiser that ignores t, whatever the schedule. Exact up to n = EXACT: every non-empty mask once. Above: DRAWS masks by
    u[DRAWS, n + 1], their sizes k stratified over 1..n and their positions uniform, weight n / (k DRAWS). The first mask is always the full
    one: what `parallel` needs (with weight 0 where it was not drawn).
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
    full = np.ones((1, n), bool)
    return np.concatenate([full, ranks < k[:, None]]), np.concatenate([[0.0], n / (k * len(u))])


def drawn_masks(u: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks [M, n], weights [M] and times [M] of the Monte Carlo estimate of a suffix's NELBO by u[K, n + 1]: sum_m weight_m sum_{l in mask m} -log p.

    As the released code draws them: K times on a lattice with one offset, t_i = eps + (1 - eps)(i + u_00) / K with eps = MC_MIN_T, each suffix
    token masked with chance t_i, weight 1 / (K t_i). A draw that masks nothing adds nothing and is left out. The mean over u is the NELBO but
    for its share below eps. Not kept of the released code, for they change a thousandth at
    most: its chance of a mask, (1 - 1e-3) t, and its float32 uniforms.
    """
    u = u.numpy()
    t = MC_MIN_T + (1 - MC_MIN_T) * (np.arange(len(u)) + u[0, 0]) / len(u)
    masks = u[:, 1:] < t[:, None]
    some = masks.any(1)
    return masks[some], 1 / (len(u) * t[some]), t[some]


def diffusion_nll(
    denoiser,
    questions: list[Question],
    micro_batch: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick=None,
    first: int = 0,
):
    """NELBO of each suffix in nats [Q] float64, and whether one pass with the whole suffix masked gets every token right [Q] bool.

    `denoiser.features(xt, t)` gets t = k / (n + 1), the mean of t given that k of n are masked; the NELBO is exact for a denoiser that
    ignores t. tick(count) is told of finished questions. The questions are numbers first, first + 1, ... of the seed, and each owns its
    masks, whatever the batch.
    """

    def plan(i: int, n: int):
        masks, weights = suffix_masks(
            n,
            uniforms(seed, first + i, 1, DRAWS * (n + 1))[0].view(DRAWS, n + 1)
            if n > EXACT
            else None,
        )
        return masks, weights, masks.sum(1) / (n + 1)

    return _weighted(denoiser, questions, plan, micro_batch, device, tick)


def monte_carlo_nll(
    denoiser,
    questions: list[Question],
    micro_batch: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick=None,
    first: int = 0,
):
    """The released code's estimate of each suffix's NELBO in nats, MC_DRAWS masks drawn for it (`drawn_masks`): [Q] float64.

    Without bias, but noisier than enumeration; exp of a mean of such estimates is on average above exp of the mean of the bounds.
    """

    def plan(i: int, n: int):
        return drawn_masks(
            uniforms(seed, first + i, 1, MC_DRAWS * (n + 1))[0].view(MC_DRAWS, n + 1)
        )

    return _weighted(denoiser, questions, plan, micro_batch, device, tick)[0]


def _weighted(
    denoiser, questions: list[Question], plan, micro_batch: int, device, tick
) -> tuple[np.ndarray, np.ndarray]:
    """sum_m weight_m sum_{l in mask m} -log p of each suffix, and whether every token is right where a mask holds all of them.

    plan(i, n) -> masks [M, n], weights [M], times [M] of question i, whose suffix has n tokens.
    """
    nelbo, right = np.zeros(len(questions)), np.ones(len(questions), bool)

    def jobs(same_length: Iterable[int]) -> Iterator[tuple[int, np.ndarray, float, float, bool]]:
        for i in same_length:
            masks, weights, times = plan(i, questions[i].end - questions[i].start)
            for m, (mask, weight, t) in enumerate(zip(masks, weights, times, strict=True)):
                yield i, mask, weight, t, m == len(masks) - 1

    for same_length in _by_length(questions):
        stream = jobs(same_length)
        while batch := list(islice(stream, micro_batch)):
            index, masks, weights, times, last = zip(*batch, strict=True)
            x0, hidden = _stack([questions[i] for i in index], masks, device)
            log_p, guess, row = _read_masked(denoiser, x0, hidden, list(times))
            np.subtract.at(nelbo, np.array(index)[row], np.array(weights)[row] * log_p)
            wrong = row[guess != x0[hidden].cpu().numpy()]
            right[[index[r] for r in set(wrong) if masks[r].all()]] = False
            if tick:
                tick(sum(last))
    return nelbo, right


def confident_guess(
    denoiser,
    questions: list[Question],
    micro_batch: int,
    device: str | torch.device = "cpu",
    tick=None,
) -> np.ndarray:
    """Is each suffix right when its most confident token is written first, one per pass, each pass seeing those before? [Q] bool.

    Greedy decoding of LLaDA's kind. A suffix whose first written token is wrong already is not carried further.
    """
    right = np.ones(len(questions), bool)
    for same_length in _by_length(questions):
        for batch in _chunks(same_length, micro_batch):
            alive = np.array(batch)
            x0, hidden = _stack([questions[i] for i in batch], None, device)
            total = hidden.sum(1)
            while len(alive):
                t = (hidden.sum(1) / (total + 1)).tolist()
                log_p, guess, row = _read_masked(denoiser, x0, hidden, t, of_guess=True)
                best = np.lexsort((-log_p, row))[
                    np.unique(row, return_index=True)[1]
                ]  # the most confident position of each row
                hit = guess[best] == x0[hidden].cpu().numpy()[best]
                right[alive[~hit]] = False
                hidden[tuple(hidden.nonzero()[best].T)] = False
                on = torch.from_numpy(hit).to(device) & hidden.any(1)
                alive, x0, hidden, total = alive[on.cpu().numpy()], x0[on], hidden[on], total[on]
            if tick:
                tick(len(batch))
    return right


def autoregressive_nll(
    gpt, questions: list[Question], micro_batch: int, device: str | torch.device = "cpu", tick=None
):
    """-log p of each suffix in nats [Q] float64, and whether the argmax of every token, the former ones given, is right [Q] bool.

    `gpt(x[B, L]) -> h[B, L, D]` predicts at l the token l + 1; `gpt.log_p(h[N, D]) -> [N, V]`. What stands right of the suffix is unseen.
    """
    nll, right = np.zeros(len(questions)), np.ones(len(questions), bool)
    for same_length in _by_length(questions):
        for batch in _chunks(same_length, micro_batch):
            x, asked = _stack([questions[i] for i in batch], None, device)
            with torch.no_grad():
                log_p, guess = _read(gpt.log_p, gpt(x)[:, :-1][asked[:, 1:]], x[asked])
            row = asked.nonzero()[:, 0].cpu().numpy()
            np.subtract.at(nll, np.array(batch)[row], log_p)
            right[[batch[r] for r in set(row[guess != x[asked].cpu().numpy()])]] = False
            if tick:
                tick(len(batch))
    return nll, right


def _by_length(questions: list[Question]) -> Iterator[list[int]]:
    """Indices of the questions, those with windows of one length together."""
    lengths = np.array([len(q.ids) for q in questions])
    for length in np.unique(lengths):
        yield np.flatnonzero(lengths == length).tolist()


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _stack(
    questions: list[Question], masks: Iterable[np.ndarray] | None, device
) -> tuple[Tensor, Tensor]:
    """Windows [B, L] and which of their tokens are asked for [B, L]: those of each suffix's mask, or all of the suffix."""
    x0 = torch.tensor([q.ids for q in questions])
    hidden = torch.zeros_like(x0, dtype=torch.bool)
    for row, q, mask in zip(hidden, questions, masks or repeat(True), strict=False):
        row[q.start : q.end] = torch.as_tensor(mask)
    return x0.to(device), hidden.to(device)


@torch.no_grad()
def _read_masked(denoiser, x0: Tensor, hidden: Tensor, t: list[float], of_guess: bool = False):
    """One pass: at hidden positions log p of the true token (or of the guess), the likeliest token, and the row [N]."""
    xt = x0.masked_fill(hidden, denoiser.mask_id)
    h = denoiser.features(xt, torch.tensor(t, dtype=torch.float32, device=x0.device), hidden)
    log_p, guess = _read(denoiser.log_p, h, None if of_guess else x0[hidden])
    return log_p, guess, hidden.nonzero()[:, 0].cpu().numpy()


def _read(log_p, h: Tensor, wanted: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """log p of the wanted tokens (the likeliest when None) and the likeliest tokens, [N] each, a chunk of rows at a time."""
    values, guesses, chunk, at = [], [], 16, 0
    while at < len(h):
        table = log_p(h[at : at + chunk])
        best, guess = table.max(-1)
        values.append(
            best if wanted is None else table.gather(-1, wanted[at : at + chunk, None])[:, 0]
        )
        guesses.append(guess)
        at += chunk
        chunk = max(16, ROWS // table.shape[1])
    return torch.cat(values).double().cpu().numpy(), torch.cat(guesses).cpu().numpy()
