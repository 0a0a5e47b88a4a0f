"""Tokenizers: any text round-trips, training is deterministic, GPT-2's ids are GPT-2's."""

import json
import random
import re
from pathlib import Path

import pytest
from known import words_tokenizer
from tokenizers import Tokenizer, models, normalizers

from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import (
    EOS,
    LONGEST_RUN,
    cut_runs,
    describe_loss,
    encode_texts,
    end_id,
    end_of_document,
    load_bpe,
    mask_of,
    read_tokenizer,
    train_bpe,
    unknown_id,
    vocabulary_size,
    without_mask,
)
from halfstep.errors import HalfstepError

GPT2 = Path("/work/shared/data/gpt2_bpe")


def test_each_word_of_the_stories_is_one_token():
    tokenizer = train_bpe(sample_stories(3000, 1), 640)
    assert tokenizer.token_to_id(EOS) == 0 and tokenizer.get_vocab_size() <= 640
    stories = sample_stories(500, 2)
    words = {word for story in stories for word in re.findall(r"(?<= )\w+", story)}
    assert not [word for word in words if len(tokenizer.encode(" " + word).ids) > 1]
    assert train_bpe(sample_stories(3000, 1), 640).to_str() == tokenizer.to_str()


def test_any_text_round_trips():
    tokenizer, rng = train_bpe(sample_stories(200, 1), 300), random.Random(0)
    ranges = [(32, 127), (0, 0xD7FF), (0x1F300, 0x1F700)]
    for _ in range(200):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(20))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"GPT-2's vocabulary is not at {GPT2}")
def test_gpt2_ids(tmp_path):
    tokenizer = load_bpe(str(GPT2))
    assert tokenizer.encode("Hello world").ids == [15496, 995]
    assert tokenizer.get_vocab_size() == 50257 and tokenizer.token_to_id(EOS) == 50256
    assert tokenizer.encode("a" + EOS).ids == [64, 50256]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_bpe(str(tmp_path)).encode("naïve 🙂\n").ids == tokenizer.encode("naïve 🙂\n").ids
    assert tokenizer.decode(tokenizer.encode(" naïve 🙂\n").ids) == " naïve 🙂\n"


def test_a_folder_with_the_file_names_of_the_hub(tmp_path):
    tokenizer = train_bpe(sample_stories(200, 1), 300)
    tokenizer.model.save(str(tmp_path))
    text = "Lily went home."
    assert load_bpe(str(tmp_path)).encode(text).ids == tokenizer.encode(text).ids


def test_errors_name_the_folder(tmp_path):
    with pytest.raises(HalfstepError, match="holds none of vocab.json"):
        load_bpe(str(tmp_path))
    with pytest.raises(HalfstepError, match="is not a folder"):
        load_bpe(str(tmp_path / "absent"))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(HalfstepError, match="merges.txt cannot be read"):
        load_bpe(str(tmp_path))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(HalfstepError, match="has no token <|endoftext|>"):
        load_bpe(str(tmp_path))


STORIES = train_bpe(sample_stories(200, 1), 300)


def write_tokenizer(folder, **changes):
    about = json.loads(STORIES.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(about))
    return folder


def test_settings_that_change_texts_are_left_out_and_said(tmp_path, capsys):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    write_tokenizer(tmp_path, truncation=truncation)
    text = "Lily went home with a kite."
    for tokenizer in (load_bpe(str(tmp_path)), read_tokenizer(tmp_path / "tokenizer.json")):
        assert tokenizer.encode(text).ids == STORIES.encode(text).ids
        assert json.loads(tokenizer.to_str())["truncation"] is None
    assert capsys.readouterr().err == (
        f"note: tokenizer {tmp_path}: its truncation is not used: texts are encoded whole, "
        "and as they are\n"
    )


def test_a_tokenizer_without_such_settings_keeps_every_byte(tmp_path, capsys):
    STORIES.save(str(tmp_path / "tokenizer.json"))
    assert load_bpe(str(tmp_path)).to_str() == STORIES.to_str()
    assert capsys.readouterr().err == ""


