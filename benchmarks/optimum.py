"""How flat is the best student of one round? Entropies in nats, on held-out windows.

    python benchmarks/optimum.py results/models/docs-mini/teacher results/data/docs

A round's targets are random: the teacher takes two substeps, and what the first one reveals changes
the prediction of the rest. Averaged over the targets q of one masked position,

- kl_forward, KL(q || student), is smallest for their mean,
- kl_backward, KL(student || q), for their geometric mean, normalized.

The geometric mean is flatter than the mean where the targets disagree and their tails are heavy.
Then kl_backward raises the entropy of a student's samples above its teacher's.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from halfstep.checkpoint import load_checkpoint
from halfstep.data.windows import Windows
from halfstep.diffusion.masking import corrupt
from halfstep.distill.targets import teacher_targets

TEXTS, POSITIONS, DRAWS = 8, 400, 16
TOKENS = (1, 4, 16, 32)  # a substep reveals on average, of a text that is all masked


def entropy(log_p: Tensor) -> float:
    return -(log_p.exp() * log_p).sum(-1).mean().item()


@torch.no_grad()
def main(teacher: Path, corpus: Path) -> None:
    denoiser = load_checkpoint(teacher, "ema", "cpu", "float32").denoiser
    assert denoiser is not None, "an autoregressive checkpoint has no rounds"
    x0 = Windows(corpus, "validation")[torch.arange(TEXTS)]
    L, random = x0.shape[1], torch.Generator().manual_seed(0)

    def uniforms() -> Tensor:
        return torch.rand(x0.shape, generator=random, dtype=torch.float64)

    print("tokens a substep | teacher's one step | targets | their mean | their geometric mean")
    for tokens in TOKENS:
        t = torch.linspace(0.3, 0.95, TEXTS, dtype=torch.float64)
        xt = corrupt(x0, t, uniforms(), denoiser.schedule, denoiser.mask_id)
        masked = xt == denoiser.mask_id
        chosen = torch.randperm(int(masked.sum()), generator=random)[:POSITIONS]

        def log_p(h: Tensor, rows: Tensor = chosen) -> Tensor:
            return torch.log_softmax(denoiser.logits(h[rows]), -1)

        one_step = log_p(denoiser.features(xt, t.float(), masked))
        targets = torch.stack(
            [
                log_p(
                    teacher_targets(denoiser, xt, t.float(), tokens / L, 2, uniforms(), uniforms())
                )
                for _ in range(DRAWS)
            ]
        )
        mean = targets.logsumexp(0) - math.log(DRAWS)
        geometric = torch.log_softmax(targets.mean(0), -1)
        found = [entropy(each) for each in (one_step, targets, mean, geometric)]
        print(tokens, *(f"{value:.3f}" for value in found), sep=" | ", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("teacher", type=Path, help="folder of a diffusion checkpoint")
    parser.add_argument("corpus", type=Path, help="folder of its corpus")
    main(**vars(parser.parse_args()))
