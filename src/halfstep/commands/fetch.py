"""`halfstep fetch`: download all files from the Hugging Face hub, so that jobs can run offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json, sha256, write_json
from halfstep.records import provenance

# Files of model repositories in formats that nothing here reads.
UNREAD = "*.msgpack *.h5 *.onnx *.ot onnx/* *.tflite *.mlmodel *.gguf".split()


def fetch(repositories: list[str], output: Path = Path("results/hub.json")) -> None:
    """Download repositories into the hub's cache (HF_HOME) and write the sha256 of their files.

    Run it on a machine with internet. A file that has changed since an earlier call is an error.

    Args:
        repositories: model:NAME[@revision] or dataset:NAME, with the hub's names;
            parquet:NAME:CONFIGURATION/SPLIT, which the hub has as parquet files; or task:NAME, the
            data of a task of lm-eval
        output: {repository: {"version": commit or version, "files": {name: sha256}}}
    """
    known = read_fetched(output) if output.exists() else {}
    fetched = {}
    for repository in repositories:
        version, folders = _download(repository)
        files = {name: digest for folder in folders for name, digest in _checksums(folder).items()}
        former = known.get(repository)
        if former and former["version"] == version:
            _check_unchanged(files, former["files"], folders, output)
        fetched[repository] = {"version": version, "files": files}
        print(f"{repository}: {version}, {len(files)} files in {', '.join(map(str, folders))}")
    write_json(output, fetched)
    provenance.write_record(output.with_suffix(f".{provenance.NAME}"), [output], [])


def read_fetched(output: Path) -> dict[str, Any]:
    """What an earlier call has written, in its whole shape."""
    known = read_json(output)
    rows = known.values() if isinstance(known, dict) else [known]
    for row in rows:
        match row:
            case {"version": str(), "files": dict() as files}:
                if all(isinstance(digest, str) for digest in files.values()):
                    continue
        raise HalfstepError(
            f"--output {output}: is not a file that halfstep fetch writes; "
            "delete it, or name another file"
        )
    return dict(known)


def _download(repository: str) -> tuple[str, list[Path]]:
    """Version and folders of a repository, downloaded or found in the cache."""
    kind, _, name = repository.partition(":")
    if kind not in DOWNLOADS or not name:
        raise HalfstepError(
            f"--repositories {repository}: expected model:NAME, model:NAME@revision, "
            "dataset:NAME, parquet:NAME:CONFIGURATION/SPLIT or task:NAME, for example "
            "model:gpt2-large"
        )
    try:
        return DOWNLOADS[kind](name)
    except Exception as error:  # the hub's client, datasets, network and disk raise different types
        raise HalfstepError(
            f"--repositories {repository}: not in the hub's cache, and the download failed "
            f"({type(error).__name__}: {reason(error)}); run this on a node with internet, without "
            "HF_HUB_OFFLINE, and with HF_HOME in a folder that all nodes see"
        ) from None


def _checksums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


def _check_unchanged(
    files: dict[str, str], former: dict[str, str], folders: list[Path], output: Path
) -> None:
    for file, digest in files.items():
        if former.get(file, digest) != digest:
            raise HalfstepError(
                f"{file} in {', '.join(map(str, folders))}: differs from its sha256 in {output}, "
                "so it is damaged; delete the folder and call again"
            )


def _download_model(name: str) -> tuple[str, list[Path]]:
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    folder = Path(snapshot_download(repository, revision=revision or None, ignore_patterns=UNREAD))
    return folder.name, [folder]  # the folder's name is the commit


def _download_parquet(name: str) -> tuple[str, list[Path]]:
    from halfstep.data.zero_shot import download_split

    folder = download_split(*name.split(":"))
    return folder.name, [folder]


def _download_task(name: str) -> tuple[str, list[Path]]:
    """Load a task of lm-eval as `score-tasks` does, so that it is found again offline."""
    from halfstep.metrics.tasks import load_tasks

    folders = {
        Path(file["filename"]).parent
        for task in load_tasks([name])[0].values()
        for split in task.dataset.values()
        for file in split.cache_files
    }
    return ", ".join(sorted({folder.name for folder in folders})), sorted(folders)


def _download_dataset(name: str) -> tuple[str, list[Path]]:
    """Prepare a data set in the cache of `datasets`, where `datasets` finds it again offline."""
    from datasets import load_dataset_builder

    builder = load_dataset_builder(name)
    builder.download_and_prepare()
    folder = Path(builder.cache_dir)
    return folder.name, [folder]


DOWNLOADS = {
    "model": _download_model,
    "dataset": _download_dataset,
    "parquet": _download_parquet,
    "task": _download_task,
}
