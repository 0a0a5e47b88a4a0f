"""The NELBO of whole texts by a denoiser: masks stratified over their sizes, in full batches.

Texts of one length share a batch, so nothing is padded. A pass reads logits at masked positions
only, and holds as many tokens as the caller allows, whatever the length of the texts.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser
from halfstep.distributed.group import Group
from halfstep.kernels.categorical import uniforms
from halfstep.kernels.logits import row_chunks
from halfstep.metrics.likelihood import (
    EXACT,
    Question,
    Tick,
    autoregressive_nll,
    suffix_masks,
)
from halfstep.progress import Progress

if TYPE_CHECKING:
    from halfstep.checkpoint import Model

SEED = 0  # of the masks
AT_ONCE = 1024  # windows that are Python objects at a time


def masks_of(n: int, draws: int, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks [M, n] and weights [M] that give the NELBO of n tokens (`suffix_masks`).

    All of them up to n = EXACT, which give the exact value; above, `draws` of this seed and number.
    Two texts with one number have the same uniforms at the same positions: where they begin with
    the same tokens, they have almost the same masks (common random numbers), and the difference of
    their estimates has far less noise than each of them.
    """
    if n <= EXACT:
        return suffix_masks(n, None)
    u = uniforms(seed, number, 1, draws * (n + 1))[0].view(n + 1, draws).T
    masks, weights = suffix_masks(n, u)
    return masks[1:], weights[1:]  # the first one is the full mask, with weight 0


def text_nelbo(
    denoiser: Denoiser,
    questions: list[Question],
    draws: int,
    tokens: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
    tick: Tick = None,
) -> np.ndarray:
    """NELBO in nats of what each question asks for, [Q] float64 (MDLM eq. 10).

    As in `diffusion_nll`, a pass with k of n tokens masked gives the denoiser the time k / (n + 1).

    Args:
        denoiser: p(x0 | xt)
        questions: windows; ids[start:end] is asked for, the whole window with 0 and its length
        draws: masks of each question with more than EXACT tokens
        tokens: tokens in one pass of the network
        seed: seed of the masks, which also depend on the question's number
        device: of the denoiser
        tick: called with the number of questions that were just finished
    """
    nelbo = np.zeros(len(questions))

    def shape(i: int) -> tuple[int, int, int]:
        return len(questions[i].ids), questions[i].start, questions[i].end

    for (length, start, end), same in groupby(sorted(range(len(questions)), key=shape), key=shape):
        n, index = end - start, list(same)
        rows, masks_each = max(1, tokens // length), 2**n - 1 if n <= EXACT else draws
        together = max(1, rows // masks_each)
        for first in range(0, len(index), together):
            some = index[first : first + together]
            plans = [masks_of(n, draws, seed, questions[i].number) for i in some]
            masks, weights = (np.concatenate(parts) for parts in zip(*plans, strict=True))
            owner = np.repeat(some, masks_each)
            for at in range(0, len(owner), rows):
                part = slice(at, at + rows)
                x0 = torch.tensor([questions[i].ids for i in owner[part]])
                hidden = torch.zeros(x0.shape, dtype=torch.bool)
                hidden[:, start:end] = torch.from_numpy(masks[part])
                log_p, row = _read_hidden(denoiser, x0, hidden, n, device)
                np.subtract.at(nelbo, owner[part][row], weights[part][row] * log_p)
            if tick:
                tick(len(some))
    return nelbo


@torch.no_grad()
def _read_hidden(
    denoiser: Denoiser, x0: Tensor, hidden: Tensor, n: int, device: str | torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """log p of every hidden token of x0[B, L] in one pass, and its row, [N] each."""
    row, place = hidden.nonzero(as_tuple=True)  # on the host, which need not wait for the device
    wanted = x0[row, place].to(device)
    t = (hidden.sum(1) / (n + 1)).float().to(device)
    xt = x0.masked_fill(hidden, denoiser.mask_id).to(device)
    h = denoiser.features(xt, t, (row.to(device), place.to(device)))
    log_p = [
        denoiser.log_p(h[part]).gather(-1, wanted[part, None])[:, 0]
        for part in row_chunks(len(h), denoiser.vocab_size, h.device)
    ]
    return torch.cat(log_p).double().cpu().numpy(), row.numpy()


def window_nll(
    model: Model,
    windows: np.ndarray,
    draws: int,
    micro_batch: int,
    device: str,
    group: Group,
    label: str,
) -> np.ndarray | None:
    """Nats and tokens of each window of windows[N, L], [N, 2] float64 on rank 0; None on others.

    A denoiser's are the NELBO of all L tokens, EOS at both ends included, as MDLM counts them; an
    autoregressive model's are -log p of the L - 1 tokens after the first one, which is given. Of a
    model of transformers the frame is given too.
    """
    diffusion = model.kind == "diffusion"
    inside = slice(0, windows.shape[1])
    if model.is_framed:
        inside = model.framing.inside(windows.shape[1])
    start, end = inside.start if diffusion else max(1, inside.start), inside.stop

    def of_rows(rows: slice) -> np.ndarray:
        found = []
        with Progress(label, rows.stop - rows.start, "window") as progress:
            for first in range(rows.start, rows.stop, AT_ONCE):
                ids = windows[first : min(first + AT_ONCE, rows.stop)].tolist()
                asked = [
                    Question(tuple(window), start, end, first + i) for i, window in enumerate(ids)
                ]
                if diffusion:
                    tokens, tick = micro_batch * model.length, progress.update
                    nats = text_nelbo(model.denoiser, asked, draws, tokens, SEED, device, tick)
                else:
                    nats, _ = autoregressive_nll(
                        model.network, asked, micro_batch, device, progress.update
                    )
                found.append(np.column_stack([nats, np.full(len(ids), end - start)]))
        return np.concatenate(found)

    return group.map_rows(len(windows), of_rows)
