"""What all tests share: one thread, oracle and helpers importable, and the folder `shared` where it is there."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """A small finished results/ folder; whoever spoils it takes a copy."""
    from small import pipeline

    return pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared, what developers have beside the checkout; users do not."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: this test compares with files that only developers have")
    return folder
