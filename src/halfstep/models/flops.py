"""Floating-point operations of the networks, from which MFU and prices are computed.

A multiplication and an addition are two operations.

Only matrix products count, as in PaLM (arXiv 2204.02311, appendix B): not norms, softmax, rotary
angles or recomputation. A backward pass costs twice its forward pass. Attention counts all pairs of
positions, causal or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from halfstep.models.dit import DiT
    from halfstep.models.gpt import GPT
    from halfstep.models.gpt2 import GPT2
    from halfstep.models.hf import TransformersNetwork

FREQUENCIES = 256  # that a noise level is embedded in (TimeEmbedding of dit.py)


class Shape(NamedTuple):
    """The numbers of a transformer that its FLOPs depend on."""

    blocks: int
    width: int
    vocabulary: int
    """tokens that have logits"""
    block_weights: int
    """weights of the matrices of one block: 12 width^2 with q, k, v (3), out (1) and MLP (4 + 4)"""
    condition: int = 0
    """weights of the matrices that read a noise level (adaLN of a DiT)"""
    spared: int = 0
    """weights of the last block that only wanted positions need: out and MLP of a denoiser"""

    @property
    def weights(self) -> int:
        """Weights that a forward pass reads, with those of the readout."""
        return self.blocks * self.block_weights + self.width * self.vocabulary + self.condition

    @property
    def parameters(self) -> int:
        """All weights of matrices, with those of a token table that is not the readout."""
        return self.weights + self.width * self.vocabulary


def causal_shape(
    blocks: int, width: int, vocabulary: int, block_weights: int | None = None
) -> Shape:
    """The shape of an autoregressive network: our baseline, or one of transformers."""
    return Shape(blocks, width, vocabulary, block_weights or 12 * width**2)


def denoiser_shape(blocks: int, width: int, vocabulary: int, cond_width: int) -> Shape:
    """The shape of a DiT, or with cond_width 0 of GPT-2's architecture as a denoiser."""
    of_blocks, of_readout = 6 * width * blocks, 2 * width
    condition = cond_width * (of_blocks + of_readout + cond_width + FREQUENCIES)
    return Shape(blocks, width, vocabulary, 12 * width**2, condition, 9 * width**2)


def network_shape(network: DiT | GPT | GPT2 | TransformersNetwork) -> Shape:
    """The shape of a network that exists; of one of transformers, without layers of its head."""
    from halfstep.models.gpt import GPT  # here, because prices are computed without torch
    from halfstep.models.hf import TransformersNetwork

    blocks = len(network.blocks)
    if isinstance(network, GPT):
        vocabulary, width = network.output_layer.linear.weight.shape
        return causal_shape(blocks, width, vocabulary)
    matrix, _ = network.readout
    if isinstance(network, TransformersNetwork):
        weights = sum(p.numel() for p in network.blocks.parameters() if p.dim() == 2)
        return Shape(blocks, matrix.shape[1], network.vocabulary, weights // blocks)
    vocabulary, width = matrix.shape  # with the mask token, which is not read out
    condition = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if parameter.dim() == 2 and ("adaLN_modulation" in name or "sigma_map" in name)
    )
    shape = denoiser_shape(blocks, width, vocabulary - 1, cond_width=0)
    return shape._replace(condition=condition)


def forward_flops(
    shape: Shape,
    texts: float,
    length: float,
    rows: float,
    conditions: float = 1,
    wanted: float | None = None,
) -> float:
    """FLOPs of one forward pass of `texts` texts of `length` tokens.

    `rows` positions go through the readout.

    Pretraining reads out the masked positions, about half of texts * length; sampling the revealed
    ones, `length` per text over all passes. `conditions` is the number of noise levels of a DiT: 1
    if it ignores time, else texts. `wanted` is the number of positions whose features are needed
    (default: rows): besides keys, values and queries, the last block computes only these.
    """
    tokens, pairs = texts * length, texts * length**2
    block = tokens * shape.block_weights + 2 * pairs * shape.width  # q k' and p v
    spared = (tokens - (rows if wanted is None else wanted)) * shape.spared
    readout = rows * shape.width * shape.vocabulary
    return 2.0 * (shape.blocks * block - spared + conditions * shape.condition + readout)


def training_flops(
    shape: Shape, texts: float, length: int, rows: float, conditions: float = 1
) -> float:
    """FLOPs of one update, forward and backward; divide by texts * length for FLOPs per token."""
    return 3 * forward_flops(shape, texts, length, rows, conditions)


def distillation_flops(  # noqa: PLR0913 (two networks, a batch and its shares)
    student: Shape,
    teacher: Shape,
    texts: float,
    length: int,
    masked: float,
    revealed: float,
    substeps: int,
    ignores_time: bool = True,
) -> float:
    """Expected FLOPs of one update of a round.

    `masked` is the share of tokens that are masked, `revealed` the share that one substep reveals.
    A text in which nothing is revealed takes no further pass of a teacher that ignores time.
    """
    again = 1 - (1 - revealed) ** length if ignores_time else 1.0
    passes = texts * (1 + (substeps - 1) * again)
    drawn = texts * (substeps - 1) * revealed * length
    rows = texts * length * masked
    own = training_flops(student, texts, length, rows, 1 if ignores_time else texts)
    conditions = 1 if ignores_time else passes
    wanted = rows * passes / texts
    return own + forward_flops(teacher, passes, length, rows + drawn, conditions, wanted)
