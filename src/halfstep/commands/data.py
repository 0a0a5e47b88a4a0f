"""`halfstep prepare-corpus`: turn documents into windows of tokens, a tokenizer and a manifest."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from halfstep.config import Corpus, Threads
from halfstep.data.corpora import CORPORA, read_corpus
from halfstep.data.files import find_files
from halfstep.data.model_tokenizer import (
    OF_MODEL,
    TOKENIZER_FILES,
    ModelTokenizer,
    find_model_tokenizer,
)
from halfstep.data.pack import Spool, pack_windows, token_dtype
from halfstep.data.pairs import pack_pairs, read_turn, split_pair
from halfstep.data.stories import last_words
from halfstep.data.tokenizer import describe_loss, end_id, load_bpe, train_bpe, vocabulary_size
from halfstep.data.windows import corpus_files, layout_of
from halfstep.errors import HalfstepError
from halfstep.files import scratch_folder, sha256, write_atomic, write_json
from halfstep.meta import Turn, check_framing
from halfstep.records import provenance

PROBED = 100  # first documents on which a tokenizer that was not trained here is tested
VALIDATION_TEXTS = 2000  # held-out documents also kept as text, for metrics that compare with them


def prepare_corpus(output: Path, corpus: Corpus, workers: Threads | None = None) -> None:
    """Write the windows, the tokenizer and the manifest of a corpus.

    Files: train.bin, validation.bin, tokenizer.json, validation.jsonl, manifest.json; stories also
    have last_words.jsonl.

    Args:
        output: folder to write
        workers: processes that read and tokenize (all cores); the files do not depend on it
    """
    if workers is not None and workers < 1:
        raise HalfstepError(
            f"workers: found {workers}, expected a positive number of processes; "
            "leave it out to use all cores"
        )
    workers = workers or _available_cores()
    files = find_files(corpus.files)
    # Loaded before the documents, so that a wrong name is found at once.
    tokenizer, own, read = _load_tokenizer(corpus)
    output.mkdir(parents=True, exist_ok=True)
    # The manifest is written last: a folder with a manifest is complete.
    (output / "manifest.json").unlink(missing_ok=True)
    kind = CORPORA[corpus.kind]
    is_pairs, read_text = corpus.kind == "pairs", str
    if is_pairs:
        read_text = _text_of_pair
    held_out = corpus.validation_documents or kind.validation_documents
    documents = read_corpus(corpus, held_out, workers)
    with (
        scratch_folder(output / "documents") as scratch,
        Spool(scratch / "documents", documents) as spool,
    ):
        train = len(spool) - held_out
        if train < 1:
            raise HalfstepError(
                f"the corpus has {len(spool)} documents and validation_documents is {held_out}: "
                "nothing is left to train on; lower validation_documents or add text"
            )
        if tokenizer is None:
            spread = map(read_text, spool.spread(train, kind.bpe_bytes))
            tokenizer = train_bpe(spread, corpus.vocab_size)
        elif loss := describe_loss(
            tokenizer, map(read_text, islice(spool.texts(0, len(spool)), PROBED))
        ):
            print(f"note: tokenizer {corpus.tokenizer}: {loss}", file=sys.stderr)
        write_atomic(output / "tokenizer.json", tokenizer.to_str(pretty=True))
        splits = {"train": range(train), "validation": range(train, len(spool))}
        about = _describe_windows(corpus, tokenizer, own)
        layout = layout_of(about)
        if is_pairs:
            turn = Turn.model_validate(about["pairs"])
            facts = pack_pairs(spool, tokenizer, layout, turn, output, splits)
        else:
            facts = pack_windows(spool, tokenizer, layout, output, splits, workers)
        texts = _write_texts(output, corpus, spool, train, read_text)
    _write_manifest(output, about, corpus, facts)
    outputs = [*corpus_files(output, *splits), *texts]
    provenance.write_record(output / provenance.NAME, outputs, [*files, *read])
    _print_facts(output, corpus, tokenizer, facts)


def _print_facts(output: Path, corpus: Corpus, tokenizer: Tokenizer, facts: dict) -> None:
    asked = f" (vocab_size asks for {corpus.vocab_size:,})" if corpus.tokenizer == "bpe" else ""
    print(f"{output}/tokenizer.json: {vocabulary_size(tokenizer):,} tokens{asked}")
    for split, found in facts.items():
        cut = found["cut_windows"] / found["windows"]
        unknown = found["unknown_tokens"] / found["tokens"]
        if too_long := found.get("too_long"):
            print(
                f"note: {split}: {too_long:,} of {found['documents']:,} pairs are longer than a "
                f"window of {corpus.length} tokens and left out",
                file=sys.stderr,
            )
        print(
            f"{output}/{split}.bin: {found['windows']:,} windows of {corpus.length} tokens, from "
            f"{found['documents']:,} documents with {found['tokens']:,} tokens; {cut:.0%} of the "
            "windows end inside a document" + (f"; {unknown:.2%} unknown tokens" if unknown else "")
        )


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _text_of_pair(document: str) -> str:
    return "\n".join(split_pair(document))


def _write_texts(
    output: Path, corpus: Corpus, spool: Spool, train: int, read_text: Callable[[str], str]
) -> list[Path]:
    """Write the held-out documents, which follow the first `train`, as text; return the files."""
    texts = islice(spool.texts(train, len(spool)), VALIDATION_TEXTS)
    files = {"validation.jsonl": ({"text": read_text(text)} for text in texts)}
    if corpus.kind == "stories":
        files["last_words.jsonl"] = last_words(len(spool) - train, corpus.corpus_seed)
    for name, rows in files.items():
        _write_lines(output / name, rows)
    return [output / name for name in files]


def _load_tokenizer(corpus: Corpus) -> tuple[Tokenizer | None, ModelTokenizer | None, list[Path]]:
    """The tokenizer, unless it is trained here; that of a model; and the files or folder read."""
    name = corpus.tokenizer
    if name == "bpe":
        return None, None, []
    if not name.startswith(OF_MODEL):
        return load_bpe(name), None, [Path(name).expanduser()]
    own, folder = find_model_tokenizer(name)
    files = [path for pattern in TOKENIZER_FILES for path in sorted(folder.glob(pattern))]
    return own.tokenizer, own, files


def _describe_windows(
    corpus: Corpus, tokenizer: Tokenizer, own: ModelTokenizer | None
) -> dict[str, Any]:
    """Entries of the manifest that say how tokens and windows are to be read."""
    about: dict[str, Any] = {
        "length": corpus.length,
        "dtype": token_dtype(tokenizer),
        "vocab_size": vocabulary_size(tokenizer),
        "eos_id": own.eos_id if own else end_id(tokenizer),
    }
    if own:
        about["framing"] = own.framing.model_dump()
        check_framing(about, f"tokenizer: {corpus.tokenizer}", "set a larger length")
    if corpus.kind == "pairs":
        turn = read_turn(own.theirs, f"tokenizer: {corpus.tokenizer}") if own else Turn()
        about["pairs"] = turn.model_dump()
    return about


def _write_manifest(output: Path, about: dict[str, Any], corpus: Corpus, facts: dict) -> None:
    manifest = {
        "format": 1,
        **about,
        "splits": facts,
        "tokenizer_sha256": sha256(output / "tokenizer.json"),
        "corpus": corpus.model_dump(),
    }
    write_json(output / "manifest.json", manifest)


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    def write(part: Path) -> None:
        with open(part, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    write_atomic(path, write)
