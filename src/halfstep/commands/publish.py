"""`halfstep import` and `halfstep export`: published weights become a checkpoint of ours, and a checkpoint a folder for transformers."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from halfstep import __version__, checkpoint
from halfstep.checkpoint import checkpoint_files as checkpoint_files
from halfstep.config import SIZES, Network, Training
from halfstep.data.pack import read_manifest
from halfstep.data.tokenizer import EOS, load_bpe
from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json, sha256, write_atomic, write_json
from halfstep.metrics.rows import model_name
from halfstep.models import hub
from halfstep.models.dit import COND_WIDTH
from halfstep.records import provenance
from halfstep.records.journal import Journal

MODELING = Path(__file__).parents[1] / "exported" / "modeling_halfstep.py"
DIVERGENCES = {"kld": "kl_backward", "mse": "mse", "tvd": "l1_log_p"}  # SDTT's names on the hub
FETCHED = ["*.safetensors", "*.bin", "config.json"]


def import_checkpoint(
    source: str, output: Path, corpus: Path | None = None, tokenizer: str | None = None, weights: Literal["ema", "raw"] = "ema",
    size: str | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint of ours from published weights: the teacher of a first round, or a student of the paper to measure.

    Args:
        source: a .ckpt of MDLM or SDTT, a folder as on the hub, or a hub name: kuleshov-group/mdlm-owt, jdeschena/sdtt@baselines_kld_step_70000
        output: folder of the checkpoint
        corpus: folder of `halfstep prepare-corpus` that it will be used with; gives tokenizer and length
        tokenizer: where there is no corpus: a hub name (gpt2) or a folder; default: the source's own tokenizer.json
        weights: ema keeps the average beside the raw weights where the source has one; raw takes the raw weights for both, as the released code does
        size: refuse weights of another size (small, medium, large ...)
    """
    where, _, revision = source.partition("@")
    path = (
        Path(source)
        if Path(source).exists()
        else fetch_from_hub(where, revision)
        if _is_hub_name(where)
        else Path(source)
    )
    found = hub.read_published(path)
    vocabulary, blocks, width, heads = hub.shape_of(found.raw, found.file)
    expected, size = (
        size,
        next((name for name, shape in SIZES.items() if shape == (blocks, width, heads)), None),
    )
    if size is None:
        known = "; ".join(f"{name} {shape}" for name, shape in SIZES.items())
        raise HalfstepError(
            f"--source {found.file}: {blocks} blocks, width {width}, {heads} heads is no size of halfstep; known are {known}"
        )
    if expected and size != expected:
        raise HalfstepError(
            f"--source {found.file}: found size {size}, expected {expected}; change network.size, or name other weights"
        )
    words, length = _tokens(path, corpus, tokenizer, found.config)
    known = words.get_vocab_size()
    if known != vocabulary:
        raise HalfstepError(
            f"--source {found.file}: its vocabulary is {vocabulary} tokens and the mask, the tokenizer has {known}; name the corpus or tokenizer it was "
            "trained with"
        )
    meta = {
        "kind": "diffusion", "network": Network(size=size, time_conditioning=_knows_time(found.config)).model_dump(), "vocab_size": vocabulary,
        "eos_id": words.token_to_id(EOS), "length": length, "corpus": corpus.name if corpus else None, "training": {"min_t": Training().min_t}, **lineage(revision),
        "ema_updates": 0,
        "imported": {
            "source": source, "revision": revision or None, "file": found.file.name, "sha256": sha256(found.file),
            "weights": "raw and ema" if found.ema and weights == "ema" else "raw" if found.ema or weights == "raw" else "the one set it has",
        },
    }  # fmt: skip
    with torch.device("meta"):
        shell = checkpoint.build_network(meta)
    buffers = {key: found.raw[key] for key in dict(shell.named_buffers())}
    sets = {
        "raw": found.raw,
        "ema": {**found.ema, **buffers} if found.ema and weights == "ema" else found.raw,
    }
    for state in sets.values():
        checkpoint.check_weights(shell, state, found.file)
    params = {"source": source, "weights": weights, **meta["network"]}
    fed = [{"name": "source", "digest": meta["imported"]["sha256"], "source": source}]
    tags = {"teacher": output.parent.name, "round": meta["round"], "imported": source}
    with Journal(
        output,
        name="teacher",
        node=f"import/{output.parent.name}",
        params=params,
        tags=tags,
        datasets=fed,
    ) as journal:
        write_atomic(output / "tokenizer.json", words.to_str(pretty=False))
        checkpoint.save_checkpoint(
            output,
            {
                checkpoint.FILES[name]: {k: v.float() for k, v in state.items()}
                for name, state in sets.items()
            },
            meta,
            output / "tokenizer.json",
        )
        journal.close(checkpoint=output)
    read = [
        found.file,
        found.file.parent / "config.json",
        *([corpus / "manifest.json", corpus / "tokenizer.json"] if corpus else []),
    ]
    provenance.write_record(
        output / provenance.NAME, [output], [file for file in read if file.is_file()]
    )


