"""The sampler `speculative`: a diffusion model drafts, an autoregressive model accepts or corrects.

The texts have the law of the autoregressive model, whatever the draft is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.diffusion.contracts import (
    Autoregressor,
    Denoiser,
    Draws,
    KeptKV,
    Samples,
    kv_denoiser,
)
from halfstep.diffusion.energy import needed_scorer
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import draw_from, nucleus

NEIGHBORS = 16  # tokens that a relaxed acceptance may count as equal to a drafted one


@torch.no_grad()
def speculative(  # noqa: PLR0913 (the four of every sampler, and its options)
    denoiser: Denoiser,
    x: Tensor,
    draws: Draws,
    steps: int,
    *,
    scorer: Autoregressor | None = None,
    draft_tokens: int = 4,
    draft_passes: int = 1,
    relaxation: float = 0.0,
    top_p: float = 1.0,
) -> Samples:
    """Draft the next tokens with the denoiser, verify them in one pass of the scorer.

    A draft of n tokens is written in contiguous groups from left to right, one for each of
    `draft_passes` passes. Within a group the tokens are drawn independently, given all tokens to
    their left and masks to their right. So the chance q of a drafted token, given the tokens to its
    left, is known: it is the denoiser's prediction itself. (A token that was drawn after one to its
    right would have another chance, given those to its left, and the text another law.)

    The scorer reads the draft in one pass with its cache. From left to right a token is accepted
    with probability min(1, p / q); the first that is not is drawn again from the residual law,
    max(p - q, 0) normalized, and ends the draft; after a draft without rejection, one more token is
    drawn from p (Leviathan et al., arXiv 2211.17192, algorithm 1). The result has exactly the law
    p, the scorer's at this temperature and nucleus `top_p`, which shape the draft as well.

    With relaxation > 0 the texts have another law (LANTERN, arXiv 2410.03355): a drafted token is
    accepted with the summed p of itself and its nearest tokens by the angle between rows of the
    denoiser's readout, as many of NEIGHBORS as have together less than this probability, and the
    residual is that of p with their probability moved to the drafted token.

    A denoiser that keeps keys and values computes only the last 2 draft_tokens + 1 tokens up to the
    end of the draft: all that can have been accepted since the last draft, and the draft. The
    others' keys and values are older. That changes the draft, not the law. A text takes at most
    `steps` network evaluations; after them the scorer writes alone. All texts must begin with
    equally many given tokens, one at least, and no other token may be given.
    """
    scorer = needed_scorer("speculative", denoiser, scorer)
    for name, value in (("draft_tokens", draft_tokens), ("draft_passes", draft_passes)):
        if value < 1:
            raise HalfstepError(
                f"{name}: found {value}, expected a whole number above zero; change it"
            )
    if not 0 <= relaxation < 1:
        raise HalfstepError(
            f"relaxation: found {relaxation:g}, expected a probability from 0 to below 1; change it"
        )
    acceptance = Acceptance(draws.temperature, top_p, relaxation)
    group_of = torch.empty(draft_tokens, dtype=torch.long, device=x.device)
    for i, group in enumerate(group_of.tensor_split(min(draft_passes, draft_tokens))):
        group.fill_(i)  # a view: the pass that draws each token of a draft
    texts = _Texts(denoiser, scorer, acceptance, x.clone(), draws)
    while texts.going:
        texts.advance(group_of, steps)
    return Samples(texts.x, texts.passes, texts.verifications)


@dataclass(frozen=True)
class Acceptance:
    """The laws that are compared, and the rule by which a drafted token is accepted."""

    temperature: float = 1.0
    top_p: float = 1.0
    relaxation: float = 0.0

    def law(self, logits: Tensor) -> Tensor:
        """Logits [..., V] -> probabilities at the temperature within the nucleus, float64."""
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_p < 1:
            rows = logits.log_softmax(-1).flatten(0, -2)
            logits = nucleus(rows, self.top_p).view_as(logits)
        return logits.double().softmax(-1)

    def relaxed(self, p: Tensor, tokens: Tensor, readout: Tensor) -> Tensor:
        """p[K, V] with the probability of the nearest tokens moved to tokens[K] (LANTERN).

        In order of nearness by the rows of readout[V, D], as long as what is moved is below
        `relaxation`.
        """
        if not self.relaxation:
            return p
        unit = torch.nn.functional.normalize(readout.float(), dim=-1)
        near = unit[tokens] @ unit.T
        near.scatter_(1, tokens[:, None], -torch.inf)
        nearest = near.topk(min(NEIGHBORS, p.shape[1] - 1), sorted=True).indices
        share = p.gather(1, nearest)
        share = share * (share.cumsum(1) < self.relaxation)
        moved = p.scatter_add(1, nearest, -share)
        return moved.scatter_add(1, tokens[:, None], share.sum(1, keepdim=True))


@dataclass(frozen=True)
class _Draft:
    """Drafts of up to n tokens in R texts.

    texts [R, L]: the texts with their drafts
    columns [R, n], exists [R, n]: the places of the drafted tokens, of which a text may lack some
    q [R, n, V]: the laws that the tokens come from; 0 for those that do not exist
    """

    texts: Tensor
    columns: Tensor
    exists: Tensor
    q: Tensor


class _Texts:
    """Texts x[N, L] that are written, and how far each has come.

    end [N]: number of tokens of each text that are accepted
    rows [R]: the texts that the reader reads; finished ones leave as soon as they are half of them
    passes [N]: passes of the denoiser over each text or over a part of it
    verifications [N]: passes of the autoregressive model over each text
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scorer: Autoregressor,
        acceptance: Acceptance,
        x: Tensor,
        draws: Draws,
    ):
        N, self.length = x.shape
        given = x != denoiser.mask_id
        begun = given.long().cumprod(1).sum(1)
        if N and not (
            1 <= begun[0] and (begun == begun[0]).all() and (begun == given.sum(1)).all()
        ):
            raise HalfstepError(
                "given: found texts that do not all begin with the same number of given tokens, "
                "one at least, with masks behind them; sampler speculative continues texts from "
                "left to right: choose another sampler"
            )
        self.denoiser, self.acceptance, self.x = denoiser, acceptance, x
        self.begun = int(begun[0]) if N else self.length
        self.end, self.rows = begun, (begun < self.length).nonzero()[:, 0]
        self.passes = torch.zeros(N, dtype=torch.long, device=x.device)
        self.verifications = torch.zeros(N, dtype=torch.long, device=x.device)
        u = draws.uniforms(N, 3 * self.length).to(x.device)
        self.u_draft, self.u_accept, self.u_correct = u.split(self.length, 1)
        self.kv: Sequence[KeptKV] | None = None
        """of the denoiser, of the texts `rows`"""
        if len(self.rows):
            self.reader = scorer.reader(len(self.rows), self.length)
            if self.begun > 1:
                self._read(self.x[self.rows, : self.begun - 1], torch.zeros_like(self.rows))

    @property
    def going(self) -> bool:
        """True if a text is not finished."""
        return bool((self.end[self.rows] < self.length).any())

    def advance(self, group_of: Tensor, steps: int) -> None:
        """Draft tokens of each text, verify and accept them; group_of[n] are their passes.

        A text that has taken `steps` passes has no draft: the reader's model writes one token.
        """
        rows, end = self.rows, self.end[self.rows, None]
        draft = self._draft(group_of, steps)
        count, law = self._accepted(draft, self._verify(draft))
        last = end + count  # the place of the token that is drawn again, or comes after the draft
        u = self.u_correct[rows].gather(1, last.clamp(max=self.length - 1))[:, 0]
        place = torch.arange(self.length, device=end.device)
        x = torch.where((place >= end) & (place < last), draft.texts, self.x[rows])
        self.x[rows] = torch.where(place == last, draw_from(law, u)[:, None], x)
        self.end[rows] = (last[:, 0] + 1).clamp(max=self.length)
        self._drop_finished()

    def _draft(self, group_of: Tensor, steps: int) -> _Draft:
        """Write a draft of each text that is not finished and has passes left."""
        rows, x, end = self.rows, self.x[self.rows], self.end[self.rows]
        left = self.length - end
        t = (left / (self.length - self.begun)).float()
        columns = end[:, None] + torch.arange(len(group_of), device=end.device)
        passes = (steps - self.passes[rows]).where(left > 0, 0).clamp(max=int(group_of[-1]) + 1)
        exists = (columns < self.length) & (group_of < passes[:, None])
        q = self.u_draft.new_zeros(*columns.shape, self.denoiser.vocab_size)
        for i in range(int(passes.max())):
            texts, at = (exists & (group_of == i)).nonzero(as_tuple=True)
            places = columns[texts, at]
            stop = (end + (group_of <= i).sum()).clamp(max=self.length)
            h = self._features(x, t, stop, len(group_of), (texts, places))
            if len(texts):  # at the end of a text a pass may have no token to draw
                law = self.acceptance.law(self.denoiser.logits(h))
                q[texts, at] = law
                x[texts, places] = draw_from(law, self.u_draft[rows[texts], places])
        self.passes[rows] += passes
        n = int(exists.sum(1).max())
        return _Draft(x, columns[:, :n], exists[:, :n], q[:, :n])

    def _verify(self, draft: _Draft) -> Tensor:
        """The scorer's laws p[R, n + 1, V] at the drafted places and the one behind, by one read.

        A text that ends before reads some of its accepted tokens again. The laws of places that it
        does not have are any.
        """
        end, n = self.end[self.rows, None], draft.columns.shape[1]
        start = (end - 1).clamp(max=self.length - 1 - n)
        new = torch.arange(n + 1, device=end.device)
        p = self.acceptance.law(self._read(draft.texts.gather(1, start + new), start[:, 0]))
        places = (end - 1 - start + new).clamp(max=n)
        return p.gather(1, places[..., None].expand_as(p))

    def _accepted(self, draft: _Draft, p: Tensor) -> tuple[Tensor, Tensor]:
        """How many drafted tokens are accepted, [R, 1], and the law [R, V] of the token after."""
        n, V = draft.columns.shape[1], p.shape[-1]
        columns = draft.columns.clamp(max=self.length - 1)
        proposed = draft.texts.gather(1, columns)
        wanted = self.acceptance.relaxed(
            p[:, :n].flatten(0, 1), proposed.flatten(), self.denoiser.readout[0][:V]
        ).view_as(draft.q)
        ratio_p, ratio_q = (law.gather(2, proposed[..., None])[..., 0] for law in (wanted, draft.q))
        u = self.u_accept[self.rows].gather(1, columns)
        accepted = (u * ratio_q < ratio_p) & draft.exists
        count = accepted.long().cumprod(1).sum(1, keepdim=True)
        law = p.gather(1, count[..., None].expand(-1, 1, V))[:, 0]
        if n:
            at = count.clamp(max=n - 1)[..., None].expand(-1, 1, V)
            residual = (wanted.gather(1, at) - draft.q.gather(1, at))[:, 0].clamp(min=0)
            rejected = count < draft.exists.sum(1, keepdim=True)
            law = torch.where(rejected & (residual.sum(1, keepdim=True) > 0), residual, law)
        return count, law

    def _features(
        self, x: Tensor, t: Tensor, stop: Tensor, n: int, where: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The denoiser's features [K, D] of x[R, L] at K places, after one pass for all texts.

        The pass ends at stop[R] and computes equally many tokens of each text, so that no draft
        depends on how many tokens of another text are accepted.
        """
        keeping, width = kv_denoiser(self.denoiser), min(2 * n + 1, self.length)
        if keeping is None:
            return self.denoiser.features(x, t, where)
        start = (stop - width).clamp(min=0)
        places = start[:, None] + torch.arange(width, device=x.device)
        h, self.kv = keeping.features_and_kv(x, t, places, self.kv)
        texts, columns = where
        return h[texts, columns - start[texts]]

    def _read(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Logits [R, n, V] after tokens[R, n] at the positions from start[R] on."""
        self.verifications[self.rows[self.end[self.rows] < self.length]] += 1
        return self.reader.read(tokens, start)

    def _drop_finished(self) -> None:
        """Let the finished texts go, if they are half of all."""
        going = self.end[self.rows] < self.length
        if 0 < 2 * int(going.sum()) <= len(going):
            kept = going.nonzero()[:, 0]
            self.reader.keep(kept)
            for block in self.kv or []:
                block.keep(kept)
            self.rows = self.rows[kept]
