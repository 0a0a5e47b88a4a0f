"""An enumerated language: its posteriors, the denoiser that never errs, and the exact laws of
samplers, targets and bounds.

A state is a text of L tokens in which some are masked (token V): S = (V + 1)^L of them, numbered
with the first position as the highest digit. Everything is a sum over states in float64, written
from the definitions and not from the package.
"""

from itertools import product
from math import comb

import torch
from torch import Tensor

EPS = 1e-3  # of the log-linear schedule


def loglinear(t):
    """alpha(t) of the log-linear schedule, for a number or a tensor."""
    return 1 - (1 - EPS) * t


class ScheduleOf:
    """The Schedule of an alpha: its derivative and noise level by autograd and by definition."""

    def __init__(self, alpha):
        self.alpha = alpha

    def alpha_prime(self, t: Tensor) -> Tensor:
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            return torch.autograd.grad(self.alpha(t).sum(), t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return -self.alpha(t).log()


class Language:
    """`log_p` [V**L] float64 over all texts; `sharpness` says how unequal they are, `forbidden` how
    many have no chance at all, `only` which ones alone have one.
    """

    def __init__(
        self,
        V: int,
        L: int,
        seed: int = 0,
        sharpness: float = 1.5,
        forbidden: int = 0,
        only: list[tuple[int, ...]] | None = None,
    ):
        self.V, self.L, self.mask_id = V, L, V
        self.texts = torch.tensor(list(product(range(V), repeat=L)))
        self.states = torch.tensor(list(product(range(V + 1), repeat=L)))
        generator = torch.Generator().manual_seed(seed)
        score = sharpness * torch.randn(len(self.texts), generator=generator, dtype=torch.float64)
        score[torch.randperm(len(score), generator=generator)[:forbidden]] = -torch.inf
        if only is not None:
            allowed = (self.texts[:, None] == torch.tensor(only)).all(-1).any(1)
            score[~allowed] = -torch.inf
        self.log_p = score.log_softmax(0)
        self.p = self.log_p.exp()
        fits = (
            ((self.states[:, None] == self.texts) | (self.states[:, None] == V)).all(-1).double()
        )  # [S, T]
        self.chance = fits @ self.p  # [S] of seeing what is visible in a state
        hot = torch.nn.functional.one_hot(self.texts, V).double()  # [T, L, V]
        self.posterior = (
            torch.einsum("st,t,tlv->slv", fits, self.p, hot)
            / self.chance.clamp(min=1e-300)[:, None, None]
        )
        self.fits, self.masked = fits, self.states == V

    def index(self, x: Tensor) -> Tensor:
        """States x[..., L] -> their numbers."""
        return (x.cpu() * (self.V + 1) ** torch.arange(self.L - 1, -1, -1)).sum(-1)

    def text_index(self, x: Tensor) -> Tensor:
        return (x * self.V ** torch.arange(self.L - 1, -1, -1)).sum(-1)

    @property
    def entropy(self) -> float:
        """Nats per text."""
        return -(self.p * self.log_p.clamp(min=-1e9)).sum().item()


class KeptText:
    """What a perfect denoiser keeps of texts instead of keys and values: their tokens [N, L]."""

    def __init__(self, text: Tensor):
        self.text = text

    def keep(self, rows: Tensor) -> None:
        self.text = self.text[rows]


class Perfect:
    """The Denoiser that never errs; with `heat` it errs in a known way that depends on time: p ~
    posterior^(1 + heat t), renormalised.

    features = log-probabilities (zero where a state cannot be), read out by the identity.
    """

    def __init__(self, language: Language, heat: float = 0.0, alpha=loglinear):
        self.language, self.heat, self.mask_id = language, heat, language.mask_id
        self.vocab_size, self.schedule = language.V, ScheduleOf(alpha)
        self.readout = (
            torch.eye(language.V, dtype=torch.float64),
            torch.zeros(language.V, dtype=torch.float64),
        )
        self.ignores_time = heat == 0
        self.passes = self.texts = 0

    def table(self, t: float) -> Tensor:
        """Exact p(x0_l = v | state) at time t, [S, L, V] float64."""
        return (
            (self.language.posterior.log() * (1 + self.heat * t))
            .softmax(-1)
            .nan_to_num(1 / self.language.V)
        )

    def features(self, xt: Tensor, t: Tensor, where: Tensor | None = None) -> Tensor:
        self.passes, self.texts = self.passes + 1, self.texts + len(xt)
        log_p = (
            self.language.posterior[self.language.index(xt)].log()
            * (1 + self.heat * t.double())[:, None, None]
        )
        log_p = log_p.log_softmax(-1).nan_to_num(nan=0.0, neginf=-torch.inf)
        return log_p if where is None else log_p[where]

    def features_and_kv(self, xt: Tensor, t: Tensor, places: Tensor, kv: list | None = None):
        """Keys and values that are always up to date: the whole text itself."""
        kv = kv or [KeptText(xt.clone())]
        places = places.expand(len(xt), -1)
        kv[0].text.scatter_(1, places, xt.gather(1, places))
        return self.features(kv[0].text, t)[torch.arange(len(xt))[:, None], places], kv

    def log_p(self, h: Tensor) -> Tensor:
        return h.log_softmax(-1)

    def logits(self, h: Tensor, words: slice = slice(None)) -> Tensor:
        return self.log_p(h)[:, words]

    def logits_at(self, h: Tensor, place: Tensor) -> Tensor:
        return self.log_p(h).gather(-1, place)


def reveal_chance(t: float, s: float, alpha=loglinear) -> float:
    """(alpha_s - alpha_t) / (1 - alpha_t), from alpha itself."""
    t, s = (torch.tensor(time, dtype=torch.float64) for time in (t, s))
    return ((alpha(s) - alpha(t)) / (1 - alpha(t))).item()


def _moves(language: Language, rows: Tensor, p: Tensor, r: float) -> Tensor:
    """Transition matrix [R, S] from the states `rows`: each masked position is revealed with chance
    r, its token drawn from p[S, L, V].
    """
    out = torch.ones(len(rows), len(language.states), dtype=torch.float64)
    for a in range(language.L):
        now, then = language.states[rows, a][:, None], language.states[:, a][None]
        value = r * p[rows, a].gather(1, then.clamp(max=language.V - 1).expand(len(rows), -1))
        move = torch.where(then == language.V, torch.tensor(1 - r, dtype=torch.float64), value)
        out *= torch.where(now == language.V, move, (now == then).double())
    return out


def independent(language: Language, law: Tensor, p: Tensor, r: float) -> Tensor:
    """law[S] after one step in which each masked position is revealed with chance r."""
    rows = law.nonzero()[:, 0]
    return law[rows] @ _moves(language, rows, p, r)


def exactly(language: Language, law: Tensor, p: Tensor, count: int) -> Tensor:
    """law[S] after a step in which `count` of the masked positions, any with equal chance, are
    revealed at once.
    """
    rows = law.nonzero()[:, 0]
    m = language.masked.sum(1).double()
    revealed = m[rows][:, None] - m[None]
    sets = torch.tensor([comb(int(n), count) for n in m[rows]], dtype=torch.float64)
    # at r = 1/2 each set of revealed positions has weight 2^-m, whatever the set
    return law[rows] @ (
        _moves(language, rows, p, 0.5)
        * 2.0 ** m[rows][:, None]
        * (revealed == count)
        / sets[:, None]
    )


def ancestral_law(denoiser: Perfect, steps: int, start: Tensor) -> Tensor:
    """Law over states [S] after ancestral sampling in `steps` equal steps from the state
    `start`[L].
    """
    language = denoiser.language
    law = torch.zeros(len(language.states), dtype=torch.float64)
    law[language.index(start)] = 1
    for i in range(steps):
        t, s = 1 - i / steps, 1 - (i + 1) / steps
        chance = reveal_chance(t, s, denoiser.schedule.alpha)
        law = independent(language, law, denoiser.table(t), chance)
    return law


def first_hitting_law(denoiser: Perfect, steps: int, start: Tensor) -> Tensor:
    """Law over states [S] when the free positions are revealed in a random order in min(steps,
    free) groups, equal up to one.
    """
    language = denoiser.language
    law = torch.zeros(len(language.states), dtype=torch.float64)
    law[language.index(start)] = 1
    free = int((start == language.V).sum())
    groups = min(steps, free)
    for k in range(groups):
        size = sum(rank * groups // free == k for rank in range(free))
        law = exactly(language, law, denoiser.table(1 - k / steps), size)
    return law


def law_of_choice(denoiser: Perfect, steps: int, start: Tensor, choose) -> tuple[Tensor, float]:
    """Law over states [S] of a sampler that chooses its positions by what it sees, and the mean
    number of its passes.

    choose(p[L, V], the masked positions, passes left) -> the positions that are revealed, with
    tokens drawn independently from p.
    """
    language, table, passes = denoiser.language, denoiser.table(1.0), 0.0
    law = {tuple(start.tolist()): 1.0}
    for step in range(steps):
        then: dict[tuple, float] = {}
        for state, chance in law.items():
            masked = [i for i, token in enumerate(state) if token == language.V]
            if not masked:
                then[state] = then.get(state, 0) + chance
                continue
            passes += chance
            p = table[language.index(torch.tensor(state))]
            chosen = choose(p, masked, steps - step)
            for tokens in product(range(language.V), repeat=len(chosen)):
                after, q = list(state), chance
                for i, token in zip(chosen, tokens, strict=True):
                    after[i], q = token, q * p[i, token].item()
                if q:
                    then[tuple(after)] = then.get(tuple(after), 0) + q
        law = then
    out = torch.zeros(len(language.states), dtype=torch.float64)
    for state, chance in law.items():
        out[language.index(torch.tensor(state))] = chance
    return out, passes


def remasking_law(denoiser: Perfect, alphas: list, sigmas: list, start: Tensor) -> Tensor:
    """Law over states [S] of ReMDM's transitions: alphas [n + 1] from time 1 to 0, sigmas [n]."""
    language, table = denoiser.language, denoiser.table(1.0)
    S, V = len(language.states), language.V
    given = start != V
    law = torch.zeros(S, dtype=torch.float64)
    law[language.index(start)] = 1
    for a_t, a_s, sigma in zip(alphas[:-1], alphas[1:], sigmas, strict=True):
        move = torch.ones(S, S, dtype=torch.float64)
        shown = (a_s - (1 - sigma) * a_t) / (1 - a_t)
        for i in range(language.L):
            now, after = language.states[:, i][:, None], language.states[:, i][None]
            token = table[:, i].gather(1, after.clamp(max=V - 1).expand(S, -1))
            from_mask = torch.where(after == V, 1 - shown, shown * token)
            s = 0.0 if given[i] else sigma
            stays = torch.where(after == now, torch.tensor(1 - s, dtype=torch.float64), 0.0)
            from_token = torch.where(after == V, torch.tensor(s, dtype=torch.float64), stays)
            move *= torch.where(now == V, from_mask, from_token)
        law = law @ move
    return law


class PerfectReader:
    """The Autoregressor and the Reader of an enumerated language: exact p(x_l | x_<l)."""

    def __init__(self, language: Language, x: Tensor | None = None):
        self.language, self.vocab_size, self.x = language, language.V, x
        self.known = torch.zeros(0, dtype=torch.long) if x is None else torch.zeros(len(x)).long()

    def next_log_p(self, x: Tensor) -> Tensor:
        """log p of the token after each of x[B, L], [B, L, V]; there is none after the last."""
        language, out = self.language, []
        for end in range(1, x.shape[1] + 1):
            seen = torch.full((len(x), language.L), language.V)
            seen[:, :end] = x[:, :end]
            place = min(end, language.L - 1)
            out.append(language.posterior[language.index(seen), place].log())
        return torch.stack(out, 1)

    def token_log_p(self, x: Tensor) -> Tensor:
        return self.next_log_p(x)[:, :-1].gather(2, x[:, 1:, None])[..., 0]

    def reader(self, texts: int, length: int) -> "PerfectReader":
        return PerfectReader(self.language, torch.zeros(texts, length, dtype=torch.long))

    def read(self, tokens: Tensor, start: Tensor) -> Tensor:
        assert (start <= self.known).all() and (start + tokens.shape[1] <= self.x.shape[1]).all()
        place = start[:, None] + torch.arange(tokens.shape[1])
        self.x.scatter_(1, place, tokens)
        self.known = start + tokens.shape[1]
        log_p = self.next_log_p(self.x)
        return log_p.gather(1, place[..., None].expand(-1, -1, self.vocab_size)).float()

    def keep(self, rows: Tensor) -> None:
        self.x, self.known = self.x[rows], self.known[rows]


def grid(name: str, t: float, dt: float, substeps: int) -> list[float]:
    """Starts of the teacher's substeps: Algorithm 1's, or the released code's (deviation Q1)."""
    if name == "exact":
        return [max(t - i * dt, 1e-5) for i in range(substeps)]
    space = [1 - i / (substeps - 1) for i in range(substeps)]
    return [max(t * w + (1 - t) * (t - substeps * dt), 1e-5) for w in space]


def target_mean(
    denoiser: Perfect, xt: Tensor, t: float, dt: float, substeps: int, times: str, of=torch.log
) -> tuple[Tensor, Tensor]:
    """Mean over the teacher's draws of of(target)[L, V] at each masked position of the state xt[L],
    and of its square.
    """
    language = denoiser.language
    law = torch.zeros(len(language.states), dtype=torch.float64)
    law[language.index(xt)] = 1
    first, second = torch.zeros(2, language.L, language.V, dtype=torch.float64)
    for i, start in enumerate(grid(times, t, dt, substeps)):
        p = denoiser.table(start)
        r = reveal_chance(start, max(start - dt, 0.0), denoiser.schedule.alpha)
        settles = 1.0 if i == substeps - 1 else r
        weight = (law[:, None] * language.masked * settles)[..., None]  # [S, L, 1]
        value = of(p.clamp(min=1e-300))
        first += (weight * value).sum(0)
        second += (weight * value.square()).sum(0)
        law = independent(language, law, p, r)
    return first, second


def masked_loss(language: Language, share: float) -> float:
    """E sum over masked positions of -log posterior(x0), when each position is masked with chance
    `share`.
    """
    m = language.masked.sum(1).double()
    weight = share**m * (1 - share) ** (language.L - m)  # [S] chance of the pattern
    loss = -(language.posterior * language.posterior.clamp(min=1e-300).log()).sum(
        -1
    )  # [S, L]: entropy of each posterior
    return (weight * language.chance * (loss * language.masked).sum(1)).sum().item()


def nelbo(language: Language, low: float = 0.0, high: float = 1.0, eps: float = EPS) -> float:
    """Integral over t of the NELBO's integrand from low to high (Gauss-Legendre; the integrand is a
    polynomial).
    """
    nodes, weights = _gauss(32)
    t = low + (high - low) * (nodes + 1) / 2
    return sum(
        (high - low) / 2 * w.item() * masked_loss(language, (1 - eps) * a.item()) / a.item()
        for a, w in zip(t, weights, strict=True)
    )


def _gauss(n: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    return tuple(map(torch.from_numpy, np.polynomial.legendre.leggauss(n)))


def chi_square(counts: Tensor, law: Tensor, least: float = 5.0) -> float:
    """p-value of counts[K] under law[K]; outcomes expected less than `least` times are pooled.

    An impossible outcome gives 0.
    """
    if counts[law <= 0].sum() > 0:
        return 0.0
    expected = law * counts.sum()
    rare = expected < least
    seen = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    statistic = ((seen - expected).square() / expected)[keep].sum()
    freedom = int(keep.sum()) - 1
    return (
        torch.special.gammaincc(
            torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2
        ).item()
        if freedom > 0
        else 1.0
    )
