"""MAUVE (Pillutla et al., arXiv 2102.01454): how far the law of the texts written lies from that of human texts, in one number from 0 to 1.

Texts of both kinds become features of the judge (the last hidden state of their last token), the features are put in num / 10 bins by
k-means, and the two histograms p and q over these bins give the curve exp(-c KL(q|r)), exp(-c KL(p|r)) over r = w p + (1 - w) q. MAUVE is the
area under it, c = 5. The computation is the authors' package `mauve-text`; the features are taken here, from the judge that is loaded anyway.
The number grows with fewer texts and fewer bins: values from other numbers of texts, lengths or judges do not compare.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError
from halfstep.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from halfstep.metrics.perplexity import Judge

SCALING = 5  # the curve's c
SEEDS = (1, 2, 3, 4, 5)  # of the k-means
T = 2.7764451051977987  # the 97.5% point of Student's t with four degrees of freedom, for the mean over five seeds


@torch.no_grad()
def features(
    judge: Judge,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    eos_id: int,
    micro_batch: int,
    label: str = "judge, features",
    group: Group = ALONE,
) -> np.ndarray | None:
    """Texts ids[N, L] of `tokenizer` -> the judge's last hidden state (after its last norm) at each text's last token, [N, D] float32.

    As `mauve-text` does with texts: they are decoded, and tokenised again by the judge's tokenizer, the first L tokens. The processes of the
    group share the texts; all but the first get None.
    """
    L = ids.shape[1]
    if judge.context is not None and judge.context < L:
        raise HalfstepError(
            f"judge: texts of {L} tokens, but {judge.name} reads at most {judge.context}; name another judge"
        )

    def own(rows: slice) -> np.ndarray:
        texts = tokenizer.decode_batch(ids[rows].tolist(), skip_special_tokens=False)
        if judge.tokenizer.eos_token:
            texts = [
                text.replace(tokenizer.id_to_token(eos_id), judge.tokenizer.eos_token)
                for text in texts
            ]
        again = judge.tokenizer(texts, truncation=True, max_length=L)["input_ids"]
        network, pieces = judge.network.base_model, []
        with Progress(label, len(again), "text") as progress:
            for first in range(0, len(again), micro_batch):
                batch = [torch.tensor(text) for text in again[first : first + micro_batch]]
                # padded on the right, where a causal model does not see it
                x = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(judge.device)
                last = torch.tensor([len(text) - 1 for text in batch], device=judge.device)
                attend = (torch.arange(x.shape[1], device=judge.device) <= last[:, None]).long()
                h = network(input_ids=x, attention_mask=attend, use_cache=False).last_hidden_state
                pieces.append(h[torch.arange(len(batch), device=judge.device), last].float().cpu())
                progress.update(len(batch))
        return torch.cat(pieces).numpy()

    return group.map_rows(len(ids), own)


def mauve(reference: np.ndarray, written: np.ndarray) -> tuple[float, tuple[float, float]]:
    """MAUVE between features[n, D] of human texts and features[m, D] of written ones: mean over SEEDS, and its 95% t interval.

    The interval is over the k-means alone: it says how well the number is computed, not how it would vary with other texts.
    """
    if min(len(reference), len(written)) < 2:
        raise HalfstepError(
            f"MAUVE: found {len(reference)} references and {len(written)} texts, expected at least two of each; add prompts"
        )
    import faiss
    from mauve import compute_mauve

    faiss.omp_set_num_threads(torch.get_num_threads())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows of exp(-c inf), which is the 0 that is meant
        found = [
            compute_mauve(
                p_features=reference,
                q_features=written,
                mauve_scaling_factor=SCALING,
                seed=seed,
                verbose=False,
            ).mauve
            for seed in SEEDS
        ]
    mean, half = float(np.mean(found)), T * float(np.std(found, ddof=1)) / len(SEEDS) ** 0.5
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))
