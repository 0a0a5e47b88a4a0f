"""Checkpoints and repositories whose Python files want to run: none does without consent."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hostile import Hostile, answer
from published import masked_tokenizer
from remote import save_remote_model
from small import CORPUS, MACHINE, done

from halfstep.files import sha256
from halfstep.remote_code import read_code

KIND = "code of a model"
MASK, ROWS = 103, 312
IMPORT = "import --source hf:hub --output out/model"
TRUSTED = f"{IMPORT} --trust-remote-code"
GENERATE = f"generate --checkpoint model --output out --steps 2 --num-samples 1 {MACHINE}"
TRUST = "trust --checkpoint model"
ASKS = "has not allowed to run; read it, and allow it with halfstep trust model$"
CHANGED = "the code has changed since the import"
MODELING = "modeling_own.OwnModel"


@functools.cache
def whole() -> Path:
    """A repository with code, a checkpoint of it, the account that allowed it; `ran` is no more."""
    folder = Path(tempfile.mkdtemp())
    done(f"prepare-corpus --output {folder}/corpus {CORPUS} --workers 1")
    save_remote_model(folder / "hub", ROWS, folder / "ran")
    masked_tokenizer(folder / "corpus", MASK).save_pretrained(folder / "hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "account"))
        given = f"--corpus {folder}/corpus --output {folder}/model --trust-remote-code"
        done(f"import --source hf:{folder}/hub {given}")
    (folder / "ran").unlink()
    return folder


@pytest.fixture(scope="module", autouse=True)
def removed():
    yield
    if whole.cache_info().currsize:
        shutil.rmtree(whole())


def hub(name: str, refused: str, command: str = TRUSTED, spoil=lambda folder: None) -> Hostile:
    """An import of the repository after `spoil(folder)`."""

    def make(folder: Path) -> None:
        shutil.copytree(whole() / "hub", folder / "hub")
        spoil(folder / "hub")

    return Hostile(KIND, name, make, command.split(), refused)


def model(
    name: str,
    refused: str | None,
    spoil=lambda folder: None,
    command: str = GENERATE,
    *,
    is_allowed: bool = True,
    **variables: str,
) -> Hostile:
    """A command on the checkpoint after `spoil(folder)`; is its own code allowed in the account?"""

    def make(folder: Path) -> None:
        shutil.copytree(whole() / "model", folder / "model")
        if is_allowed:
            shutil.copytree(whole() / "account", folder.parent / "account")
        spoil(folder / "model")

    return Hostile(KIND, name, make, command.split(), refused, variables=variables)


def auto_map(value: object):
    """Change what the repository's config.json says of its code."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = value
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def masked(name: object):
    return auto_map({"AutoConfig": "configuration_own.OwnConfig", "AutoModelForMaskedLM": name})


def rewrite(folder: Path, **changes: object) -> None:
    """Change the entry `transformers`, and make the checksums of meta.json right again."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["transformers"] |= changes
    names = [name for name in meta["sha256"] if (folder / name).is_file()]
    meta["sha256"] = {name: sha256(folder / name) for name in names}
    (folder / "meta.json").write_text(json.dumps(meta))


def add_line(folder: Path) -> None:
    with open(folder / "code/modeling_own.py", "a") as file:
        file.write("import os\n")


def add_line_and_checksums(folder: Path) -> None:
    add_line(folder)
    rewrite(folder, code=read_code(folder / "code"))


def name_in_meta(reference: str):
    """Let the checkpoint name another class of its code, which the account has allowed."""

    def spoil(folder: Path) -> None:
        about = json.loads((folder / "meta.json").read_text())["transformers"]
        names = about["config"]["auto_map"] | {"AutoModelForMaskedLM": reference}
        rewrite(folder, config=about["config"] | {"auto_map": names})

    return spoil


def bring_consent(folder: Path) -> None:
    """A consent of the checkpoint's author, where a relative path would find it."""
    shutil.copytree(whole() / "account/halfstep", folder.parent / "halfstep")
    shutil.copytree(whole() / "account/halfstep", folder / "halfstep")


def remove_code(folder: Path) -> None:
    shutil.rmtree(folder / "code")


def pipe_in_code(folder: Path) -> None:
    os.mkfifo(folder / "code/x.py")


def many_files(folder: Path) -> None:
    for i in range(70):
        (folder / f"x{i}.py").write_text("")


