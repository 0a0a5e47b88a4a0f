"""Hub folders of small random models, with tokenizers that frame texts as each family does."""

from pathlib import Path

from published import build_family

# Special tokens in the order of their ids; before and after a text; names; the end of a text.
FRAMES = {
    "bert": ("[PAD] [UNK] [CLS] [SEP] [MASK]", "[CLS]", "[SEP]", "sep cls mask", "[SEP]"),
    "modernbert": ("<|endoftext|> [CLS] [SEP] [MASK]", "[CLS]", "[SEP]", "sep cls mask", "[SEP]"),
    "roberta": ("<s> <pad> </s> <mask>", "<s>", "</s>", "mask", "</s>"),
    "gpt2": ("<|endoftext|> <|mask|>", "", "", "mask", "<|endoftext|>"),
    "llama": ("<s> </s> <|mask|>", "<s>", "", "mask", "</s>"),
    "qwen2": ("<|im_start|> <|im_end|> <|endoftext|> <|mask|>", "", "", "mask", "<|endoftext|>"),
}


def save_framed(kind: str, folder: Path, length: int, **options):
    """Write a model of a family with its tokenizer; return the tokenizer as transformers has it.

    The tokenizer is a byte-level BPE of stories, and its mask is the last of the special tokens, so
    it is in the middle of the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from halfstep.data.stories import sample_stories

    special, begin, end, names, _ = FRAMES[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special.split(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sample_stories(200, 1), trainer)
    if begin or end:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(filter(None, (begin, "$A", end))),
            special_tokens=[(one, backend.token_to_id(one)) for one in filter(None, (begin, end))],
        )
    of_name = {"sep": "[SEP]", "cls": "[CLS]", "mask": special.split()[-1]}
    given = {f"{name}_token": of_name[name] for name in names.split()}
    if kind == "qwen2":
        given["eos_token"] = "<|im_end|>"  # ends a turn of a chat, not a text
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **given, **options)
    theirs.save_pretrained(folder)
    build_family(kind, backend.get_vocab_size(), length, folder)
    return theirs
