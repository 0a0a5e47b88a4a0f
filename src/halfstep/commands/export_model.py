"""`halfstep export`: a folder that transformers loads, with a model card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer

from halfstep import __version__
from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.commands.export_transformers import (
    check_kept,
    config_of_source,
    header_and_usage,
    write_model,
)
from halfstep.commands.writers import MASK
from halfstep.config import Network
from halfstep.errors import HalfstepError, reason
from halfstep.files import write_atomic, write_json, write_tensors
from halfstep.metrics.rows import model_name
from halfstep.records import provenance
from halfstep.records.shapes import metric_rows
from halfstep.sanitize import mask_secrets

MODELING = Path(__file__).parents[1] / "exported" / "modeling_halfstep.py"
EXPORTED_SCHEDULES = ("loglinear", "cosine")  # SHARES of exported/modeling_halfstep.py
TEACHER_STEPS = 1024
TOLERANCE = 1e-4  # between log p of an export and ours, as a share of the largest |log p|
CARD = """\
---
{header}---
# {name}
A masked diffusion language model (MDLM, arXiv 2406.07524): {what} (arXiv 2410.21035).
{usage}
| | |
|---|---|
{facts}

## Measured
{measured}
"""
HEADER_OF_OURS = """\
license: apache-2.0
library_name: transformers
pipeline_tag: fill-mask
tags: [masked-diffusion, sdtt]
"""
USAGE_OF_OURS = """\
In the folder of this file:
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

model = AutoModelForMaskedLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", config=model.config)  # runs no code
print(tokenizer.decode(model.sample(num_samples=1, steps={steps})[0]))

fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
print(fill(f"Once upon a {{tokenizer.mask_token}} there was"))
```
The logits are log-probabilities: the mask token has none, and a visible token keeps its value. In
float32 they differ from those of halfstep by at most {tolerance:g} times the largest |log p|; in
bfloat16 and float16 by the rounding of these types. `PreTrainedTokenizerFast.from_pretrained` loads
the tokenizer without the model.
"""
CARD_COLUMNS = (
    *("metric", "task", "measure", "protocol", "version", "steps", "value", "low", "high"),
    *("num_samples", "seed", "sampler", "draw_dtype", "precision", "temperature", "judge", "data"),
    "commit",
)


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    weights: Literal["ema", "raw", "best"] = "ema",
    metrics: list[Path] | None = None,
    push: str | None = None,
    revision: str | None = None,
) -> None:
    """Write a folder that transformers loads without halfstep, with a model card.

    config.json is written last: a folder without it is not complete, and cannot be loaded.
    A model that came from transformers keeps its class, its configuration, its tokenizer and its
    ids, so that it is loaded as its teacher is.
    With --push it is uploaded to the hub, one revision per round. The card leaves out rows of other
    models, rows of other weights, and timings.

    Args:
        checkpoint: checkpoint folder of a denoiser
        output: folder to write
        weights: which weights of the checkpoint
        metrics: files of metric rows for the card
        push: hub repository, user/name
        revision: branch to push to (default: <run>-round-<n>, main for a teacher)
    """
    model = load_checkpoint(checkpoint, weights)
    if model.denoiser is None:
        raise HalfstepError(
            f"--checkpoint {checkpoint}: is autoregressive; transformers loads its hf/ folder"
        )
    name = model_name(checkpoint)
    rows = _rows_for_card(metrics or [], name, model.sha256, weights)
    text = mask_secrets(card(name, model, rows))
    # Without config.json nothing can be loaded: a folder that is half new and half old never is.
    if "transformers" in model.meta:
        check_kept(checkpoint, model)
        config = config_of_source(model)
        (output / "config.json").unlink(missing_ok=True)
        write_model(output, checkpoint, model)
    else:
        config = _config_for_transformers(model)
        tokenizer, mask = with_mask_token(model.tokenizer, model.mask_id)
        (output / "config.json").unlink(missing_ok=True)
        _write_weights(output, model)
        _write_tokenizer(output, model, tokenizer, mask)
        write_atomic(output / "modeling_halfstep.py", MODELING.read_bytes())
    write_atomic(output / "README.md", text)
    write_json(output / "config.json", config)
    read = [*checkpoint_files(checkpoint, weights), *(metrics or [])]
    provenance.write_record(output / provenance.NAME, [output], read)
    if push:
        branch = name.partition("/")[2].replace("/", "-") if model.meta["round"] else "main"
        upload(output, push, revision or branch)


def _config_for_transformers(model: Model) -> dict:
    """config.json of an export: the shape of the network, and the classes that load it.

    Raises HalfstepError if the exported file does not know the noise schedule.
    """
    if model.tokenizer.id_to_token(model.eos_id) is None:
        raise HalfstepError(
            f"meta.json: eos_id: found {model.eos_id}, but tokenizer.json has no token with this "
            "id; copy the whole folder again"
        )
    network = Network.model_validate(model.meta["network"])
    if network.schedule not in EXPORTED_SCHEDULES:
        raise HalfstepError(
            f"network.schedule: found {network.schedule!r}, but an exported model samples with "
            f"{' or '.join(EXPORTED_SCHEDULES)} only; add it to exported/modeling_halfstep.py"
        )
    return {
        "model_type": "halfstep",
        "architectures": ["HalfstepForMaskedLM"],
        "auto_map": {
            "AutoConfig": "modeling_halfstep.HalfstepConfig",
            "AutoModel": "modeling_halfstep.HalfstepModel",
            "AutoModelForMaskedLM": "modeling_halfstep.HalfstepForMaskedLM",
        },
        "vocab_size": model.vocab_size + 1,
        "hidden_dim": network.width,
        "n_blocks": network.blocks,
        "n_heads": network.heads,
        "cond_dim": network.cond_width,
        "model_length": model.length,
        "time_conditioning": network.time_conditioning,
        "schedule": network.schedule,
        "steps": model.meta.get("student_steps", TEACHER_STEPS),
        "shifted": network.shifted,
        "architecture": network.architecture,
        "bos_token_id": model.eos_id,
        "eos_token_id": model.eos_id,
        "pad_token_id": model.eos_id,  # attention_mask says which of them are padding
        "mask_token_id": model.mask_id,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }


def _write_weights(output: Path, model: Model) -> None:
    weights = model.network.state_dict()
    tensors = {f"backbone.{key}": value for key, value in weights.items()}
    write_tensors(output / "model.safetensors", tensors, {"format": "pt"})


def _write_tokenizer(output: Path, model: Model, tokenizer: str, mask: dict) -> None:
    """Write tokenizer.json, and its special tokens under the names that transformers knows."""
    eos = model.tokenizer.id_to_token(model.eos_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": eos,
        "mask_token": {"__type": "AddedToken", **mask},
        "model_max_length": model.length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_atomic(output / "tokenizer.json", tokenizer)
    write_json(output / "tokenizer_config.json", config)


def with_mask_token(tokenizer: Tokenizer, mask_id: int) -> tuple[str, dict]:
    """The JSON of a tokenizer that also knows the mask token, and that token's options.

    It encodes as halfstep does: no truncation, no padding, no token before or after a text. A blank
    before the mask belongs to the token that fills it.
    """
    content = MASK if tokenizer.token_to_id(MASK) is None else f"<|mask-{mask_id}|>"
    mask = {
        "content": content,
        "single_word": False,
        "lstrip": True,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    about = json.loads(tokenizer.to_str())
    about["truncation"] = about["padding"] = None
    if (about["post_processor"] or {}).get("type") != "ByteLevel":
        about["post_processor"] = None
    vocabulary = about["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary[content] = mask_id  # an added token alone would fill the first hole of the ids
    about["added_tokens"].append({"id": mask_id, **mask})
    text = json.dumps(about, ensure_ascii=False)
    found = Tokenizer.from_str(text).token_to_id(content)
    if found != mask_id:
        raise HalfstepError(
            f"tokenizer.json: the mask token would have id {found}, but the model has {mask_id}; "
            f"use a byte-level BPE, or a tokenizer of {mask_id} tokens"
        )
    return text, mask


def _rows_for_card(files: list[Path], name: str, digest: str, weights: str) -> list[dict]:
    """The rows of exactly these weights; prints a note if there are rows of other weights."""
    rows = [row for file in files for row in metric_rows(file)]
    rows = [row for row in rows if row.get("model") == name and row["metric"] != "latency_s"]
    others = {str(row.get("checkpoint")) for row in rows} - {digest[:16]}
    if others:
        print(
            f"note: rows of checkpoint {', '.join(sorted(others))} are not on the card: "
            f"these weights, {weights}, are {digest[:16]}",
            file=sys.stderr,
        )
    return [row for row in rows if row.get("checkpoint") == digest[:16]]


def card(name: str, model: Model, rows: list[dict]) -> str:
    """The model card: the model, its training, and every number with its protocol and interval."""
    meta = model.meta
    steps = meta.get("student_steps") or TEACHER_STEPS
    what = f"a teacher, meant for {TEACHER_STEPS:,} sampling steps"
    if meta["round"]:
        what = (
            f"round {meta['round']} of Self-Distillation Through Time, "
            f"meant for **{steps} sampling steps**"
        )
    header, usage = (
        header_and_usage(model, steps)
        if "transformers" in meta
        else (HEADER_OF_OURS, USAGE_OF_OURS.format(steps=steps, tolerance=TOLERANCE))
    )
    facts = _card_facts(meta, model.sha256, model.weights)
    return CARD.format(
        header=header,
        name=name,
        what=what,
        usage=usage,
        facts="\n".join(f"| {key} | {_cell(value)} |" for key, value in facts.items() if value),
        measured=_card_table(rows),
    )


def _card_facts(meta: dict, digest: str, weights: str) -> dict[str, object]:
    run = meta.get("run", {})
    source = meta.get("transformers", {}).get("source")
    options = run or meta.get("training", {})
    return {
        "network": (
            f"{meta['network']['size']}, {meta['vocab_size']} tokens and the mask, "
            f"texts of {meta['length']} tokens"
        ),
        "corpus": meta.get("corpus"),
        "round": meta["round"],
        "divergence": run.get("divergence"),
        "time grid of the teacher": run.get("teacher_times"),
        "training": "; ".join(f"{key} {value}" for key, value in options.items()),
        "adapted from": meta.get("adapted", {}).get("from"),
        "imported from": meta.get("imported", {}).get("source") or source,
        "steps": meta.get("student_steps"),
        "weights": f"{weights}, sha256 {digest[:16]}",
        "written by": f"halfstep {__version__}",
    }


def _cell(value: object) -> str:
    """A value in a table of the card: one line, without the signs that end a cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = "" if value is None else str(value)
    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return printable.replace("|", "\\|")


def _card_table(rows: list[dict]) -> str:
    if not rows:
        return "No metric was measured with these weights before this card was written."

    has_tasks = any(row.get("task") for row in rows)
    columns = [name for name in CARD_COLUMNS if has_tasks or name not in ("task", "measure")]
    lines = [
        "The interval [low, high] covers 95%. For MAUVE it covers the clustering alone, "
        "over the same texts.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        lines.append(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |")
    return "\n".join(lines)


def upload(folder: Path, name: str, branch: str) -> None:
    """Upload an exported folder to a branch of a hub repository; create both if needed."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        if branch != "main":
            api.create_branch(name, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=branch,
            commit_message=f"halfstep export, {branch}",
        )
    except Exception as error:  # the client, requests and the file system raise different types
        raise HalfstepError(
            f"--push {name}: the upload failed ({type(error).__name__}: {reason(error)}); "
            f"the folder {folder} is complete: check the network and `hf auth login`, "
            "and repeat the command"
        ) from None
