"""Decoders on one frontier: quality at equal entropy, passes, and time, in one process.

`halfstep latency --variant` times them in turns with the cached autoregressive decoder.

    python benchmarks/decoders.py results/models/stories-tiny results/data/stories --texts 64

Writes a Markdown table. Every row is a sampler with its options and a step count, for the teacher
and the last round of a run. The judge is the corpus's own autoregressive baseline. It is the scorer
of `energy` and `speculative` too, so their perplexity is that of the judge's favor: compare the
share of accepted stories, which the grammar decides, and MAUVE of nobody.

Perplexity at held-out entropy comes from three temperatures (metrics/frontier.py). Passes and times
are those of temperature 1; a time is that of a batch of 16 texts, the fastest of its batches.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from halfstep.checkpoint import Model, load_checkpoint
from halfstep.commands.variety import grammar_rows, held_out_texts
from halfstep.commands.writers import sampler_options, text_writer
from halfstep.config import DrawOptions
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.frontier import perplexity_at
from halfstep.metrics.perplexity import ids_nll, load_judge

TEMPERATURES = (0.7, 1.0, 1.3)
BATCH = 16
RESAMPLES = 1000


@dataclass(frozen=True)
class Decoder:
    """A sampler with its options, at one step count (None: as many as the text has tokens)."""

    name: str
    steps: int | None
    options: dict

    def draw_options(self, temperature: float) -> DrawOptions:
        chosen = {"temperature": temperature, **self.options}
        return DrawOptions.model_validate(chosen)

    def label(self, model: Model) -> str:
        """The sampler and its options, without the scorer."""
        if model.denoiser is None:
            return "autoregressive, cached"
        own = sampler_options(self.draw_options(1.0))
        own.pop("top_p", None)
        return ", ".join([self.name, *(f"{key} {value}" for key, value in own.items())])


def decoders(scorer: str, steps: list[int]) -> list[Decoder]:
    """What is compared: each sampler at its usual settings, for passes by step count or by its own
    pace."""
    asking = {"scorer": scorer}
    rows: list[tuple[str, list[int], list[dict]]] = [
        ("ancestral", [*steps, 256], [{}]),
        ("threshold", [], [{"threshold": p} for p in (0.5, 0.9)]),
        ("threshold", [16, 64], [{"threshold": 1.0}]),
        ("entropy_bounded", [], [{"entropy_bound": bound} for bound in (0.1, 4.0)]),
        (
            "remask",
            [64, 256],
            [
                {"remasking": "cap", "eta": 0.02},
                {"remasking": "loop", "eta": 0.02},
                {"remasking": "cap", "eta": 0.5, "by_confidence": True},
            ],
        ),
        ("energy", [16], [{"candidates": k} | asking for k in (4, 16)]),
        (
            "speculative",
            [],
            [
                options | asking
                for options in (
                    {"draft_tokens": 2},
                    {"draft_tokens": 4},
                    {"draft_tokens": 8, "draft_passes": 2},
                    {"draft_tokens": 4, "relaxation": 0.2},
                )
            ],
        ),
    ]
    return [
        Decoder(name, count, {"sampler": name} | options)
        for name, counts, settings in rows
        for options in settings
        for count in counts or [None]
    ]


def written(model: Model, decoder: Decoder, temperature: float, texts: int):
    """Texts [N, L], mean passes of the denoiser and of the scorer, and seconds of a batch."""
    steps = decoder.steps or model.length
    write = text_writer(model, model.length, steps, decoder.draw_options(temperature))
    prompts, ids, passes, asked, seconds = torch.empty(BATCH, 0, dtype=torch.long), [], [], [], []
    for first in range(0, texts, BATCH):
        started = time.perf_counter()
        batch = write(prompts, first)
        seconds.append(time.perf_counter() - started)
        ids.append(batch.ids.numpy())
        passes.append(batch.network_evaluations.double().numpy())
        if batch.autoregressive_passes is not None:
            asked.append(batch.autoregressive_passes.double().numpy())
    scorings = float(np.concatenate(asked).mean()) if asked else None
    return np.concatenate(ids), float(np.concatenate(passes).mean()), scorings, min(seconds)


def main(
    models: Path,
    corpus: Path,
    run: str,
    texts: int,
    steps: list[int],
    only: list[str],
    folders: list[str],
) -> None:
    """Print the table: each decoder for the teacher, the last round, and the baseline."""
    judge = load_judge(str(models / "baseline" / "hf"))
    rounds = sorted(models.glob(f"{run}/round-*"), key=lambda folder: int(folder.name[6:]))
    real = held_out_texts(corpus, 512).ids
    target = float(unigram_entropy(real).mean())
    print(
        f"Held-out text: perplexity {np.exp(ids_nll(judge, real, 32, 'held-out').mean()):.2f}, "
        f"entropy {target:.3f}. {texts} texts a cell, {len(TEMPERATURES)} temperatures.\n"
    )
    head = [
        "model",
        "sampler",
        "steps",
        "passes",
        "tokens a pass",
        "scorer's passes",
        "ms a text",
        "entropy",
        "perplexity",
        "at held-out entropy",
        "accepted stories",
    ]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    scorer = str(models / "baseline")
    chosen = folders or ["teacher", f"{run}/{rounds[-1].name}", "baseline"]
    for folder in [models / name for name in chosen]:
        model = load_checkpoint(folder, "ema", "cpu", "float32")
        some = decoders(scorer, steps) if model.denoiser else [Decoder("", None, {})]
        for decoder in some:
            if only and decoder.name and decoder.name not in only:
                continue
            curve, shown = [], []
            for temperature in TEMPERATURES:
                ids, passes, asked, seconds = written(model, decoder, temperature, texts)
                nll, entropy = ids_nll(judge, ids, 32, decoder.name), unigram_entropy(ids)
                tokens = np.full(len(ids), ids.shape[1] - 1.0)
                curve.append(np.stack([nll * tokens, tokens, entropy], -1))
                if temperature == 1:
                    rows = grammar_rows(ids, {}, model.tokenizer, 100)
                    share = next(r for r in rows if r["metric"] == "accepted_share")
                    shown = [
                        f"{passes:.1f}",
                        f"{model.length / max(passes, 1e-9):.1f}",
                        "" if asked is None else f"{asked:.1f}",
                        f"{1000 * seconds / BATCH:.1f}",
                        f"{entropy.mean():.3f}",
                        f"{np.exp(nll.mean()):.2f}",
                    ]
                    accepted = (
                        f"{share['value']:.1%} [{share['low']:.1%}, {share['high']:.1%}]"
                        if share["value"] is not None
                        else "none"
                    )
            found = perplexity_at(np.stack(curve), target, RESAMPLES)
            at = (
                found.reached
                if found.value is None
                else (
                    f"{found.value:.2f} [{found.low or float('nan'):.2f}, "
                    f"{found.high or float('nan'):.2f}]"
                )
            )
            cells = [
                folder.name,
                decoder.label(model),
                str(decoder.steps or ""),
                *shown,
                at,
                accepted,
            ]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, help="results/models/<teacher>")
    parser.add_argument("corpus", type=Path, help="results/data/<corpus>")
    parser.add_argument("--run", default="kl_backward")
    parser.add_argument("--texts", type=int, default=64, help=f"a multiple of {BATCH}")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--only", nargs="+", default=[], help="samplers by name")
    parser.add_argument("--folders", nargs="+", default=[], help="models, such as teacher baseline")
    given = parser.parse_args()
    torch.set_num_threads(1)
    main(given.models, given.corpus, given.run, given.texts, given.steps, given.only, given.folders)
