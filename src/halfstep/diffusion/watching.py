"""Watching a sampler: which step revealed each position of one text, seen from its passes alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser

Show = Callable[[Tensor, Tensor], None]
"""Called with xt[B, L] and t[B] before each pass of a network."""

PASSES = ("features", "features_and_kv")  # the members of a denoiser that are one pass each
HIDDEN = -1
GIVEN = 0


def watched(denoiser: Denoiser, show: Show) -> Denoiser:
    """The same denoiser, which calls show(xt, t) before each of its passes.

    A sampler that is given it draws the same tokens. An ordinary sampler pays nothing for it.
    """
    return cast(Denoiser, _Watched(denoiser, show))


@dataclass(frozen=True)
class _Watched:
    """A denoiser and who watches it; all members are the denoiser's own."""

    denoiser: Denoiser
    show: Show

    def __getattr__(self, name: str) -> Any:
        member = getattr(self.denoiser, name)
        if name not in PASSES:
            return member

        def shown(xt: Tensor, t: Tensor, *rest: Any, **options: Any) -> Any:
            self.show(xt, t)
            return member(xt, t, *rest, **options)

        return shown


class Reveals:
    """The positions of one text, and the step that revealed each of them.

    ids: int64 [L], with mask_id where nothing is revealed yet
    step_of: int64 [L]; k from 1 to `steps` for what step k revealed, GIVEN, or HIDDEN
    step: the step that runs now, from 1 on; 0 before the first pass
    passes: passes of the network so far

    The time of a pass says which step it is; with by_time=False each pass is the next step.
    """

    def __init__(self, frame: Tensor, mask_id: int, steps: int, by_time: bool = True):
        self.ids, self.mask_id, self.steps, self.by_time = frame, mask_id, steps, by_time
        self.step_of = torch.where(frame == mask_id, HIDDEN, GIVEN)
        self.step = self.passes = 0

    def before_pass(self, xt: Tensor, t: Tensor) -> None:
        """Note what the last step revealed, and which one begins: xt[1, L] at its time t[1]."""
        self.note(xt[0])
        self.passes += 1
        self.step = 1 + round((1 - t[0].item()) * self.steps) if self.by_time else self.passes

    def note(self, ids: Tensor) -> None:
        """Note that the step that runs now has revealed what is new in ids[L], or taken it back."""
        self.ids = ids.cpu().clone()  # a sampler may go on to write into its own
        self.step_of[self.ids == self.mask_id] = HIDDEN
        is_new = (self.step_of == HIDDEN) & (self.ids != self.mask_id)
        self.step_of[is_new] = self.step
