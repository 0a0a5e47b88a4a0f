"""`halfstep prepare-corpus`: documents in; tokens, tokenizer, manifest and held-out text out."""

from __future__ import annotations

import json
import os
from pathlib import Path

from halfstep.config import Corpus
from halfstep.data.corpora import CORPORA
from halfstep.data.pack import Spool, pack
from halfstep.data.stories import last_words
from halfstep.data.tokenizer import EOS, load_bpe, train_bpe
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_atomic, write_json

BPE_SAMPLE = {"stories": 4 << 20}  # bytes of text that a BPE is trained on
VALIDATION_TEXTS = 2000  # held-out documents kept as text, for metrics that compare with them


def prepare_corpus(output: Path, corpus: Corpus, workers: int | None = None) -> None:
    """Write {output}/train.bin, validation.bin, tokenizer.json, validation.jsonl, manifest.json, and for stories last_words.jsonl.

    workers: processes that tokenise; all cores when absent. The files do not depend on it.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(missing_ok=True)  # written last: a folder with a manifest is whole
    workers = workers or len(os.sched_getaffinity(0))
    held_out = corpus.validation_documents
    total = corpus.num_documents + held_out if corpus.kind == "stories" else None
    spool = Spool(output / ".documents.part", CORPORA[corpus.kind](corpus), total)
    try:
        train = spool.documents - held_out
        if train < 1:
            raise HalfstepError(
                f"the corpus has {spool.documents} documents and validation_documents is {held_out}: nothing is left to train on; "
                "lower validation_documents or add text"
            )
        if corpus.tokenizer == "bpe":
            tokenizer = train_bpe(spool.spread(BPE_SAMPLE.get(corpus.kind, 64 << 20)), corpus.vocab_size)
        else:
            tokenizer = load_bpe(corpus.tokenizer)
        tokenizer.save(str(output / "tokenizer.json"))
        splits = {"train": range(train), "validation": range(train, spool.documents)}
        facts = pack(spool, tokenizer, corpus.length, output, splits, workers)
        texts = spool.texts(train, min(train + VALIDATION_TEXTS, spool.documents))
        write_atomic(output / "validation.jsonl", _lines({"text": text} for text in texts))
    finally:
        spool.delete()
    if corpus.kind == "stories":
        write_atomic(output / "last_words.jsonl", _lines(last_words(held_out, corpus.corpus_seed)))
    write_json(output / "manifest.json", {
        "format": 1,
        "length": corpus.length,
        "dtype": "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32",
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_id": tokenizer.token_to_id(EOS),
        "splits": facts,
        "tokenizer_sha256": sha256(output / "tokenizer.json"),
        "corpus": corpus.model_dump(),
    })  # fmt: skip
    print(f"{output}: " + "; ".join(f"{k}: {v['windows']} windows of {corpus.length}, {v['tokens']} tokens" for k, v in facts.items()))


def _lines(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
