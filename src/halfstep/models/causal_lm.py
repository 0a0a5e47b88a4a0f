"""A causal language model of transformers as the network of an autoregressive baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from halfstep.errors import HalfstepError
from halfstep.models.gpt import draw_token
from halfstep.models.hf import passed_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3  # between logits that should be equal, as a share of the largest


class CausalLM(nn.Module):
    """Features and log-probabilities of a causal language model of transformers, in float32.

    Its vocabulary is cut to the first `vocabulary` tokens, because tables are often padded.
    Features are what the model gives to its last linear layer, which now returns its input: the
    model must not be used for itself any more.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int):
        super().__init__()
        # Before the model, so that the readout has the name that it has in our own networks.
        head = model.get_output_embeddings()
        self.output_layer = nn.ModuleDict({"linear": head})
        self.model, self.vocabulary = model, vocabulary
        head.forward = passed_on

    @property
    def most_tokens(self) -> int | None:
        """Number of positions that it has; None if its configuration sets no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def forward(self, x: Tensor) -> Tensor:
        """Token ids x[B, L] -> features h[B, L, D]; position l predicts token l + 1.

        HalfstepError if a text has more tokens than the model has positions.
        """
        self.check_length(x.shape[1])
        return self.model(input_ids=x, use_cache=False).logits

    def extend(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Read x[B, n] after the tokens in the cache (None: first): features [B, D], and the cache.

        The features are those of the last position.
        """
        found = self.model(input_ids=x, past_key_values=cache, use_cache=True)
        return found.logits[:, -1], found.past_key_values

    def logits(self, h: Tensor) -> Tensor:
        """Features h[..., D] -> logits [..., V], float32 inside autocast too."""
        with torch.autocast(h.device.type, enabled=False):
            head: Any = self.output_layer["linear"]
            return functional.linear(h.float(), head.weight, head.bias)[..., : self.vocabulary]

    def log_p(self, h: Tensor) -> Tensor:
        """log p of the next token from features h[N, D]: [N, V] float32."""
        return self.logits(h).log_softmax(-1)

    def decoder(self, batch: int, length: int, temperature: float, top_p: float) -> CachedDecoder:
        """A decoder of `batch` texts of `length` tokens."""
        return CachedDecoder(self, batch, length, temperature, top_p)

    def check_length(self, length: int) -> None:
        """HalfstepError if texts of `length` tokens are longer than the model's positions."""
        if self.most_tokens is not None and length > self.most_tokens:
            raise HalfstepError(
                f"length: found texts of {length} tokens, but the baseline has the positions of "
                f"{self.most_tokens}; use shorter texts, or another baseline"
            )


class CachedDecoder:
    """Writes `batch` texts of `length` tokens, one per step, with the KV cache of transformers."""

    def __init__(
        self, network: CausalLM, batch: int, length: int, temperature: float, top_p: float
    ):
        network.check_length(length)
        self.network, self.length = network, length
        self.temperature, self.top_p = temperature, top_p
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=network.model.device)

    @torch.inference_mode()
    def write(self, start: Tensor, u: Tensor) -> Tensor:
        """Write texts [N, length] that begin with start[P] or [N, P].

        They are drawn by u[N, length] float64.
        """
        begun, u = start.shape[-1], u.to(self.ids.device)
        self.ids[:, :begun] = start
        unread, cache = self.ids[:, :begun], None
        for position in range(begun, self.length):
            h, cache = self.network.extend(unread, cache)
            logits = self.network.logits(h)
            drawn = draw_token(logits, self.temperature, self.top_p, u[:, position])
            self.ids[:, position] = drawn
            unread = drawn[:, None]
        return self.ids.clone()


@torch.no_grad()
def check_causal(network: CausalLM) -> None:
    """ValueError unless `network` gives the model's own logits, and these are causal.

    Three tokens are read at once, with another last token, and one at a time through the cache.
    """
    x = torch.arange(3)[None] % network.vocabulary
    other = x.clone()
    other[:, -1] = network.vocabulary - 1
    head = network.output_layer["linear"]
    del head.forward  # the class has its own
    expected, changed = (
        network.model(input_ids=ids, use_cache=False).logits[..., : network.vocabulary]
        for ids in (x, other)
    )
    head.forward = passed_on
    cache, steps = None, []
    for position in range(x.shape[1]):
        h, cache = network.extend(x[:, position : position + 1], cache)
        steps.append(network.logits(h))
    cases = {
        "its predictions depend on later tokens": (changed[:, :-1], expected[:, :-1]),
        "its logits are no linear function of its features": (
            network.logits(network(x)),
            expected,
        ),
        "its KV cache changes its logits": (torch.stack(steps, 1), expected),
    }
    for fault, (found, wanted) in cases.items():
        if not (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            raise ValueError(fault)
