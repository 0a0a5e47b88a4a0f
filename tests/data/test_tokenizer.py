"""Tokenizers: any text round-trips, training is deterministic, GPT-2's ids are GPT-2's."""

import json
import random
from pathlib import Path

import pytest

from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import EOS, load_bpe, train_bpe
from halfstep.errors import HalfstepError

GPT2 = Path("/work/shared/data/gpt2_bpe")


def test_each_word_of_the_stories_is_one_token():
    tokenizer = train_bpe(sample_stories(3000, 1), 640)
    assert tokenizer.token_to_id(EOS) == 0 and tokenizer.get_vocab_size() <= 640
    stories = sample_stories(500, 2)
    words = {word for story in stories for word in story.replace(".", "").split()[1:]}
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