CASES = [
    hub("a repository with code, and no word of the user", "its code .* not run", IMPORT),
    hub("code of another repository", "auto_map names 'x/y--a.B'", spoil=masked("x/y--a.B")),
    hub("a class of the standard library", "auto_map names 'os.system'", spoil=masked("os.system")),
    hub("a module above the repository", "auto_map names '../up.X'", spoil=masked("../up.X")),
    hub("a module in a module", "auto_map names 'a.b.X'", spoil=masked("a.b.X")),
    hub("a number for a class", "auto_map names '7'", spoil=masked(7)),
    hub("a name of a million letters", "auto_map names 'aaa", spoil=masked("a" * 10**6)),
    hub("an escape in a class's name", r"auto_map names '\\x1b\[", spoil=masked("\x1b[31m.X")),
    hub("auto_map is a list", "brings no code of a language model", spoil=auto_map([MODELING])),
    hub("auto_map is empty", "brings no code of a language model", spoil=auto_map({})),
    hub("seventy Python files", "found 7[0-9] Python files", spoil=many_files),
    hub(
        "five megabytes of Python",
        "found 3 Python files of 5,",
        spoil=lambda folder: (folder / "big.py").write_text("#" * 5_000_000),
    ),
    hub(
        "a file's name with an escape",
        r"'\\x1b\[31m.py' is no name of a Python module",
        spoil=lambda folder: (folder / "\x1b[31m.py").write_text(""),
    ),
    hub(
        "a folder that is named as a Python file",
        "found 3 Python files",
        spoil=lambda folder: (folder / "x.py").mkdir(),
    ),
    model("a checkpoint with code that this account never allowed", ASKS, is_allowed=False),
    model("code with one line more", CHANGED, add_line),
    model("code with one line more, and right checksums", ASKS, add_line_and_checksums),
    model(
        "one file more in code/",
        CHANGED,
        lambda folder: (folder / "code/torch.py").write_text(""),
    ),
    model(
        "one file less in code/",
        CHANGED,
        lambda folder: (folder / "code/configuration_own.py").unlink(),
    ),
    model("no folder code/", "found 0 Python files", remove_code),
    model("a named pipe in code/", "found 3 Python files", pipe_in_code),
    model(
        "a checksum that is a path",
        "meta.json.*code",
        lambda folder: rewrite(folder, code="../../account"),
    ),
    model(
        "code that meta.json does not mention",
        "describes no model that this version of transformers builds",
        lambda folder: rewrite(folder, code=None),
    ),
    model("another class of allowed code", "OwnBlock is no", name_in_meta("modeling_own.OwnBlock")),
    model("a function outside the code", "auto_map names 'os.abort'", name_in_meta("os.abort")),
    model(
        "consent that the checkpoint brings",
        ASKS,
        bring_consent,
        is_allowed=False,
        XDG_CONFIG_HOME="model",
    ),
    model(
        "consent in the current folder",
        ASKS,
        bring_consent,
        is_allowed=False,
        XDG_CONFIG_HOME=".",
    ),
    model("trust of changed code", CHANGED, add_line, TRUST, is_allowed=False),
    model("trust of a checkpoint", None, command=TRUST, is_allowed=False),
]
RUNS = ("another class of allowed code",)  # it may: the account has allowed it


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_code_runs_without_consent(case, tmp_path):
    """`ran` is the file that the code writes when it runs."""
    folder = tmp_path / "case"
    folder.mkdir()
    own = {"XDG_CONFIG_HOME": str(tmp_path / "account"), "HOME": str(tmp_path / "home")}
    answer(dataclasses.replace(case, variables={**own, **case.variables}), folder)
    ran = whole() / "ran"
    assert ran.exists() == (case.name in RUNS)
    ran.unlink(missing_ok=True)


def test_the_same_command_runs_the_code_once_it_is_allowed(tmp_path):
    """Without this the test above could not fail."""
    (tmp_path / "case").mkdir()
    variables = {"XDG_CONFIG_HOME": str(tmp_path / "account")}
    case = model("allowed", None)
    answer(dataclasses.replace(case, variables=variables), tmp_path / "case")
    assert (whole() / "ran").read_text().split() == ["configuration_own", "modeling_own"]
    (whole() / "ran").unlink()
