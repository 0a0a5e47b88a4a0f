"""The workflow of an installed wheel, without a clone: it plans and runs what a clone does."""

import json
import re
import subprocess

import pytest
from dryrun import REPOSITORY, Workflow, copy
from wheels import Installed

from halfstep.errors import HalfstepError
from halfstep.workflow import packaged
from halfstep.workflow.packaged import (
    OURS,
    PACKAGED,
    caller,
    pip_argument,
    resume_command,
    snakemake_words,
    with_preset,
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, wheel_file) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed") / "venv", wheel_file)


def commands(plan: str) -> list[str]:
    return sorted(re.findall(r"^ +(halfstep .*? 2>&1.*)", plan.replace("\\\n", " "), re.MULTILINE))


def write_text(folder):
    lines = [f"Day {day}: the sun rose over the hill, and we went on.\n\n" for day in range(200)]
    (folder / "diary.txt").write_text("".join(lines))


def test_a_project_without_a_clone_plans_the_jobs_of_a_clone(installed, workflow, tmp_path):
    """The same commands with the same flags, from the configuration that `init` wrote."""
    write_text(tmp_path)
    done = installed.call(tmp_path, "halfstep", "init", "project", "--text", "diary.txt")
    assert done.returncode == 0, done.stderr
    project = tmp_path / "project"
    options = ["-p", "--cores", "2"]
    ours = installed.call(project, "halfstep", "run", "all", "paper", "-n", *options)
    assert ours.returncode == 0, ours.stdout + ours.stderr
    configured = ["--configfile", str(project / "config.yaml")]
    clone = workflow.plan("all", "paper", *options, *configured)
    assert commands(ours.stdout) == commands(clone) and len(commands(clone)) > 35
    assert not (project / "results").exists()


def test_a_preset_runs_in_an_empty_folder(installed, tmp_path):
    """Jobs are those of the installed package, and a second call has nothing to do."""
    target = "results/models/stories-ci/baseline/meta.json"
    words = ["halfstep", "run", target, "--preset", "ci", "--cores", "1"]
    done = installed.call(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".snakemake", "results"}
    record = json.loads((tmp_path / target).with_name("provenance.json").read_text())
    assert record["command"][1] == "train-baseline" and record["commit"] == "unknown"
    assert "Nothing to be done" in installed.call(tmp_path, *words).stderr
    doctor = installed.call(tmp_path, "halfstep", "doctor")
    assert f"in {installed.package}" in doctor.stdout


def test_the_price_is_that_of_the_packaged_workflow(installed, tmp_path):
    done = installed.call(tmp_path, "halfstep", "plan", "--", "--config", "preset=ci")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^distill_round +7 ", done.stdout, re.MULTILINE)


def test_the_profile_of_a_cluster_is_packaged(installed, tmp_path):
    """It runs the paper in place of the default preset; a project keeps its own teachers."""
    write_text(tmp_path)
    made = installed.call(tmp_path, "halfstep", "init", "my-text-tiny", "--text", "diary.txt")
    assert made.returncode == 0, made.stderr
    (tmp_path / "owt-small").mkdir()
    (tmp_path / "owt-small/config.yaml").write_text("preset: laptop\n")
    for teacher, gpus in {"my-text-tiny": 0, "owt-small": 8}.items():
        target = f"results/models/{teacher}/teacher/meta.json"
        words = ["run", target, "-n", "--profile", "slurm"]
        plan = installed.call(tmp_path / teacher, "halfstep", *words)
        assert plan.returncode == 0, plan.stderr
        asked = re.search(r"resources: (.*)", plan.stdout.split("rule pretrain:")[1])[1]
        assert f"gpu={gpus}," in asked and "runtime=" in asked


def test_the_exit_code_is_snakemakes(installed, tmp_path):
    words = ["results/no-such-file", "--cores", "1"]
    done = installed.call(tmp_path, "halfstep", "run", "--preset", "ci", *words)
    snakefile = installed.package / "packaged" / "Snakefile"
    direct = installed.call(
        *(tmp_path, "python", "-m", "snakemake", "--snakefile", str(snakefile)),
        *(
            "--configfile",
            str(REPOSITORY / "config.yaml"),
            "--config",
            "preset=ci",
            "--",
            *words[:1],
        ),
    )
    assert done.returncode == direct.returncode != 0
    assert "results/no-such-file" in done.stdout + done.stderr


def test_a_fetched_commit_is_in_records_and_in_conda_environments(installed, tmp_path):
    """pip notes the commit that it installed from; a wheel from elsewhere has its address."""
    code = "import halfstep.workflow.packaged as p, halfstep.records.journal as j; "
    code += "print(j.commit(), p.pip_argument())"
    (note,) = installed.package.parent.glob("halfstep-*.dist-info/direct_url.json")
    before = note.read_text()
    wheel = json.loads(before)["url"]
    assert installed.call(tmp_path, "python", "-c", code).stdout.split("\n")[0] == (
        f"unknown halfstep @ {wheel}"
    )
    commit = "0123456789abcdef" * 2
    vcs = {"url": "https://host/halfstep", "vcs_info": {"vcs": "git", "commit_id": commit}}
    try:
        note.write_text(json.dumps(vcs))
        said = installed.call(tmp_path, "python", "-c", code).stdout.strip()
        assert said == f"{commit[:12]} halfstep @ git+https://host/halfstep@{commit}"
        note.write_text("{}")  # from an index, pip writes none
        said = installed.call(tmp_path, "python", "-c", code).stdout.strip()
        assert re.fullmatch(r"unknown halfstep==\d+\.\d+\.\d+", said)
    finally:
        note.write_text(before)


