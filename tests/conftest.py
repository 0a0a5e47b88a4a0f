"""What all tests share: one thread, oracle and helpers importable, and the folder `shared` where it
is there.
"""

import gc
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from known import write_samples

from halfstep import checkpoint
from halfstep.commands.data import prepare_corpus
from halfstep.config import Corpus, Network
from halfstep.files import read_json
from halfstep.models.gpt import save_gpt_neox

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Spare all later garbage collections the modules and the tests, which stay: 0.4 s each."""
    gc.freeze()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name bytes by their number.

    All processes of pytest-xdist must collect the same names, and gzip writes the time.
    """
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A small finished results/ folder; whoever spoils it takes a copy."""
    from small import pipeline

    return pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without the network."""
    from wheels import build_wheel

    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared next to the checkout, which only developers have."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(
            f"{folder} is not there: this test compares with files that only developers have"
        )
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """results/ with a stories corpus, a random teacher and baseline of size tiny, and the teacher's
    samples at two step counts.
    """
    root = tmp_path_factory.mktemp("world") / "results"
    corpus = root / "data" / "stories"
    prepare_corpus(
        corpus,
        Corpus(
            kind="stories", length=128, vocab_size=640, num_documents=60, validation_documents=60
        ),
        workers=1,
    )
    facts = read_json(corpus / "manifest.json")
    models_ = root / "models" / "stories-tiny"
    for kind, name in (("diffusion", "teacher"), ("autoregressive", "baseline")):
        torch.manual_seed(0)
        meta = {
            "kind": kind,
            "network": Network(size="tiny").model_dump(),
            **{k: facts[k] for k in ("vocab_size", "eos_id", "length")},
        }
        network = checkpoint.build_network(meta)
        torch.nn.init.normal_(network.output_layer.linear.weight, std=0.1)
        state = network.state_dict()
        checkpoint.save_checkpoint(
            models_ / name,
            {"model.safetensors": state, "ema.safetensors": state},
            meta,
            corpus / "tokenizer.json",
        )
    save_gpt_neox(
        network,
        models_ / "baseline" / "hf",
        facts["length"],
        facts["eos_id"],
        corpus / "tokenizer.json",
        "<|endoftext|>",
    )
    held_out = np.fromfile(corpus / "validation.bin", facts["dtype"]).reshape(-1, facts["length"])
    for steps in (8, 16):
        ids = np.random.default_rng(steps).permuted(held_out[:12], axis=1).astype(np.int32)
        write_samples(root / "samples" / "stories-tiny" / "teacher" / f"steps-{steps}", ids, steps)
    return SimpleNamespace(
        root=root,
        corpus=corpus,
        facts=facts,
        models=models_,
        samples=root / "samples" / "stories-tiny" / "teacher",
        held_out=held_out,
    )
