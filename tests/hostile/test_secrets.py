"""Passwords and tokens reach no output, no file and no tag."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import printed
import pytest
import synthetic
from dryrun import copy

from halfstep.checkpoint import load_checkpoint
from halfstep.commands import track as tracking
from halfstep.errors import HalfstepError
from halfstep.records import provenance
from halfstep.records.journal import Journal, read_journal
from halfstep.sanitize import GuardedStream, mask_secrets

LEAK = "s3cr3t"  # a part of every spelling of the password
PASSWORD = f"{LEAK}/Pa@s:s"
URI = f"user:{quote(PASSWORD, safe='')}@127.0.0.1:9"
POSTGRES = f"postgresql://{URI}/mlflow?connect_timeout=2"
TOKEN = f"hf_{LEAK}" + "x" * 30
MASKED = "***"


def one_pass() -> None:
    """A failed pass is not repeated, and no database or hub is waited for."""
    for name in ("MLFLOW_TRACKING_URI", "http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        os.environ.pop(name, None)
    import huggingface_hub.utils._http as hub
    import mlflow.store.db.utils as store

    tracking.WAITS_S = (0,)
    store.MAX_RETRY_COUNT = 1
    hub.time.sleep = lambda seconds: None


def results(folder: Path) -> None:
    """A finished results folder."""
    synthetic.write(folder / "out", runs=("kl_backward",), rounds=1, steps=[8], points=2)


@dataclass(frozen=True)
class Secret:
    """A command that is given a secret; its output and its files must not hold it.

    `shown`: what the output must hold; None where the command has no reason to name the place.
    """

    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    make: Callable[[Path], object] = results
    shown: str | None = MASKED
    code: int = 1
    kind: str = "secrets"

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


NO_SLURM = {"PATH": "/usr/bin-without-slurm"}
TRACK = ["track", "--results", "out"]
CORPUS = ["prepare-corpus", "--kind", "files", "--output", "out/corpus"]


def nothing(folder: Path) -> None:
    (folder / "out").mkdir()


def text_file(folder: Path) -> None:
    nothing(folder)
    (folder / "text.txt").write_text("one\n\ntwo\n")


CASES = [
    Secret("a database in --uri", [*TRACK, "--uri", POSTGRES]),
    Secret("a database in MLFLOW_TRACKING_URI", TRACK, {"MLFLOW_TRACKING_URI": POSTGRES}),
    Secret(
        "a database, and the warning for the graph",
        [*TRACK, "--output", "out/mlflow.synced"],
        {"MLFLOW_TRACKING_URI": POSTGRES},
        code=0,
    ),
    Secret("a password that is not encoded", [*TRACK, "--uri", f"postgresql://me:{PASSWORD}@h/x"]),
    Secret("a password with an emphasis", [*TRACK, "--uri", f"postgresql://me:{LEAK}!$&*'()@h/x"]),
    Secret("a driver that is not there", [*TRACK, "--uri", f"mysql+nothing://{URI}/mlflow"]),
    Secret("a scheme that nobody knows", [*TRACK, "--uri", f"gopher://{URI}/mlflow"]),
    Secret("a database without a user", [*TRACK, "--uri", f"postgresql://:{LEAK}@127.0.0.1:9/x"]),
    Secret("a server in --uri", [*TRACK, "--uri", f"http://{URI}"]),
    Secret("a server with a bad port", [*TRACK, "--uri", f"http://me:{LEAK}@127.0.0.1:port"]),
    Secret("a token in the query", [*TRACK, "--uri", f"http://127.0.0.1:9/?token={LEAK}&x=1"]),
    Secret(
        "a signature in the query",
        [*TRACK, "--uri", f"http://127.0.0.1:9/?X-Amz-Signature={LEAK}"],
    ),
    Secret("a token in place of a user", [*TRACK, "--uri", f"http://{LEAK}@127.0.0.1:9"]),
    Secret(
        "the password of the server in its own variable",
        [*TRACK, "--uri", "http://127.0.0.1:9"],
        {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": PASSWORD},
        shown="127.0.0.1:9",
    ),
    Secret(
        "a proxy",
        [*TRACK, "--uri", "http://tracking.invalid"],
        {"http_proxy": f"http://{URI}", "no_proxy": ""},
        shown="tracking.invalid",
    ),
    Secret(
        "a proxy without a scheme",
        [*TRACK, "--uri", "http://tracking.invalid"],
        {"http_proxy": URI, "HTTP_PROXY": URI, "no_proxy": ""},
        shown="tracking.invalid",
    ),
    Secret(
        "doctor and a server",
        ["doctor", "--results", "out"],
        {"MLFLOW_TRACKING_URI": f"http://{URI}", **NO_SLURM},
        code=0,
    ),
    Secret(
        "doctor and a short password that is not encoded",
        ["doctor", "--results", "out"],
        {"MLFLOW_TRACKING_URI": f"http://me:{LEAK}:7@127.0.0.1:9", **NO_SLURM},
        code=0,
    ),
    Secret(
        "doctor and a database",
        ["doctor", "--results", "out"],
        {"MLFLOW_TRACKING_URI": POSTGRES, **NO_SLURM},
        code=0,
    ),
    Secret(
        "fetch from an endpoint with a password",
        ["fetch", "--repositories", "model:x/y", "--output", "out/hub.json"],
        {"HF_ENDPOINT": f"http://{URI}", "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN},
        nothing,
        shown="the download failed",
    ),
    Secret(
        "fetch of a URI",
        ["fetch", "--repositories", f"model:https://{URI}/x", "--output", "out/hub.json"],
        make=nothing,
    ),
    Secret(
        "text from a URI",
        [*CORPUS, "--files", f"https://{URI}/text.txt"],
        make=nothing,
    ),
    Secret(
        "a tokenizer from a URI",
        [*CORPUS, "--files", "text.txt", "--tokenizer", f"https://{URI}/gpt2"],
        make=text_file,
    ),
    Secret(
        "weights from a URI",
        ["import", "--source", f"https://{URI}/w.ckpt", "--corpus", "out", "--output", "out/model"],
        make=nothing,
        shown=None,
    ),
    Secret(
        "a checkpoint at a URI",
        ["generate", "--checkpoint", f"s3://{URI}/teacher", "--output", "out/x", "--steps", "8"],
        make=nothing,
    ),
    Secret("results at a URI", ["summary", "--results", f"https://{URI}/results"], make=nothing),
    Secret("records at a URI", ["verify", f"https://{URI}/results"], make=nothing),
    Secret("an unknown flag", ["verify", f"--token={LEAK}"], code=2),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, tuple[Path, int, str]]:
    """Folder, exit code and output of each case; all run in one process, which imports once."""
    root = tmp_path_factory.mktemp("secrets")
    calls = []
    for number, case in enumerate(CASES):
        folder = root / str(number)
        folder.mkdir()
        case.make(folder)
        calls.append(printed.Call(case.arguments, folder, case.environment))
    outputs = printed.outputs_of(calls, one_pass)
    return {
        case.name: (call.folder, *output)
        for case, call, output in zip(CASES, calls, outputs, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_secret_is_neither_printed_nor_stored(case, answers):
    folder, code, text = answers[case.name]
    assert LEAK not in text
    assert printed.files_with(LEAK, folder) == []
    assert "Traceback" not in text, text
    assert case.code == code, text
    assert case.shown is None or case.shown in text, text


def test_tags_commands_and_cards_hold_no_secret(tmp_path, monkeypatch):
    """The whole command line is a tag of a journal and is in each record."""
    command = ["halfstep", "track", "--uri", POSTGRES]
    monkeypatch.setattr(sys, "argv", command)
    source = {"name": "x", "digest": "0", "source": f"https://{URI}/x"}
    with Journal(tmp_path, name="x", node="x", params={"from": POSTGRES}, datasets=[source]):
        pass
    monkeypatch.setitem(provenance._call, "command", command)
    provenance.write_record(tmp_path / provenance.NAME, [tmp_path], [])
    assert printed.files_with(LEAK, tmp_path) == []
    assert MASKED in json.dumps(read_journal(tmp_path)[0])


def test_what_was_stored_before_is_masked_when_it_is_read(tmp_path):
    """An old journal and an old record are sent and merged without their secret."""
    run = {"name": "x", "started": 1.0, "status": "finished", "tags": {"command": POSTGRES}}
    tmp_path.joinpath("run.json").write_text(json.dumps(run))
    record = {"format": 1, "outputs": {}, "inputs": {}, "command": ["halfstep", POSTGRES]}
    tmp_path.joinpath("provenance.json").write_text(json.dumps(record))
    assert LEAK not in str(read_journal(tmp_path))
    assert LEAK not in str(provenance.merge_records(tmp_path))


def test_an_exported_card_holds_no_secret(world, tmp_path):
    row = {"metric": "entropy", "model": "stories-tiny/teacher", "judge": f"https://{URI}/gpt2"}
    teacher = tmp_path / "results" / "models" / "stories-tiny" / "teacher"
    shutil.copytree(world.models / "teacher", teacher)
    meta = json.loads((teacher / "meta.json").read_text())
    (teacher / "meta.json").write_text(json.dumps({**meta, "round": 0}))
    row |= {"value": 1.0, "protocol": "unigram"}
    row |= {"checkpoint": load_checkpoint(teacher, "ema").sha256[:16]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    arguments = ["export", "--checkpoint", str(teacher), "--output", "out"]
    code, text = printed.output_of([*arguments, "--metrics", "rows.json"], tmp_path)
    assert code == 0, text
    assert MASKED in (tmp_path / "out" / "README.md").read_text()
    assert printed.files_with(LEAK, tmp_path / "out") == []


def test_mlflow_gets_no_secret_of_an_old_journal(tmp_path):
    """All that is sent is in the jobs that are gathered from the files."""
    results(tmp_path)
    file = tmp_path / "out" / "models" / "stories-tiny" / "teacher" / "run.json"
    run = json.loads(file.read_text())
    run["tags"]["command"] = f"halfstep pretrain --uri {POSTGRES}"
    run["params"]["from"] = POSTGRES
    run["datasets"][0]["source"] = f"https://{URI}/x"
    file.write_text(json.dumps(run))
    jobs = tracking.gather_jobs(tmp_path / "out")
    assert len(jobs) > 2 and MASKED in str(jobs)
    assert LEAK not in str(jobs)


SPOILED = f"""
import logging, sys, warnings
from halfstep.sanitize import guard_output
guard_output()
print("http://me:{LEAK}@h", file=sys.stdout)
warnings.warn("http://me:{LEAK}@h \\x1b[31m")
logging.getLogger("x").error("http://me:{LEAK}@h \\x1b[31m")
raise ValueError("http://me:{LEAK}@h \\x1b[31m \\udcff")
"""


def test_a_traceback_a_warning_and_a_log_line_are_masked():
    done = subprocess.run([sys.executable, "-c", SPOILED], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert LEAK not in said and said.count(MASKED) >= 4
    assert printed.control_characters(said) == []
    assert "Traceback" in said and r"\x1b[31m" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:p@ss/w0rd@db/x", "postgresql://***@db/x"),
        ("see 'http://u:p@h:5000' and http://h2/x@y", "see 'http://***@h:5000' and http://h2/x@y"),
        ("https://h/x?a=1&api_key=abc#y", "https://h/x?a=1&api_key=***#y"),
        ("host=h password='a b' user=x", "host=h password=*** user=x"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        (f"token {TOKEN} is wrong", "token hf_*** is wrong"),
        # None of these is a secret.
        ("http://localhost:5000/#/experiments/1", None),
        ("http://[::1]:5000/a@b", None),
        ("sqlite:////home/me@lab/mlflow.db", None),
        ("hf://datasets/user/name@main/x.parquet", None),
        ("model:jdeschena/sdtt@teacher_1M_sm, stories@001122", None),
        ("--prompt-tokens=50 add_bos_token=True", None),
    ],
)
def test_exactly_the_secret_is_masked(text, expected):
    assert mask_secrets(text) == (expected or text)
    assert mask_secrets({"a": [text, 1, None]}) == {"a": [expected or text, 1, None]}
    assert str(HalfstepError(text)) == (expected or text)


def test_a_name_that_is_also_a_password_stays_readable(monkeypatch):
    """The usual mlflow:mlflow@db/mlflow hides the password in the URI, and not the word."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:mlflow@db/mlflow")
    assert mask_secrets("results/mlflow.db") == "results/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://mlflow:pass%2Bword@db/mlflow")
    assert mask_secrets("no entry for 'pass+word'") == "no entry for '***'"


