"""Hostile tokenizers: settings that change texts, damaged files, and ids that are no vocabulary."""

import json
import os

import numpy as np
import pytest
from hostile import Hostile, answer
from known import write_checkpoint
from tokenizers import Tokenizer

from halfstep.data.tokenizer import EOS, train_bpe

TEXTS = [
    f"The {name}  sat\non the {place}, mat." for name in ("cat", "dog") for place in "abcdefgh"
]
PLAIN = train_bpe(TEXTS, 300)
SIZE = PLAIN.get_vocab_size()
IDS = [PLAIN.encode(text).ids for text in TEXTS]
PREPARE = ["prepare-corpus", "--output", "out", "--kind", "files", "--files", "a.jsonl"]
PREPARE += ["--length", "8", "--validation-documents", "2", "--workers", "1"]
PREPARE += ["--tokenizer", "./tok"]
SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
UNKNOWN = {"type": "WordLevel", "vocab": {EOS: 0, "The": 1, "?": 2}, "unk_token": "?"}
LETTERS = {letter: i for i, letter in enumerate(sorted({*"".join(TEXTS), EOS}))}


def settings(**changes):
    """A tokenizer.json like PLAIN's, with other values of top-level keys."""

    def make(path):
        about = json.loads(PLAIN.to_str()) | changes
        path.write_text(json.dumps(about))

    return make


def model(**changes):
    """A tokenizer.json like PLAIN's, with other values of its model's keys."""
    about = json.loads(PLAIN.to_str())["model"]
    vocab = about["vocab"] | changes.pop("vocab", {})
    return settings(model=about | {"vocab": vocab} | changes)


def added(**changes):
    """A tokenizer.json like PLAIN's, with a further added token."""
    tokens = json.loads(PLAIN.to_str())["added_tokens"]
    token = SPECIAL | {"id": SIZE, "content": "cat", "special": False} | changes
    return settings(added_tokens=[*tokens, token])


def content(raw):
    return lambda path: path.write_bytes(raw)


def case(name, make, pattern, check=lambda folder: None):
    """A folder with the tokenizer.json that `make` writes; `pattern` None: it is used."""

    def write(folder):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
        (folder / "a.jsonl").write_text(rows)
        (folder / "tok").mkdir()
        make(folder / "tok" / "tokenizer.json")

    return Hostile("tokenizer.json", name, write, PREPARE, pattern, check)


def the_windows(folder):
    """Windows and tokens are those of PLAIN."""
    manifest = json.loads((folder / "out/manifest.json").read_text())
    facts, train = manifest["splits"]["train"], IDS[:-2]
    stream = [token for ids in train for token in [*ids, 0]]
    assert facts["tokens"] == len(stream)
    windows = np.fromfile(folder / "out/train.bin", manifest["dtype"]).reshape(-1, 8)
    assert windows[:, 1:-1].flatten().tolist() == stream[: 6 * len(windows)]


def the_windows_of_plain_ids(folder):
    """The setting has no effect here, nor on whoever reads the tokenizer of the corpus later."""
    the_windows(folder)
    kept = Tokenizer.from_file(str(folder / "out/tokenizer.json"))
    assert kept.encode(TEXTS[0]).ids == IDS[0]


def vocabulary(size, dtype="uint16"):
    def check(folder):
        manifest = json.loads((folder / "out/manifest.json").read_text())
        assert (manifest["vocab_size"], manifest["dtype"]) == (size, dtype)

    return check


def says(text):
    """The command has said on standard error what the tokenizer changes."""

    def check(folder):
        assert text in (folder.parent / f"{folder.name}.errors").read_text()

    return check


def template(*pieces):
    special = {EOS: {"id": EOS, "ids": [0], "tokens": [EOS]}}
    return {
        "type": "TemplateProcessing",
        "single": list(pieces),
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": special,
    }


A, END = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": EOS, "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": EOS,
}


def deep_vocabulary(path):
    path.with_name("merges.txt").write_text("#version: 0.2\n")
    path.with_name("vocab.json").write_text('{"a":' * 100_000)


def file_for_folder(path):
    path.parent.rmdir()
    path.parent.write_text("{}")


def large_file(path):
    path.touch()
    os.truncate(path, 300 << 20)


def same(name, make):
    return case(name, make, None, the_windows_of_plain_ids)


