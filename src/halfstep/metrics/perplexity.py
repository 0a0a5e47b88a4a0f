"""Generative perplexity: how likely a judge finds the texts.

A judge is an autoregressive model that `transformers` loads. Two protocols are in use. They give
different numbers for the same texts, so each number names its protocol:

    ids          SDTT's: the judge reads the sampled ids as they are;
                 exp(mean over texts of the mean over its L - 1 predictions of -log p)
    retokenized  MDLM's: texts are decoded, tokenized again by the judge's tokenizer and cut to L
                 tokens; every EOS but the first is left out;
                 exp(sum over all texts and tokens of -log p / number of tokens)

MDLM counts the tokens after the second EOS too; only the EOS tokens themselves, and padding, have
no weight. The first token of a text is never predicted, so a BOS (which is EOS) uses up the one EOS
that would count. Unlike in MDLM's code, the last partial batch counts.

Of pairs, only responses up to and with their first EOS count. The judge reads their prompts.

The SDTT paper has two judges, named as on the hub: gpt2-large and meta-llama/Meta-Llama-3-8B.
Llama's ids are other tokens than GPT-2's, so it scores `retokenized` only. (The released code's
Llama number is neither protocol: it drops every EOS, strips the text, and takes the mean of means.)

A judge computes in the precision in which its weights are stored (gpt2-large: float32; Llama-3-8B:
bfloat16, 16 GB), except that float16 becomes float32. With precision bfloat16 it computes under
autocast. Log-probabilities are float32, from its logits; the readout of float32 weights is float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError, reason
from halfstep.files import sha256_once
from halfstep.kernels.precision import computing
from halfstep.metrics.rows import model_name
from halfstep.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}  # largest number of logits at a time (128 MiB, 1 GiB)


@dataclass(frozen=True)
class Judge:
    """A causal language model with its tokenizer.

    `name` is hub name@commit, or folder@sha256 of its weights, with the first 12 digits of either.
    """

    name: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    precision: str = "float32"

    @property
    def vocab_size(self) -> int:
        return self.network.get_input_embeddings().weight.shape[0]

    @property
    def dtype(self) -> str:
        if self.precision == "bfloat16":
            return "bfloat16 autocast"
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def columns(self) -> dict[str, str]:
        """The columns of a metric row that describe the judge."""
        return {"judge": self.name, "judge_dtype": self.dtype}

    @property
    def context(self) -> int | None:
        """Longest text that the judge can read; None if the model sets no limit."""
        return getattr(self.network.config, "max_position_embeddings", None)

    def shares(self, tokenizer: Tokenizer) -> bool:
        """True if the same ids mean the same tokens; protocol `ids` makes sense only then."""
        return tokenizer.get_vocab().items() <= self.tokenizer.get_vocab().items()

    def retokenize(
        self,
        ids: np.ndarray,
        tokenizer: Tokenizer,
        eos_id: int,
        spans: np.ndarray | None = None,
    ) -> tuple[list[list[int]], list[int]]:
        """Texts ids[N, L] of `tokenizer` as tokens of the judge, at most L of each.

        And how many of the tokens are before what counts: none, or, with the spans[N, 2] of
        responses, those of the prompts. Prompt and response are then tokenized separately, and cut
        to what the judge reads. HalfstepError if that is not even one token of a response.

        EOS becomes the judge's EOS, if it has one. Of what the judge's tokenizer would add, only a
        BOS that is not its EOS is kept (Llama's).
        """
        bos = self.tokenizer.bos_token_id
        own_bos = bos != self.tokenizer.eos_token_id and self.tokenizer("")["input_ids"][:1] == [
            bos
        ]
        start = [bos] if own_bos else []
        parts = self._encode(counted_parts(ids, spans), tokenizer, eos_id)
        if spans is None:
            longest = min(ids.shape[1], self.context or ids.shape[1])
            return [(start + text)[:longest] for text in parts], [0] * len(ids)
        prompts = [text[:begin] for text, begin in zip(ids, spans[:, 0], strict=True)]
        given = [start + prompt for prompt in self._encode(prompts, tokenizer, eos_id)]
        both = list(zip(given, parts, strict=True))
        _check_texts(self, [prompt + text[:1] for prompt, text in both])
        return [(prompt + text)[: self.context] for prompt, text in both], list(map(len, given))

    def _encode(
        self, texts: Sequence[np.ndarray], tokenizer: Tokenizer, eos_id: int
    ) -> list[list[int]]:
        """Ids of `tokenizer` as ids of the judge's, nothing added."""
        rows = [text.tolist() for text in texts]
        words = tokenizer.decode_batch(rows, skip_special_tokens=False)
        if self.tokenizer.eos_token:
            eos = tokenizer.id_to_token(eos_id)
            words = [text.replace(eos, self.tokenizer.eos_token) for text in words]
        encoded = self.tokenizer(words, add_special_tokens=False)["input_ids"]
        if any(words) and not any(encoded):
            raise HalfstepError(
                f"judge: the tokenizer of {self.name} has no token for any text; "
                "put the tokenizer.json of its network next to the weights"
            )
        return encoded


def load_judge(name: str, device: str | torch.device = "cpu", precision: str = "float32") -> Judge:
    """Load a judge by its name: a folder, or a hub name (`gpt2-large`, `gpt2-large@revision`).

    precision: float32, which is that of its weights, or bfloat16, which is autocast.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    folder = Path(name)
    local = folder.is_dir()
    if local and not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise HalfstepError(
            f"judge: no config.json in {folder}, found {found} there; "
            "name a folder that transformers' save_pretrained wrote"
        )
    if not local and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise HalfstepError(
            f"judge: no folder {name}; train the baseline first, "
            "or name a model of the Hugging Face hub such as gpt2-large"
        )
    where, _, revision = (name, "", "") if local else name.partition("@")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    revision = revision or "main"
    try:
        network = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype="auto")
        if network.dtype == torch.float16:  # its largest number is 65,504
            network = network.float()
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
    except Exception as error:  # transformers, the hub client and safetensors each raise their own
        raise HalfstepError(
            f"judge: transformers cannot load {name!r} ({type(error).__name__}: {reason(error)}); "
            f"{_remedy(where, local, error)}"
        ) from error
    if local:  # the same name on every machine, however the path was typed
        name = f"{model_name(folder)}@{weights_sha256(folder)[:12]}"
    elif commit := getattr(network.config, "_commit_hash", None):
        name = f"{where}@{commit[:12]}"
    _stop_dropout(tokenizer)
    network = network.to(device).eval().requires_grad_(False)
    _keep_float32_logits(network)
    return Judge(name, network, tokenizer, torch.device(device), precision)


def _keep_float32_logits(network: PreTrainedModel) -> None:
    """Let a float32 readout compute in float32 inside autocast too."""
    readout = network.get_output_embeddings()
    if readout is None or readout.weight.dtype != torch.float32:
        return
    forward = readout.forward

    def outside_autocast(h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return forward(h.float())

    readout.forward = outside_autocast


def _stop_dropout(tokenizer: PreTrainedTokenizerBase) -> None:
    """A BPE that leaves out merges at random would give another score at each call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "dropout", None):
        backend.model.dropout = None


