"""Models that bring code: nothing of it runs before the user of this account has allowed it."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from published import build_family, masked_tokenizer
from remote import save_remote_model
from safetensors.torch import load_file
from small import MACHINE, ROUND, call, done

import halfstep
from halfstep.commands.import_transformers import swap_of
from halfstep.errors import HalfstepError

V, ROWS, LENGTH, MASK = 300, 312, 24, 103
ORDER = torch.tensor([swap_of(MASK, V)(token) for token in range(V + 1)])


@pytest.fixture(autouse=True)
def account(tmp_path, monkeypatch):
    """A new account: nothing is allowed yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "account"))
    return tmp_path / "account"


def save(root, corpus, auto="AutoModelForMaskedLM"):
    """The folder and the marker of a repository with code."""
    marker = root / "ran"
    save_remote_model(root / "hub", ROWS, marker, auto)
    masked_tokenizer(corpus, MASK).save_pretrained(root / "hub")
    return root / "hub", marker


def importing(hub, corpus, output, more=""):
    return f"import --source hf:{hub} --corpus {corpus} --output {output} {more}"


def fresh(line, account):
    """Exit code and stderr of `halfstep <line>` in a new process, which has loaded no code yet."""
    variables = {**os.environ, "XDG_CONFIG_HOME": str(account)}
    code = "import sys; from halfstep.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *line.split()]
    done_ = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done_.returncode, done_.stderr, done_.stdout


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """A repository, a teacher and a student of one round, and the account that allowed the code."""
    root = tmp_path_factory.mktemp("own")
    hub, marker = save(root, pipeline.corpus)
    models, account = root / "models/t", root / "first-account"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(account))
        done(importing(hub, pipeline.corpus, models / "teacher", "--trust-remote-code"))
        rest = f"--corpus {pipeline.corpus} {ROUND}"
        done(f"distill-round --teacher {models}/teacher --output {models}/kl/round-1 {rest}")
        done(f"export --checkpoint {models}/teacher --output {root}/teacher")
        done(f"export --checkpoint {models}/kl/round-1 --output {root}/student")
    return SimpleNamespace(
        root=root,
        hub=hub,
        marker=marker,
        account=account,
        teacher=models / "teacher",
        student=models / "kl/round-1",
    )


# Consent


