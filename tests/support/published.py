"""Small random models as transformers saves them, with a corpus's tokenizer."""

import shutil
from pathlib import Path


def save_gpt2(folder: Path, vocabulary: int, length: int, tokenizer: Path | None = None, **options):
    """Write a GPT2LMHeadModel of 2 blocks, width 32 and 2 heads; return it in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": length} | options
    config = GPT2Config(
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
        **shape,
    )
    return save_model(GPT2LMHeadModel, config, folder, tokenizer)


def save_causal_lm(kind: str, folder: Path, vocabulary: int, length: int, tokenizer: Path):
    """Write a causal language model of a kind of transformers (llama, gpt_neox), as `save_gpt2`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "vocab_size": vocabulary, "max_position_embeddings": length}
    config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=0, **shape)
    return save_model(AutoModelForCausalLM.from_config, config, folder, tokenizer)


def save_model(build, config, folder: Path, tokenizer: Path | None = None):
    """Write a model with random weights, biases and norms that matter; return it in eval mode."""
    import torch

    torch.manual_seed(5)
    model = build(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 0.5, 0.3)
    model.save_pretrained(folder)
    if tokenizer:
        shutil.copy(tokenizer, folder / "tokenizer.json")
    return model