def test_the_vocabulary_is_the_largest_id_plus_one(tmp_path, capsys):
    assert vocabulary_size(STORIES) == STORIES.get_vocab_size() == 300
    model = json.loads(STORIES.to_str())["model"]
    model["vocab"] |= {"zzz": 310}
    tokenizer = load_bpe(str(write_tokenizer(tmp_path, model=model)))
    assert vocabulary_size(tokenizer) == 311 and tokenizer.get_vocab_size() == 301
    assert "the vocabulary is the largest id + 1, 311, for 301 tokens" in capsys.readouterr().err


def test_special_tokens_in_a_text_are_text(tmp_path):
    STORIES.save(str(tmp_path / "tokenizer.json"))
    text = f"a {EOS} b"
    (ids,) = encode_texts(STORIES, [text])
    assert 0 not in ids and STORIES.decode(ids) == text
    assert read_tokenizer(tmp_path / "tokenizer.json").encode(text).ids == ids
    assert 0 in STORIES.encode(text).ids  # the tokenizer itself is as it was


def test_a_loss_is_described_and_most_of_a_text_may_not_be_lost(tmp_path):
    texts = ["The Cat sat.", "a mat"]
    assert describe_loss(STORIES, texts) is None
    lower = Tokenizer.from_str(STORIES.to_str())
    lower.normalizer = normalizers.Lowercase()
    assert describe_loss(lower, texts) == (
        "1 of the first 2 documents do not come back exactly; 'The Cat sat.' becomes 'the cat sat.'"
    )
    words = words_tokenizer("The Cat sat.")
    assert unknown_id(STORIES) is None and unknown_id(words) == 0
    with pytest.raises(HalfstepError, match="loses most .*100% of the tokens are unknown"):
        describe_loss(words, ["nothing that it knows"])


@pytest.mark.parametrize("run", ["a", "7", "=", " ", "é", "🙂", "\n"])
def test_a_run_of_a_million_characters_is_cut(run):
    """Nothing is lost, and only runs are cut: the pieces are words of the BPE, or parts of them."""
    text = f"once upon {run * 1_000_000} a time"
    pieces = list(cut_runs(text))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 2 * LONGEST_RUN
    short = f"once upon {run * (LONGEST_RUN - 9)} a time"
    assert list(cut_runs(short)) == [short]
    assert train_bpe([text], 300).get_vocab_size() > 256


def test_a_cut_does_not_change_a_bpe_of_usual_text(monkeypatch):
    before = train_bpe(sample_stories(500, 1), 500).to_str()
    monkeypatch.setattr("halfstep.data.tokenizer.cut_runs", lambda text: [text])
    assert train_bpe(sample_stories(500, 1), 500).to_str() == before


def masked_models():
    """A tokenizer of each kind whose mask has id 2, and whose last token is 5."""
    tokens = ["a", "b", "[MASK]", "c", EOS, "d"]
    ids = {token: number for number, token in enumerate(tokens)}
    return {
        "BPE": models.BPE(ids, []),
        "WordPiece": models.WordPiece(ids, unk_token="a"),
        "WordLevel": models.WordLevel(ids, unk_token="a"),
        "Unigram": models.Unigram([(token, -1.0) for token in tokens], 0, False),
    }


@pytest.mark.parametrize("kind", masked_models())
@pytest.mark.parametrize("added_last", [False, True], ids=["", "the last token is an added one"])
def test_a_mask_in_the_middle_gives_its_id_to_the_last_token(tmp_path, kind, added_last):
    tokenizer = Tokenizer(masked_models()[kind])
    tokenizer.add_special_tokens(["[MASK]", EOS, *(["<late>"] if added_last else [])])
    before = tokenizer.get_vocab()
    last = max(before, key=before.get)
    assert mask_of(tokenizer) == 2
    expected = {**before, last: 2}
    del expected["[MASK]"]
    assert without_mask(tokenizer, 2).get_vocab() == expected
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_bpe(str(tmp_path)).get_vocab() == expected


def test_the_end_of_a_document_is_the_first_known_token():
    words = models.WordLevel({"[SEP]": 0, "</s>": 1, "a": 2}, unk_token="a")
    assert end_of_document(Tokenizer(words)) == "</s>" and end_id(Tokenizer(words)) == 1
    nothing = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert end_of_document(nothing) is None
    with pytest.raises(ValueError, match="none of"):
        end_id(nothing)