def _remedy(where: str, local: bool, error: Exception) -> str:
    """What to do about a judge that cannot be loaded."""
    if local:
        return "make the folder again"
    if "gated" in str(error).lower():
        return (
            f"accept its license at https://huggingface.co/{where}, then log in with "
            "`hf auth login` or set HF_TOKEN, or name a folder that holds it"
        )
    return "without network, download it beforehand or name a folder that holds the model"


def weights_sha256(folder: Path) -> str:
    """Checksum of a judge's weights: of one file, or of the checksums of its parts by name."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    sums = [sha256_once(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def pad_texts(texts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, L] int64.

    Texts are padded on the right, where a causal model does not see the padding.
    """
    rows = [torch.tensor(text, dtype=torch.long) for text in texts]
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    attend = (torch.arange(x.shape[1]) < lengths[:, None]).long()
    return x.to(device), attend.to(device)


@torch.no_grad()
def token_nll(
    judge: Judge, texts: list[list[int]], micro_batch: int, label: str = "judge"
) -> list[np.ndarray]:
    """-log p of each token but the first, in nats: one float32 array of len(text) - 1 per text.

    At most LOGITS logits exist at a time.
    """
    _check_texts(judge, texts)
    nll = [np.zeros(0, np.float32)] * len(texts)
    # Longest first, so that a batch needs little padding; a text of one token has no prediction.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    order = [i for i in order if len(texts[i]) > 1]
    budget = LOGITS.get(judge.device.type, LOGITS["cpu"])
    first = 0
    with Progress(label, len(order), "text") as progress:
        while first < len(order):
            most = budget // (len(texts[order[first]]) * judge.vocab_size)
            rows = order[first : first + max(1, min(micro_batch, most))]
            first += len(rows)
            for i, values in zip(rows, _batch_nll(judge, [texts[i] for i in rows]), strict=True):
                nll[i] = values
            progress.update(len(rows))
    return nll


