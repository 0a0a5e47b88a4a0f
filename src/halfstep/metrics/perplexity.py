"""Generative perplexity: how likely a judge, an autoregressive model that `transformers` loads, finds the texts.

Two protocols are in use and give different numbers for the same texts, so each number names its own:

    ids          SDTT's: the judge reads the sampled ids as they are, exp(mean over texts of the mean over its L - 1 predictions of -log p)
    retokenized  MDLM's: texts are decoded and tokenised again by the judge's tokenizer (cut to L tokens), every EOS but the first is
                 left out, exp(sum over all texts and tokens of -log p / number of tokens)

MDLM counts tokens behind the second EOS too; only the EOS tokens themselves, and padding, have no weight. The first token of a text is
never predicted, so a BOS (which is EOS) uses up the one EOS that would count. Unlike MDLM's code, the last partial batch counts.

Both judges of the SDTT paper go by their hub names: gpt2-large, and meta-llama/Meta-Llama-3-8B, whose ids are other tokens than GPT-2's, so that
it scores `retokenized` alone. A judge computes in the precision that its weights are stored in (gpt2-large: float32; Llama-3-8B: bfloat16, 16 GB),
float16 read as float32; log-probabilities are taken in float32 of its logits. (The released code's Llama number is neither protocol: it drops
every EOS, strips the text, and takes the mean of means.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError, reason
from halfstep.files import sha256_once
from halfstep.metrics.rows import model_name
from halfstep.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}  # largest number of logits at once (128 MiB, 1 GiB)


@dataclass(frozen=True)
class Judge:
    """A causal language model with its tokenizer. `name` says which: hub name@commit, or folder@sha256 of its weights, 12 digits of either."""

    name: str
    network: torch.nn.Module
    tokenizer: object
    device: torch.device

    @property
    def vocab_size(self) -> int:
        return self.network.get_input_embeddings().weight.shape[0]

    @property
    def dtype(self) -> str:
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def about(self) -> dict[str, str]:
        """What a row says of its judge."""
        return {"judge": self.name, "judge_dtype": self.dtype}

    @property
    def context(self) -> int | None:
        """Longest text it can read, None when the model sets no limit."""
        return getattr(self.network.config, "max_position_embeddings", None)

    def shares(self, tokenizer: Tokenizer) -> bool:
        """Do the same ids mean the same tokens? Protocol `ids` makes sense only then."""
        return tokenizer.get_vocab().items() <= self.tokenizer.get_vocab().items()


def load_judge(name: str, device: str | torch.device = "cpu") -> Judge:
    """The judge of a name, the one way for all of them: a folder, or a hub name (`gpt2-large`, `gpt2-large@revision`)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise HalfstepError(
                f"judge: no config.json in {folder}, found {found} there; name a folder that transformers' save_pretrained wrote"
            )
    elif folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise HalfstepError(
            f"judge: no folder {name}; train the baseline first, or name a model of the Hugging Face hub such as gpt2-large"
        )
    where, _, revision = (name, "", "") if folder.is_dir() else name.partition("@")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            where, revision=revision or "main", dtype="auto"
        )
        network = (
            network.float() if network.dtype == torch.float16 else network
        )  # whose largest number is 65,504
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision or "main")
    except Exception as error:  # transformers, the hub client and safetensors each raise their own
        hint = (
            "make the folder again" if folder.is_dir()
            else f"accept its licence at https://huggingface.co/{where}, then log in with `hf auth login` or set HF_TOKEN, or name a folder that holds it"
            if "gated" in str(error).lower()
            else "without network, download it beforehand or name a folder that holds the model"
        )  # fmt: skip
        raise HalfstepError(
            f"judge: transformers cannot load {name!r} ({type(error).__name__}: {reason(error)}); {hint}"
        ) from error
    found = (
        weights_sha256(folder) if folder.is_dir() else getattr(network.config, "_commit_hash", None)
    )
    where = (
        model_name(folder) if folder.is_dir() else where
    )  # however its path was typed, on whatever machine
    name = f"{where}@{found[:12]}" if found else name
    return Judge(
        name, network.to(device).eval().requires_grad_(False), tokenizer, torch.device(device)
    )


