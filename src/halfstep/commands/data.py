"""`halfstep prepare-corpus`: documents in; tokens, tokenizer, manifest and held-out text out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from halfstep.config import Corpus
from halfstep.data.corpora import CORPORA, HELD_OUT
from halfstep.data.files import find
from halfstep.data.pack import Spool, corpus_files, dtype_of, pack_windows
from halfstep.data.stories import last_words
from halfstep.data.tokenizer import EOS, load_bpe, train_bpe
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_atomic, write_json
from halfstep.records import provenance

BPE_SAMPLE = {"stories": 4 << 20}  # bytes of text that a BPE is trained on; 64 MB where not named
VALIDATION_TEXTS = 2000  # held-out documents also kept as text, for metrics that compare with them


def prepare_corpus(output: Path, corpus: Corpus, workers: int | None = None) -> None:
    """Write {output}/train.bin, validation.bin, tokenizer.json, validation.jsonl, manifest.json, and for stories last_words.jsonl.

    Args:
        output: folder to write
        workers: processes that read and tokenise, all cores when absent; the files do not depend on it
    """
    if workers is not None and workers < 1:
        raise HalfstepError(
            f"workers: found {workers}, expected a positive number of processes, or none for all cores"
        )
    workers = workers or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if corpus.tokenizer != "bpe":
        tokenizer = load_bpe(
            corpus.tokenizer
        )  # first: a wrong name should not cost the reading of a corpus
    output.mkdir(parents=True, exist_ok=True)
    (output / "manifest.json").unlink(
        missing_ok=True
    )  # written last: a folder with a manifest is whole
    held_out = corpus.validation_documents or HELD_OUT.get(corpus.kind, 1000)
    most = None if corpus.kind == "stories" else corpus.num_documents
    with Spool(
        output / ".documents.part", islice(CORPORA[corpus.kind](corpus, held_out, workers), most)
    ) as spool:
        train = len(spool) - held_out
        if train < 1:
            raise HalfstepError(
                f"the corpus has {len(spool)} documents and validation_documents is {held_out}: nothing is left to train on; "
                "lower validation_documents or add text"
            )
        if corpus.tokenizer == "bpe":
            tokenizer = train_bpe(
                spool.spread(train, BPE_SAMPLE.get(corpus.kind, 64 << 20)), corpus.vocab_size
            )
        write_atomic(output / "tokenizer.json", tokenizer.to_str(pretty=True))
        splits = {"train": range(train), "validation": range(train, len(spool))}
        facts = pack_windows(spool, tokenizer, corpus.length, output, splits, workers)
        _write_lines(
            output / "validation.jsonl",
            ({"text": text} for text in islice(spool.texts(train, len(spool)), VALIDATION_TEXTS)),
        )
    if corpus.kind == "stories":
        _write_lines(output / "last_words.jsonl", last_words(held_out, corpus.corpus_seed))
    write_json(output / "manifest.json", {
        "format": 1,
        "length": corpus.length,
        "dtype": dtype_of(tokenizer),
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_id": tokenizer.token_to_id(EOS),
        "splits": facts,
        "tokenizer_sha256": sha256(output / "tokenizer.json"),
        "corpus": corpus.model_dump(),
    })  # fmt: skip
    made = [
        *corpus_files(output, *splits),
        output / "validation.jsonl",
        *([output / "last_words.jsonl"] if corpus.kind == "stories" else []),
    ]
    read = [*find(corpus.files), *([corpus.tokenizer] if corpus.tokenizer != "bpe" else [])]
    provenance.write_record(output / provenance.NAME, made, read)
    for split, f in facts.items():
        print(
            f"{output}/{split}.bin: {f['windows']:,} windows of {corpus.length} from {f['documents']:,} documents, {f['tokens']:,} tokens"
        )


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    def write(part: Path) -> None:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    write_atomic(path, write)
