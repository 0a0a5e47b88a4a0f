"""Every corpus kind: a row of CORPORA, a name in Corpus.kind, a stream that ends in held-out text.

A new kind needs its function and row in data/corpora.py, and its name in config/networks.py. These
tests fail until both are right. Only a kind that needs other keys than num_documents, or something
from outside, also needs a row of EXAMPLES.
"""

import inspect
import json
import sys
from types import SimpleNamespace
from typing import get_args

import pytest

from halfstep.commands.data import prepare_corpus
from halfstep.config import Corpus
from halfstep.data import docstrings
from halfstep.data.corpora import CORPORA, read_corpus
from halfstep.data.windows import Windows
from halfstep.files import read_json

NAMES = get_args(Corpus.model_fields["kind"].annotation)
HELD_OUT = 5
ARGUMENTS = {"corpus": "Corpus", "held_out": "int", "workers": "int"}


def text_files(folder, monkeypatch):
    (folder / "a.txt").write_text("\n\n".join(f"File text number {i}." for i in range(40)))
    return {"files": [str(folder / "a.txt")]}


def few_sources(folder, monkeypatch):
    files = [folder / f"{i}.py" for i in range(40)]
    for i, file in enumerate(files):
        sentence = f"This file has the word {'a' * (i + 1)}. "
        file.write_text(f'"""{sentence * 10}"""')
    monkeypatch.setattr(docstrings, "source_files", lambda: files)
    return {}


def fake_hub(folder, monkeypatch):
    rows = [{"text": f"Web text number {i}."} for i in range(40)]
    module = SimpleNamespace(load_dataset=lambda *args, **options: rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return {}


def pair_files(folder, monkeypatch):
    rows = [json.dumps({"prompt": f"{i}", "response": "a"}) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    return {"files": [str(folder / "a.jsonl")]}


# kind: prepares its surroundings and gives the keys of a small corpus
EXAMPLES = {"docs": few_sources, "openwebtext": fake_hub, "files": text_files, "pairs": pair_files}


@pytest.fixture
def corpus(kind, tmp_path, monkeypatch):
    """A small corpus of the kind: 30 documents, and the held-out ones if it is generated."""
    keys = EXAMPLES[kind](tmp_path, monkeypatch) if kind in EXAMPLES else {}
    small = {"num_documents": 30, "length": 8, "vocab_size": 300, "validation_documents": HELD_OUT}
    return Corpus(kind=kind, **small, **keys)


@pytest.mark.parametrize("kind", sorted({*CORPORA, *NAMES}))
def test_a_kind_has_a_row_and_a_name(kind):
    assert kind in CORPORA, f"Corpus.kind allows {kind!r}; add its row to CORPORA"
    assert kind in NAMES, f"CORPORA has the row {kind!r}; add the name to Corpus.kind"


@pytest.mark.parametrize("kind", CORPORA)
def test_the_function_of_a_kind_has_the_signature_of_all(kind):
    function = CORPORA[kind].documents
    found = inspect.get_annotations(function)
    assert found == {**ARGUMENTS, "return": "Iterator[str]"}
    assert list(inspect.signature(function).parameters) == list(ARGUMENTS)
    assert function.__doc__, "say in a docstring which text it gives"


@pytest.mark.parametrize("kind", CORPORA)
def test_a_stream_has_the_documents_that_were_asked_for(kind, corpus):
    documents = list(read_corpus(corpus, HELD_OUT, workers=1))
    expected = 30 + HELD_OUT if CORPORA[kind].generated else 30
    assert len(documents) == expected, "num_documents counts training documents if generated"
    assert all(isinstance(text, str) and text.strip() for text in documents)
    assert documents == list(read_corpus(corpus, HELD_OUT, workers=1)), "must be repeatable"


@pytest.mark.parametrize("kind", CORPORA)
def test_held_out_documents_are_never_trained_on(kind, corpus):
    documents = list(read_corpus(corpus, HELD_OUT, workers=1))
    train, validation = documents[:-HELD_OUT], documents[-HELD_OUT:]
    assert train and not set(train) & set(validation)


@pytest.mark.parametrize("kind", CORPORA)
def test_a_kind_can_be_prepared(kind, corpus, tmp_path):
    """The files hold the documents of the stream, the last ones as validation."""
    documents = list(read_corpus(corpus, HELD_OUT, workers=1))
    output = tmp_path / "corpus"
    prepare_corpus(output, corpus, workers=1)
    splits = read_json(output / "manifest.json")["splits"]
    assert splits["train"]["documents"] == len(documents) - HELD_OUT
    assert splits["validation"]["documents"] == HELD_OUT
    lines = (output / "validation.jsonl").read_text().splitlines()
    texts = documents[-HELD_OUT:]
    if kind == "pairs":
        texts = ["\n".join(json.loads(document)) for document in texts]
    assert [json.loads(line)["text"] for line in lines] == texts
    assert len(Windows(output, "train")) and len(Windows(output, "validation"))
