"""Tasks of lm-eval that need no network: a .yaml file and a .jsonl file next to it."""

import json
from pathlib import Path

import yaml


def write_task(folder: Path, name: str, rows: list[dict], **changes) -> str:
    """A task of multiple choice over rows of question, choices and label; its .yaml file.

    A change to None leaves a key out.
    """
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }
    path = folder / f"{name}.yaml"
    kept = {key: value for key, value in (task | changes).items() if value is not None}
    path.write_text(yaml.safe_dump(kept))
    return str(path)


def write_generation(folder: Path, name: str, rows: list[dict], **kwargs) -> str:
    """A task whose answers are written: rows of question and answer; its .yaml file.

    Its generation_kwargs are greedy, with at most 4 tokens before a full stop, or as given.
    """
    options = {"until": ["."], "max_gen_toks": 4, "do_sample": False} | kwargs
    changes = {
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{answer}}",
        "generation_kwargs": options,
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    return write_task(folder, name, rows, **changes)


def write_rolling(folder: Path, name: str, texts: list[str]) -> str:
    """A task that asks for the likelihood of whole texts; its .yaml file."""
    rows = [{"text": text} for text in texts]
    metrics = [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]
    changes = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_choice": None}
    changes |= {"doc_to_target": "{{text}}", "metric_list": metrics}
    return write_task(folder, name, rows, **changes)
