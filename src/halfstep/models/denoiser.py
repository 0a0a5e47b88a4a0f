"""A network under MDLM's SUBS parameterization, as a `Denoiser` (diffusion/contracts.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfstep.diffusion.contracts import KVDenoiser, Readout, Schedule, Where
from halfstep.kernels.linear import matmul, pack_network, pack_weight
from halfstep.kernels.logits import logits, vocab_chunks
from halfstep.models.cuda_graphs import GraphedNetwork
from halfstep.models.dit import BlockKV, DiT
from halfstep.models.gpt2 import GPT2
from halfstep.models.hf import TransformersNetwork


class SubsDenoiser:
    """p(x0 | xt) of MDLM (arXiv 2406.07524, section 3.2.3).

    The mask token has no probability; the caller carries visible tokens over.

    A time-conditioned network is given the noise level sigma(t) of the schedule; any other network
    ignores time. With `shifted`, the network's output at position i - 1 predicts the token at i, as
    in an autoregressive model (DiffuGPT, arXiv 2410.17891); the output at the last position
    predicts the first token.
    """

    def __init__(
        self,
        network: DiT | GPT2 | TransformersNetwork,
        schedule: Schedule,
        time_conditioning: bool = False,
        shifted: bool = False,
    ):
        self.network, self.schedule, self.shifted = network, schedule, shifted
        self.ignores_time = not time_conditioning
        self._pass: Callable[..., Tensor] = network
        self._packed: dict[tuple[int, int], Tensor] = {}  # (first, last token) -> slice of W

    @property
    def vocab_size(self) -> int:
        """V, without the mask token."""
        return self.network.vocabulary

    @property
    def mask_id(self) -> int:
        """The mask token is the last id of the embedding table."""
        return self.network.vocabulary

    def features(self, xt: Tensor, t: Tensor, where: Where = None) -> Tensor:
        """One pass of the network: xt[B, L] int64, t[B] in [0, 1] -> h[B, L, D].

        With `where`, only the features of these positions, in row order: h[N, D].

        `where` is a mask [B, L] or its nonzero(as_tuple=True). With indices that were computed on
        the host, the host does not wait for the device.
        """
        if not self.shifted:
            return self._pass(xt, self._sigma(t), where)
        if where is None:
            return self._pass(xt, self._sigma(t), None).roll(1, 1)
        texts, places = where if isinstance(where, tuple) else where.nonzero(as_tuple=True)
        return self._pass(xt, self._sigma(t), (texts, (places - 1) % xt.shape[1]))

    @property
    def keeps_kv(self) -> bool:
        """Whether the network can keep keys and values, as `features_and_kv` needs."""
        return not isinstance(self.network, TransformersNetwork)

    def features_and_kv(
        self, xt: Tensor, t: Tensor, places: Tensor, kv: list[BlockKV] | None = None
    ) -> tuple[Tensor, list[BlockKV]]:
        """`features` of consecutive places of xt[B, L], and the keys and values of every block.

        With `kv` given back, only the tokens there are computed; with `shifted` also the token
        before them.
        """
        sigma, (B, L) = self._sigma(t), xt.shape
        if self.shifted:
            places = torch.cat([places[..., :1] - 1, places], -1) % L
        if kv is None:
            kv = [BlockKV() for _ in self.network.blocks]
            h = self.network(xt, sigma, kept=kv)
            h = h.gather(1, places.expand(B, -1)[..., None].expand(-1, -1, h.shape[-1]))
        else:
            x = xt.gather(1, places.expand(B, -1))
            h = self.network(x, sigma, positions=places, kept=kv)
        return h[:, :-1] if self.shifted else h, kv

    def reading(self, pairs: Tensor) -> SubsDenoiser:
        """The same denoiser, in which position i reads the positions j with pairs[i, j].

        pairs[L, L] bool; `features_and_kv` reads all positions as before.
        """
        return self.passing(partial(self.network, pairs=pairs))

    def passing(self, forward: Callable[..., Tensor]) -> SubsDenoiser:
        """The same denoiser, with another function for `features`: that of the network."""
        copy = SubsDenoiser(self.network, self.schedule, not self.ignores_time, self.shifted)
        copy._pass = forward
        return copy

    @cached_property
    def inference_copy(self) -> SubsDenoiser:
        """The same denoiser with frozen weights, for sampling.

        It has packed matrices on a CPU, and CUDA graphs for small batches; of a model of
        transformers only the readout is packed.

        It shares the weights, which must not change from now on.
        """
        is_ours = not isinstance(self.network, TransformersNetwork)
        network = pack_network(self.network) if is_ours else self.network
        copy = SubsDenoiser(network, self.schedule, not self.ignores_time, self.shifted)
        if is_ours:
            copy._pass = GraphedNetwork(network)
        weight, bias = self.readout
        if weight.device.type == "cpu":
            with torch.autocast("cpu", enabled=False):  # the readout is float32 inside it too
                for chunk in vocab_chunks(len(bias), weight.device):
                    copy._packed[chunk.start, chunk.stop] = pack_weight(weight[chunk].float())
        return copy

    @property
    def readout(self) -> Readout:
        """Weight [V + 1 or more, D], whose rows after the first V are no tokens, and bias [V]."""
        return self.network.readout

    def logits(self, h: Tensor, chunk: slice = slice(None)) -> Tensor:
        """log p(x0 = v | xt) up to one constant per row: h[N, D] -> [N, V] float32.

        With `chunk`, only these columns.
        """
        weight, bias = self.readout
        matrix = self._packed.get((chunk.start, chunk.stop))
        return logits(h, weight[: len(bias)][chunk] if matrix is None else matrix, bias[chunk])

    def logits_at(self, h: Tensor, tokens: Tensor) -> Tensor:
        """`logits` of n tokens per row: h[N, D], tokens[N, n] int64 -> [N, n]."""
        weight, bias = self.readout
        with torch.autocast(h.device.type, enabled=False):
            rows = weight[tokens].float()
            return (rows @ h.float()[:, :, None])[:, :, 0] + bias[tokens].float()

    def log_p(self, h: Tensor) -> Tensor:
        """log p(x0 = v | xt), normalized: h[..., D] -> [..., V], float32 inside autocast too."""
        weight, bias = self.readout
        with torch.autocast(h.device.type, enabled=False):
            return matmul(h.float(), weight[: len(bias)].float(), bias.float()).log_softmax(-1)

    def _sigma(self, t: Tensor) -> Tensor | None:
        return None if self.ignores_time else self.schedule.sigma(t)


if TYPE_CHECKING:  # the type checker compares the class with its contract
    _CONTRACT: type[KVDenoiser] = SubsDenoiser
