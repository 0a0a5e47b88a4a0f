"""halfstep: teach a masked diffusion language model to write in 8 steps what took it 1,024 (SDTT, arXiv 2410.21035).

    model = halfstep.load("results/models/stories-tiny/kl_backward/round-7")
    print(halfstep.generate(model, steps=8)[0])

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from halfstep.checkpoint import Model

__version__ = "0.1.0"
__all__ = ["generate", "load"]


def load(folder: str | Path, weights: str = "ema", device: str = "cpu") -> Model:
    """A checkpoint folder, ready for use; no configuration needed. weights: ema, raw or best."""
    from halfstep.checkpoint import load_checkpoint

    return load_checkpoint(folder, weights, device)


def generate(
    model: Model, steps: int = 8, num_samples: int = 1, prompt: str = "", seed: int = 1, **writing
) -> list[str]:
    """Texts written by a loaded model in `steps` sampling steps; `writing` takes sampler, temperature and top_p.

    A prompt begins every text; each <|mask|> in it is one token to be filled in.
    """
    from halfstep.commands.generate import draw_texts, encode_prompt
    from halfstep.config import GenerateOptions, Machine

    device = next(model.network.parameters()).device
    how = GenerateOptions(num_samples=num_samples, sampling_seed=seed, **writing)
    prompts = encode_prompt(model, prompt).expand(num_samples, -1)
    texts = draw_texts(model, prompts, model.length, steps, how, Machine(), device)
    return model.tokenizer.decode_batch(texts.ids.tolist(), skip_special_tokens=True)
