"""Floating-point operations of the networks, written out: a multiplication and an addition are two. What MFU is computed from.

Only matrix products count, as in PaLM (arXiv 2204.02311, appendix B): norms, softmax, rotary angles and recomputation do not. A backward pass
takes twice its forward pass. Attention counts all pairs of positions, causal or not.
"""


def forward_flops(
    network, texts: int, length: int, rows: float, conditions: int = 1, wanted: float | None = None
) -> float:
    """FLOPs of one forward pass of a DiT or GPT: texts of `length` tokens through the blocks, `rows` positions through the readout.

    Pretraining reads out the masked positions, about half of texts * length; sampling the revealed ones, length a text in all its passes.
    `conditions` is how many noise levels a DiT is fed: 1 for a network that ignores time, else texts; `wanted` how many positions its features are
    asked of (`rows` when absent): the last block computes more than keys and values, queries and attention of these alone.
    """
    vocabulary, width = network.output_layer.linear.weight.shape
    tokens, pairs = texts * length, texts * length**2
    block = (
        tokens * 12 * width**2 + 2 * pairs * width
    )  # q, k, v: 3, out: 1, MLP: 4 + 4; then q k' and p v
    condition, spared = 0, 0.0
    if (scale := network.output_layer.adaLN_modulation) is not None:
        spared = (tokens - (rows if wanted is None else wanted)) * 9 * width**2  # out and MLP
        condition = (
            scale.weight.numel()
            + len(network.blocks) * network.blocks[0].adaLN_modulation.weight.numel()
        )
        condition += sum(p.numel() for p in network.sigma_map.parameters() if p.dim() == 2)
    return 2.0 * (
        len(network.blocks) * block
        - spared
        + conditions * condition
        + rows * width * (vocabulary - hasattr(network, "sigma_map"))
    )


def training_flops(network, texts: int, length: int, rows: float, conditions: int = 1) -> float:
    """FLOPs of one step, forward and backward: per token, divide by texts * length.

    A distillation step is training(student, texts, length, masked) + forward(teacher, passes, length, masked + drawn): `passes` the texts that the
    teacher saw in all its substeps, `drawn` the rows that it revealed.
    """
    return 3 * forward_flops(network, texts, length, rows, conditions)
