"""A running graph: its lines, the time left against closed forms, and the logger in a real run."""

import logging
import re
from types import SimpleNamespace

import pytest
from dryrun import Workflow, copy

from halfstep.workflow import timeline
from halfstep.workflow.graph import PlannedJob
from halfstep.workflow.timeline import WORDS, Expected, Timeline, describe_job
from snakemake_logger_plugin_halfstep import LogHandler


def chain(*seconds: float) -> dict[int, Expected]:
    """Jobs 1, 2, ... each of which reads what the one before it writes."""
    return {
        i: Expected(PlannedJob("rule", [f"o{i - 1}"], [f"o{i}"]), s)
        for i, s in enumerate(seconds, start=1)
    }


def side_by_side(*seconds: float, gpu: int = 0) -> dict[int, Expected]:
    return {
        i: Expected(PlannedJob("rule", [], [f"o{i}"], gpu), s)
        for i, s in enumerate(seconds, start=1)
    }


@pytest.mark.parametrize(
    ("expected", "cores", "gpus", "seconds"),
    [
        (chain(10, 20, 30), 2, 0, 60),
        (side_by_side(10, 20, 30), 1, 0, 60),
        (side_by_side(10, 20, 30), 2, 0, 30),
        (side_by_side(30, 30, 30), 2, 0, 45),
        (side_by_side(30, 30, 30, gpu=1), 8, 1, 90),
        (side_by_side(30, 30, 30), None, 0, 30),  # a cluster
        ({}, 2, 0, 0),
    ],
)
def test_a_graph_takes_its_longest_path_or_the_load_of_its_devices(expected, cores, gpus, seconds):
    assert Timeline(expected, len(expected), cores, gpus).left(now=0.0) == seconds


def test_time_left_follows_what_ended_jobs_took():
    run = Timeline(chain(10, 20, 30), 3, cores=2)
    run.start(1, "rule", {}, now=100.0)
    assert run.left(now=104.0) == 6 + 20 + 30
    assert run.left(now=150.0) == 20 + 30  # late, but it cannot take less than nothing
    assert run.finish(1, now=120.0) == "[1/3] done in 20 s; about 1.7 min left"
    assert run.left(now=120.0) == 2 * (20 + 30)
    run.start(2, "rule", {}, now=120.0)
    assert run.left(now=130.0) == 2 * (20 + 30) - 10


def test_a_job_keeps_its_number_when_it_is_tried_again():
    run = Timeline(chain(10, 20), 12, cores=2)
    first = {"model": "a/teacher"}
    assert run.start(7, "generate", first, now=0.0) == "[ 1/12] draw samples of a/teacher"
    assert run.start(3, "plot", {"figure": "frontier"}, now=1.0).startswith("[ 2/12] ")
    assert run.fail(7) == "[ 1/12] failed"
    assert run.start(7, "generate", first, now=2.0).startswith("[ 1/12] ")
    assert run.finish(3, now=2.0) is None  # quick


def test_every_rule_has_words_that_its_wildcards_fill(workflow):
    """The names in braces are wildcards of the rule's outputs."""
    seen = {}
    for file in sorted((workflow.folder / "rules").glob("*.smk")):
        for name, body in re.findall(
            r"^ *rule (\w+):\n(.*?)(?=^\S|\Z)", file.read_text(), re.M | re.S
        ):
            seen[name] = set(re.findall(r"{(\w+)}", body))
    assert seen.keys() == WORDS.keys()
    for rule, words in WORDS.items():
        assert set(re.findall(r"{(\w+)}", words)) <= seen[rule], rule


def test_a_rule_of_another_workflow_goes_by_its_name():
    assert describe_job("make_tea", {"kind": "green"}) == "make tea green"


def handler(**changes) -> LogHandler:
    settings = {"dryrun": False, "printshellcmds": False, "verbose": False, "debug_dag": False}
    made = LogHandler(SimpleNamespace(**settings | changes), None)
    made.setFormatter(logging.Formatter("default: %(message)s"))
    return made


def record(message: str, level: int = logging.INFO, **facts) -> logging.LogRecord:
    made = logging.LogRecord("snakemake", level, "", 0, message, None, None)
    vars(made).update(facts)
    return made


def test_remarks_are_left_out_and_faults_are_not(monkeypatch, capsys):
    monkeypatch.setattr(timeline, "CURRENT", None)
    log = handler()
    for message in ("Building DAG of jobs...", "Select jobs to execute..."):
        log.emit(record(message))
    assert capsys.readouterr().err == ""
    log.emit(record("Nothing to be done (all requested files are present)."))
    log.emit(record("disk full", logging.ERROR))
    assert capsys.readouterr().err.splitlines() == [
        "default: Nothing to be done (all requested files are present).",
        "default: disk full",
    ]
    handler(dryrun=True).emit(record("Building DAG of jobs..."))
    assert capsys.readouterr().err == "default: Building DAG of jobs...\n"


def test_a_real_run_has_a_line_for_each_job_and_shows_the_log_of_a_failed_one(tmp_path):
    tree: Workflow = copy(tmp_path)
    call = ["--logger", "halfstep", "--cores", "1", "--config", "preset=ci", "--"]
    done = tree.run(*call, "results/data/stories-ci/manifest.json")
    assert done.returncode == 0, done.stderr
    assert "[1/1] prepare the corpus stories-ci" in done.stderr.splitlines()
    assert "Building DAG" not in done.stderr and "localrule" not in done.stderr
    broken = tree.folder / "results/data/stories-ci/train.bin"
    broken.write_bytes(b"")
    done = tree.run(*call, "results/models/stories-ci/baseline/meta.json")
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert "[1/1] train the baseline of stories-ci" in lines and "[1/1] failed" in lines
    assert any("halfstep |" in line and "train.bin" in line for line in lines)
    assert len(lines) < 40
