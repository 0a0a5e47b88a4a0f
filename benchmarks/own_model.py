"""A small ModernBert with random weights as a hub folder, and pairs: docs/results/own-model.yaml.

    python benchmarks/own_model.py models/modernbert
    snakemake --configfile docs/results/own-model.yaml

Its tokenizer is a BPE of the demo's stories, with a mask token as the last one. A pair is the first
sentence of a story and the rest of it (pairs.jsonl next to the model).
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from halfstep.commands.data import prepare_corpus
from halfstep.config import Corpus
from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import EOS, vocabulary_size
from halfstep.data.windows import corpus_tokenizer

STORIES = Corpus(
    kind="stories", length=256, vocab_size=640, num_documents=4000, validation_documents=100
)
PAIRS = 40000
LENGTH = 256  # positions
SHAPE = {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 8}  # that of size tiny
INTERMEDIATE = 680  # so that it has as many parameters as our DiT of this size
MASK = "<|mask|>"


def write_model(folder: Path, corpus: Path) -> int:
    """Write a ModernBert with random weights and the tokenizer of a corpus; its parameters."""
    tokenizer = corpus_tokenizer(corpus)
    tokenizer.add_special_tokens([MASK])
    ids = dict.fromkeys(("pad", "bos", "eos", "cls", "sep"), tokenizer.token_to_id(EOS))
    config = ModernBertConfig(
        vocab_size=vocabulary_size(tokenizer),
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=LENGTH,
        **SHAPE,
        **{f"{name}_token_id": number for name, number in ids.items()},
    )
    torch.manual_seed(1)
    model = ModernBertForMaskedLM(config)
    model.save_pretrained(folder)
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token=MASK, eos_token=EOS)
    own.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def write_pairs(file: Path, count: int) -> None:
    """Write pairs as lines of JSON: the first sentence of a story asks for the rest of it."""
    with open(file, "w") as out:
        for story in sample_stories(count, 1):
            prompt, end, response = story.partition(". ")
            out.write(json.dumps({"prompt": prompt + end.strip(), "response": response}) + "\n")


def main(folder: tyro.conf.Positional[Path]) -> None:
    """Write the model into `folder`, and pairs.jsonl next to it."""
    with TemporaryDirectory() as name:
        prepare_corpus(Path(name), STORIES)
        weights = write_model(folder, Path(name))
    write_pairs(folder.with_name("pairs.jsonl"), PAIRS)
    print(f"{folder}: a ModernBert of {weights:,} parameters with random weights")


if __name__ == "__main__":
    tyro.cli(main)
