"""The kinds of corpora: each a function from the Corpus section to an iterator of documents, held-out documents last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfstep.config import Corpus


def stories(corpus: Corpus) -> Iterator[str]:
    """Stories of the embedded grammar; the held-out ones combine names and things as never in training."""
    from halfstep.data.stories import sample

    yield from sample(corpus.num_documents, corpus.corpus_seed)
    yield from sample(corpus.validation_documents, corpus.corpus_seed, held_out=True)


CORPORA: dict[str, Callable[[Corpus], Iterator[str]]] = {"stories": stories}
