"""A language model of transformers as the network of a denoiser, which `SubsDenoiser` reads.

It is a masked language model, or a causal one that was trained to read both ways. Its mask token is
the last one, as in our own networks: where it is another, its rows have changed places with those
of the last token (`swap_rows`). Rows after it are padding and are never drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfstep.diffusion.contracts import Readout, Where
from halfstep.errors import HalfstepError, reason
from halfstep.pretrained import MASKED, build_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersNetwork(nn.Module):
    """Features and readout of a language model of transformers, over `vocabulary` tokens.

    Features are what the model gives to its last linear layer, after any layers of its head before
    it. The model must not be used for itself any more, because that layer now returns its input.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int):
        super().__init__()
        head = model.get_output_embeddings()
        # Before the model, so that the readout has the name that it has in our own networks.
        self.output_layer = nn.ModuleDict({"linear": head})
        self.model, self.vocabulary = model, vocabulary
        head.forward = passed_on

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        where: Where = None,
        positions: Tensor | None = None,
        kept: list[Any] | None = None,
        pairs: Tensor | None = None,
    ) -> Tensor:
        """Token ids x[B, L] -> features h[B, L, D]; arguments and shapes are those of `DiT`.

        `sigma` is not read, and no keys and values can be kept. HalfstepError if a text is longer
        than the model's positions, or if only some pairs of positions are to be read.
        """
        assert kept is None and positions is None
        if pairs is not None:
            name = type(self.model).__name__
            raise HalfstepError(
                f"anneal_attention: the attention of {name} cannot be limited; leave it out"
            )
        if self.most_tokens is not None and x.shape[1] > self.most_tokens:
            raise HalfstepError(
                f"length: found texts of {x.shape[1]} tokens, but this network has the positions "
                f"of {self.most_tokens}; use shorter texts, or another model"
            )
        h = self.model(input_ids=x).logits
        return h if where is None else h[where]

    @property
    def readout(self) -> Readout:
        """Weight [rows, D], whose rows after the first V are no tokens, and bias [V]."""
        head = self.output_layer["linear"]
        assert isinstance(head, nn.Linear)
        if head.bias is None:
            return head.weight, torch.zeros(self.vocabulary, device=head.weight.device)
        return head.weight, head.bias[: self.vocabulary]

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the model: its longest list of modules."""
        lists = [part for part in self.model.modules() if isinstance(part, nn.ModuleList)]
        return max(lists, key=len)

    @property
    def most_tokens(self) -> int | None:
        """Tokens that a text may have; None if the configuration sets no limit."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is None or most < 0:
            return None
        table = self.model.get_input_embeddings()
        for part in self.model.modules():
            if isinstance(part, nn.Embedding) and part is not table and len(part.weight) == most:
                # Roberta counts its positions from after that of padding.
                return most if part.padding_idx is None else most - part.padding_idx - 1
        return most

    def as_published(self, mask_id: int) -> PreTrainedModel:
        """The model with its own logits, and with the ids of its source, where `mask_id` is masked.

        The network must not be used any more.
        """
        del self.output_layer["linear"].__dict__["forward"]
        swap_rows(self.model, mask_id, self.vocabulary)
        return self.model


def passed_on(h: Tensor) -> Tensor:
    """The features themselves, in place of a last layer's forward."""
    return h


def build_network_of(about: dict[str, Any], vocabulary: int, dropout: float) -> TransformersNetwork:
    """A new network of the entry `transformers` of a meta.json: its keys `auto` and `config`.

    HalfstepError if transformers knows no such model.
    """
    try:
        model = build_pretrained(about["auto"], about["config"], dropout, about.get("code"))
    except HalfstepError:
        raise
    except Exception as error:  # transformers raises many types
        raise HalfstepError(
            "meta.json: transformers: describes no model that this version of transformers builds "
            f"({type(error).__name__}: {reason(error)}); install another one, or import the model "
            "again"
        ) from None
    if about["auto"] != MASKED:
        read_both_ways(model)
    return TransformersNetwork(model, vocabulary)


def read_both_ways(model: PreTrainedModel) -> None:
    """Let every position of a causal model read all positions, in place.

    Masks follow from the configuration, and kernels without a mask from the attention layers.
    """
    model.config.is_causal = False
    model.config.use_cache = False
    for part in model.modules():
        if hasattr(part, "is_causal"):
            setattr(part, "is_causal", False)  # noqa: B010  an attribute that nn.Module has not


@torch.no_grad()
def swap_rows(model: PreTrainedModel, one: int, other: int) -> None:
    """Let two tokens change their ids, in place: in the embedding table, the readout, its bias."""
    head: Any = model.get_output_embeddings()
    tables: list[Any] = [model.get_input_embeddings().weight, head.weight, head.bias]
    for table in {id(table): table for table in tables if table is not None}.values():
        table[[one, other]] = table[[other, one]]
