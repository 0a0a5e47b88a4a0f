"""Pairs: windows by hand, the chat template against transformers, and what is refused."""

import json

import numpy as np
import pytest
from framed import save_framed
from small import call, done

from halfstep.data.files import read_pairs
from halfstep.data.model_tokenizer import find_model_tokenizer
from halfstep.data.pairs import encode_between, encode_prompts, read_turn
from halfstep.data.tokenizer import encode_texts
from halfstep.data.windows import Windows, corpus_tokenizer, read_manifest
from halfstep.errors import HalfstepError
from halfstep.meta import Turn

LENGTH = 40
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PAIRS = [(f"Who saw the {what}?", f"{who} saw it.") for who, what in zip(
    ["Tom", "Anna", "Lily", "Ben"] * 5, ["kite", "fox", "dog", "cat", "ball"] * 4, strict=True
)]  # fmt: skip
LONG = ("Tell all.", "Tom had a red kite. " * 20)


def write_pairs(path, pairs, prompt="prompt", response="response"):
    rows = [json.dumps({prompt: one, response: other}) for one, other in pairs]
    path.write_text("\n".join(rows) + "\n")
    return path


def prepare(tmp_path, tokenizer, pairs=(*PAIRS, LONG, *PAIRS[:3])):
    file, corpus = write_pairs(tmp_path / "pairs.jsonl", pairs), tmp_path / "corpus"
    done(f"prepare-corpus --output {corpus} --kind pairs --files {file} --length {LENGTH} "
         f"--validation-documents 3 --workers 1 --tokenizer {tokenizer}")  # fmt: skip
    return corpus


def test_windows_of_a_plain_corpus_are_prompt_line_break_response_and_ends(tmp_path, capsys):
    """EOS on both sides as in our own corpora; the long pair is counted and left out."""
    corpus = prepare(tmp_path, "bpe")
    tokenizer, manifest = corpus_tokenizer(corpus), read_manifest(corpus)
    expected, asked = [], []
    for pair in PAIRS:
        before, after = encode_texts(tokenizer, [f"{pair[0]}\n", pair[1]])
        ids = [0, *before, *after]
        expected.append([*ids, *[0] * (LENGTH - len(ids))])
        asked.append([False] * (1 + len(before)) + [True] * (LENGTH - 1 - len(before)))
    windows = Windows(corpus, "train")
    rows = np.arange(len(windows))
    assert windows[rows].tolist() == expected
    assert windows.asked(rows).tolist() == asked
    assert windows.asked([3, 1]).tolist() == [asked[3], asked[1]]
    facts = manifest["splits"]["train"]
    assert (facts["documents"], facts["windows"], facts["too_long"]) == (21, 20, 1)
    assert facts["tokens"] == sum(np.trim_zeros(window, "b").__len__() + 1 for window in expected)
    assert manifest["pairs"] == {"before": "", "after": "\n", "end": ""}
    note = "note: train: 1 of 21 pairs are longer than a window of 40 tokens and left out"
    assert note in capsys.readouterr().err
    text = json.loads((corpus / "validation.jsonl").read_text().splitlines()[0])["text"]
    assert text == "\n".join(PAIRS[0])


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_windows_have_the_frame_of_the_model(kind, tmp_path):
    theirs = save_framed(kind, tmp_path / "hub", LENGTH)
    corpus = prepare(tmp_path, f"hf:{tmp_path}/hub")
    windows, tokenizer = Windows(corpus, "train"), corpus_tokenizer(corpus)
    before, after = windows.layout.framing.begin, windows.layout.framing.end
    assert bool(before) == (kind != "gpt2") and bool(after) == (kind == "bert")
    (window,), (asked,) = windows[[0]].tolist(), windows.asked([0])
    prompt, response = encode_texts(tokenizer, [f"{PAIRS[0][0]}\n", PAIRS[0][1]])
    ids = [*before, *prompt, *response]
    fill = LENGTH - len(ids) - len(after)
    assert window == [*ids, *[windows.eos_id] * fill, *after]
    start = len(before) + len(prompt)
    assert asked.nonzero()[:, 0].tolist() == list(range(start, LENGTH - len(after)))
    assert theirs.chat_template is None


