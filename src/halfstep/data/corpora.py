"""The kinds of corpora: each a function from the Corpus section to its documents as a stream, held-out documents last."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from halfstep.config import Corpus
from halfstep.errors import HalfstepError
from halfstep.progress import Progress

OPENWEBTEXT = "Skylion007/openwebtext"


def stories(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """Stories of the embedded grammar; the held-out ones combine names and things as never in training."""
    from halfstep.data.stories import sample_stories

    yield from sample_stories(corpus.num_documents, corpus.corpus_seed)
    yield from sample_stories(held_out, corpus.corpus_seed, "validation")


def docs(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """Documentation strings of the standard library and of halfstep's dependencies."""
    from halfstep.data.docstrings import read_docs

    yield from read_docs(workers)


def own_files(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """The user's own text."""
    from halfstep.data.files import find, read_documents

    paths = find(corpus.files)
    sizes = [path.stat().st_size for path in paths]
    before = 0
    with Progress("read files", sum(sizes) >> 20, "MB") as progress:
        for path, size in zip(paths, sizes, strict=True):
            for text, position in read_documents(path, corpus.text_field):
                if (ahead := (before + position >> 20) - progress.done) > 0:
                    progress.update(ahead)
                yield text
            before += size


def openwebtext(corpus: Corpus, held_out: int, workers: int) -> Iterator[str]:
    """OpenWebText in the order of the hub: as a stream, or offline (HF_HUB_OFFLINE=1 says so at once) from the local cache of `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise HalfstepError(
            "corpus kind openwebtext needs the package datasets; run pip install 'halfstep[eval]'"
        ) from None
    try:
        try:
            rows = load_dataset(OPENWEBTEXT, split="train", streaming=True)
        except Exception:  # the hub, the network and the file system each have their own
            rows = load_dataset(OPENWEBTEXT, split="train")
        with Progress(
            "read openwebtext",
            corpus.num_documents or rows.info.splits["train"].num_examples,
            "document",
        ) as progress:
            for row in rows:
                progress.update()
                yield row["text"]
    except Exception as error:
        raise HalfstepError(
            f"corpus kind openwebtext: {OPENWEBTEXT} comes neither from the hub nor from the local cache ({_first_line(error)}); connect this "
            "machine, or download the data set's parquet files elsewhere and use kind: files with files: [folder/*.parquet]"
        ) from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


CORPORA: dict[str, Callable[[Corpus, int, int], Iterator[str]]] = {
    "stories": stories,
    "docs": docs,
    "openwebtext": openwebtext,
    "files": own_files,
}
HELD_OUT = {
    "openwebtext": 100_000
}  # documents, where the Corpus does not say; MDLM holds out the last 100,000
