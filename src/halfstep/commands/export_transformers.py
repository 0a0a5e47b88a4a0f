"""A checkpoint of a model of transformers as the folder that transformers loads it from."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from halfstep.checkpoint import Model, checked_file, kept_files
from halfstep.commands.import_transformers import EXPORTED, swap_of, with_ids
from halfstep.errors import HalfstepError
from halfstep.files import scratch_folder, write_atomic
from halfstep.pretrained import CAUSAL, MASKED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from halfstep.models.hf import TransformersNetwork

WEIGHTS = "model*.safetensors*"  # one file, or several and their index
HEADER = """\
{base}library_name: transformers
pipeline_tag: {task}
tags: [masked-diffusion, sdtt]
"""
USAGE = """\
The network is `{network}`{brought}, with the tokenizer and the ids of its source, {source}. The
weights are in {dtype}.
```python
import torch
from transformers import AutoConfig, {auto}, AutoTokenizer

folder = "."  # where this file is
tokenizer = AutoTokenizer.from_pretrained(folder{code})
config = AutoConfig.from_pretrained(folder{code})
{both_ways}model = {auto}.from_pretrained(folder, config=config{code}).eval()
{in_layers}
mask, tokens, length, steps = {mask_id}, {tokens}, {length}, {steps}
x = torch.full((1, length), mask)  # visible tokens of x stay as they are
for step in range(steps, 0, -1):
    with torch.no_grad():
        logits = model(input_ids=x).logits[..., :tokens].double()
{shift}    logits[..., mask] = -torch.inf
    drawn = torch.distributions.Categorical(logits=logits).sample()
    shown = (x == mask) & (torch.rand(x.shape) < 1 / step)
    x = torch.where(shown, drawn, x)
print(tokenizer.decode(x[0]))
```
`logits: {logits}`: {meaning}

halfstep reads this folder too, and has faster samplers:
```sh
halfstep import --source hf:. --output models/own/teacher{flag}
halfstep generate models/own/teacher --steps {steps}
```
"""
MEANING = {
    "same": "the output at a position predicts the token at this position.",
    "shifted": (
        "the output at position i predicts the token at i + 1, as in an autoregressive model.\n"
        "So the code moves the outputs by one, and the last one predicts the first token."
    ),
}
SHIFT = "    logits = logits.roll(1, 1)  # the output before a position predicts its token\n"
# transformers lets a position of a causal model read only earlier ones.
BOTH_WAYS = "config.is_causal = False  # every position reads all others\n"
IN_LAYERS = """\
for part in model.modules():
    if hasattr(part, "is_causal"):
        part.is_causal = False
"""


def config_of_source(model: Model) -> dict[str, Any]:
    """config.json of an export: that of the source, with its ids, and what the student is.

    The entry EXPORTED says round, step count and logits.
    """
    about = model.meta["transformers"]
    config = with_ids(about["config"], swap_of(about["mask_id"], model.vocab_size))
    said = {"round": model.meta["round"], "student_steps": model.meta.get("student_steps")}
    theirs: Any = model.network
    return config | {
        "architectures": [type(theirs.model).__name__],
        "torch_dtype" if "torch_dtype" in config else "dtype": _name(_dtype(model)),
        EXPORTED: {**said, "logits": logits_of(model)},
    }


def logits_of(model: Model) -> str:
    """Which output of a model predicts a token."""
    return "shifted" if model.meta["network"]["shifted"] else "same"


def header_and_usage(model: Model, steps: int) -> tuple[str, str]:
    """The YAML header of a model card without its license, and the text on how to use it."""
    about, logits = model.meta["transformers"], logits_of(model)
    theirs: Any = model.network
    auto, source = about["auto"], about["source"]
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source.partition("@")[0])
    is_causal, has_code = auto != MASKED, bool(about.get("code"))
    header = HEADER.format(
        base=f"base_model: {source.partition('@')[0]}\n" if is_hub_name else "",
        task="text-generation" if auto == CAUSAL else "fill-mask",
    )
    usage = USAGE.format(
        network=type(theirs.model).__name__,
        source=source if is_hub_name else "a local folder",
        dtype=_name(_dtype(model)),
        auto=auto,
        brought=", whose code is in this folder" if has_code else " of transformers",
        code=", trust_remote_code=True" if has_code else "",
        flag=" --trust-remote-code" if has_code else "",
        both_ways=BOTH_WAYS if is_causal else "",
        in_layers=IN_LAYERS if is_causal else "",
        mask_id=about["mask_id"],
        tokens=model.vocab_size + 1,
        length=model.length,
        steps=steps,
        shift=SHIFT if logits == "shifted" else "",
        logits=logits,
        meaning=MEANING[logits],
    )
    return header, usage


def check_kept(checkpoint: Path, model: Model) -> None:
    """HalfstepError if a checkpoint of a model of transformers lacks the files of its tokenizer."""
    if not kept_files(model.meta):
        raise HalfstepError(
            f"--checkpoint {checkpoint}: holds no files of its source's tokenizer, because an "
            "older halfstep imported it; import it again"
        )


def write_model(output: Path, checkpoint: Path, model: Model) -> None:
    """Write the weights and the tokenizer, as the source has them; `model` is used up.

    The weights have the dtype that the source's config.json names if they lose nothing in it, and
    float32 otherwise.
    """
    for old in output.glob(WEIGHTS):
        old.unlink()
    network: TransformersNetwork = model.network  # type: ignore[assignment]
    theirs = network.as_published(model.meta["transformers"]["mask_id"]).to(_dtype(model))
    _save_weights(theirs, output)
    for name in kept_files(model.meta):
        content = checked_file(checkpoint, name, model.meta).read_bytes()
        write_atomic(output / Path(name).name, content)


def _save_weights(model: PreTrainedModel, output: Path) -> None:
    """The files of weights that transformers writes, each complete or absent."""
    import transformers

    transformers.logging.disable_progress_bar()
    with scratch_folder(output / "weights") as folder:
        model.save_pretrained(folder / "all")
        for file in sorted((folder / "all").glob(WEIGHTS)):
            write_atomic(output / file.name, partial(os.replace, file))


def _dtype(model: Model) -> torch.dtype:
    """The dtype of the source's configuration if no weight changes in it, else float32."""
    config = model.meta["transformers"]["config"]
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if named not in (torch.bfloat16, torch.float16):
        return torch.float32
    weights = model.network.parameters()
    is_exact = all(torch.equal(p.to(named).to(p.dtype), p) for p in weights)
    return named if is_exact else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
