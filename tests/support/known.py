"""Languages with known probabilities, and files as the commands write them."""

import io
import json
import tempfile

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from halfstep.checkpoint import build_network, save_checkpoint
from halfstep.files import sha256, write_atomic, write_json
from halfstep.meta import Framing

UNFRAMED = {"framing": Framing(begin=[0], end=[0]), "is_framed": False, "turn": None}
"""The frame of a model of our own: EOS on both sides, which are part of the text"""


class Language:
    """A perfect denoiser: the posterior over an enumerated set of windows.

    It sums the windows that agree with the visible tokens. `asked` counts the rows of logits.
    """

    ignores_time = True

    def __init__(self, windows: dict[tuple[int, ...], float], vocabulary: int):
        self.windows, self.vocabulary, self.mask_id = windows, vocabulary, vocabulary
        self.asked = 0

    def features(self, xt, t, where=None):
        assert t.shape == (len(xt),) and ((t > 0) & (t < 1)).all()
        p = torch.zeros(*xt.shape, self.vocabulary, dtype=torch.float64)
        for row, out in zip(xt.tolist(), p, strict=True):
            for window, chance in self.windows.items():
                if len(window) == len(row) and self._agree(window, row):
                    out[torch.arange(len(row)), torch.tensor(window)] += chance
        return p.log() if where is None else p.log()[where]

    def _agree(self, window, row):
        return all(v in (w, self.mask_id) for v, w in zip(row, window, strict=True))

    def log_p(self, h):
        self.asked += len(h)
        return h.log_softmax(-1)


class Stubborn:
    """A denoiser that is wrong in a fixed way: the visible tokens fix its random probabilities."""

    ignores_time = True

    def __init__(self, vocabulary: int):
        self.vocabulary = self.vocab_size = self.mask_id = vocabulary

    def features(self, xt, t, where=None):
        rows = [
            np.random.default_rng([7, *row]).normal(0, 2, (len(row), self.vocabulary))
            for row in xt.tolist()
        ]
        table = torch.from_numpy(np.stack(rows))
        return table if where is None else table[where]

    def log_p(self, h):
        return h.log_softmax(-1)


def words_tokenizer(text: str) -> Tokenizer:
    """One token per word of `text`, in order of appearance after EOS (id 0)."""
    eos = "<|endoftext|>"
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([eos, *text.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, eos))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([eos])
    return tokenizer


def write_checkpoint(folder, tokenizer, **changes):
    """An untrained denoiser with windows of 32 tokens; `changes` are of its tokenizer.json."""
    size = tokenizer.get_vocab_size()
    meta = {"kind": "diffusion", "network": {"size": "tiny"}, "vocab_size": size}
    meta |= {"eos_id": tokenizer.token_to_id("<|endoftext|>"), "length": 32, "round": 0}
    weights = build_network(meta).state_dict()
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(json.dumps(json.loads(tokenizer.to_str()) | changes))
        file.flush()
        save_checkpoint(folder, {"ema.safetensors": weights}, meta, file.name)
    return folder


def write_samples(folder, ids, steps, kind="diffusion", model="stories-tiny/teacher"):
    """A folder of samples as `halfstep generate` writes it."""
    buffer = io.BytesIO()
    np.save(buffer, ids)
    write_atomic(folder / "samples.npy", buffer.getvalue())
    facts = {
        "model": model,
        "checkpoint": "ab" * 32,
        "kind": kind,
        "sampler": "ancestral",
        "steps": steps,
        "network_evaluations": float(steps),
        "num_samples": len(ids),
        "seed": 1,
        "weights": "ema",
        "draw_dtype": "float64",
        "temperature": 1.0,
        "elapsed_s": 1.0,
        "sha256": sha256(folder / "samples.npy"),
        "commit": "unknown",
        "meta": {},
    }
    write_json(folder / "samples.json", facts)
