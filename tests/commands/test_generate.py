"""Prompts and texts with a BPE, whose words begin with their blank."""

from types import SimpleNamespace

import pytest
import torch
from known import UNFRAMED

from halfstep.commands.writers import encode_prompt, separate_documents
from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import EOS, train_bpe
from halfstep.diffusion.contracts import Samples

BPE = train_bpe(sample_stories(300, 1), 640)
MODEL = SimpleNamespace(
    tokenizer=BPE, eos_id=0, **UNFRAMED, mask_id=BPE.get_vocab_size(), length=64, denoiser=object()
)


def ids_of(text):
    return BPE.encode(text).ids


def filled(prompt, *words):
    """The text of a prompt when each mask is filled with the token of a word."""
    ids = encode_prompt(MODEL, prompt).tolist()
    answers = iter(words)
    written = [BPE.token_to_id(next(answers)) if i == MODEL.mask_id else i for i in ids]
    assert next(answers, None) is None
    return BPE.decode(written[1:], skip_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "words", "text"),
    [
        ("the <|mask|> was", ["Ġcat"], "the cat was"),
        ("the<|mask|> was", ["Ġcat"], "the cat was"),
        ("the <|mask|> <|mask|> was", ["Ġred", "Ġcat"], "the red cat was"),
        ("<|mask|> cat", ["A"], "A cat"),
        ("the  <|mask|>", ["Ġcat"], "the  cat"),
        ("the c<|mask|> was", ["at"], "the cat was"),
        ("the <|mask|><|mask|>.", ["Ġ", "c"], "the c."),
        ("a.\n<|mask|>", ["A"], "a.\nA"),
    ],
)
def test_a_mask_brings_its_blank(prompt, words, text):
    """No blank is doubled."""
    assert filled(prompt, *words) == text


def test_masks_of_other_models_are_text_and_that_is_said(capsys):
    ids = encode_prompt(MODEL, "the [MASK] was").tolist()
    assert MODEL.mask_id not in ids
    said = capsys.readouterr().err
    assert said == "note: [MASK] is taken as text; a token to fill in is written <|mask|>\n"
    encode_prompt(MODEL, "the <|mask|> was")
    assert capsys.readouterr().err == ""


def test_a_filled_prompt_has_the_tokens_of_its_text():
    """The model has learned `Ġcat`, and never a blank before it."""
    ids = encode_prompt(MODEL, "the <|mask|> was").tolist()
    ids[ids.index(MODEL.mask_id)] = BPE.token_to_id("Ġcat")
    assert ids == [0, *ids_of("the cat was")]


def test_the_end_of_a_prompt_is_written_by_the_model():
    assert encode_prompt(MODEL, "the cat ").tolist() == [0, *ids_of("the cat")]
    assert encode_prompt(MODEL, " ").tolist() == [0]
    assert encode_prompt(MODEL, "").tolist() == []


def test_a_prompt_can_end_a_document_and_other_special_tokens_are_text():
    mixed = train_bpe(sample_stories(300, 1), 640)
    mixed.add_special_tokens(["<|pad|>"])
    model = SimpleNamespace(**{**vars(MODEL), "tokenizer": mixed})
    found = encode_prompt(model, f"a cat.{EOS}The <|pad|>").tolist()
    assert found == [0, *ids_of("a cat."), 0, *ids_of("The <|pad|>")]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (f"{EOS}One.{EOS}", "One."),
        (f"{EOS}One.{EOS}Two.{EOS}", f"One.\n{EOS}\nTwo."),
        (f"{EOS}Three is cu", "Three is cu"),
        (f"cut.{EOS}Two.{EOS}cu", f"cut.\n{EOS}\nTwo.\n{EOS}\ncu"),
        (f"{EOS}One.{EOS}{EOS}Two.{EOS}", f"One.\n{EOS}\n\n{EOS}\nTwo."),
        (f"{EOS}{EOS}", ""),
        (EOS, ""),
    ],
)
def test_documents_of_a_text_are_separated(written, text):
    """Between two documents is the line that also separates those of a .txt file."""
    texts = Samples(torch.tensor([ids_of(written)]), torch.ones(1))
    assert separate_documents(MODEL, texts) == [text]
