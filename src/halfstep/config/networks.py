"""The sections of a corpus and of a network."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import pydantic
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from halfstep.config.values import Count, Section, Seed, TokenCount, Whole, Word


class Corpus(Section):
    """The text, and the windows of tokens that it is cut into."""

    kind: Literal["stories", "docs", "openwebtext", "files", "pairs"]
    """stories: written by the built-in grammar; docs: docstrings of the installed Python packages;
    openwebtext: from the hub; files: your own text; pairs: your own prompts and responses"""
    length: Annotated[TokenCount, Field(ge=8)] = 1024
    """tokens per window, BOS and EOS included"""
    tokenizer: Word = "bpe"
    """bpe: a byte-level BPE trained on the corpus; otherwise a hub name (gpt2) or a folder with
    vocab.json and merges.txt; hf:NAME, as for a teacher: the tokenizer of a model of transformers,
    with the tokens that it puts before and after each text"""
    vocab_size: Annotated[Whole, Field(ge=258, le=2**24)] = 8192
    """vocabulary size of the trained BPE, EOS included (only with tokenizer: bpe)"""
    files: list[Word] = []
    """paths or globs of .txt, .jsonl, .jsonl.gz or .parquet files (only with kind: files,
    and without .txt with kind: pairs)"""
    text_field: Word = "text"
    """field of .jsonl and .parquet files that holds the text (only with kind: files)"""
    prompt_field: Word = "prompt"
    """field that holds the prompt (only with kind: pairs)"""
    response_field: Word = "response"
    """field that holds the response, which alone is masked and learned (only with kind: pairs). The
    chat template of tokenizer: hf:NAME is put around the two; without one, a line break is between
    them"""
    num_documents: Count | None = None
    """maximum number of documents to read; kind stories: number of stories to write"""
    validation_documents: Count | None = None
    """number of held-out documents (by default 1,000; openwebtext: 100,000): the last ones of the
    corpus, or stories with combinations that are never trained on"""
    corpus_seed: Seed = 1
    """seed of the grammar (only with kind: stories)"""

    @model_validator(mode="after")
    def _check_kind(self) -> Corpus:
        if (self.kind in ("files", "pairs")) != bool(self.files):
            raise ValueError(
                "`files` and kind: files or pairs need each other, "
                f"found kind: {self.kind} and files: {self.files}"
            )
        if self.kind == "stories" and self.num_documents is None:
            raise ValueError("kind: stories needs num_documents, the number of stories to write")
        self._check_unused("corpus_seed", "kind", "stories")
        self._check_unused("text_field", "kind", "files")
        self._check_unused("prompt_field", "kind", "pairs")
        self._check_unused("response_field", "kind", "pairs")
        self._check_unused("vocab_size", "tokenizer", "bpe")
        return self

    def _check_unused(self, key: str, switch: str, wanted: str) -> None:
        """Refuse a value of `key` where another key makes it useless."""
        value = getattr(self, key)
        if getattr(self, switch) != wanted and value != type(self).model_fields[key].default:
            raise ValueError(
                f"{key}: found {value!r}, which is used only with {switch}: {wanted}; leave it out"
            )


# Blocks, width and heads: SDTT Table 2, and two sizes for small machines.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (3, 128, 8),
    "mini": (6, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (24, 1536, 16),
    "1.3B": (24, 2048, 32),
    "3B": (26, 3072, 32),
    "8B": (40, 4096, 32),
}
COND_WIDTH = 128  # of the vector that adaLN reads the noise level from, in every row of SIZES
SHAPE = r"(1\d\d|[1-9]\d?)(x[1-9]\d{0,4}){2,3}"  # blocks x width x heads, if need be x COND_WIDTH


def shape_of_size(size: str) -> tuple[int, int, int, int]:
    """(blocks, width, heads, width of adaLN's input) of a network size."""
    if size in SIZES:
        return (*SIZES[size], COND_WIDTH)
    blocks, width, heads, *rest = map(int, size.split("x"))
    return blocks, width, heads, rest[0] if rest else COND_WIDTH


def size_of_shape(blocks: int, width: int, heads: int, cond_width: int = COND_WIDTH) -> str:
    """The network size with this shape: a row of SIZES, or its numbers, as in 6x256x4."""
    if cond_width != COND_WIDTH:
        return f"{blocks}x{width}x{heads}x{cond_width}"
    names = [name for name, row in SIZES.items() if row == (blocks, width, heads)]
    return names[0] if names else f"{blocks}x{width}x{heads}"


def _check_size(size: str) -> str:
    """A network size in its only spelling: 3x128x8 is tiny."""
    if size in SIZES:
        return size
    if not re.fullmatch(SHAPE, size):  # an error like that of a Literal, which has a hint
        raise PydanticCustomError("literal_error", "Input should be {expected}", KNOWN_SIZES)
    blocks, width, heads, cond_width = shape_of_size(size)
    if width % (2 * heads):
        raise ValueError(f"the width {width} must be a multiple of 2 x {heads} heads")
    return size_of_shape(blocks, width, heads, cond_width)


KNOWN_SIZES = {
    "expected": f"{', '.join(map(repr, SIZES))} or blocks, width and heads as in '6x256x4'"
}
Size = Annotated[
    str,
    pydantic.AfterValidator(_check_size),
    pydantic.WithJsonSchema(
        {"type": "string", "anyOf": [{"enum": list(SIZES)}, {"pattern": f"^{SHAPE}$"}]}
    ),
]


class Network(Section):
    """The network of the denoiser and of its autoregressive baseline."""

    size: Size = "small"
    """tiny, mini; SDTT Table 2: small 169M, medium 424M, large 863M, 1.3B, 3B, 8B; or any other
    shape as blocks x width x heads: 6x256x4"""
    time_conditioning: bool = False
    """feed the time t to adaLN (the paper feeds zero)"""
    shifted: bool = False
    """predict each token from the output at the position before it, as the teachers do that are
    adapted from autoregressive models (DiffuGPT)"""
    architecture: Literal["dit", "gpt2", "transformers"] = "dit"
    """dit: the paper's, with RoPE and adaLN; gpt2: that of teachers which are adapted from GPT-2;
    transformers: that of baselines with `from`, and of teachers from: hf:NAME. The last two follow
    from the weights"""
    schedule: Literal["loglinear", "cosine"] = "loglinear"
    """noise schedule alpha(t): loglinear (MDLM and the paper), or cosine (MaskGIT, MD4)"""

    @model_validator(mode="after")
    def _check_time(self) -> Network:
        if self.time_conditioning and self.architecture == "gpt2":
            raise ValueError(
                "found time_conditioning, but the architecture gpt2 has no input for the time; "
                "leave it out"
            )
        return self

    @property
    def blocks(self) -> int:
        return shape_of_size(self.size)[0]

    @property
    def width(self) -> int:
        return shape_of_size(self.size)[1]

    @property
    def heads(self) -> int:
        return shape_of_size(self.size)[2]

    @property
    def cond_width(self) -> int:
        return shape_of_size(self.size)[3]
