"""`halfstep fetch`: everything that comes from the Hugging Face hub, into its cache, on a machine that has internet; the rest runs offline."""

from __future__ import annotations

from pathlib import Path

from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json, sha256, write_json
from halfstep.records import provenance

UNREAD = [
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.ot",
    "onnx/*",
    "*.tflite",
    "*.mlmodel",
    "*.gguf",
]  # of model repositories


def fetch(repositories: list[str], output: Path = Path("results/hub.json")) -> None:
    """Bring repositories into the hub's cache (HF_HOME) and write their files' sha256. A file that has changed since an earlier call is an error.

    Args:
        repositories: model:NAME[@revision] or dataset:NAME, as the hub names them
        output: {repository: {"commit" or "version", "files": {name: sha256}}}
    """
    known = read_json(output) if output.is_file() else {}
    found = {}
    for repository in repositories:
        kind, _, name = repository.partition(":")
        if kind not in GET or not name:
            raise HalfstepError(
                f"--repositories {repository}: expected model:NAME, model:NAME@revision or dataset:NAME, as model:gpt2-large"
            )
        try:
            version, folder = GET[kind](name)
        except Exception as error:  # the hub's client, datasets, the network and the file system each raise their own
            raise HalfstepError(
                f"--repositories {repository}: not in the hub's cache, and the hub did not give it ({type(error).__name__}: {reason(error)}); run this on a "
                "node with internet and without HF_HUB_OFFLINE, and with HF_HOME in a folder that all nodes see"
            ) from None
        files = {
            str(path.relative_to(folder)): sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.endswith(".lock")
        }
        found[repository] = {"version": version, "files": files}
        before = known.get(repository, {})
        changed = [
            file
            for file, digest in files.items()
            if before.get("files", {}).get(file, digest) != digest
        ]
        if before.get("version") == version and changed:
            raise HalfstepError(
                f"{folder / changed[0]}: differs from its sha256 in {output}, so it is damaged; delete {folder} and call again"
            )
        print(f"{repository}: {version}, {len(files)} files in {folder}")
    write_json(output, found)
    provenance.write_record(output.with_suffix(f".{provenance.NAME}"), [output], [])


def _model(name: str) -> tuple[str, Path]:
    from huggingface_hub import snapshot_download

    where, _, revision = name.partition("@")
    folder = Path(snapshot_download(where, revision=revision or None, ignore_patterns=UNREAD))
    return folder.name, folder  # named by its commit


def _dataset(name: str) -> tuple[str, Path]:
    """As `datasets` itself finds it again offline: prepared in its own cache."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name)
    builder.download_and_prepare()
    folder = Path(builder.cache_dir)
    return folder.name, folder


GET = {"model": _model, "dataset": _dataset}