def test_a_progress_bar_may_move_the_cursor():
    written = []

    class Terminal:
        write = written.append

    stream = GuardedStream(Terminal())
    for text in ("\r 10%|#", "\x1b[A", "a\rb\x1b[A\n"):
        stream.write(text)
    assert written == ["\r 10%|#", "\x1b[A", "a\\x0db\\x1b[A\n"]


def test_snakemake_stores_and_prints_no_secret(tmp_path):
    """A real run of the rule `track` with a database that cannot be opened, then a refused value.

    Outputs, banners, logs, the synced file and all of .snakemake are searched.
    """
    workflow = copy(tmp_path)
    results(tmp_path)
    (tmp_path / "out").rename(tmp_path / "results")
    inputs = (
        r"    input:\n        expand\(\"results/models.*?(?=    output:\n        \"results/mlflow)"
    )
    workflow.edit("rules/report.smk", lambda text: re.sub(inputs, "", text, flags=re.DOTALL))
    options = ["--config", "preset=ci", "--cores", "1"]
    secret = {"MLFLOW_TRACKING_URI": POSTGRES, "HF_TOKEN": TOKEN}
    done = workflow.run("results/mlflow.synced", "-p", *options, **secret)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert LEAK not in said and MASKED in said
    assert MASKED in (tmp_path / "results" / "mlflow.synced").read_text()
    assert MASKED in (tmp_path / "results" / "logs" / "track.log").read_text()

    wrong = f'evaluation={{"lambada": "https://{URI}/x"}}'
    done = workflow.run("results/mlflow.synced", "--cores", "1", "--config", wrong, **secret)
    said += done.stdout + done.stderr
    assert done.returncode != 0
    assert "evaluation.lambada: found 'https://***@127.0.0.1:9/x'" in done.stderr
    assert LEAK not in said
    assert printed.files_with(LEAK, tmp_path) == []