def lineage(revision: str) -> dict:
    """Round, divergence and steps that a revision of jdeschena/sdtt tells by its name; of any other, a teacher's (round 0)."""
    match = re.fullmatch(r"(?:baselines_(\w+)|scaling_400k_\w+?)_step_(\d)0000", revision)
    if not match:
        return {"round": 0}
    round = int(match[2])
    run = {"divergence": DIVERGENCES.get(match[1] or "kld", match[1])}
    return {
        "round": round,
        "run": run,
        "dt": 2 ** (round - 1) / 1024,
        "student_steps": 1024 // 2**round,
    }


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).suffix == ".ckpt"


def fetch_from_hub(name: str, revision: str) -> Path:
    """The folder of a hub repository's revision, downloaded or from the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FETCHED))
    except Exception as error:  # the client raises its own, requests' and OSError
        raise HalfstepError(
            f"--source {name}{'@' * bool(revision)}{revision}: the hub did not give it ({type(error).__name__}: {reason(error)}); check name, revision and network, or "
            "download it elsewhere and name the folder"
        ) from None


def _tokens(
    path: Path, corpus: Path | None, name: str | None, config: dict
) -> tuple[Tokenizer, int]:
    """Tokenizer and length, of the corpus or of what else is named."""
    if corpus:
        return Tokenizer.from_file(str(corpus / "tokenizer.json")), read_manifest(corpus)["length"]
    model = config.get("model") if isinstance(config.get("model"), dict) else {}
    length = config.get("model_length") or model.get("length")
    if not isinstance(length, int):
        raise HalfstepError(
            f"--source {path}: does not say how many tokens a text has; give --corpus, the folder of halfstep prepare-corpus"
        )
    if name:
        return load_bpe(name), length
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return load_bpe(str(path)), length
    raise HalfstepError(
        f"--source {path}: comes without a tokenizer; give --corpus, or --tokenizer gpt2 for the published models"
    )


def _knows_time(config: dict) -> bool:
    return bool(config.get("time_conditioning", False))


def export_checkpoint(
    checkpoint: Path, output: Path, weights: Literal["ema", "raw", "best"] = "ema", metrics: list[Path] | None = None, push: str | None = None,
    revision: str | None = None,
) -> None:  # fmt: skip
    """Write a folder that transformers loads without halfstep, with a model card; push it to the hub, one revision per round.

    Args:
        checkpoint: a checkpoint folder of a denoiser
        output: folder to write
        weights: which weights of the checkpoint
        metrics: files of metric rows for the card; rows of other models, of other weights and of timings are left out
        push: hub repository, user/name
        revision: branch to push to; default: <run>-round-<n>, of a teacher main
    """
    model = load(checkpoint, weights)
    if model.denoiser is None:
        raise HalfstepError(
            f"--checkpoint {checkpoint}: is autoregressive; its hf/ folder is what transformers loads already"
        )
    meta, network = model.meta, Network.model_validate(model.meta["network"])
    write_json(output / "config.json", {
        "model_type": "halfstep", "architectures": ["HalfstepForMaskedLM"],
        "auto_map": {"AutoConfig": "modeling_halfstep.HalfstepConfig", "AutoModelForMaskedLM": "modeling_halfstep.HalfstepForMaskedLM"},
        "vocab_size": model.vocab_size + 1, "hidden_dim": network.width, "n_blocks": network.blocks, "n_heads": network.heads, "cond_dim": COND_WIDTH,
        "model_length": model.length, "time_conditioning": network.time_conditioning, "steps": meta.get("student_steps", 1024),
        "bos_token_id": model.eos_id, "eos_token_id": model.eos_id, "dtype": "float32",
    })  # fmt: skip
    from safetensors.torch import save_file

    state = {
        f"backbone.{key}": value.contiguous() for key, value in model.network.state_dict().items()
    }
    write_atomic(
        output / "model.safetensors", lambda part: save_file(state, part, {"format": "pt"})
    )
    write_atomic(output / "tokenizer.json", (checkpoint / "tokenizer.json").read_bytes())
    eos = model.tokenizer.id_to_token(model.eos_id)
    write_json(output / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": eos, "eos_token": eos, "model_max_length": model.length,
    })  # fmt: skip
    write_atomic(output / "modeling_halfstep.py", MODELING.read_bytes())
    name = model_name(checkpoint)
    mine = [
        row
        for file in metrics or []
        for row in read_json(file)
        if row.get("model") == name and row["metric"] != "latency_s"
    ]
    rows = [row for row in mine if row.get("checkpoint") == model.sha256[:16]]
    if others := {str(row.get("checkpoint")) for row in mine} - {model.sha256[:16]}:
        print(
            f"note: rows of checkpoint {', '.join(sorted(others))} are not on the card: these weights, {weights}, are {model.sha256[:16]}",
            file=sys.stderr,
        )
    write_atomic(output / "README.md", card(name, meta, model.sha256, weights, rows))
    provenance.write_record(
        output / provenance.NAME,
        [output],
        [*checkpoint_files(checkpoint, weights), *(metrics or [])],
    )
    if push:
        branch = revision or (
            "main" if not meta["round"] else name.partition("/")[2].replace("/", "-")
        )
        upload(output, push, branch)


def load(folder: Path, weights: str):
    return checkpoint.load_checkpoint(folder, weights)


def card(name: str, meta: dict, digest: str, weights: str, rows: list[dict]) -> str:
    """The model card: what it is, how it was made, every number with its protocol and interval."""
    run, steps = meta.get("run", {}), meta.get("student_steps")
    what = (
        f"round {meta['round']} of Self-Distillation Through Time, meant for **{steps} sampling steps**"
        if meta["round"]
        else "a teacher, meant for 1,024 sampling steps"
    )
    facts = {
        "network": f"{meta['network']['size']}, {meta['vocab_size']} tokens and the mask, texts of {meta['length']} tokens", "corpus": meta.get("corpus"),
        "round": meta["round"] or None, "divergence": run.get("divergence"), "time grid of the teacher": run.get("teacher_times"),
        "training": "; ".join(f"{key} {value}" for key, value in (run or meta.get("training", {})).items()) or None,
        "imported from": meta.get("imported", {}).get("source"), "weights": f"{weights}, sha256 {digest[:16]}", "written by": f"halfstep {__version__}",
    }  # fmt: skip
    lines = [
        "---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: fill-mask", "tags: [masked-diffusion, sdtt]", "---", f"# {name}",
        f"A masked diffusion language model (MDLM, arXiv 2406.07524): {what} (arXiv 2410.21035).", "```python",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer", "",
        'model = AutoModelForMaskedLM.from_pretrained("this folder", trust_remote_code=True)', 'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        f"print(tokenizer.decode(model.sample(num_samples=1, steps={steps or 1024})[0]))", "```", "| | |", "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items() if value), "", "## Measured",
    ]  # fmt: skip
    if not rows:
        return "\n".join(
            [*lines, "Nothing was measured of these weights when this card was written.", ""]
        )
    columns = (
        "metric",
        "protocol",
        "version",
        "steps",
        "value",
        "low",
        "high",
        "num_samples",
        "seed",
        "sampler",
        "draw_dtype",
        "temperature",
        "judge",
        "data",
        "commit",
    )
    lines += [
        "The interval [low, high] is of 95%; that of MAUVE is of its clustering alone, over the same texts.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return "" if value is None else str(value)

    lines += [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join([*lines, ""])


def upload(folder: Path, name: str, branch: str) -> None:
    """Send an exported folder to a branch of a hub repository, both made where they are missing."""
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
    except Exception as error:  # the client raises its own, requests' and OSError
        raise HalfstepError(
            f"--push {name}: the hub did not take it ({type(error).__name__}: {reason(error)}); the folder {folder} is whole: check the network and "
            "`hf auth login`, and give the command again"
        ) from None