def _batch_nll(judge: Judge, texts: list[list[int]]) -> list[np.ndarray]:
    """`token_nll` of texts that are read in one pass."""
    x, attend = pad_texts(texts, judge.device)
    with computing(judge.device, judge.precision):
        logits = judge.network(input_ids=x, attention_mask=attend, use_cache=False).logits
    nll = []
    for i, text in enumerate(texts):
        n = len(text)
        loss = F.cross_entropy(logits[i, : n - 1].float(), x[i, 1:n], reduction="none")
        nll.append(loss.cpu().numpy())
    return nll


def _check_texts(judge: Judge, texts: list[list[int]]) -> None:
    """HalfstepError unless the judge's vocabulary and context hold the texts."""
    largest = max((max(text) for text in texts if text), default=0)
    if largest >= judge.vocab_size:
        raise HalfstepError(
            f"judge: token id {largest} in the texts, but {judge.name} has only ids below "
            f"{judge.vocab_size}; name a judge with the corpus's own tokenizer (the baseline), "
            "or score `retokenized`"
        )
    longest = max((len(text) for text in texts), default=0)
    if longest > 1 and judge.context is not None and longest > judge.context:
        raise HalfstepError(
            f"judge: texts of {longest} tokens, but {judge.name} reads at most {judge.context}; "
            "name another judge"
        )


def counted_parts(ids: np.ndarray, spans: np.ndarray | None) -> Sequence[np.ndarray]:
    """What counts of texts ids[N, L]: all of each, or what is in spans[N, 2] of it."""
    if spans is None:
        return ids
    return [text[begin:end] for text, (begin, end) in zip(ids, spans.tolist(), strict=True)]


def ids_nll(
    judge: Judge,
    ids: np.ndarray,
    micro_batch: int,
    label: str = "judge, ids",
    group: Group = ALONE,
    spans: np.ndarray | None = None,
) -> np.ndarray | None:
    """Mean -log p of the tokens of each text of ids[N, L] but its first: [N] float64.

    With spans[N, 2] it is the mean over these tokens of a text. Perplexity (protocol ids) =
    exp(mean). The ranks of the group share the texts; all but rank 0 get None.
    """
    whole = np.array([[1, ids.shape[1]]]).repeat(len(ids), 0)
    spans = whole if spans is None else spans.clip(min=1)

    def of_rows(rows: slice) -> np.ndarray:
        begins, ends = spans[rows].T.tolist()
        read = [text[:end] for text, end in zip(ids[rows].tolist(), ends, strict=True)]
        found = zip(token_nll(judge, read, micro_batch, label), begins, strict=True)
        # Token i is predicted at position i - 1.
        return np.array([nll[begin - 1 :].mean(dtype=np.float64) for nll, begin in found])

    return group.map_rows(len(ids), of_rows)


def retokenized_nll(  # noqa: PLR0913 - what is read, how, and who shares the work
    judge: Judge,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    eos_id: int,
    micro_batch: int,
    label: str = "judge, retokenized",
    group: Group = ALONE,
    spans: np.ndarray | None = None,
) -> np.ndarray | None:
    """Sum of -log p, and number, of the tokens that count in each text of ids[N, L]: [N, 2].

    They are those of the responses where their spans[N, 2] are given. Perplexity (protocol
    retokenized) = exp(mean sum / mean number). The ranks of the group share the texts; all but
    rank 0 get None.
    """
    if judge.tokenizer.eos_token is None:
        raise HalfstepError(
            f"judge: the tokenizer of {judge.name} names no eos_token; "
            "add it to its tokenizer_config.json"
        )

    def of_rows(rows: slice) -> np.ndarray:
        inside = None if spans is None else spans[rows]
        texts, given = judge.retokenize(ids[rows], tokenizer, eos_id, inside)
        found = token_nll(judge, texts, micro_batch, label)
        sums = []
        for text, before, nll in zip(texts, given, found, strict=True):
            eos = np.array(text[before:]) == judge.tokenizer.eos_token_id
            counts = ~eos | (eos.cumsum() == 1)  # at an EOS, the sum is 1 for the first one only
            counts = np.concatenate([np.zeros(before, bool), counts])[1:]
            sums.append((nll[counts].sum(dtype=np.float64), counts.sum()))
        return np.array(sums, np.float64)

    sums = group.map_rows(len(ids), of_rows)
    if group.is_main and not sums[:, 1].any():
        raise HalfstepError(
            "samples: no token to score, every text is empty or end-of-text alone; "
            "look at samples.txt"
        )
    return sums
