"""A small random GPT-2 as transformers saves it."""

import shutil
from pathlib import Path


def save_gpt2(folder: Path, vocabulary: int, length: int, tokenizer: Path | None = None, **options):
    """Write a GPT2LMHeadModel of 2 blocks, width 32 and 2 heads; return it in eval mode."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": length} | options
    config = GPT2Config(
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        **shape,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():  # with biases and norms that matter
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 0.5, 0.3)
    model.save_pretrained(folder)
    if tokenizer:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    return model
