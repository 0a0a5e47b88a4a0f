"""The kinds of corpora: each is a function that streams documents, and a row of CORPORA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from halfstep.config import Corpus
from halfstep.errors import HalfstepError, reason
from halfstep.progress import Progress

OPENWEBTEXT = "Skylion007/openwebtext"


def stories(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """Stories of the embedded grammar; no held-out story is among those for training."""
    from halfstep.data.stories import sample_stories

    yield from sample_stories(corpus.num_documents, corpus.corpus_seed)
    yield from sample_stories(held_out, corpus.corpus_seed, "validation")


def docs(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """Docstrings of the standard library and of halfstep's dependencies."""
    from halfstep.data.docstrings import read_docs

    yield from read_docs(workers)


def own_files(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """The user's own text files."""
    from halfstep.data.files import read_documents

    yield from _of_files(corpus, lambda path: read_documents(path, corpus.text_field))


def own_pairs(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """The user's own prompts and responses, each pair as one document (`join_pair`)."""
    from halfstep.data.files import read_pairs
    from halfstep.data.pairs import join_pair

    def documents(path: Path) -> Iterator[tuple[str, int]]:
        for prompt, response, position in read_pairs(
            path, corpus.prompt_field, corpus.response_field
        ):
            yield join_pair(prompt, response), position

    yield from _of_files(corpus, documents)


def _of_files(corpus: Corpus, read: Callable[[Path], Iterator[tuple[str, int]]]) -> Iterator[str]:
    """The documents of all files of a corpus, with progress; read(path) gives those of one."""
    from halfstep.data.files import find_files

    paths = find_files(corpus.files)
    sizes = [path.stat().st_size for path in paths]
    before = 0
    with Progress("read files", sum(sizes) >> 20, "MB") as progress:
        for path, size in zip(paths, sizes, strict=True):
            for text, position in read(path):
                ahead = (before + position >> 20) - progress.done
                if ahead > 0:
                    progress.update(ahead)
                yield text
            before += size


def openwebtext(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """OpenWebText in the order of the hub.

    It is streamed, or read from the local cache of `datasets` if the hub cannot be reached. With
    HF_HUB_OFFLINE=1 the cache is read at once.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise HalfstepError(
            "corpus kind openwebtext needs the package datasets; run pip install 'halfstep[eval]'"
        ) from None
    try:
        try:
            rows = load_dataset(OPENWEBTEXT, split="train", streaming=True)
        except Exception:  # the hub, the network and the file system each raise their own
            rows = load_dataset(OPENWEBTEXT, split="train")
        total = corpus.num_documents or rows.info.splits["train"].num_examples
        with Progress("read openwebtext", total, "document") as progress:
            for row in rows:
                progress.update()
                yield row["text"]
    except Exception as error:
        raise HalfstepError(
            f"corpus kind openwebtext: {OPENWEBTEXT} comes neither from the hub nor from the local "
            f"cache ({type(error).__name__}: {reason(error)}); connect this machine, or download "
            "the data set's parquet files elsewhere and use kind: files with "
            "files: [folder/*.parquet]"
        ) from None


@dataclass(frozen=True)
class CorpusKind:
    """A kind of corpus: the function that gives its documents, and its defaults."""

    documents: Callable[[Corpus, int, int], Iterator[str]]
    """(corpus, held_out, workers) -> a stream of documents; the last `held_out` are held out"""
    generated: bool = False
    """True: it writes num_documents training documents and `held_out` more; False: it reads text"""
    validation_documents: int = 1000
    """`held_out` when the Corpus section does not give it"""
    bpe_bytes: int = 64 << 20
    """bytes of text on which a BPE is trained"""


CORPORA = {
    "stories": CorpusKind(stories, generated=True, bpe_bytes=4 << 20),
    "docs": CorpusKind(docs),
    "openwebtext": CorpusKind(openwebtext, validation_documents=100_000),  # MDLM's number
    "files": CorpusKind(own_files),
    "pairs": CorpusKind(own_pairs),
}


def read_corpus(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """The documents of a corpus, held-out ones last.

    num_documents limits them all, except for a generated kind, where it counts the training ones.
    """
    kind = CORPORA[corpus.kind]
    limit = None if kind.generated else corpus.num_documents
    return islice(kind.documents(corpus, held_out, workers), limit)
