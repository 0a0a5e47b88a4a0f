"""Texts for zero-shot perplexity: those of MDLM's Table 3, and other data sets of the hub.

As in MDLM's released code (arXiv 2406.07524): every row of a data set is detokenized, becomes its
tokens and EOS, and the joined stream is cut every length - 2 tokens; a window is EOS + cut + EOS.
Windows do not overlap. The remainder at the end is dropped, or kept as the only, shorter window
where the whole text fills none; MDLM drops a remainder for every 1,000 rows. It reads PubMed and
arXiv in full, WikiText-103 line by line, and the test split of LM1B, AG News and LAMBADA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from halfstep.data.files import READERS
from halfstep.errors import HalfstepError, reason
from halfstep.texts import reading

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

    from halfstep.data.windows import Layout

Rules = tuple[tuple[str, str], ...]
"""Regular expressions and what replaces them, in the order in which they are applied"""

# The released rules, which undo the tokenization of each corpus. Rules without effect are left out.
WIKITEXT: Rules = (
    (r"s '", "s'"),
    *((rf" @{re.escape(mark)}@ ", mark) for mark in "-,."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
PTB: Rules = (
    (r" 's", "'s"),
    (r"s ' ", "s' "),
    (r" n't", "n't"),
    (r" \n ", "\n"),
    (r"\\/", "/"),
    (r" N(?= )", " 1"),
    (r"([$#]) 1", r"\g<1>1"),
    (r"<unk>", "?"),
)
LM1B: Rules = (
    (r"(https?) : / / ", r"\1://"),
    (r" '(\w+)", r"'\1"),
    (r" (\w+) \. ", r" \1. "),
    (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "),
    (r" \?$", "?"),
    (r" ! ", "! "),
    (r" !$", "!"),
    *((rf" {mark} ", f"{mark} ") for mark in ",:;"),
    (r" / ", "/"),
    *((rf"{mark} ([^{mark}]+) {mark}", rf"{mark}\1{mark}") for mark in "\"'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
)
LAMBADA: Rules = (("[“”]", '"'), (r"\s+\Z", ""), (r"\A\s*", "\n"))


REVISION = "refs/convert/parquet"  # where the hub keeps each public data set as parquet files
HUB_TEXT = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+)(?:/([\w.-]+))?)?")


class DataSet(NamedTuple):
    """Rows of a data set of the hub that are text."""

    repository: str
    configuration: str = "default"
    split: str = "test"
    field: str = "text"
    rules: Rules = ()

    @property
    def source(self) -> str:
        """What `halfstep fetch` must be given."""
        return f"parquet:{self.repository}:{self.configuration}/{self.split}"


PAPERS = "armanc/scientific_papers"
DATA_SETS = {  # the splits and fields of MDLM's released code
    "ptb": DataSet("ptb-text-only/ptb_text_only", "penn_treebank", "validation", "sentence", PTB),
    "wikitext": DataSet("Salesforce/wikitext", "wikitext-103-raw-v1", "validation", rules=WIKITEXT),
    "lm1b": DataSet("billion-word-benchmark/lm1b", "plain_text", rules=LM1B),
    "lambada": DataSet("EleutherAI/lambada_openai", rules=LAMBADA),
    "ag_news": DataSet("fancyzhx/ag_news"),
    "pubmed": DataSet(PAPERS, "pubmed", "validation", "article", WIKITEXT + LM1B),
    "arxiv": DataSet(PAPERS, "arxiv", "validation", "article", WIKITEXT + LM1B),
}


def find_data_set(name: str) -> DataSet | None:
    """The data set of a name in DATA_SETS or of owner/name[:configuration[/split]], or None."""
    if name in DATA_SETS:
        return DATA_SETS[name]
    found = HUB_TEXT.fullmatch(name)
    if found is None or name.endswith((*READERS, ".yaml", ".yml")):
        return None
    repository, configuration, split = found.groups()
    return DataSet(repository, configuration or "default", split or "test")


def download_split(repository: str, split: str) -> Path:
    """The folder of a data set in the hub's cache, which has the .parquet files of this split.

    split: configuration/split. Offline it is found where it was downloaded before.
    """
    from huggingface_hub import snapshot_download

    pattern = f"{split}/*.parquet"
    folder = snapshot_download(
        repository, repo_type="dataset", revision=REVISION, allow_patterns=pattern
    )
    if not list(Path(folder).glob(pattern)):
        raise FileNotFoundError(f"no files {pattern} in revision {REVISION}")
    return Path(folder)


def read_rows_of(data: DataSet) -> Iterator[str]:
    """The detokenized rows of a data set, empty ones too."""
    split = f"{data.configuration}/{data.split}"
    try:
        folder = download_split(data.repository, split)
    except Exception as error:  # the hub's client raises many types
        raise HalfstepError(
            f"perplexity: cannot read {split} of {data.repository} ({type(error).__name__}: "
            f"{reason(error)}); run `halfstep fetch --repositories {data.source}` where there is "
            "a network, or name a file"
        ) from None
    for path in sorted((folder / split).glob("*.parquet")):
        with reading(path) as file:
            for text in READERS[".parquet"](path, file, data.field):
                yield detokenize(text, data.rules)


def detokenize(text: str, rules: Rules) -> str:
    """The text as people write it, without the spaces and marks that its corpus has."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def cut_windows(
    texts: Iterable[str], tokenizer: Tokenizer, layout: Layout, most: int | None = None
) -> np.ndarray:
    """The first `most` windows (None: all) of texts, [N, length] int32; [1, fewer] of a short text.

    Their frame is that of the layout: EOS on both sides, or that of a model of transformers.

    HalfstepError if the texts have no tokens.
    """
    import numpy as np  # not at the top: the workflow needs the names alone

    from halfstep.data.tokenizer import encode_texts

    eos_id, room = layout.eos_id, layout.room
    stream, texts = np.zeros(0, np.int32), iter(texts)
    parts = [stream]
    while part := list(islice(texts, 1000)):
        encoded = encode_texts(tokenizer, part)
        parts += [np.array([*ids, eos_id], np.int32) for ids in encoded]
        if most and sum(map(len, parts)) >= most * room:
            break
    stream = np.concatenate(parts)
    if not (stream != eos_id).any():
        raise HalfstepError("found no text; leave it out, or name another")
    if len(stream) < room:
        return np.array(layout.framing.around(stream), np.int32)[None]
    count = min(len(stream) // room, most or len(stream))
    windows = layout.frames(count, np.int32)
    windows[:, layout.framing.inside(layout.length)] = stream[: count * room].reshape(count, room)
    return windows