def weights_sha256(folder: Path) -> str:
    """Checksum of a judge's weights: of the one file, or of the checksums of its parts in the order of their names."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    sums = [sha256_once(file) for file in files]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


@torch.no_grad()
def token_nll(
    judge: Judge, texts: list[list[int]], micro_batch: int, label: str = "judge"
) -> list[np.ndarray]:
    """-log p of each token but the first, in nats: one float32 array of len(text) - 1 per text. No more than LOGITS logits exist at once."""
    largest = max((max(text) for text in texts if text), default=0)
    if largest >= judge.vocab_size:
        raise HalfstepError(
            f"judge: token id {largest} in the texts, but {judge.name} knows only ids below {judge.vocab_size}; "
            "name a judge with the corpus's own tokenizer (the baseline), or score `retokenized`"
        )
    out = [np.zeros(0, np.float32)] * len(texts)
    order = sorted(
        (i for i in range(len(texts)) if len(texts[i]) > 1), key=lambda i: -len(texts[i])
    )
    if order and judge.context is not None and len(texts[order[0]]) > judge.context:
        raise HalfstepError(
            f"judge: texts of {len(texts[order[0]])} tokens, but {judge.name} reads at most {judge.context}; name another judge"
        )
    budget = LOGITS.get(judge.device.type, LOGITS["cpu"])
    at = 0
    with Progress(label, len(order), "text") as progress:
        while at < len(order):
            L = len(texts[order[at]])
            rows = order[at : at + max(1, min(micro_batch, budget // (L * judge.vocab_size)))]
            at += len(rows)
            lengths = [len(texts[i]) for i in rows]
            x = torch.zeros(
                len(rows), L, dtype=torch.long
            )  # padding is on the right, where a causal model does not see it
            attend = torch.zeros_like(x)
            for j, i in enumerate(rows):
                x[j, : lengths[j]] = torch.tensor(texts[i])
                attend[j, : lengths[j]] = 1
            x = x.to(judge.device)
            logits = judge.network(
                input_ids=x, attention_mask=attend.to(judge.device), use_cache=False
            ).logits
            for j, i in enumerate(rows):
                out[i] = (
                    F.cross_entropy(
                        logits[j, : lengths[j] - 1].float(), x[j, 1 : lengths[j]], reduction="none"
                    )
                    .cpu()
                    .numpy()
                )
            del logits
            progress.update(len(rows))
    return out


def ids_nll(
    judge: Judge,
    ids: np.ndarray,
    micro_batch: int,
    label: str = "judge, ids",
    group: Group = ALONE,
    start: int = 1,
) -> np.ndarray | None:
    """Mean -log p of the tokens from `start` on, per text of ids[N, L]: [N] float64. Perplexity (protocol ids) = exp(mean).

    The processes of the group share the texts; all but the first get None.
    """

    def own(rows: slice) -> np.ndarray:
        found = token_nll(judge, ids[rows].tolist(), micro_batch, label)
        return np.array(
            [nll[start - 1 :].mean(dtype=np.float64) for nll in found]
        )  # token i is predicted at i - 1

    return group.map_rows(len(ids), own)


def retokenized_nll(
    judge: Judge,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    eos_id: int,
    micro_batch: int,
    label: str = "judge, retokenized",
    group: Group = ALONE,
) -> np.ndarray | None:
    """Per text of ids[N, L]: sum of -log p, and number, of the tokens that count, [N, 2]. Perplexity = exp(mean sum / mean number).

    The processes of the group share the texts; all but the first get None.
    """
    ours, theirs = tokenizer.id_to_token(eos_id), judge.tokenizer.eos_token
    if theirs is None:
        raise HalfstepError(
            f"judge: the tokenizer of {judge.name} names no eos_token; add it to its tokenizer_config.json"
        )
    limit = min(ids.shape[1], judge.context or ids.shape[1])

    def own(rows: slice) -> np.ndarray:
        texts = [
            text.replace(ours, theirs)
            for text in tokenizer.decode_batch(ids[rows].tolist(), skip_special_tokens=False)
        ]
        again = judge.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        sums = []
        for text, nll in zip(again, token_nll(judge, again, micro_batch, label), strict=True):
            eos = np.array(text) == judge.tokenizer.eos_token_id
            counts = (~eos | (eos.cumsum() == 1))[
                1:
            ]  # at an EOS the running count is 1 for the first only
            sums.append((nll[counts].sum(dtype=np.float64), counts.sum()))
        return np.array(sums, np.float64)

    sums = group.map_rows(len(ids), own)
    if group.is_main and not sums[:, 1].any():
        raise HalfstepError(
            "samples: no token to score, every text is empty or end-of-text alone; look at samples.txt"
        )
    return sums
