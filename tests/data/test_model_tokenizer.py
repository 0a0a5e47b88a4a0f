"""Tokenizers of models of transformers: frames and ends of texts as each family has them."""

import huggingface_hub
import pytest
from framed import FRAMES, save_framed

from halfstep.data.model_tokenizer import find_model_tokenizer, read_model_tokenizer
from halfstep.data.tokenizer import encode_texts, vocabulary_size
from halfstep.errors import HalfstepError


@pytest.mark.parametrize("kind", FRAMES)
def test_a_framed_text_is_what_transformers_encodes(kind, tmp_path):
    """But for the ids of the mask and of the last token, which have changed places."""
    theirs, (_, _, _, _, end) = save_framed(kind, tmp_path, 24), FRAMES[kind]
    own, folder = find_model_tokenizer(f"hf:{tmp_path}")
    assert folder == tmp_path and own.mask_id == theirs.mask_token_id
    assert own.eos_id == own.swapped(theirs.convert_tokens_to_ids(end))
    text = f"Tom had a red kite{end} and saw it."
    ids = encode_texts(own.tokenizer, [text])[0]
    assert own.eos_id not in ids  # a text that mentions the end does not end there
    (plain,) = encode_texts(own.tokenizer, ["Tom had a red kite."])
    expected = theirs("Tom had a red kite.")["input_ids"]
    assert list(own.framing.around(plain)) == [own.swapped(token) for token in expected]
    last = vocabulary_size(own.tokenizer)
    assert len(theirs) == last + 1 and own.swapped(own.mask_id) == last
    assert own.tokenizer.token_to_id(theirs.mask_token) is None


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    save_framed("gpt2", tmp_path, 24)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|what|>"))
    with pytest.raises(HalfstepError, match="^here: its tokenizer names no token that ends a text"):
        read_model_tokenizer(tmp_path, "here")


@pytest.mark.parametrize("name", ["own/model@main", "./gone", "/gone/away", "a b"])
def test_a_name_that_is_not_there_offline_is_one_sentence(name, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(HalfstepError) as caught:
        find_model_tokenizer(f"hf:{name}")
    assert str(caught.value).startswith(f"tokenizer: hf:{name}: is no folder, and the download")
    assert f"halfstep fetch --repositories model:{name}" in str(caught.value)
    assert "\n" not in str(caught.value)
