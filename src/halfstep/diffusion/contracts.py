"""The contracts of the mathematics: what a noise schedule, a denoiser and a sampler must provide.

Shapes: B texts of L tokens, N positions out of the B L, features of width D, V tokens in the
vocabulary. The mask token has the id `mask_id`. A class satisfies a protocol by having its members;
it need not inherit from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from halfstep.kernels.categorical import uniforms

Where = Tensor | tuple[Tensor, ...] | None
"""Positions: a mask [B, L], its nonzero(as_tuple=True), or None for all."""

Readout = tuple[Tensor, Tensor]
"""Weight W[V or more, D] and bias b[V] of the last layer; rows of W beyond V are no tokens."""

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log_p[N, V] of the student, log_q[N, V] of the teacher) -> [N], without a reduction."""


class Schedule(Protocol):
    """A noise schedule: the probability alpha(t) that a token is still visible at time t.

    alpha falls from 1 at t = 0 to about 0 at t = 1.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t), elementwise."""
        ...

    def alpha_prime(self, t: Tensor) -> Tensor:
        """The derivative of alpha at t, elementwise."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level -log alpha(t), the input of a time-conditioned network."""
        ...


class Denoiser(Protocol):
    """p(x0 | xt) at masked positions: first features, then logits only where they are needed."""

    @property
    def mask_id(self) -> int:
        """Id of the mask token; it is not part of the vocabulary."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that the denoiser can predict."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the denoiser was trained with."""
        ...

    @property
    def ignores_time(self) -> bool:
        """True if `features` does not depend on t."""
        ...

    @property
    def readout(self) -> Readout:
        """The last linear layer, which the losses need to form their gradient chunk by chunk."""
        ...

    def features(self, xt: Tensor, t: Tensor, where: Where = None) -> Tensor:
        """One pass of the network: xt[B, L] int64, t[B] -> h[B, L, D].

        With `where`, only the features of these positions, in row order: h[N, D].
        """
        ...

    def logits(self, h: Tensor, chunk: slice = slice(None)) -> Tensor:
        """log p(x0 = v | xt) up to one constant per row: h[N, D] -> [N, V] float32.

        With `chunk`, only these columns. The result is a new tensor, which the caller may
        overwrite.
        """
        ...

    def logits_at(self, h: Tensor, tokens: Tensor) -> Tensor:
        """`logits` of n tokens per row: h[N, D], tokens[N, n] int64 -> [N, n], a new tensor."""
        ...

    def log_p(self, h: Tensor) -> Tensor:
        """log p(x0 = v | xt), normalized over the vocabulary: h[..., D] -> [..., V] float32."""
        ...


class KeptKV(Protocol):
    """Keys and values of all positions of B texts in one block of a network."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows[K] of the texts alone, in this order."""
        ...


class KVDenoiser(Denoiser, Protocol):
    """A denoiser that can keep the keys and values of a pass; the sampler `block` needs one."""

    def features_and_kv(
        self, xt: Tensor, t: Tensor, places: Tensor, kv: Any = None
    ) -> tuple[Tensor, Sequence[KeptKV]]:
        """`features` h[B, n, D] of consecutive places of xt[B, L], and the blocks' keys and values.

        The places are [n], the same for all texts, or [B, n]. The first call computes the whole
        text. With its `kv`, a later call computes the tokens at the places alone, which read the
        keys and values of the other positions from there.
        """
        ...


def kv_denoiser(denoiser: Denoiser) -> KVDenoiser | None:
    """The denoiser, if it can keep keys and values.

    One whose `keeps_kv` is false cannot, though its class has the member for other networks.
    """
    able = hasattr(denoiser, "features_and_kv") and getattr(denoiser, "keeps_kv", True)
    return cast(KVDenoiser, denoiser) if able else None


@dataclass(frozen=True)
class Draws:
    """The random numbers of texts first, first + 1, ... of a seed, and the temperature.

    Text i owns its numbers: they depend on (seed, i) alone, not on the batch, the device or the
    process.
    """

    seed: int = 1
    first: int = 0
    temperature: float = 1.0

    def uniforms(self, texts: int, n: int, stream: int = 0) -> Tensor:
        """[texts, n] float64 uniforms on [0, 1); those of two streams are independent."""
        return uniforms(self.seed, self.first, texts, n, stream)


@dataclass(frozen=True)
class Samples:
    """Token ids[N, L] int64, and what each text took.

    network_evaluations [N]: passes of the denoiser, or of an autoregressive model that writes alone
    autoregressive_passes [N]: passes of the autoregressive model that a sampler asks; None if none
    """

    ids: Tensor
    network_evaluations: Tensor
    autoregressive_passes: Tensor | None = None


SamplerFunction = Callable[..., Samples]
"""(denoiser, x[N, L] int64, draws, steps, **its own options, which have defaults) -> Samples.

It fills the mask tokens of x in at most `steps` steps; other tokens are given.
"""


class Reader(Protocol):
    """Reads B texts part by part and keeps their keys and values, each text at its own place."""

    def read(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Logits of the token after each of tokens[B, n], which begin at the positions start[B].

        They read what was read before at earlier positions; what was read at these positions or
        later is forgotten. Result [B, n, V] float32.
        """
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows[K] of the texts alone, in this order."""
        ...


class Autoregressor(Protocol):
    """An autoregressive model: p(x_l | x_<l) of every token but the first, which is given."""

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens that it can predict."""
        ...

    def token_log_p(self, x: Tensor) -> Tensor:
        """log p of the tokens 1 to L - 1 of x[B, L] int64, given those before: [B, L - 1]."""
        ...

    def reader(self, texts: int, length: int) -> Reader:
        """A reader of texts of up to `length` tokens, none of which is read yet."""
        ...
