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
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = AutoConfig.for_model(kind, **special, **shape)
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


FAMILIES = {
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "modernbert": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "qwen2": "AutoModelForCausalLM",
    "qwen3": "AutoModelForCausalLM",
}
"""Families of models that fill in masks, and the class of transformers that loads each"""
LOGITS = {"llama": "shifted", "qwen2": "same", "qwen3": "same"}
"""Causal families whose denoisers have either kind of logits, and the kind of those in the tests"""


def logits_flag(kind: str) -> str:
    """What the user must say of a model of a family."""
    return f"--logits {LOGITS[kind]}" if kind in LOGITS else ""


def family_config(kind: str, rows: int, length: int, **options):
    """The configuration of a small model of a family: `rows` of its table, texts of `length`."""
    from transformers import AutoConfig

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 64, "vocab_size": rows, "max_position_embeddings": length}
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    own = {
        "roberta": {"pad_token_id": 1, "max_position_embeddings": length + 2},
        "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
        "qwen2": {"num_key_value_heads": 1},
        "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
    }
    given = shape | special | {"pad_token_id": 0} | own.get(kind, {}) | options
    return AutoConfig.for_model(kind, **given)


def build_family(kind: str, rows: int, length: int, folder: Path | None = None, **options):
    """A small random model of a family in eval mode, saved in `folder` if one is given."""
    import tempfile

    import transformers

    build = getattr(transformers, FAMILIES[kind]).from_config
    with tempfile.TemporaryDirectory() as name:
        return save_model(build, family_config(kind, rows, length, **options), folder or Path(name))


def masked_tokenizer(corpus: Path, mask_id: int, mask: str = "<|mask|>", framing: bool = False):
    """The tokenizer of a corpus with a mask token at `mask_id`; the token of this id is the last.

    With `framing`, texts begin with token 1 and end with EOS.
    """
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    about = json.loads((corpus / "tokenizer.json").read_text())
    vocabulary = about["model"]["vocab"]
    last = len(vocabulary)
    for token, number in list(vocabulary.items()):
        if number == mask_id:
            vocabulary[token] = last
    vocabulary[mask] = mask_id
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    about["added_tokens"].append({"id": mask_id, "content": mask, "special": True, **flags})
    if framing:
        first = next(token for token, number in vocabulary.items() if number == 1)
        pieces = [
            {"SpecialToken": {"id": first, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
        ]
        tokens = {
            token: {"id": token, "ids": [vocabulary[token]], "tokens": [token]}
            for token in (first, "<|endoftext|>")
        }
        about["post_processor"] = {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": tokens,
        }
    backend = Tokenizer.from_str(json.dumps(about))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token=mask, eos_token="<|endoftext|>"
    )