def test_without_the_users_word_nothing_runs(pipeline, tmp_path, account, capsys):
    hub, marker = save(tmp_path, pipeline.corpus)
    assert call(importing(hub, pipeline.corpus, tmp_path / "m/teacher")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "its code in the repository, which is not run; read that code, and set" in error
    assert not marker.exists() and not account.exists()
    assert not (tmp_path / "m").exists()


def test_with_it_one_warning_names_repository_and_checksum(pipeline, tmp_path, account, capsys):
    """The checksum is that of sha256sum, so that anybody can compute it."""
    hub, marker = save(tmp_path, pipeline.corpus)
    done(importing(hub, pipeline.corpus, tmp_path / "m/teacher", "--trust-remote-code"))
    expected = subprocess.run(
        "sha256sum *.py | sha256sum",
        shell=True,
        cwd=hub,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[0]
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert lines == [
        f"halfstep import: warning: runs the code of {hub} (configuration_own.py, modeling_own.py),"
        f" sha256 {expected}; this account allows it from now on"
    ]
    files = [path.name for path in account.rglob("*") if path.is_file()]
    assert files == [f"{expected}.json"]
    assert marker.read_text().split() == ["configuration_own", "modeling_own"]


def test_another_account_must_allow_it_first(trained, tmp_path):
    """In new processes: a refusal, the user's word, which runs nothing, and then texts."""
    other = tmp_path / "other"
    trained.marker.unlink(missing_ok=True)
    line = f"generate --checkpoint {trained.student} --steps 4 --num-samples 1 {MACHINE}"
    code, error, _ = fresh(line, other)
    assert code == 1 and error.count("\n") == 1
    assert error.rstrip().endswith(
        "which this account has not allowed to run; read it, and allow it with "
        f"halfstep trust {trained.student}"
    )
    assert not trained.marker.exists()
    code, _, said = fresh(f"trust --checkpoint {trained.student}", other)
    assert code == 0 and not trained.marker.exists()
    assert f"code of {trained.hub}, as the checkpoint says" in said
    digest = json.loads((trained.student / "meta.json").read_text())["transformers"]["code"]
    assert f"sha256 {digest}" in said and "configuration_own.py, modeling_own.py" in said
    code, error, texts = fresh(line, other)
    assert code == 0 and texts.strip(), error
    assert trained.marker.exists()


def test_in_one_process_too_each_account_is_asked(trained, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(trained.account))
    halfstep.load(trained.teacher, "cpu")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(trained.account / "none"))
    with pytest.raises(HalfstepError, match="has not allowed to run"):
        halfstep.load(trained.teacher, "cpu")


@pytest.mark.parametrize("knows_checksums", [False, True])
def test_code_that_has_changed_is_refused(trained, tmp_path, monkeypatch, knows_checksums):
    """Also if its author has made the checksums in meta.json right again."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(trained.account))
    folder = tmp_path / "teacher"
    shutil.copytree(trained.teacher, folder)
    evil = tmp_path / "evil"
    with open(folder / "code/modeling_own.py", "a") as file:
        file.write(f"\nopen({str(evil)!r}, 'w').close()\n")
    sentence = "the code has changed since the import"
    if knows_checksums:
        from halfstep.remote_code import read_code

        meta = json.loads((folder / "meta.json").read_text())
        meta["transformers"]["code"] = read_code(folder / "code")
        (folder / "meta.json").write_text(json.dumps(meta))
        sentence = "has not allowed to run"
    with pytest.raises(HalfstepError, match=sentence):
        halfstep.load(folder, "cpu")
    assert not evil.exists()


def test_a_checkpoint_without_code_needs_no_word(pipeline, capsys):
    assert call(f"trust --checkpoint {pipeline.teacher}") == 1
    assert "its model brings no code; nothing needs to be allowed" in capsys.readouterr().err


# The model


def test_log_p_is_that_of_transformers_with_the_code_of_the_export(trained, tmp_path, monkeypatch):
    """Teacher and student; transformers is in another process."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(trained.account))
    x = torch.randint(2, V + 1, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.save(ORDER[x], tmp_path / "x.pt")
    script = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer
x = torch.load(sys.argv[1] + "/x.pt", weights_only=True)
for name in sys.argv[2:]:
    model = AutoModelForMaskedLM.from_pretrained(name, trust_remote_code=True).eval()
    AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(x).logits, sys.argv[1] + "/" + name.rpartition("/")[2] + ".pt")
"""
    exports = [str(trained.root / name) for name in ("teacher", "student")]
    command = [sys.executable, "-c", script, str(tmp_path), *exports]
    variables = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    subprocess.run(command, env=variables, check=True, capture_output=True)
    for name in ("teacher", "student"):
        model = halfstep.load(getattr(trained, name), "cpu")
        z = torch.load(tmp_path / f"{name}.pt", weights_only=True)[..., ORDER[:V]]
        ours = model.denoiser.log_p(model.denoiser.features(x, torch.ones(3)))
        assert (z.log_softmax(-1) - ours).abs().max() < 1e-5


def test_its_export_has_its_code_and_every_bit(trained):
    for name in ("configuration_own.py", "modeling_own.py", "tokenizer.json"):
        for folder in ("teacher", "student"):
            content = (trained.root / folder / name).read_bytes()
            assert content == (trained.hub / name).read_bytes()
    theirs, ours = (
        load_file(folder / "model.safetensors")
        for folder in (trained.hub, trained.root / "teacher")
    )
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    config = json.loads((trained.root / "teacher/config.json").read_text())
    assert config.pop("halfstep") == {"round": 0, "student_steps": None, "logits": "same"}
    assert config == json.loads((trained.hub / "config.json").read_text())


def test_an_import_of_its_export_keeps_every_bit(trained, pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(trained.account))
    hub = trained.root / "student"
    done(importing(hub, pipeline.corpus, tmp_path / "m/teacher", "--trust-remote-code"))
    first, again = (
        halfstep.load(folder, "cpu") for folder in (trained.student, tmp_path / "m/teacher")
    )
    expected = first.network.state_dict()
    found = again.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert first.meta["transformers"]["code"] == again.meta["transformers"]["code"]


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForCausalLM"])
def test_a_class_that_names_no_kind_needs_its_logits_said(pipeline, tmp_path, capsys, auto):
    """LLaDA is AutoModelForCausalLM, Dream is AutoModel."""
    hub, _ = save(tmp_path, pipeline.corpus, auto)
    output = tmp_path / "m/teacher"
    assert call(importing(hub, pipeline.corpus, output, "--trust-remote-code")) == 1
    assert "set logits: same, or" in capsys.readouterr().err
    done(importing(hub, pipeline.corpus, output, "--trust-remote-code --logits same"))
    assert halfstep.load(output, "cpu").meta["transformers"]["auto"] == auto
    done(f"export --checkpoint {output} --output {tmp_path}/exported")
    text = (tmp_path / "exported/README.md").read_text()
    assert f"{auto}.from_pretrained(folder, config=config, trust_remote_code=True)" in text
    assert "--trust-remote-code\n" in text


# Bad input


def rewrite(name, old, new):
    def spoil(hub):
        text = (hub / name).read_text()
        assert old in text
        (hub / name).write_text(text.replace(old, new))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            rewrite("modeling_own.py", "return self.head\n", "return None\n"),
            "OwnModel names no embedding table and no linear layer of logits",
        ),
        (
            rewrite("modeling_own.py", "forward(self, input_ids)", "forward(self, tokens, time)"),
            "OwnModel cannot be read as a denoiser (TypeError: .*unexpected keyword",
        ),
        (
            rewrite(
                "modeling_own.py",
                "product_attention(q, k, v)",
                "product_attention(q, k, v, is_causal=True)",
            ),
            "its predictions do not depend on later tokens",
        ),
        (
            rewrite(
                "modeling_own.py",
                "return MaskedLMOutput",
                "h = h.relu(); 1 / 0; return MaskedLMOutput",
            ),
            "ZeroDivisionError",
        ),
        (
            rewrite("modeling_own.py", "from torch import nn", "import no_such_package"),
            "No module named 'no_such_package'",
        ),
        (
            rewrite("config.json", "modeling_own.OwnModel", "evil/other--modeling_own.OwnModel"),
            "auto_map names 'evil/other--modeling_own.OwnModel'",
        ),
        (
            rewrite("config.json", "modeling_own.OwnModel", "os.system"),
            "auto_map names 'os.system'",
        ),
        (
            rewrite("config.json", "modeling_own.OwnModel", "modeling_own.OwnBlock"),
            "OwnBlock is no PreTrainedModel",
        ),
        (
            rewrite("config.json", "AutoModelForMaskedLM", "AutoModelForVision"),
            "brings no code of a language model",
        ),
        (lambda hub: [path.unlink() for path in hub.glob("*.py")], "found 0 Python files"),
        (
            rewrite("config.json", '"vocab_size": 312', '"vocab_size": 1000000000'),
            "for a network of",
        ),
    ],
)
def test_refusals_are_one_line(pipeline, tmp_path, capsys, spoil, sentence):
    hub, _ = save(tmp_path, pipeline.corpus)
    spoil(hub)
    capsys.readouterr()
    output = tmp_path / "m/teacher"
    assert call(importing(hub, pipeline.corpus, output, "--trust-remote-code")) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(sentence.replace("(", r"\("), lines[-1]), lines
    assert lines[-1].startswith("halfstep import: ") and len(lines) <= 2
    assert not (output / "meta.json").exists()


def test_a_word_without_code_is_refused(pipeline, tmp_path, account, capsys):
    build_family("bert", ROWS, LENGTH, tmp_path / "hub")
    masked_tokenizer(pipeline.corpus, MASK).save_pretrained(tmp_path / "hub")
    for source in (f"hf:{tmp_path}/hub", f"{tmp_path}/hub"):
        line = f"import --source {source} --corpus {pipeline.corpus} --trust-remote-code"
        assert call(f"{line} --output {tmp_path}/m/teacher") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search("--trust-remote-code: .*leave it out", error)
    assert not account.exists()
