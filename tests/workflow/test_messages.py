"""What a run prints at its start and end, and how it reads its command line, without Snakemake."""

import json

import pytest

from halfstep.workflow.messages import (
    LAST_LINES,
    banner,
    curves,
    failures,
    only_looks,
    typed,
    unsent,
)


def as_texts(value):
    """The value as Snakemake passes it: every leaf is text."""
    if isinstance(value, dict):
        return {key: as_texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_texts(item) for item in value]
    return value if isinstance(value, str) else json.dumps(value)


def test_nested_values_get_their_types_back():
    value = {
        "preset": "ci",
        "seed": 3,
        "published": True,
        "continuations": None,
        "sampling": {"steps": [8, "own"], "temperature": 0.5},
        "text": "a: b, {c",
    }
    assert typed(as_texts(value)) == value
    assert typed(value) == value


@pytest.mark.parametrize("arguments, expected", [
    (["all"], False), (["--cores", "2", "--config", "preset=ci"], False), (["-k", "all"], False),
    (["-n"], True), (["-np"], True), (["-pn", "all"], True), (["--dry-run"], True),
    (["--dryrun"], True), (["--report", "report.html"], True), (["--lint"], True),
])  # fmt: skip
def test_some_calls_only_look(arguments, expected):
    assert only_looks(arguments) == expected


def test_a_warning_is_shown_until_all_was_sent(tmp_path):
    marker = tmp_path / "mlflow.synced"
    assert unsent(marker) == []
    marker.write_text("WARNING: one\ntwo\n")
    assert unsent(marker) == ["WARNING: one", "two"]
    marker.write_text("")
    assert unsent(marker) == []


def test_curves_are_at_the_server_or_in_the_store(tmp_path):
    store = tmp_path / "mlflow.db"
    assert curves({}, store) == []
    server = {"MLFLOW_TRACKING_URI": "https://mlflow.example"}
    assert curves(server, store) == ["curves: https://mlflow.example"]
    other = {"MLFLOW_TRACKING_URI": "sqlite:///other.db"}
    assert curves(other, store) == ["curves: mlflow ui --backend-store-uri sqlite:///other.db"]
    store.write_text("")
    assert curves({}, store) == [f"curves: halfstep ui --results {tmp_path}"]


def test_a_banner_is_marked_and_goes_to_stderr(capsys):
    banner("one", "two")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "\n  halfstep | one\n  halfstep | two\n\n")


LOG = """\
Error in rule pretrain:
    message: SLURM job 7 failed, see {slurm}/logs/slurm/rule_pretrain/7.log
    jobid: 3
    log: {own} (check log file(s) for error details)
    shell: halfstep pretrain
[Fri Nov 27 04:38:57 2026]
Error in rule pretrain:
    message: SLURM job 8 failed, see {slurm}/logs/slurm/rule_pretrain/8.log
    log: {own} (check log file(s) for error details)
Finished jobid: 1 (Rule: fetch)
Error in rule generate:
    log: {absent}, {own}
Error in rule plot:
    jobid: 9
[Fri Nov 27 04:39:10 2026]
    message: Error in group continuations-a/teacher
    log: {slurm}/logs/slurm/group_continuations-a/9.log (check log file(s) for error details)
    jobs:
    Error in rule score_continuations:
        jobid: 3
"""


def test_each_failed_job_is_named_once_with_the_end_of_its_logs(tmp_path):
    own, absent, log = tmp_path / "own.log", tmp_path / "absent.log", tmp_path / "snakemake.log"
    own.write_text("".join(f"line {n}\n" for n in range(30)))
    log.write_text(LOG.format(own=own, absent=absent, slurm=tmp_path))
    assert list(failures(log)) == [
        "rule pretrain",
        f"  log: {own}",
        *(f"  | line {n}" for n in range(30 - LAST_LINES, 30)),
        f"  Slurm's log: {tmp_path}/logs/slurm/rule_pretrain/8.log",
        "rule generate",
        f"  log: {absent}",
        "  | no such file: the job did not start",
        "rule plot",
        "group continuations-a/teacher",
        f"  Slurm's log: {tmp_path}/logs/slurm/group_continuations-a/9.log",
    ]
