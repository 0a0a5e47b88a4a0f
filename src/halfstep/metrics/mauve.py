"""MAUVE (arXiv 2102.01454): how close the distribution of written texts is to human text, 0 to 1.

Texts of both kinds become features of the judge: the last hidden state of their last token, or the
mean over their tokens. k-means puts the features in num / 10 bins. Let p and q be the two
histograms over these bins. MAUVE is the area under the curve over the mixtures r, c = 5:

    (exp(-c KL(q|r)), exp(-c KL(p|r))),   r = w p + (1 - w) q

It is computed by the package `mauve-text` of the authors (Pillutla et al.); the features are taken
here, from the judge that is loaded anyway.

The number grows with fewer texts and fewer bins: do not compare values from other numbers of texts,
lengths or judges.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import torch

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import computing
from halfstep.metrics.perplexity import Judge, pad_texts
from halfstep.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCALING = 5  # the curve's c
SEEDS = (1, 2, 3, 4, 5)  # of the k-means
# 97.5% point of Student's t with four degrees of freedom, for the mean of five seeds.
T = 2.7764451051977987


@torch.no_grad()
def judge_features(  # noqa: PLR0913 - what is read, how, and who shares the work
    judge: Judge,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    eos_id: int,
    micro_batch: int,
    label: str = "judge, features",
    group: Group = ALONE,
    mean: bool = False,
    spans: np.ndarray | None = None,
) -> np.ndarray | None:
    """The judge's last hidden state at the last token of each text ids[N, L]: [N, D] float32.

    With `mean` it is the mean over all tokens of a text: the last token of a window, which is cut
    anywhere, says little more than where the cut fell. It is taken after the last norm;
    `tokenizer` is that of the ids. As `mauve-text` does, texts are decoded and tokenized again by
    the judge's tokenizer, of which the first L tokens are read. With the spans[N, 2] of responses a
    text ends with its response, and the mean is over that. The ranks of the group share the
    texts; all but rank 0 get None.
    """
    L = ids.shape[1]
    if judge.context is not None and judge.context < L:
        raise HalfstepError(
            f"judge: texts of {L} tokens, but {judge.name} reads at most {judge.context}; "
            "name another judge"
        )

    def of_rows(rows: slice) -> np.ndarray:
        inside = None if spans is None else spans[rows]
        texts, given = judge.retokenize(ids[rows], tokenizer, eos_id, inside)
        for i, (text, before) in enumerate(zip(texts, given, strict=True)):
            if len(text) <= before:
                raise HalfstepError(
                    f"judge: text {rows.start + i} has no token for {judge.name}, "
                    "so it has no features; look at samples.txt, or name another judge"
                )
        features = []
        with Progress(label, len(texts), "text") as progress:
            for first in range(0, len(texts), micro_batch):
                batch = texts[first : first + micro_batch]
                starts = torch.tensor(given[first : first + micro_batch], device=judge.device)
                x, attend = pad_texts(batch, judge.device)
                network = judge.network.base_model
                with computing(judge.device, judge.precision):
                    read = network(input_ids=x, attention_mask=attend, use_cache=False)
                h = read.last_hidden_state
                if mean:
                    position = torch.arange(x.shape[1], device=judge.device)
                    counts = attend * (position >= starts[:, None])
                    found = (h.float() * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
                else:
                    index = torch.arange(len(batch), device=judge.device)
                    found = h[index, attend.sum(1) - 1].float()
                features.append(found.cpu())
                progress.update(len(batch))
        return torch.cat(features).numpy()

    return group.map_rows(len(ids), of_rows)


def mauve(reference: np.ndarray, written: np.ndarray) -> tuple[float, tuple[float, float]]:
    """MAUVE between features[n, D] of human texts and features[m, D] of written ones.

    The value is the mean over SEEDS, with its 95% t interval. The interval is over the k-means
    alone: how precisely the number is computed, not how it would vary with other texts.
    """
    if min(len(reference), len(written)) < 2:
        raise HalfstepError(
            f"MAUVE: found {len(reference)} references and {len(written)} texts, "
            "expected at least two of each; add prompts"
        )
    import faiss
    from mauve import compute_mauve

    faiss.omp_set_num_threads(torch.get_num_threads())
    how = {"mauve_scaling_factor": SCALING, "verbose": False}
    # Ten texts a bin are MAUVE's; faiss would print a warning below 39 for each k-means.
    k_means = partial(faiss.Kmeans, min_points_per_centroid=1)
    with warnings.catch_warnings(), patch.object(faiss, "Kmeans", k_means):
        warnings.simplefilter("ignore")  # exp(-c inf) overflows to the 0 that is meant
        found = [
            compute_mauve(p_features=reference, q_features=written, seed=seed, **how)
            for seed in SEEDS
        ]
    # Of equal histograms the curve is one point, (1, 1), and `mauve-text` may give 0.75.
    values = [1.0 if np.array_equal(one.p_hist, one.q_hist) else one.mauve for one in found]
    mean = float(np.mean(values))
    half = T * float(np.std(values, ddof=1)) / len(SEEDS) ** 0.5
    return mean, (max(mean - half, 0.0), min(mean + half, 1.0))