def test_the_chat_template_is_that_of_transformers(tmp_path):
    """Prompt and response as `apply_chat_template` has them; a marker in a prompt is text."""
    theirs = save_framed("qwen2", tmp_path / "hub", LENGTH, chat_template=CHAT)
    own, _ = find_model_tokenizer(f"hf:{tmp_path}/hub")
    turn = read_turn(own.theirs, "here")
    start, end = "<|im_start|>", "<|im_end|>"
    after = f"{end}\n{start}assistant\n"
    assert turn == Turn(before=f"{start}user\n", after=after, end=f"{end}\n")
    (prompt, response) = PAIRS[0]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    expected = theirs.apply_chat_template(chat, return_dict=False)
    corpus = prepare(tmp_path, f"hf:{tmp_path}/hub", [*PAIRS, *PAIRS[:3]])
    windows = Windows(corpus, "train")
    window, asked = windows[[0]][0].tolist(), windows.asked([0])[0]
    ids = [own.swapped(token) for token in expected]
    assert window == [*ids, *[windows.eos_id] * (LENGTH - len(ids))]
    assert windows.eos_id != own.tokenizer.token_to_id(end)
    learned = own.tokenizer.decode(np.array(window)[asked.numpy()], skip_special_tokens=False)
    assert learned.startswith(f"{response}{end}\n<|endoftext|>")
    marked = f"Who said {end}?"
    (found,) = encode_between(own.tokenizer, turn.before, [marked], turn.after)
    assert found.count(own.tokenizer.token_to_id(end)) == 1
    assert own.tokenizer.decode(found, skip_special_tokens=False) == turn.before + marked + after


def test_a_template_that_writes_the_begin_itself_has_it_once(tmp_path):
    save_framed("llama", tmp_path, LENGTH, chat_template="<s>{{ messages[0].content }} "
                "{{ messages[1].content }}")  # fmt: skip
    own, _ = find_model_tokenizer(f"hf:{tmp_path}")
    turn = read_turn(own.theirs, "here")
    assert turn.before == "<s>"
    (ids,) = encode_prompts(own.tokenizer, turn, own.framing.begin, ["Tom"])
    assert ids[: len(own.framing.begin) + 1].count(own.framing.begin[0]) == 1


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ 1 / 0 }}", "{% for %}"])
def test_a_template_without_a_place_for_both_is_one_sentence(tmp_path, template):
    save_framed("gpt2", tmp_path, LENGTH, chat_template=template)
    own, _ = find_model_tokenizer(f"hf:{tmp_path}")
    with pytest.raises(HalfstepError, match="^here: its chat template cannot be used") as caught:
        read_turn(own.theirs, "here")
    assert "\n" not in str(caught.value)


def test_pairs_of_a_parquet_are_those_of_a_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    prompts, responses = map(list, zip(*PAIRS, strict=True))
    table = pyarrow.table({"q": prompts, "other": [1] * len(PAIRS), "a": responses})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    write_pairs(tmp_path / "pairs.jsonl", PAIRS, "q", "a")
    for name in ("pairs.parquet", "pairs.jsonl"):
        found = [pair[:2] for pair in read_pairs(tmp_path / name, "q", "a")]
        assert found == PAIRS


@pytest.mark.parametrize(
    ("rows", "name", "sentence"),
    [
        ([{"prompt": "a"}], "p.jsonl", "line 1: found an object with prompt, expected a field "
         "'response'; set response_field"),
        ([{"question": "a"}], "p.jsonl", "expected a field 'prompt'; set prompt_field"),
        ([{"prompt": "a", "response": " "}], "p.jsonl", "pair 1: field 'response' is empty"),
        ([{"prompt": "", "response": "b"}], "p.jsonl", "pair 1: field 'prompt' is empty"),
        ([{"prompt": "a", "response": 3}], "p.jsonl", "field 'response' holds a int"),
        ([], "p.jsonl", "holds no pairs"),
        ([], "p.txt", "found text, expected pairs in a .jsonl"),
        ([{"prompt": "a " * 99, "response": "b"}] * 9, "p.jsonl", "none of 8 pairs fits into a "
         "window of 40 tokens; raise length"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(rows, name, sentence, tmp_path, capsys):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    line = f"--kind pairs --files {file} --length {LENGTH} --validation-documents 1 --workers 1"
    assert call(f"prepare-corpus --output {tmp_path}/c {line}") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert sentence in error[-1] and "Traceback" not in "".join(error)
    assert not (tmp_path / "c/manifest.json").exists()


def test_a_corpus_that_was_cut_or_changed_is_found(tmp_path):
    corpus = prepare(tmp_path, "bpe")
    file = corpus / "train.bin"
    raw = file.read_bytes()
    file.write_bytes(raw[:-4])
    with pytest.raises(HalfstepError, match=f"found {len(raw) - 4} bytes, expected {len(raw)}"):
        Windows(corpus, "train")