def split_by(expression):
    pattern = {"Regex": expression}
    return settings(
        pre_tokenizer={"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    )


CASES = [
    same("truncation", settings(truncation=TRUNCATION)),
    same("truncation to nothing", settings(truncation=TRUNCATION | {"max_length": 0})),
    same("a stride above the length", settings(truncation=TRUNCATION | {"stride": 9})),
    same("padding to the longest", settings(padding=PADDING)),
    same("padding to a length", settings(padding=PADDING | {"strategy": {"Fixed": 64}})),
    same("padding to a multiple of 0", settings(padding=PADDING | {"pad_to_multiple_of": 0})),
    same("a template that adds EOS", settings(post_processor=template(A, END))),
    same("a template that adds BOS", settings(post_processor=template(END, A))),
    same(
        "a template in a sequence",
        settings(
            post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template(END, A, END)]}
        ),
    ),
    same(
        "the post-processor of RoBERTa",
        settings(
            post_processor={
                "type": "RobertaProcessing",
                "sep": [EOS, 0],
                "cls": [EOS, 0],
                "trim_offsets": True,
                "add_prefix_space": False,
            }
        ),
    ),
    same("dropout", model(dropout=0.5)),
    same(
        "all three", settings(truncation=TRUNCATION, padding=PADDING, post_processor=template(END))
    ),
    same("a byte order mark", lambda path: path.write_text(PLAIN.to_str(), "utf-8-sig")),
    case(
        "an EOS that takes blanks away",
        settings(
            added_tokens=[SPECIAL | {"id": 0, "content": EOS, "special": True, "lstrip": True}]
        ),
        None,
        the_windows_of_plain_ids,
    ),
    case(
        "an added word that takes blanks away",
        added(lstrip=True, rstrip=True),
        None,
        says("strip of added tokens is not used"),
    ),
    case("an added word", added(), None, vocabulary(SIZE + 1)),
    case("an added token of another id", added(id=9000), None, vocabulary(SIZE + 1)),
    case("a special word in the text", added(special=True), None, the_windows),
    case("a hole in the ids", model(vocab={"zzz": 310}), None, vocabulary(311)),
    case(
        "as many holes as tokens",
        model(vocab={"zzz": 2 * SIZE + 1}),
        None,
        vocabulary(2 * SIZE + 2),
    ),
    case(
        "lower case",
        settings(normalizer={"type": "Lowercase"}),
        None,
        says("16 of the first 16 documents do not come back exactly; 'The cat"),
    ),
    case(
        "a prefix",
        settings(normalizer={"type": "Prepend", "prepend": "x"}),
        None,
        says("'xThe cat"),
    ),
    case("no decoder", settings(decoder=None), None, says("do not come back exactly")),
    case(
        "a blank before each text",
        settings(pre_tokenizer=BYTE_LEVEL | {"use_regex": True}),
        None,
        says("becomes ' The cat"),
    ),
    case(
        "a normalizer that leaves nothing",
        settings(normalizer={"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}),
        "loses most of the text .0% of the characters come back",
    ),
    case(
        "words that it does not know",
        settings(model=UNKNOWN, decoder=None, pre_tokenizer={"type": "Whitespace"}),
        "loses most of the text .*of the tokens are unknown",
    ),
    case(
        "unknown words without a token for them",
        settings(model=UNKNOWN | {"unk_token": "[UNK]"}, pre_tokenizer={"type": "Whitespace"}),
        "cannot encode a text .*Missing .UNK. token",
    ),
    case(
        "letters without bytes",
        settings(
            model={"type": "BPE", "vocab": {EOS: 0, "T": 1, "h": 2}, "merges": []},
            pre_tokenizer=None,
            decoder=None,
        ),
        "loses most of the text",
    ),
    case(
        "pieces without an unknown one",
        settings(model={"type": "Unigram", "unk_id": None, "vocab": [[EOS, 0.0], ["a", -1.0]]}),
        "cannot encode a text .*unk_id. is missing",
    ),
    case(
        "a search without end",
        split_by(r"(\w|\w|\s|\W)+[^\w\s.,]$"),
        "cannot encode a text .*retry-limit",
    ),
    case("a pattern that is none", split_by("(("), "cannot be read .*Oniguruma error"),
    case(
        "a table that is none",
        settings(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "cannot be read .*Precompiled",
    ),
    case(
        "an id of four billion", model(vocab={"zzz": 2**32 - 1}), "ids up to 4294967295: most rows"
    ),
    case(
        "more holes than tokens", model(vocab={"zzz": 900}), "has [0-9]+ tokens, but ids up to 900"
    ),
    case("an id beyond 32 bits", model(vocab={"zzz": 2**32}), "cannot be read .*u32"),
    case("a negative id", model(vocab={"zzz": -1}), "cannot be read .*expected u32"),
    case("a text as id", model(vocab={"zzz": "1"}), "cannot be read .*expected u32"),
    case("one id twice", model(vocab={"zzz": 5}), "gives the id 5 to two tokens, .* and 'zzz'"),
    case("a merge of unknown tokens", model(merges=[["q", "nope"]]), "cannot be read .*vocabulary"),
    case("merges that are none", model(merges=["a b c"]), "cannot be read .*[Mm]erges"),
    case(
        "no EOS", settings(model=UNKNOWN | {"vocab": {"?": 0}}, added_tokens=[]), "has no token <"
    ),
    case(
        "an empty vocabulary",
        settings(model=UNKNOWN | {"vocab": {}}, added_tokens=[]),
        "has no tok",
    ),
    case("an unknown kind", settings(model={"type": "Nope"}), "cannot be read .*untagged"),
    case("no model", settings(model=None), "cannot be read .it has no model"),
    case("a list", content(b"[1, 2]"), "cannot be read .it has no model"),
    case("an empty file", content(b""), "cannot be read .*expected JSON"),
    case("a cut file", content(PLAIN.to_str().encode()[:-99]), "cannot be read .*expected JSON"),
    case("bytes", content(bytes(range(256))), "cannot be read .*expected JSON in UTF-8"),
    case("deep JSON", content(b'{"model":' * 100_000), "cannot be read .*expected JSON"),
    case(
        "deep settings",
        settings(normalizer=json.loads('{"a":' * 300 + "1" + "}" * 300)),
        "cannot be",
    ),
    case("a name of 100,000 letters", settings(decoder={"type": "A" * 100_000}), "cannot be read"),
    case(
        "text of Latin-1", content('{"model": "\xe9"}'.encode("latin1")), "expected JSON in UTF-8"
    ),
    case("300 MB", large_file, "expected at most"),
    case("a pipe", os.mkfifo, "tok holds none of vocab.json"),
    case("a folder", lambda path: path.mkdir(), "tok holds none of vocab.json"),
    case("a vocab.json of depth 100,000", deep_vocabulary, "vocab.json and .* cannot be read"),
    case("nothing", lambda path: None, "tok holds none of vocab.json"),
    case(
        "a file instead of a folder",
        file_for_folder,
        "tokenizer: ./tok is not a folder",
    ),
]

GENERATE = ["generate", "--checkpoint", "model", "--output", "out", "--device", "cpu"]
GENERATE += ["--steps", "2", "--num-samples", "2", "--prompt", "The cat  sat on"]


def of_a_checkpoint(name, pattern=None, **changes):
    """A checkpoint with a changed tokenizer.json, whose texts begin with the prompt."""

    def check(folder):
        ids = np.load(folder / "out/samples.npy")
        given = [0, *PLAIN.encode("The cat  sat on").ids]
        assert ids[:, : len(given)].tolist() == [given, given]

    def make(folder):
        write_checkpoint(folder / "model", PLAIN, **changes)

    return Hostile("tokenizer.json", f"{name}, of a checkpoint", make, GENERATE, pattern, check)


CASES += [
    of_a_checkpoint("truncation", truncation=TRUNCATION),
    of_a_checkpoint("padding", padding=PADDING | {"strategy": {"Fixed": 64}}),
    of_a_checkpoint("a template", post_processor=template(END, A, END)),
    of_a_checkpoint("no model", "tokenizer.json cannot be read .it has no model", model=None),
    of_a_checkpoint(
        "a table that is none",
        "tokenizer.json cannot be read .Precompiled",
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    of_a_checkpoint(
        "an id beyond the vocabulary",
        "tokenizer.json has 311 tokens, but vocab_size in meta.json is",
        model=json.loads(PLAIN.to_str())["model"]
        | {"vocab": PLAIN.get_vocab(with_added_tokens=False) | {"zzz": 310}},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)
