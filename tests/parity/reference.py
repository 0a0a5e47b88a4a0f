"""The reference's tensors, and our networks with its weights."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from halfstep.checkpoint import load_weights
from halfstep.diffusion.schedules import LogLinear
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT

HERE = Path(__file__).parent
MASK = 256


def arrays(name: str) -> dict[str, torch.Tensor]:
    """Arrays of one .npz as tensors; scalars keep their dtype."""
    return {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(HERE / name).items()}


def dit(which: str) -> DiT:
    """The DiT of the fixtures with the weights of `which`, teacher or student; uses every key."""
    network = DiT(MASK, width=64, blocks=2, heads=4, cond_width=32)
    path = HERE / f"dit_a_{which}.safetensors"
    state = load_file(path)
    assert state.keys() == network.state_dict().keys()
    load_weights(network, state, path)
    return network


def denoiser(which: str) -> SubsDenoiser:
    return SubsDenoiser(dit(which).eval(), LogLinear())


def subs(denoiser: SubsDenoiser, x: torch.Tensor) -> torch.Tensor:
    """Our log p(x0 | x) over the 256 data tokens at every position, [B, L, 256]."""
    h = denoiser.features(x, torch.zeros(len(x)))
    return denoiser.log_p(h.flatten(0, 1)).view(*x.shape, MASK)