def test_conda_environments_get_the_halfstep_that_runs(tmp_path):
    """The script that Snakemake calls in a new environment, with a pip that tells its arguments."""
    (tmp_path / "pip").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    scripts = sorted(REPOSITORY.glob("envs/*.post-deploy.sh"))
    assert {file.name.split(".")[0] for file in scripts} == {
        file.stem for file in REPOSITORY.glob("envs/*.yaml")
    }
    for script in scripts:
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        source = {"HALFSTEP_SOURCE": pip_argument()}
        done = subprocess.run(["bash", script], env=path | source, capture_output=True, text=True)
        assert done.stdout.splitlines() == ["install", "--no-deps", f"--editable={REPOSITORY}"]
        bare = subprocess.run(["bash", script], env=path, capture_output=True, text=True)
        assert bare.returncode and "HALFSTEP_SOURCE" in bare.stderr


def test_the_links_of_a_clone_name_the_files_at_its_root():
    """One copy of each file: the standard layout of Snakemake stays."""
    for link in PACKAGED.iterdir():
        assert link.is_symlink(), link
        assert link.resolve().is_relative_to(REPOSITORY) and link.exists()
    assert (PACKAGED / "Snakefile").samefile(REPOSITORY / "Snakefile")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_with_a_snakefile_keeps_its_own(empty):
    words = ["all", "--profile", "slurm"]
    assert caller() == "halfstep run"
    (empty / "workflow").mkdir()
    (empty / "workflow/Snakefile").touch()
    assert snakemake_words(words) == words and caller() == "snakemake"


def test_without_configuration_and_preset_the_sentence_says_what_to_call(empty):
    with pytest.raises(HalfstepError, match=r"^config.yaml: not found in .*halfstep init \.`, or"):
        snakemake_words(["all"])
    found = snakemake_words(["all", "--config", "preset=ci"])
    assert found == [OURS, "all", "--config", "preset=ci"]
    own = ["--configfile", "mine.yaml"]
    assert snakemake_words(own) == [OURS, *own]


def test_a_preset_in_an_empty_folder_is_the_one_that_is_shipped(workflow, empty, monkeypatch):
    """An editable install has the clone's config.yaml, which its user may have edited."""
    for name in ("clone", "project"):
        (empty / name).mkdir()
    clone, project = copy(empty / "clone"), Workflow(empty / "project")
    clone.edit("config.yaml", lambda text: text + "\nseed: 7\n")
    monkeypatch.setattr(packaged, "PACKAGED", clone.folder)
    monkeypatch.setattr(packaged, "OURS", f"--snakefile={clone.folder / 'Snakefile'}")
    monkeypatch.chdir(project.folder)
    words = with_preset(["-p", "--cores", "1"], "ci")
    plan = project.plan(*snakemake_words(words))
    assert commands(plan) == commands(workflow.plan(*words)) and len(commands(plan)) > 40


def test_a_profile_of_the_project_goes_before_the_packaged_one(empty):
    (empty / "config.yaml").write_text("preset: ci\n")
    words = ["--profile", "slurm", "--jobs", "3"]
    slurm = str(PACKAGED / "profiles/slurm")
    assert snakemake_words(words) == [OURS, "--profile", slurm, "--jobs", "3"]
    assert snakemake_words(["slurm", "--profile", "mine"]) == [OURS, "slurm", "--profile", "mine"]
    (empty / "slurm").mkdir()
    assert snakemake_words(words) == [OURS, *words]


def test_without_snakemake_one_sentence_names_the_extra(empty, monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(HalfstepError, match=r"pip install 'halfstep\[workflow\]'"):
        snakemake_words(["all", "--config", "preset=ci"])


@pytest.mark.parametrize("words, expected", [
    ([], ["--config", "preset=ci"]),
    (["all", "-n"], ["all", "-n", "--config", "preset=ci"]),
    (["--config", "seed=2", "-n"], ["--config", "preset=ci", "seed=2", "-n"]),
    (["-C", "seed=2"], ["-C", "preset=ci", "seed=2"]),
    (["-n", "--", "all"], ["-n", "--config", "preset=ci", "--", "all"]),
])  # fmt: skip
def test_a_preset_joins_the_users_own_keys(words, expected):
    assert with_preset(words, "ci") == expected


def test_the_resume_command_is_the_call_itself():
    words = ["all", "--config", 'sampling={"steps": [8]}', "--keep-going"]
    assert (
        resume_command(words) == "snakemake all --config 'sampling={\"steps\": [8]}' --keep-going"
    )
    assert resume_command([OURS, "all"]) == "halfstep run all"
    other = ["--snakefile=other/Snakefile", "all"]
    assert resume_command(other) == "snakemake --snakefile=other/Snakefile all"


def test_every_file_that_the_rules_name_is_in_the_wheel(installed):
    """As files, and not as links into a clone."""
    folder = installed.package / "packaged"
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    for file in folder.glob("rules/*.smk"):
        for name in re.findall(r'"(\.\./[^"]+)"', file.read_text()):
            assert (file.parent / name).is_file(), f"{file.name} names {name}"
