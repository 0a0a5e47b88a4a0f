"""A network and the SUBS parameterisation as a Denoiser: the one callable that the mathematics knows."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from halfstep.kernels.linear import matmul, pack_network, pack_weight
from halfstep.kernels.logits import logits, vocab_chunks
from halfstep.models.cuda_graphs import GraphedNetwork
from halfstep.models.dit import BlockKV
from halfstep.models.layers import Where


class SubsDenoiser:
    """p(x0 | xt) of MDLM (arXiv 2406.07524, section 3.2.3): no mass on the mask token; visible tokens are carried over by the caller.

    `sigma(t[B]) -> [B]` is the noise level fed to a time-conditioned network, None for a network that ignores time.
    """

    def __init__(self, network: nn.Module, sigma: Callable[[Tensor], Tensor] | None = None):
        self.network, self._sigma, self._pass = network, sigma, network
        self._packed: dict[
            tuple[int, int], Tensor
        ] = {}  # the readout, by first and last word of each slice
        self.mask_id = network.vocabulary

    @property
    def ignores_time(self) -> bool:
        return self._sigma is None

    def features(self, xt: Tensor, t: Tensor, where: Where = None) -> Tensor:
        """One pass of the network: xt[B, L] int64, t[B] in [0, 1] -> h[B, L, D]; of the positions where[B, L] alone, in row order, h[N, D].

        `where` is a mask, or its nonzero(as_tuple=True): found on the host, it is not counted on a device, for which the host would wait.
        """
        return self._pass(xt, None if self._sigma is None else self._sigma(t), where)

    @cached_property
    def replayed(self) -> "SubsDenoiser":
        """The same law of the same weights, which must no longer change: matrices as oneDNN reads them on a CPU, CUDA graphs where there are few
        texts. For sampling."""
        twin, (weight, bias) = SubsDenoiser(pack_network(self.network), self._sigma), self.readout
        twin._pass = GraphedNetwork(twin.network)
        if weight.device.type == "cpu":
            twin._packed = {
                (words.start, words.stop): pack_weight(weight[words].float())
                for words in vocab_chunks(len(bias), weight.device)
            }
        return twin

    def features_and_keys(
        self, xt: Tensor, t: Tensor, start: int = 0, kept: list | None = None
    ) -> tuple[Tensor, list]:
        """As `features`, and every block's keys and values. Given back, xt[B, l] are the tokens from `start` on, and only they are computed."""
        kept = kept or [BlockKV() for _ in self.network.blocks]
        return self.network(
            xt, None if self._sigma is None else self._sigma(t), start=start, kept=kept
        ), kept

    @property
    def readout(self) -> tuple[Tensor, Tensor]:
        """Weight [V + 1, D], the mask token's row last, and bias [V] of the data vocabulary. (A slice of the weight would cost its backward pass a table.)"""
        linear = self.network.output_layer.linear
        return linear.weight, linear.bias[:-1]

    def logits(self, h: Tensor, words: slice = slice(None)) -> Tensor:
        """log p(x0 = v | xt) up to a number for each row, float32, of features h[N, D]: [N, V], or of a slice of the vocabulary."""
        weight, bias = self.readout
        return logits(
            h, self._packed.get((words.start, words.stop), weight[: len(bias)][words]), bias[words]
        )

    def logits_at(self, h: Tensor, place: Tensor) -> Tensor:
        """`logits` of each row's own words place[N, n] -> [N, n]."""
        weight, bias = self.readout
        with torch.autocast(h.device.type, enabled=False):
            return (weight[place].float() @ h.float()[:, :, None])[:, :, 0] + bias[place].float()

    def log_p(self, h: Tensor) -> Tensor:
        """log p(x0 = v | xt) [..., V], float32 inside autocast too, normalised over the data vocabulary, of features h[..., D]."""
        weight, bias = self.readout
        with torch.autocast(h.device.type, enabled=False):
            return matmul(h.float(), weight[:-1].float(), bias.float()).log_softmax(-1)
