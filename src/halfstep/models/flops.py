"""Floating-point operations of the networks, from which MFU is computed.

A multiplication and an addition are two operations.

Only matrix products count, as in PaLM (arXiv 2204.02311, appendix B): not norms, softmax, rotary
angles or recomputation. A backward pass costs twice its forward pass. Attention counts all pairs of
positions, causal or not.
"""

from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT
from halfstep.models.gpt2 import GPT2


def forward_flops(
    network: DiT | GPT | GPT2,
    texts: float,
    length: int,
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
    if isinstance(network, GPT):
        matrix = network.output_layer.linear.weight
    else:
        matrix, _ = network.readout
    vocabulary, width = matrix.shape
    tokens, pairs = texts * length, texts * length**2
    block = (
        tokens * 12 * width**2 + 2 * pairs * width
    )  # q, k, v: 3, out: 1, MLP: 4 + 4; then q k' and p v
    condition, spared = 0, 0.0
    if not isinstance(network, GPT):
        vocabulary -= 1  # the mask token is not read out
        spared = (tokens - (rows if wanted is None else wanted)) * 9 * width**2  # out and MLP
        condition = sum(
            parameter.numel()
            for name, parameter in network.named_parameters()
            if parameter.dim() == 2 and ("adaLN_modulation" in name or "sigma_map" in name)
        )
    blocks = len(network.blocks) * block - spared
    return 2.0 * (blocks + conditions * condition + rows * width * vocabulary)


def training_flops(
    network: DiT | GPT | GPT2, texts: int, length: int, rows: float, conditions: float = 1
) -> float:
    """FLOPs of one update, forward and backward; divide by texts * length for FLOPs per token.

    A distillation update costs training_flops(student, texts, length, masked) +
    forward_flops(teacher, passes, length, masked + drawn): `passes` is the number of texts that the
    teacher reads in all its substeps, `drawn` the number of positions that it reveals.
    """
    return 3 * forward_flops(network, texts, length, rows, conditions)
