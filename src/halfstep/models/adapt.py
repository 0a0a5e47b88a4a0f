"""From an autoregressive network to a denoiser: DiffuGPT's start (arXiv 2410.17891)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT

GATES = [2, 5]  # of adaLN's six parts: those of the attention and of the MLP


@torch.no_grad()
def adapt_weights(gpt: GPT, dit: DiT) -> None:
    """Copy the weights of a causal network into a denoiser's network of the same shape.

    The blocks compute what they computed, because their gates are one and their shifts and scales
    zero; only attention sees the whole text from now on. The mask token's embedding is the mean of
    the table. The outputs predict the next token, so the denoiser must be shifted (SubsDenoiser).

    Raises ValueError if the networks differ in vocabulary, width, blocks or heads.
    """
    table, V = gpt.vocab_embed.embedding, gpt.vocabulary
    ours = dit.vocabulary, dit.vocab_embed.embedding.shape[1], len(dit.blocks)
    theirs = V, table.shape[1], len(gpt.blocks)
    if (*ours, dit.heads) != (*theirs, gpt.heads):
        raise ValueError(
            f"vocabulary, width, blocks and heads are {(*theirs, gpt.heads)}, "
            f"but the denoiser has {(*ours, dit.heads)}"
        )
    own, given = dit.state_dict(), gpt.state_dict()
    for name, value in given.items():
        if own[name].shape == value.shape:
            own[name].copy_(value)
    dit.vocab_embed.embedding[:V] = table
    dit.vocab_embed.embedding[V] = table.mean(0)
    dit.output_layer.linear.weight[:V] = gpt.output_layer.linear.weight
    dit.output_layer.linear.weight[V] = 0
    for block in dit.blocks:
        gates = cast(nn.Linear, block.adaLN_modulation).bias.view(6, -1)
        gates[GATES] = 1  # the rest is zero from the start


def annealed_pairs(length: int, share: float, seed: int) -> Tensor:
    """Pairs of positions for attention that is no longer causal and not yet full: [L, L] bool.

    Position i reads all positions up to i, and each later one with probability `share` (section
    3.3 of the paper).
    """
    generator = torch.Generator().manual_seed(seed)
    later = torch.rand(length, length, generator=generator) < share
    return later | torch.ones(length, length, dtype=torch.bool).tril()
